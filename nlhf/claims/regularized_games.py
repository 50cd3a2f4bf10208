"""The KL-regularised preference game: identities, certificates and the size of its equilibrium.

Most are in Munos et al. 2024 (arXiv:2312.00886) or follow in a line or two; where a proof is needed it is given.
M = P - 1/2 throughout, J(p, q) = KL(p, q) + KL(q, p), BR(pi) ∝ mu exp(P pi / tau), gap = metrics.duality_gap.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import numpy as np
from scipy.special import log_softmax, logsumexp

from nlhf import SelfPlay, metrics
from nlhf.claims.claim import Claim
from nlhf.claims.instances import Duel, Floats, duels
from nlhf.tabular import ExactSolver, MatrixGame, Tabular, nash, newton, regularized_nash
from nlhf.tabular.games import times

PAPER = "Munos et al. 2024, arXiv:2312.00886"


def wins(i: Duel, one: Tabular, two: Tabular) -> float:
    """P(one > two)."""
    return metrics.win_rate(one, i.game, two)


def prefers(i: Duel, one: Tabular, two: Tabular) -> float:
    """P_tau(one > two) = P(one > two) - tau KL(one, mu) + tau KL(two, mu)."""
    return wins(i, one, two) - i.tau * metrics.kl(one, i.mu) + i.tau * metrics.kl(two, i.mu)


def gap(i: Duel, pi: Tabular) -> float:
    """max over pi' of P_tau(pi' > pi) - 1/2."""
    return metrics.duality_gap(pi, i.game, i.tau)


def reply(i: Duel, pi: Tabular) -> Tabular:
    """BR(pi)."""
    return Tabular(metrics.best_response(pi, i.game, i.tau))


def jeffreys(p: Tabular, q: Tabular) -> float:
    """KL(p, q) + KL(q, p)."""
    return metrics.kl(p, q) + metrics.kl(q, p)


def distance(p: Tabular, q: Tabular) -> float:
    """|p - q|_1."""
    return float(np.abs(p.probs - q.probs).sum())


def blend(i: Duel) -> Tabular:
    """share pi + (1 - share) q."""
    return Tabular.from_logits(np.log(i.share * i.pi.probs + (1 - i.share) * i.q.probs))


def weighted(i: Duel, of: Callable[[Tabular], float]) -> float:
    """share of(pi) + (1 - share) of(q)."""
    return i.share * of(i.pi) + (1 - i.share) * of(i.q)


def near_reference(i: Duel) -> Tabular:
    """A policy with span(log pi / mu) = 1 / tau exactly, in a random direction."""
    span = np.ptp(i.policy)
    return Tabular.from_logits(i.reference + (i.policy / (span * i.tau) if span else 0.0))


def gradient(i: Duel, pi: Tabular) -> Floats:
    """(n,) the gradient of the gap in the probabilities, up to a constant: P^T BR(pi) + tau log(pi / mu)."""
    return i.win_prob.T @ reply(i, pi).probs + i.tau * (pi.log_probs - i.mu.log_probs)


def expansion(i: Duel, slope: float = 1.0, curvature: float = 1.0) -> float:
    """The gap of q from that of pi, to all orders."""
    linear = gradient(i, i.pi) @ (i.q.probs - i.pi.probs)
    bent = metrics.kl(i.q, i.pi) + curvature * metrics.kl(reply(i, i.pi), reply(i, i.q))
    return gap(i, i.pi) + slope * float(linear) + i.tau * bent


def along(i: Duel) -> Floats:
    """(n,) a direction in the logits, at most 1 long."""
    return np.tanh(i.other)


def slope(i: Duel) -> float:
    """The derivative of the gap along it, by differences of fourth order."""
    h = 3e-3 * min(i.tau, 1.0)
    at = [gap(i, Tabular.from_logits(i.pi.log_probs + k * h * along(i))) for k in (-2, -1, 1, 2)]
    return (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h)


def covariance(i: Duel, tau: float) -> float:
    """Cov_pi(P^T BR(pi) + tau log(pi / mu), direction): the softmax Jacobian is diag(pi) - pi pi^T."""
    of = i.win_prob.T @ reply(i, i.pi).probs + tau * (i.pi.log_probs - i.mu.log_probs)
    p, v = i.pi.probs, along(i)
    return float(p @ (of * v) - (p @ of) * (p @ v))


def picard(i: Duel, steps: int = 15) -> Floats:
    """|pi_t - pi*|_1 of pi <- BR(pi), which is self-play with the step 1 / tau, at t = 1, ..., steps."""
    algorithm = SelfPlay(1 / i.tau, i.tau)
    state, found = algorithm.init(i.mu)._replace(policy=i.pi), []
    for _ in range(steps):
        state, _ = algorithm.step(state, ExactSolver(i.game))
        found.append(distance(state.policy, i.star))
    return np.array(found)


def margins(i: Duel) -> Floats:
    """(n,) the least M(y, z) over z != y."""
    return np.asarray(np.where(np.eye(i.n, dtype=bool), np.inf, i.skew).min(axis=1))


def log_odds(policy: Tabular) -> Floats:
    """(n,) log pi(y) / (1 - pi(y)), without cancellation where pi(y) is nearly 1."""
    others = np.where(np.eye(policy.log_probs.size, dtype=bool), -np.inf, policy.log_probs)
    return policy.log_probs - np.asarray(logsumexp(others, axis=1))


def linear(i: Duel) -> tuple[Floats, MatrixGame]:
    """Rewards r with span 1/2, and the game P(y > z) = 1/2 + r(y) - r(z)."""
    r = 0.5 * (i.other - i.other.min()) / max(float(np.ptp(i.other)), 1e-12)
    return r, MatrixGame(0.5 + r[:, None] - r, i.mu)


def patched(owner: Any, name: str, wrong: Any) -> Callable[[], AbstractContextManager[Any]]:
    """The code with one function replaced by a wrong one."""
    return lambda: mock.patch.object(owner, name, wrong)


FLIPPED = patched(MatrixGame, "versus", lambda self, probs: times(np.swapaxes(self.matrix, -1, -2), probs))
"""The preference read the wrong way round."""

BACKWARDS = patched(metrics, "kl_rows", lambda p, q, kl_rows=metrics.kl_rows: kl_rows(q, p))
"""KL with its arguments swapped."""

UNFINISHED = patched(newton, "goal", lambda tau, tol: newton.Goal(1e-3 * tau, 0.3, 1e-3 * tau))
"""Newton's method stopped early."""

TAU_TWICE = patched(metrics, "best_response", lambda pi, game, tau, br=metrics.best_response: br(pi, game, tau**2))
"""The best response to a game regularised twice."""


CLAIMS = (
    Claim(
        id="regularized_games/symmetric",
        statement="P_tau(pi > q) = 1 - P_tau(q > pi)",
        source=f"{PAPER}, section 3",
        tag="proved",
        instances=duels(),
        lhs=lambda i: np.array([prefers(i, i.pi, z) for z in (i.q, i.p, i.mu)]),
        identity=lambda i: np.array([1 - i.prefers(z, i.pi) for z in (i.q, i.p, i.mu)]),
        mutants={
            "the regularisation of one player only": {
                "lhs": lambda i: np.array([wins(i, i.pi, z) - i.tau * metrics.kl(i.pi, i.mu) for z in (i.q, i.p, i.mu)])
            },
            "the preference read the wrong way round": FLIPPED,
        },
    ),
    Claim(
        id="regularized_games/fixed-point",
        statement="pi* = BR(pi*): log pi* = log mu + P pi* / tau - log Z",
        source=f"{PAPER}, section 4",
        tag="proved",
        instances=duels(),
        lhs=lambda i: i.star.log_probs,
        identity=lambda i: log_softmax(i.mu.log_probs + i.win_prob @ i.star.probs / i.tau),
        mutants={
            "the columns of P": {
                "identity": lambda i: log_softmax(i.mu.log_probs + i.win_prob.T @ i.star.probs / i.tau)
            },
            "Newton's method stopped early": UNFINISHED,
        },
    ),
    Claim(
        id="regularized_games/deviation",
        statement="P_tau(pi > pi*) = 1/2 - tau KL(pi, pi*)",
        source="P pi* = tau log(pi* / mu) + const, inserted; pi = pi* gives the constant",
        tag="proved",
        instances=duels(),
        lhs=lambda i: prefers(i, i.pi, i.star),
        identity=lambda i: 0.5 - i.tau * metrics.kl(i.pi, i.star),
        mutants={
            "KL(pi*, pi)": {"identity": lambda i: 0.5 - i.tau * metrics.kl(i.star, i.pi)},
            "KL with its arguments swapped": BACKWARDS,
        },
    ),
    Claim(
        id="regularized_games/three-policies",
        statement="P_tau(q > pi) = 1/2 - tau KL(q, pi*) + tau KL(pi, pi*) + (q - pi*)^T M (pi - pi*)",
        source="deviation, for both policies, and the bilinearity of P",
        tag="proved",
        instances=duels(),
        lhs=lambda i: prefers(i, i.q, i.pi),
        identity=lambda i: (
            0.5
            - i.tau * metrics.kl(i.q, i.star)
            + i.tau * metrics.kl(i.pi, i.star)
            + (i.q.probs - i.star.probs) @ i.skew @ (i.pi.probs - i.star.probs)
        ),
        mutants={
            "without the bilinear term": {
                "identity": lambda i: 0.5 - i.tau * metrics.kl(i.q, i.star) + i.tau * metrics.kl(i.pi, i.star)
            },
            "the preference read the wrong way round": FLIPPED,
        },
    ),
    Claim(
        id="regularized_games/win-rate",
        statement="P(pi* > mu) - 1/2 = tau (KL(pi*, mu) + KL(mu, pi*))",
        source="deviation, for pi = mu",
        tag="proved",
        instances=duels(),
        lhs=lambda i: metrics.win_rate(i.star, i.game) - 0.5,
        identity=lambda i: i.tau * jeffreys(i.star, i.mu),
        mutants={
            "2 KL(pi*, mu)": {"identity": lambda i: 2 * i.tau * metrics.kl(i.star, i.mu)},
            "Newton's method stopped early": UNFINISHED,
        },
    ),
    Claim(
        id="regularized_games/win-rate-over-policy",
        statement="tau (KL(pi*, mu) - KL(pi, mu)) <= P(pi* > pi) - 1/2, for pi, mu and pi*",
        source="deviation, without KL(pi, pi*) >= 0",
        tag="proved",
        instances=duels(),
        lhs=lambda i: np.array([i.tau * (metrics.kl(i.star, i.mu) - metrics.kl(z, i.mu)) for z in (i.pi, i.mu)]),
        rhs=lambda i: np.array([wins(i, i.star, z) - 0.5 for z in (i.pi, i.mu)]),
        mutants={
            "minus tau KL(pi*, pi)": {
                "rhs": lambda i: np.array(
                    [wins(i, i.star, z) - 0.5 - i.tau * metrics.kl(i.star, z) for z in (i.pi, i.mu)]
                )
            },
            "the preference read the wrong way round": FLIPPED,
        },
    ),
    Claim(
        id="regularized_games/gap",
        statement="gap(pi) = tau log sum mu exp(P pi / tau) + tau KL(pi, mu) - 1/2",
        source="Gibbs' variational principle, attained at BR(pi) = mu exp(P pi / tau) / Z",
        tag="proved",
        instances=duels(),
        lhs=lambda i: gap(i, i.pi),
        identity=lambda i: (
            i.tau * logsumexp(i.mu.log_probs + i.win_prob @ i.pi.probs / i.tau) + i.tau * metrics.kl(i.pi, i.mu) - 0.5
        ),
        mutants={
            "without KL(pi, mu)": {
                "identity": lambda i: i.tau * logsumexp(i.mu.log_probs + i.win_prob @ i.pi.probs / i.tau) - 0.5
            },
            "tau applied twice": TAU_TWICE,
        },
    ),
    Claim(
        id="regularized_games/gap-attained",
        statement="P_tau(q > pi) + tau KL(q, BR(pi)) = 1/2 + gap(pi): BR(pi) gains the most",
        source="Gibbs' variational principle",
        tag="proved",
        instances=duels(),
        lhs=lambda i: np.array([prefers(i, q, i.pi) + i.tau * metrics.kl(q, reply(i, i.pi)) for q in (i.q, i.mu)]),
        identity=lambda i: 0.5 + gap(i, i.pi),
        mutants={
            "KL(BR(pi), q)": {
                "lhs": lambda i: np.array(
                    [prefers(i, q, i.pi) + i.tau * metrics.kl(reply(i, i.pi), q) for q in (i.q, i.mu)]
                )
            },
            "tau applied twice": TAU_TWICE,
        },
    ),
    Claim(
        id="regularized_games/gap-pythagoras",
        statement="gap(pi) = tau KL(pi, pi*) + tau KL(pi*, BR(pi))",
        source="gap(pi) = tau KL(pi, BR(pi)), and <pi - pi*, log pi* / BR(pi)> = (pi - pi*)^T M (pi* - pi) / tau = 0",
        tag="proved",
        instances=duels(),
        lhs=lambda i: gap(i, i.pi),
        identity=lambda i: i.tau * (metrics.kl(i.pi, i.star) + metrics.kl(i.star, reply(i, i.pi))),
        mutants={
            "KL(BR(pi), pi*)": {
                "identity": lambda i: i.tau * (metrics.kl(i.pi, i.star) + metrics.kl(reply(i, i.pi), i.star))
            },
            "Newton's method stopped early": UNFINISHED,
        },
    ),
    Claim(
        id="regularized_games/gap-below",
        statement="tau KL(pi, pi*) <= gap(pi)",
        source="gap-pythagoras",
        tag="proved",
        instances=duels(),
        lhs=lambda i: i.tau * metrics.kl(i.pi, i.star),
        rhs=lambda i: gap(i, i.pi),
        mutants={
            "KL(pi*, pi)": {"lhs": lambda i: i.tau * metrics.kl(i.star, i.pi)},
            "1.05 tau": {"lhs": lambda i: 1.05 * i.tau * metrics.kl(i.pi, i.star)},
        },
    ),
    Claim(
        id="regularized_games/gap-above",
        statement="gap(pi) - tau KL(pi, pi*) <= |pi - pi*|_1^2 / (8 tau)",
        source="gap(pi) - tau KL(pi, pi*) = tau log E_pi* exp(M d / tau) - <pi*, M d>, d = pi - pi*; Hoeffding's lemma",
        tag="proved",
        instances=duels(),
        lhs=lambda i: gap(i, i.pi) - i.tau * metrics.kl(i.pi, i.star),
        rhs=lambda i: distance(i.pi, i.star) ** 2 / (8 * i.tau),
        mutants={
            "an eighth of the constant": {"rhs": lambda i: distance(i.pi, i.star) ** 2 / (64 * i.tau)},
        },
    ),
    Claim(
        id="regularized_games/gap-above-kl",
        statement="gap(pi) <= (tau + 1 / (4 tau)) KL(pi, pi*)",
        source="gap-above and Pinsker's inequality",
        tag="proved",
        instances=duels(),
        lhs=lambda i: gap(i, i.pi),
        rhs=lambda i: (i.tau + 1 / (4 * i.tau)) * metrics.kl(i.pi, i.star),
        mutants={
            "without 1 / (4 tau)": {"rhs": lambda i: i.tau * metrics.kl(i.pi, i.star)},
            "KL(pi*, pi)": {"rhs": lambda i: (i.tau + 1 / (4 * i.tau)) * metrics.kl(i.star, i.pi)},
        },
    ),
    Claim(
        id="regularized_games/gap-from-kl",
        statement="span(log pi / mu) <= 1 / tau: gap(pi) <= [tau c(2 / tau) + 1 / (4 tau)] KL(pi*, pi), "
        "c(s) = (s e^s - e^s + 1) / (e^s - 1 - s)",
        source="gap-above, Pinsker's inequality, and KL(q, p) <= c(s) KL(p, q) where log(q / p) <= s",
        tag="proved",
        instances=duels(),
        lhs=lambda i: np.array([gap(i, pi) for pi in (near_reference(i), i.mu)]),
        rhs=lambda i: np.array(
            [metrics.gap_from_kl(metrics.kl(i.star, pi), i.tau) for pi in (near_reference(i), i.mu)]
        ),
        mutants={
            "tau KL(pi*, pi)": {
                "rhs": lambda i: np.array([i.tau * metrics.kl(i.star, pi) for pi in (near_reference(i), i.mu)])
            },
            "c = 1": patched(metrics, "reverse_kl_factor", lambda s: np.ones_like(s)),
        },
    ),
    Claim(
        id="regularized_games/gap-strongly-convex",
        statement="m = a pi + (1 - a) q: tau (a KL(pi, m) + (1 - a) KL(q, m)) <= a gap(pi) + (1 - a) gap(q) - gap(m)",
        source="log-sum-exp of a linear map is convex, and tau KL(., mu) contributes the left-hand side exactly",
        tag="proved",
        instances=duels(),
        lhs=lambda i: i.tau * weighted(i, lambda p: metrics.kl(p, blend(i))),
        rhs=lambda i: weighted(i, lambda p: gap(i, p)) - gap(i, blend(i)),
        mutants={
            "1.05 tau": {"lhs": lambda i: 1.05 * i.tau * weighted(i, lambda p: metrics.kl(p, blend(i)))},
            "KL(m, pi)": {"lhs": lambda i: i.tau * weighted(i, lambda p: metrics.kl(blend(i), p))},
        },
    ),
    Claim(
        id="regularized_games/gap-smooth",
        statement="a gap(pi) + (1 - a) gap(q) - gap(m) - tau (a KL(pi, m) + (1 - a) KL(q, m)) "
        "<= a (1 - a) |pi - q|_1^2 / (8 tau)",
        source="the second derivative of tau log E_mu exp(P pi / tau) along d is Var(M d) / tau <= |d|_1^2 / (4 tau)",
        tag="proved",
        instances=duels(),
        lhs=lambda i: weighted(i, lambda p: gap(i, p) - i.tau * metrics.kl(p, blend(i))) - gap(i, blend(i)),
        rhs=lambda i: i.share * (1 - i.share) * distance(i.pi, i.q) ** 2 / (8 * i.tau),
        mutants={
            "an eighth of the constant": {
                "rhs": lambda i: i.share * (1 - i.share) * distance(i.pi, i.q) ** 2 / (64 * i.tau)
            },
        },
    ),
    Claim(
        id="regularized_games/gap-expansion",
        statement="gap(q) = gap(pi) + <P^T BR(pi) + tau log(pi / mu), q - pi> + tau KL(q, pi) + tau KL(BR(pi), BR(q))",
        source="Danskin's theorem; the last terms are the Bregman divergences of tau KL(., mu) and of log-sum-exp",
        tag="proved",
        instances=duels(),
        lhs=lambda i: gap(i, i.q),
        identity=expansion,
        mutants={
            "without KL(BR(pi), BR(q))": {"identity": lambda i: expansion(i, curvature=0)},
            "half of the gradient": {"identity": lambda i: expansion(i, slope=0.5)},
            "tau applied twice": TAU_TWICE,
        },
    ),
    Claim(
        id="regularized_games/gap-gradient",
        statement="d gap / d theta = (pi o (P^T BR(pi) + tau log(pi / mu))) (I - 1 pi^T), pi = softmax(theta)",
        source="Danskin's theorem: BR(pi) may be held fixed",
        tag="proved",
        instances=duels(),
        lhs=slope,
        identity=lambda i: covariance(i, i.tau),
        mutants={
            "minus tau log(pi / mu)": {"identity": lambda i: covariance(i, -i.tau)},
            "without tau log(pi / mu)": {"identity": lambda i: covariance(i, 0.0)},
        },
        # h^4 / 30 times the fifth derivative, at most 2000 max(tau, tau^-4) along a direction of length 1; and the
        # rounding errors 1e-15 (1 + tau) of the gap over h
        tol=lambda i: 1e-8 * max(i.tau, 1.0) + 1e-12 / min(i.tau, 1.0),
    ),
    Claim(
        id="regularized_games/span",
        statement="tau span(log pi* / mu) <= 1",
        source="log pi* / mu = P pi* / tau + const, and span(P pi*) <= 1",
        tag="proved",
        instances=duels(),
        lhs=lambda i: i.tau * np.ptp(i.star.log_probs - i.mu.log_probs),
        rhs=lambda i: 1.0,
        mutants={"1/2": {"rhs": lambda i: 0.5}},
    ),
    Claim(
        id="regularized_games/size",
        statement="tau^2 (KL(pi*, mu) + KL(mu, pi*)) <= 1/12",
        source="With r = pi* / mu: tau J = E_mu M(y, z) (r(y) - r(z)) / 2 <= G / 2, G = E_mu |r(y) - r(z)| / 2 < 1. "
        "G^2 <= 4/3 Var(sqrt r) (Cauchy and Schwarz, with the weight (t + 1/t) / sqrt 3 - v, v uniform in [-1, 1], as "
        "artanh(sqrt 3 t / (1 + t^2)) <= sqrt 3 / t) and 4 Var(sqrt r) <= J. Sharp: a ranking, mu uniform, tau large",
        tag="proved",
        instances=duels(),
        lhs=lambda i: i.tau**2 * jeffreys(i.star, i.mu),
        rhs=lambda i: 1 / 12,
        mutants={"1/18": {"rhs": lambda i: 1 / 18}},
    ),
    Claim(
        id="regularized_games/size-small-tau",
        statement="tau (KL(pi*, mu) + KL(mu, pi*)) < 1/2",
        source="as size: tau J <= G / 2 and G < 1",
        tag="proved",
        instances=duels(),
        lhs=lambda i: i.tau * jeffreys(i.star, i.mu),
        rhs=lambda i: 0.5,
        mutants={"1/10": {"rhs": lambda i: 0.1}},
    ),
    Claim(
        id="regularized_games/size-forward",
        statement="tau^2 KL(pi*, mu) <= 1/24",
        source="With b = 1 / tau: d KL(pi*, mu) / db = b Var(y'), where y' = d log(pi*) / db has Var(y') <= Var(M pi*) "
        "<= 1/12: for f = M pi*, E f^2 = E M(y, z) (f(y) - f(z)) / 2 <= E |f(y) - f(z)| / 4 <= sd(f) / (2 sqrt 3)",
        tag="proved",
        instances=duels(),
        lhs=lambda i: i.tau**2 * metrics.kl(i.star, i.mu),
        rhs=lambda i: 1 / 24,
        mutants={"1/36": {"rhs": lambda i: 1 / 36}},
    ),
    Claim(
        id="regularized_games/size-backward",
        statement="tau^2 KL(mu, pi*) <= 1/24",
        source="no proof of 1/24, which a ranking attains for mu uniform and tau large; size gives 1/12",
        tag="checked",
        instances=duels(),
        lhs=lambda i: i.tau**2 * metrics.kl(i.mu, i.star),
        rhs=lambda i: 1 / 24,
        mutants={"1/36": {"rhs": lambda i: 1 / 36}},
    ),
    Claim(
        id="regularized_games/size-hoeffding",
        statement="tau^2 KL(mu, pi*) <= 1/8 and tau^2 KL(pi*, mu) <= min(1/8, tau / 2)",
        source="span and Hoeffding's lemma, a third of what size and size-forward say",
        tag="proved",
        instances=duels(),
        lhs=lambda i: i.tau**2 * np.array([metrics.kl(i.mu, i.star), metrics.kl(i.star, i.mu)]),
        rhs=lambda i: np.array([1 / 8, min(1 / 8, i.tau / 2)]),
        mutants={"1/50": {"rhs": lambda i: np.array([1 / 50, min(1 / 50, i.tau / 2)])}},
    ),
    Claim(
        id="regularized_games/exploitability",
        statement="max_y P(y > pi*) - 1/2 = tau (max_y log(pi*(y) / mu(y)) - KL(pi*, mu))",
        source="P(y > pi*) = tau log(pi*(y) / mu(y)) + c, and its mean under pi* is 1/2",
        tag="proved",
        instances=duels(),
        lhs=lambda i: metrics.duality_gap(i.star, i.game, 0.0),
        identity=lambda i: i.tau * (np.max(i.star.log_probs - i.mu.log_probs) - metrics.kl(i.star, i.mu)),
        mutants={
            "without KL(pi*, mu)": {"identity": lambda i: i.tau * np.max(i.star.log_probs - i.mu.log_probs)},
            "the preference read the wrong way round": FLIPPED,
        },
    ),
    Claim(
        id="regularized_games/exploitability-bound",
        statement="max_y P(y > pi*) - 1/2 <= tau (max_y log(1 / mu(y)) - KL(pi*, mu))",
        source="exploitability, and log pi*(y) <= 0",
        tag="proved",
        instances=duels(),
        lhs=lambda i: metrics.duality_gap(i.star, i.game, 0.0),
        rhs=lambda i: i.tau * (np.max(-i.mu.log_probs) - metrics.kl(i.star, i.mu)),
        mutants={
            "a third": {"rhs": lambda i: i.tau * (np.max(-i.mu.log_probs) - metrics.kl(i.star, i.mu)) / 3},
            "the least log(1 / mu)": {"rhs": lambda i: i.tau * (np.min(-i.mu.log_probs) - metrics.kl(i.star, i.mu))},
        },
    ),
    Claim(
        id="regularized_games/unregularised",
        statement="tau = 0: max_y P(y > pi*) = 1/2",
        source="Kreweras 1965, Fishburn 1984: the maximal lottery",
        tag="proved",
        instances=duels(),
        lhs=lambda i: metrics.duality_gap(nash(i.game).policy, i.game, 0.0),
        rhs=lambda i: 0.0,
        mutants={
            "a regularised equilibrium": {"lhs": lambda i: metrics.duality_gap(i.star, i.game, 0.0)},
            "the preference read the wrong way round": FLIPPED,
        },
    ),
    Claim(
        id="regularized_games/best-response-l1",
        statement="|BR(p) - BR(q)|_1 <= 2 tanh(|p - q|_1 / (4 tau))",
        source="the span of log BR(p) / BR(q) is s <= |p - q|_1 / tau, and laws with log-ratios of span s are at most "
        "2 tanh(s / 4) apart",
        tag="proved",
        instances=duels(),
        lhs=lambda i: distance(reply(i, i.pi), reply(i, i.q)),
        rhs=lambda i: 2 * np.tanh(distance(i.pi, i.q) / (4 * i.tau)),
        mutants={"half": {"rhs": lambda i: np.tanh(distance(i.pi, i.q) / (4 * i.tau))}},
    ),
    Claim(
        id="regularized_games/best-response-span",
        statement="tau span(log BR(p) / BR(q)) <= |p - q|_1",
        source="(M d)_y - (M d)_z = sum (M_yx - M_zx) d_x, where d sums to zero and |M_yx - M_zx| <= 1",
        tag="proved",
        instances=duels(),
        lhs=lambda i: i.tau * np.ptp(reply(i, i.pi).log_probs - reply(i, i.q).log_probs),
        rhs=lambda i: distance(i.pi, i.q),
        mutants={
            "half": {"rhs": lambda i: distance(i.pi, i.q) / 2},
            "tau applied twice": TAU_TWICE,
        },
    ),
    Claim(
        id="regularized_games/picard",
        statement="pi_{t+1} = BR(pi_t), tau > 1/2: |pi_t - pi*|_1 <= (2 tau)^-t |pi_0 - pi*|_1",
        source="best-response-l1, with tanh x <= x",
        tag="proved",
        instances=duels(tau=(0.5, 10.0)),
        lhs=picard,
        rhs=lambda i: distance(i.pi, i.star) * (2 * i.tau) ** -np.arange(1.0, 16.0),
        mutants={
            "(5 tau)^-t": {"rhs": lambda i: distance(i.pi, i.star) * (5 * i.tau) ** -np.arange(1.0, 16.0)},
            "Newton's method stopped early": UNFINISHED,
        },
        axis="iteration t",
    ),
    Claim(
        id="regularized_games/odds",
        statement="tau (logit mu(y) - logit pi*(y)) <= max over z != y of P(z > y) - 1/2, for every y",
        source="tau (log(p / m) - KL(pi*, mu)) = P(y > pi*) - 1/2 >= (1 - p) min M(y, z) for p = pi*(y), m = mu(y), "
        "and KL(pi*, mu) >= p log(p / m) + (1 - p) log((1 - p) / (1 - m)); equality for two responses",
        tag="proved",
        instances=duels(),
        lhs=lambda i: i.tau * (log_odds(i.mu) - log_odds(i.star)),
        rhs=lambda i: -margins(i),
        mutants={
            "minus 1/10": {"rhs": lambda i: -margins(i) - 0.1},
            "against the mean opponent": {"rhs": lambda i: -i.skew.sum(axis=1) / max(i.n - 1, 1)},
        },
    ),
    Claim(
        id="regularized_games/condorcet",
        statement="y wins against each z != y by at least d > 0: d (1 - pi*(y)) <= tau log(1 / mu(y))",
        source="d (1 - pi*(y)) <= P(y > pi*) - 1/2 = tau (log(pi*(y) / mu(y)) - KL(pi*, mu)); odds is exponentially "
        "sharper: the odds of y grow by a factor of e^(d / tau)",
        tag="proved",
        instances=duels(kinds=("winner",)),
        where=lambda i: margins(i)[0] > 0,
        lhs=lambda i: margins(i)[0] * (1 - i.star.probs[0]),
        rhs=lambda i: -i.tau * i.mu.log_probs[0],
        mutants={
            "a tenth": {"rhs": lambda i: -0.1 * i.tau * i.mu.log_probs[0]},
            "the reference instead of pi*": {"lhs": lambda i: margins(i)[0] * (1 - i.mu.probs[0])},
        },
    ),
    Claim(
        id="regularized_games/two-responses",
        statement="n = 2: log(pi*_1 / pi*_2) = log(mu_1 / mu_2) + (P(1 > 2) - 1/2) / tau",
        source="P(1 > pi) - P(2 > pi) is the same for every opponent pi",
        tag="proved",
        instances=duels(sizes=(2, 2)),
        lhs=lambda i: i.star.log_probs[0] - i.star.log_probs[1],
        identity=lambda i: i.mu.log_probs[0] - i.mu.log_probs[1] + i.skew[0, 1] / i.tau,
        mutants={
            "2 (P - 1/2)": {"identity": lambda i: i.mu.log_probs[0] - i.mu.log_probs[1] + 2 * i.skew[0, 1] / i.tau},
            "Newton's method stopped early": UNFINISHED,
        },
    ),
    Claim(
        id="regularized_games/linear-link",
        statement="P(y > z) = 1/2 + r(y) - r(z): pi* = mu exp(r / tau) / Z = BR(q) for every q",
        source="P q = r + const whatever q is",
        tag="proved",
        instances=duels(),
        lhs=lambda i: np.stack(
            [
                regularized_nash(linear(i)[1], i.tau).policy.log_probs,
                metrics.best_response(i.q, linear(i)[1], i.tau),
            ]
        ),
        identity=lambda i: log_softmax(i.mu.log_probs + linear(i)[0] / i.tau),
        mutants={
            "2 r": {"identity": lambda i: log_softmax(i.mu.log_probs + 2 * linear(i)[0] / i.tau)},
            "tau applied twice": TAU_TWICE,
        },
    ),
)
