"""Nash mirror descent: Munos et al. 2024 (arXiv:2312.00886), with sharper constants where there are proofs.

The constant 1/24 of a step is new and cannot be improved. The step is exactly

    KL(pi*, pi+) = (1 - b) KL(pi*, pi) - (1 - b) KL(q, pi) - b KL(q, pi*) + log E_q exp(eta M q),    b = eta tau,

where M = P - 1/2 is antisymmetric with |M| <= 1/2. For a set S of responses, sum_{y in S} q(y) (M q)_y counts only the
pairs of S and its complement, so it is at most q(S) (1 - q(S)) / 2, which is the integral of the quantiles of the
uniform law on [-1/2, 1/2] over its upper q(S). So the law of (M q)_y, y ~ q, lies below that law in the convex order,
and log E_q exp(eta M q) <= log(sinh(eta/2) / (eta/2)) <= eta^2 / 24. In a circular tournament where each of n = 2m + 1
beats the next m, with q uniform on m + 1 neighbours, eta -> 0 and tau / eta -> 0, it is eta^2 (1 - 1/(m+1)^2) / 24.
"""

from __future__ import annotations

from functools import partial
from math import sqrt
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import numpy as np
from scipy.special import logsumexp

from nlhf import NashMD, SelfPlay, metrics
from nlhf.claims.claim import Claim
from nlhf.claims.instances import Duel, Floats, duels
from nlhf.claims.mirror_descent import (
    RELATIVE,
    ROUND,
    RPS,
    Fixed,
    T,
    arcs,
    departure,
    divergences,
    explicit,
    gained,
    noise,
    path,
    posing,
    promised,
    rounding,
    share,
    step,
    stepping,
)
from nlhf.core import Geometric, Info, Prox
from nlhf.tabular import ExactSolver, MatrixGame, Tabular, regularized_nash

PAPER = "Munos et al. 2024, arXiv:2312.00886"
CONVEX_ORDER = "(M q)_y, y ~ q, lies below the uniform law on [-1/2, 1/2] in the convex order (proof: module docstring)"

OWN_OPPONENT = posing(NashMD, lambda self, state, prox: prox._replace(opponent=state.policy))
"""A bug: self-play from the mixture."""
REFERENCE_OPPONENT = posing(NashMD, lambda self, state, prox: prox._replace(opponent=state.reference))
"""A bug: the opponent never moves."""
NO_ANCHOR = posing(NashMD, lambda self, state, prox: prox._replace(anchor=state.policy))
"""A bug: the step starts from the policy instead of the mixture."""


def exchanged(self: Any, state: Any, prox: Prox) -> Prox:
    """A bug: the mixture has its weights on the wrong models."""
    (pi, weight), (mu, b) = prox.anchor.parts
    mixture = Geometric(((pi, b), (mu, weight)))
    return Prox(mixture, mixture, prox.eta)


WRONG_WEIGHTS = posing(NashMD, exchanged)


def nash_md(i: Duel) -> Any:
    """A constant step, a share of 1 / tau."""
    return NashMD(share(i) / i.tau, i.tau)


def mixture(i: Duel, pi: Tabular) -> Tabular:
    """q ∝ pi^(1-b) mu^b, as Nash-MD plays against it."""
    algorithm, posed = nash_md(i), []

    def solve(prox: Prox, start: Tabular) -> tuple[Tabular, Info]:
        posed.append(prox.opponent.log_prob(..., ...))  # type: ignore[union-attr]
        return start, Info()

    algorithm.step(algorithm.init(pi, i.mu), solve)
    return Tabular.from_logits(posed[0])


# --- one step ---------------------------------------------------------------------------------------------------------


def stepped(i: Duel) -> Any:
    """A constant step that is not too small for its noise to be seen."""
    return stepping(NashMD, i)


def exact(i: Duel, towards: float = 1) -> float:
    """The right-hand side of the exact step; `towards` is the factor of KL(q, pi*)."""
    q, b, eta = mixture(i, i.pi), share(i), share(i) / i.tau
    moment = logsumexp(q.log_probs + eta * (i.skew @ q.probs))
    left = (1 - b) * (metrics.kl(i.star, i.pi) - metrics.kl(q, i.pi))
    return float(left - towards * b * metrics.kl(q, i.star) + moment)


def spread_noise(i: Duel) -> float:
    """KL(pi*, pi+) - (1 - eta tau) (KL(pi*, pi) - KL(q, pi)), in units of eta^2."""
    algorithm = nash_md(i)
    left = explicit(algorithm) * (metrics.kl(i.star, i.pi) - metrics.kl(mixture(i, i.pi), i.pi))
    return float((metrics.kl(i.star, step(algorithm, i, i.pi)) - left) / algorithm.eta**2)


def moments(i: Duel) -> Floats:
    """(4,) log E_q exp(eta P q) - eta / 2 in units of eta^2, eta = 0.1, 1, 10; and |P(q > q) - 1/2|."""
    eta = np.array([0.1, 1.0, 10.0])
    paid = i.game.versus(i.pi.probs) - 0.5
    found = logsumexp(i.pi.log_probs + eta[:, None] * paid, axis=-1) / eta**2
    return np.append(found, abs(i.pi.probs @ paid))


def uniform_moments(i: Duel) -> Floats:
    """(4,) log(sinh(eta/2) / (eta/2)) in units of eta^2, and 0."""
    eta = np.array([0.1, 1.0, 10.0])
    return np.append(np.log(np.sinh(eta / 2) / (eta / 2)) / eta**2, 0.0)


# --- many steps -------------------------------------------------------------------------------------------------------


def scheduled(i: Duel) -> Floats:
    """(25,) tau^2 (T + 1) KL(pi*, pi_T) of the schedule, from pi."""
    return np.asarray(i.tau**2 * (T + 1) * divergences(i, NashMD.default(i.tau), i.pi)[1:])


def floor(i: Duel) -> Floats:
    """(25,) tau / eta (KL(pi*, pi_T) - (1 - eta tau)^T KL(pi*, pi_0))."""
    algorithm, found = stepped(i), divergences(i, stepped(i), i.pi)
    return np.asarray((found[1:] - explicit(algorithm) ** T * found[0]) * i.tau / algorithm.eta)


def shifted(i: Duel) -> Tabular:
    """The equilibrium of tau / (1 - b)."""
    return regularized_nash(i.game, i.tau / (1 - share(i))).policy


def reply(i: Duel, opponent: Tabular, tau: float) -> Tabular:
    """BR_tau(opponent)."""
    return Tabular(metrics.best_response(opponent, i.game, tau))


def mixtures(i: Duel, algorithm: Any, weight: float, steps: int = 25) -> Floats:
    """(steps + 1, n) log q_t, q_t ∝ pi_t^(1-weight) mu^weight."""
    found = path(algorithm, i, i.pi, steps)
    return np.stack([Tabular.from_logits((1 - weight) * pi + weight * i.mu.log_probs).log_probs for pi in found])


def self_play_of_mixtures(i: Duel, eta: float, tau: float) -> Floats:
    """(2, n) log-probabilities of self-play from q_0."""
    return path(SelfPlay(eta, tau), i, mixture(i, i.pi), 1)


def restored(i: Duel, tau: float) -> Floats:
    """The mixture after a step, in a game regularised by `tau`, from BR(pi*)."""
    eta = share(i) / i.tau
    after = step(NashMD(eta, tau), i, reply(i, i.star, tau))
    return after.lerp(i.mu, eta * tau).probs


def answered(i: Duel, b: float) -> Floats:
    """BR_tau(pi^(1-b) mu^b) of pi = BR_tau(q), q the equilibrium of tau / (1 - share), posed to the solver."""
    pi = reply(i, shifted(i), i.tau)
    opponent = Geometric(((pi, 1 - b), (i.mu, b)))
    return ExactSolver(i.game)(Prox(Geometric(((i.mu, 1.0),)), opponent, 1 / i.tau))[0].probs


def linear(i: Duel) -> Any:
    """A constant step with eta (1 - eta tau) <= 4 tau, the lower one of two."""
    most = 0.99 if i.tau >= 0.25 else 0.5 * (1 - sqrt(1 - 16 * i.tau**2))
    return NashMD(share(i) * most / i.tau, i.tau)


def limit(i: Duel, algorithm: Any) -> Tabular:
    """Of its mixtures."""
    return regularized_nash(i.game, i.tau / explicit(algorithm)).policy


def approach(i: Duel) -> Floats:
    """(26,) KL(q, q_T), q the limit."""
    algorithm = linear(i)
    return metrics.kl_rows(limit(i, algorithm).log_probs, mixtures(i, algorithm, algorithm.eta * i.tau))


# --- numbers ----------------------------------------------------------------------------------------------------------


def fixed(win_prob: Any, reference: Any) -> Fixed:
    """A game that numbers are printed for, tau = 0.1."""
    flat = np.zeros(len(reference))
    return Fixed(np.asarray(win_prob), np.log(reference), flat, flat, flat, tau=0.1, share=1.0)


DICE = fixed(MatrixGame.cyclic(3, 5 / 9).matrix, [0.6, 0.3, 0.1])
PI_STAR = 0.6437299335, 0.2284984188, 0.1277716477
"""Of the dice."""
THREE_TYPES = fixed(
    [[0.5, 1 - (2 / 3 - 0.05), 2 / 3 + 0.025], [2 / 3 - 0.05, 0.5, 1 / 3 - 0.025], [1 / 3 - 0.025, 2 / 3 + 0.025, 0.5]],
    [1 / 3] * 3,
)


def equilibria(i: Duel, taus: tuple[float, ...]) -> Floats:
    """(len(taus), n) pi*."""
    return np.stack([regularized_nash(i.game, tau).policy.probs for tau in taus])


def of_dice(i: Duel) -> Floats:
    """pi*, gap(mu), gap(uniform), KL(pi*, mu), KL(mu, pi*), P(pi* > mu)."""
    gaps = [metrics.duality_gap(pi, i.game, i.tau) for pi in (i.mu, i.pi)]
    divergence = [metrics.kl(i.star, i.mu), metrics.kl(i.mu, i.star)]
    return np.array([*i.star.probs, *gaps, *divergence, metrics.win_rate(i.star, i.game)])


def mixed_opponents(i: Duel) -> Floats:
    """(4, n) where pi = BR(pi^(1-b) mu^b) for b = 1/8, 1/4, 1/2, 1: 60 solves from mu."""
    found, solve = [], ExactSolver(i.game)
    for b in (0.125, 0.25, 0.5, 1.0):
        pi = i.mu
        for _ in range(60):
            pi, _ = solve(Prox(Geometric(((i.mu, 1.0),)), Geometric(((pi, 1 - b), (i.mu, b))), 1 / i.tau), pi)
        found.append(pi.probs)
    return np.stack(found)


CLAIMS = (
    Claim(
        id="nash_md/mixture",
        statement="q ∝ pi^(1-b) mu^b: KL(p, q) = (1-b) KL(p, pi) + b (KL(p, mu) - KL(q, mu)) - (1-b) KL(q, pi), any p",
        source="log q = (1-b) log pi + b log mu - log Z, and log Z = -(1-b) KL(q, pi) - b KL(q, mu) from p = q",
        tag="proved",
        instances=duels(),
        lhs=lambda i: metrics.kl(i.p, mixture(i, i.pi)),
        identity=lambda i: (
            (1 - share(i)) * (metrics.kl(i.p, i.pi) - metrics.kl(mixture(i, i.pi), i.pi))
            + share(i) * (metrics.kl(i.p, i.mu) - metrics.kl(mixture(i, i.pi), i.mu))
        ),
        mutants={
            "weights on the wrong models": WRONG_WEIGHTS,
            "without the normalisation": {
                "identity": lambda i: (1 - share(i)) * metrics.kl(i.p, i.pi) + share(i) * metrics.kl(i.p, i.mu)
            },
        },
    ),
    Claim(
        id="nash_md/to-the-mixture",
        statement="q ∝ pi^(1-b) mu^b: KL(pi, q) = b KL(pi, mu) + log sum pi^(1-b) mu^b",
        source="log q inserted; so that with q frozen the gradient of KL(pi, q) is that of b KL(pi, mu)",
        tag="proved",
        instances=duels(),
        lhs=lambda i: metrics.kl(i.pi, mixture(i, i.pi)),
        identity=lambda i: (
            share(i) * metrics.kl(i.pi, i.mu) + logsumexp((1 - share(i)) * i.pi.log_probs + share(i) * i.mu.log_probs)
        ),
        mutants={
            "weights on the wrong models": WRONG_WEIGHTS,
            "minus log Z": {
                "identity": lambda i: (
                    share(i) * metrics.kl(i.pi, i.mu)
                    - logsumexp((1 - share(i)) * i.pi.log_probs + share(i) * i.mu.log_probs)
                )
            },
        },
    ),
    Claim(
        id="nash_md/exact",
        statement="KL(pi*, pi+) = (1-b) (KL(pi*, pi) - KL(q, pi)) - b KL(q, pi*) + log E_q exp(eta (P q - 1/2)), "
        "b = eta tau, q ∝ pi^(1-b) mu^b",
        source="exact mirror step, nash_md/mixture at p = pi*, and P_tau(pi* > q) = 1/2 + tau KL(q, pi*)",
        tag="proved",
        instances=duels(),
        # both in units of 1 + eta, which is the size of what the exponent rounds
        lhs=lambda i: metrics.kl(i.star, step(nash_md(i), i, i.pi)) / (1 + nash_md(i).eta),
        identity=lambda i: exact(i) / (1 + nash_md(i).eta),
        mutants={
            "without b KL(q, pi*)": {"identity": lambda i: exact(i, 0) / (1 + nash_md(i).eta)},
            "the opponent is the policy": OWN_OPPONENT,
            "weights on the wrong models": WRONG_WEIGHTS,
        },
    ),
    Claim(
        id="nash_md/convex-order",
        statement="(log E_q exp(eta P q) - eta / 2) / eta^2 <= log(sinh(eta/2) / (eta/2)) / eta^2, which is below 1/24"
        "; P(q > q) = 1/2",
        source=CONVEX_ORDER,
        tag="proved",
        instances=duels() | arcs() | duels(tau=(0.01, 1.0), kinds=("bradley-terry", "certain", "few", "winner")),
        lhs=moments,
        rhs=uniform_moments,
        mutants={
            "0.8 of it, above 1/32": {"rhs": lambda i: 0.8 * uniform_moments(i)},
            "versus is not antisymmetric": lambda: mock.patch.object(
                MatrixGame, "versus", lambda self, probs: np.maximum(self.matrix, 0.5) @ probs
            ),
        },
    ),
    Claim(
        id="nash_md/one-step",
        statement="(KL(pi*, pi+) - (1 - eta tau) KL(pi*, pi)) / eta^2 <= 1/24 for 0 < eta tau <= 1, the best constant",
        source="nash_md/exact and nash_md/convex-order; circular tournaments attain it in the limit",
        tag="proved",
        instances=duels() | arcs(),
        lhs=lambda i: noise(i, stepped(i)),
        rhs=lambda i: 1 / 24,
        mutants={"1/32": {"rhs": lambda i: 1 / 32}, "the opponent is the reference": REFERENCE_OPPONENT},
        tol=rounding,
    ),
    Claim(
        id="nash_md/one-step-span",
        statement="(KL(pi*, pi+) - (1 - eta tau) (KL(pi*, pi) - KL(q, pi))) / eta^2 <= span(P q)^2 / 8",
        source="Hoeffding's lemma in the exact step",
        tag="proved",
        instances=duels() | arcs(),
        where=lambda i: share(i) >= min(1e-2, i.tau),
        lhs=spread_noise,
        rhs=lambda i: np.ptp(i.win_prob @ mixture(i, i.pi).probs) ** 2 / 8,
        mutants={
            "1/10": {"rhs": lambda i: np.ptp(i.win_prob @ mixture(i, i.pi).probs) ** 2 / 10},
            "the opponent is the reference": REFERENCE_OPPONENT,
        },
        tol=rounding,
    ),
    Claim(
        id="nash_md/one-step-published",
        statement="(KL(pi*, pi+) - (1 - eta tau) KL(pi*, pi)) / eta^2 <= 2 for 0 < eta tau <= 1",
        source=f"{PAPER}, Theorem 1; the best constant is 1/24",
        tag="published",
        instances=duels() | arcs(),
        lhs=lambda i: noise(i, stepped(i)),
        rhs=lambda i: 2.0,
        mutants={
            "1/32": {"rhs": lambda i: 1 / 32},
            "the step starts from the policy": NO_ANCHOR,
        },
        tol=rounding,
    ),
    Claim(
        id="nash_md/declared",
        statement="(KL(pi*, pi+) - (1 - eta tau) KL(pi*, pi)) / eta^2 <= 1/24, which is what rate() declares",
        source="nash_md/one-step",
        tag="proved",
        instances=duels() | arcs(),
        lhs=lambda i: noise(i, stepped(i)),
        rhs=lambda i: (stepped(i).rate(1.0, 0) - explicit(stepped(i))) / stepped(i).eta ** 2,
        mutants={
            "rate() with eta^2 / 32": lambda: mock.patch.object(
                NashMD, "rate", lambda self, kl, t: (1 - self.eta * self.tau) * kl + self.eta**2 / 32
            ),
            "the step starts from the policy": NO_ANCHOR,
        },
        tol=rounding,
    ),
    Claim(
        id="nash_md/schedule",
        statement="eta_t = 2 / (tau (t + 2)): tau^2 (T + 1) KL(pi*, pi_T) <= 1/6 for T >= 1, any pi_0",
        source="nash_md/one-step, by induction: t / (t + 1) + 1 / (t + 2) <= 1",
        tag="proved",
        instances=duels(),
        lhs=scheduled,
        rhs=lambda i: 1 / 6 + 0 * T,
        mutants={
            "1/60": {"rhs": lambda i: 1 / 60 + 0 * T},
            "weights on the wrong models": WRONG_WEIGHTS,
        },
        axis="iteration T",
    ),
    Claim(
        id="nash_md/schedule-published",
        statement="eta_t = 2 / (tau (t + 2)): tau^2 (T + 1) KL(pi*, pi_T) <= 8",
        source=f"{PAPER}, Theorem 1; Hoeffding's lemma gives 1/2",
        tag="published",
        instances=duels(),
        lhs=scheduled,
        rhs=lambda i: 8 + 0 * T,
        mutants={
            "1/60": {"rhs": lambda i: 1 / 60 + 0 * T},
            "weights on the wrong models": WRONG_WEIGHTS,
        },
        axis="iteration T",
    ),
    Claim(
        id="nash_md/constant-step",
        statement="constant eta: (KL(pi*, pi_T) - c KL(pi*, pi_0)) tau / eta <= (1 - c) / 24, c = (1 - eta tau)^T",
        source="nash_md/one-step, summed; Hoeffding's lemma gives 1/8",
        tag="proved",
        instances=duels() | arcs(),
        lhs=floor,
        rhs=lambda i: (1 - explicit(stepped(i)) ** T) / 24,
        mutants={
            "1/32": {"rhs": lambda i: (1 - explicit(stepped(i)) ** T) / 32},
            "the opponent is the reference": REFERENCE_OPPONENT,
        },
        tol=lambda i: rounding(i) * i.tau * stepped(i).eta,
        axis="iteration T",
    ),
    Claim(
        id="nash_md/mixtures-are-self-play",
        statement="the mixtures of constant steps are self-play with eta (1 - eta tau) and tau / (1 - eta tau)",
        source="their logarithms, compared",
        tag="proved",
        instances=duels(),
        where=lambda i: i.share < 0.99,
        lhs=lambda i: mixtures(i, nash_md(i), share(i), 1),
        identity=lambda i: self_play_of_mixtures(i, nash_md(i).eta * (1 - share(i)), i.tau / (1 - share(i))),
        mutants={
            "self-play with eta and tau": {"identity": lambda i: self_play_of_mixtures(i, nash_md(i).eta, i.tau)},
            "the opponent is the reference": REFERENCE_OPPONENT,
        },
    ),
    Claim(
        id="nash_md/mixtures-converge",
        statement="constant eta with eta (1 - eta tau) <= 4 tau: -T log(1 - eta tau) <= log(KL(q, q_0) / KL(q, q_T)), "
        "q the equilibrium of tau / (1 - eta tau)",
        source="mixtures-are-self-play and the rate of self-play with eta' <= 4 tau' / (1 + 4 tau'^2)",
        tag="proved",
        instances=ROUND,
        where=lambda i: approach(i)[0] > 1e-6,
        lhs=lambda i: promised(approach(i)[0], explicit(linear(i))),
        rhs=lambda i: gained(approach(i)),
        mutants={
            "4 times the rate": {"lhs": lambda i: promised(approach(i)[0], explicit(linear(i)) ** 4)},
            "the opponent is the reference": REFERENCE_OPPONENT,
        },
        tol=RELATIVE,
        axis="iteration T",
    ),
    Claim(
        id="nash_md/bias",
        statement="constant eta stands still at BR_tau(q), q the equilibrium of tau / (1 - eta tau), not at pi*",
        source="its mixture is q: log BR_tau(q) = log mu + P q / tau + const, inserted",
        tag="proved",
        instances=duels(),
        where=lambda i: i.share < 0.99,
        lhs=lambda i: step(nash_md(i), i, reply(i, shifted(i), i.tau)).probs,
        identity=lambda i: reply(i, shifted(i), i.tau).probs,
        mutants={
            "it stands still at pi*": {
                "lhs": lambda i: step(nash_md(i), i, i.star).probs,
                "identity": lambda i: i.star.probs,
            },
            "the opponent is the policy": OWN_OPPONENT,
        },
    ),
    Claim(
        id="nash_md/unbiased-mixture",
        statement="constant eta with tau0 = tau / (1 + eta tau) for tau: its mixture stands still at pi*",
        source="nash_md/bias: tau0 / (1 - eta tau0) = tau",
        tag="proved",
        instances=duels(),
        lhs=lambda i: restored(i, i.tau / (1 + share(i))),
        identity=lambda i: i.star.probs,
        mutants={
            "with tau": {"lhs": lambda i: restored(i, i.tau)},
            "the opponent is the policy": OWN_OPPONENT,
        },
    ),
    Claim(
        id="nash_md/mixed-opponent",
        statement="pi = BR_tau(pi^(1-b) mu^b) where the mixture is the equilibrium of tau / (1 - b), 0 <= b < 1",
        source="Calandriello et al. 2024, arXiv:2403.08635, Proposition 5.2",
        tag="proved",
        instances=duels(),
        where=lambda i: i.share < 0.99,
        lhs=lambda i: answered(i, share(i)),
        identity=lambda i: reply(i, shifted(i), i.tau).probs,
        mutants={
            "the equilibrium itself": {"identity": lambda i: i.star.probs},
            "b and 1 - b exchanged": {"lhs": lambda i: answered(i, 1 - share(i))},
        },
    ),
    Claim(
        id="nash_md/span",
        statement="from mu with constant eta tau <= 1: tau span(log pi_t / mu) <= 1 for all t",
        source="tau log(pi_t / mu) is a weighted mean of 0 and P q_s, s < t, up to a constant",
        tag="proved",
        instances=duels(),
        lhs=lambda i: departure(i, nash_md(i)),
        rhs=lambda i: 1 + 0 * T,
        mutants={
            "1/2": {"rhs": lambda i: 0.5 + 0 * T},
            "the step starts from the policy": NO_ANCHOR,
        },
        axis="iteration t",
    ),
    Claim(
        id="nash_md/dice",
        statement="P(1>2) = P(2>3) = P(3>1) = 5/9, mu = (.6, .3, .1), tau = .1: pi*, gap(mu), gap(uniform), "
        "KL(pi*, mu), KL(mu, pi*), P(pi* > mu)",
        source="computed once, apart from this code",
        tag="checked",
        instances=st.just(DICE),
        lhs=of_dice,
        identity=lambda i: np.array(
            [*PI_STAR, 0.00157621432, 0.02405155517, 0.01439030775, 0.01495873204, 0.50293490398]
        ),
        mutants={
            "reference forgotten": {"lhs": lambda i: of_dice(fixed(i.win_prob, [1 / 3] * 3))},
            "preferences the wrong way round": {"lhs": lambda i: of_dice(fixed(i.win_prob.T, [0.6, 0.3, 0.1]))},
        },
        tol=1e-10,  # digits that are printed
    ),
    Claim(
        id="nash_md/dice-constant-step",
        statement="the dice, from mu with eta = 1: (.6454452358, .2276888203, .1268659439)",
        source="computed once, apart from this code",
        tag="checked",
        instances=st.just(DICE),
        lhs=lambda i: np.exp(path(NashMD(1.0, i.tau), i, i.mu, 250)[-1]),
        identity=lambda i: np.array([0.6454452358, 0.2276888203, 0.1268659439]),
        mutants={"pi*": {"identity": lambda i: i.star.probs}, "the opponent is the policy": OWN_OPPONENT},
        tol=1e-10,  # digits that are printed
    ),
    Claim(
        id="nash_md/dice-schedule",
        statement="the dice, eta_t = 2 / (tau (t + 2)): KL(pi*, pi_T) = 6.08043e-5 (T = 10), 9.26199e-7 (T = 100)",
        source="computed once, apart from this code",
        tag="checked",
        instances=st.just(DICE),
        lhs=lambda i: np.log(divergences(i, NashMD.default(i.tau), i.mu, 100)[[10, 100]]),
        identity=lambda i: np.log([6.08043e-5, 9.26199e-7]),
        mutants={
            "t for t + 2": {
                "lhs": lambda i: np.log(
                    divergences(i, NashMD(lambda t: 2 / (i.tau * max(t, 2)), i.tau), i.mu, 100)[[10, 100]]
                )
            },
            "the opponent is the policy": OWN_OPPONENT,
        },
        tol=1e-6,  # digits that are printed
    ),
    Claim(
        id="nash_md/dice-mixed-opponent",
        statement="the dice: the fixed points of pi = BR(pi^(1-b) mu^b), b = 1/8, 1/4, 1/2, 1",
        source="computed once, apart from this code",
        tag="checked",
        instances=st.just(DICE),
        lhs=mixed_opponents,
        identity=lambda i: np.array(
            [
                [0.6458727522, 0.2274976153, 0.1266296325],
                [0.6479997674, 0.2266096901, 0.1253905425],
                [0.6521785008, 0.2251784916, 0.1226430076],
                [0.6600256006, 0.2236858369, 0.1162885624],
            ]
        ),
        mutants={"pi*": {"identity": lambda i: np.tile(i.star.probs, (4, 1))}},
        tol=1e-10,  # digits that are printed
    ),
    Claim(
        id="nash_md/three-types",
        statement="P(2>1) = 2/3 - e/2, P(1>3) = P(3>2) = 2/3 + e/4, e = .1, uniform mu: pi* for tau = .05 and .01",
        source=f"{PAPER}, section 3; computed once, apart from this code",
        tag="checked",
        instances=st.just(THREE_TYPES),
        lhs=partial(equilibria, taus=(0.05, 0.01)),
        identity=lambda i: np.array(
            [[0.411125726, 0.3350913525, 0.2537829215], [0.3926285763, 0.3730130787, 0.234358345]]
        ),
        mutants={"tau = 0": {"identity": lambda i: np.tile([1 / 3 + 0.05, 1 / 3 + 0.05, 1 / 3 - 0.1], (2, 1))}},
        tol=1e-10,  # digits that are printed
    ),
    Claim(
        id="nash_md/rock-paper-scissors",
        statement="certain preferences, mu = (.5, .3, .2): pi* for tau = 1, .3, .1, .03",
        source="computed once, apart from this code",
        tag="checked",
        instances=st.just(RPS),
        lhs=partial(equilibria, taus=(1.0, 0.3, 0.1, 0.03)),
        identity=lambda i: np.array(
            [
                [0.5108675583, 0.2615561887, 0.2275762530],
                [0.4628769834, 0.2361897348, 0.3009332818],
                [0.3753269575, 0.2774326283, 0.3472404143],
                [0.3430734504, 0.3150791195, 0.3418474301],
            ]
        ),
        mutants={
            "uniform": {"identity": lambda i: np.full((4, 3), 1 / 3)},
            "preferences the wrong way round": {
                "lhs": lambda i: equilibria(fixed(i.win_prob.T, [0.5, 0.3, 0.2]), (1.0, 0.3, 0.1, 0.03))
            },
        },
        tol=1e-10,  # digits that are printed
    ),
)
