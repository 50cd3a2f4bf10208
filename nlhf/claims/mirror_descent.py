"""Mirror descent in self-play: plain, magnetic, extragradient, optimistic. Equivalences, rates, lower bounds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from math import sqrt
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import numpy as np
from scipy.special import log_softmax, logsumexp

from nlhf import BestResponse, MagneticMD, MirrorProx, NashEMA, OptimisticMD, SelfPlay, metrics, tabular
from nlhf.claims.claim import Claim
from nlhf.claims.instances import Duel, Floats, duels
from nlhf.core import Mixture, Prox
from nlhf.schedules import Harmonic
from nlhf.tabular import ExactSolver, MatrixGame, Tabular, nash, regularized_nash

SOKOTA = "Sokota et al. 2023, arXiv:2206.05825"
CEN = "Cen, Wei and Chi 2021, arXiv:2105.15186"
THREE_POINTS = "three-point inequalities of the steps; P_tau(pi > pi*) = 1/2 - tau KL(pi, pi*); Pinsker's inequality"
T = np.arange(1, 26)
"""The iterations of a curve."""


def path(algorithm: Any, i: Duel, start: Tabular, steps: int = 25) -> Floats:
    """(steps + 1, n) log pi_0, ..., log pi_steps."""
    solver, state = ExactSolver(i.game), algorithm.init(start, i.mu)
    found = [state.policy.log_probs]
    for _ in range(steps):
        state, _ = algorithm.step(state, solver)
        found.append(state.policy.log_probs)
    return np.stack(found)


def step(algorithm: Any, i: Duel, start: Tabular) -> Tabular:
    """pi_1."""
    return Tabular(path(algorithm, i, start, 1)[1])


def divergences(i: Duel, algorithm: Any, start: Tabular, steps: int = 25) -> Floats:
    """(steps + 1,) KL(pi*, pi_T)."""
    return metrics.kl_rows(i.star.log_probs, path(algorithm, i, start, steps))


def promised(kl: float, factor: float) -> Floats:
    """(25,) T log(1 / factor); 0 once KL would be below 1e-12, where the errors of pi*, 1e-13, begin to show."""
    total = -T * np.log(factor)
    return np.where(total <= np.log(kl / 1e-12), total, 0.0)


def gained(kls: Floats) -> Floats:
    """(25,) log(KL_0 / KL_T)."""
    return np.asarray(np.log(kls[0]) - np.log(np.maximum(kls[1:], 1e-300)))


def apart(i: Duel) -> bool:
    """Whether there is a distance to gain."""
    return metrics.kl(i.star, i.pi) > 1e-6


def posing(algorithm: Any, change: Callable[[Any, Any, Prox], Prox]) -> Callable[[], AbstractContextManager[Any]]:
    """A bug: where the algorithm poses `prox`, it poses `change(self, state, prox)`."""

    def buggy() -> AbstractContextManager[Any]:
        def step(self: Any, state: Any, solve: Any) -> Any:
            return right(self, state, lambda prox, start: solve(change(self, state, prox), start))

        right = algorithm.step
        return mock.patch.object(algorithm, "step", step)

    return buggy


def share(i: Duel) -> float:
    """The instance's share, but not 0, which is no step."""
    return max(i.share, 1e-3)


def self_play(i: Duel, times: float = 1) -> Any:
    """A share of the largest step with a linear rate, eta = 4 tau / (1 + 4 tau^2)."""
    return SelfPlay(min(times * share(i) * 4 * i.tau / (1 + 4 * i.tau**2), 0.999 / i.tau), i.tau)


def magnetic(i: Duel, times: float = 1) -> Any:
    """A share of the largest step with a linear rate, eta = 4 tau."""
    return MagneticMD(times * share(i) * 4 * i.tau, i.tau)


def mirror_prox(i: Duel, times: float = 1) -> Any:
    """A share of the largest step with a linear rate, eta = 2 (tau + sqrt(1 + tau^2))."""
    return MirrorProx(times * share(i) * 2 * (i.tau + sqrt(1 + i.tau**2)), i.tau)


def optimistic(i: Duel) -> Any:
    """The largest step that its source proves, eta = min(1 / (1 + 2 tau), 1 / 2)."""
    return OptimisticMD.default(i.tau)


def free(i: Duel) -> Any:
    """Self-play with a share of the largest step that there is, eta = 1 / tau."""
    return SelfPlay(share(i) / i.tau, i.tau)


def ema(i: Duel) -> Any:
    """Nash-EMA likewise, with any decay < 1."""
    return NashEMA(share(i) / i.tau, i.tau, decay=min(i.share, 0.99))


def explicit(algorithm: Any) -> float:
    """1 - eta tau."""
    return float(1 - algorithm.eta * algorithm.tau)


def implicit(algorithm: Any) -> float:
    """1 / (1 + eta tau)."""
    return float(1 / (1 + algorithm.eta * algorithm.tau))


# --- one step, and from the reference ---------------------------------------------------------------------------------


def stepping(algorithm: Any, i: Duel) -> Any:
    """`algorithm` with a share of the step 1 / tau, but not one so small that the noise drowns in rounding."""
    return algorithm(max(i.share, min(1e-2, i.tau)) / i.tau, i.tau)


def noise(i: Duel, algorithm: Any) -> Floats:
    """(3,) KL(pi*, pi+) - (1 - eta tau) KL(pi*, pi), in units of eta^2, from pi, mu and pi*."""
    before, after = np.array([divergences(i, algorithm, start, 1) for start in (i.pi, i.mu, i.star)]).T
    return np.asarray((after - explicit(algorithm) * before) / algorithm.eta**2)


def rounding(i: Duel) -> float:
    """Of `noise`: the difference of two numbers of the size of KL(pi*, pi), which eta^2 divides."""
    return float(1e-13 * (1 + metrics.kl(i.star, i.pi)) / stepping(SelfPlay, i).eta ** 2 + 1e-12)


def spans(i: Duel) -> Floats:
    """(3,) span(P pi - tau log(pi / mu)) of pi, mu and pi*."""
    every = (i.pi, i.mu, i.star)
    return np.array([np.ptp(i.win_prob @ pi.probs - i.tau * (pi.log_probs - i.mu.log_probs)) for pi in every])


def exact(i: Duel, turn: float) -> float:
    """The right-hand side of the exact step, of whose KL(pi, pi*) the share `turn` is not turned round."""
    algorithm, x = free(i), i.win_prob @ i.pi.probs - i.tau * (i.pi.log_probs - i.mu.log_probs)
    kl, back = metrics.kl(i.star, i.pi), metrics.kl(i.pi, i.star)
    moment = logsumexp(i.pi.log_probs + algorithm.eta * (x - i.pi.probs @ x))
    return float(explicit(algorithm) * kl - share(i) * (turn * back + (1 - turn) * kl) + moment)


def departure(i: Duel, algorithm: Any) -> Floats:
    """(25,) tau span(log pi_t / mu) from mu."""
    return np.asarray(i.tau * np.ptp(path(algorithm, i, i.mu)[1:] - i.mu.log_probs, axis=-1))


# --- near the equilibrium ---------------------------------------------------------------------------------------------


def direction(i: Duel) -> Floats:
    """v of span at most 1."""
    return np.asarray(i.other / max(np.ptp(i.other), 1.0))


def derivative(i: Duel) -> Floats:
    """d log pi+ at pi* along v, less its mean, in units of 1 + eta: a central difference."""
    up, down = (
        step(free(i), i, Tabular.from_logits(i.star.log_probs + size * direction(i))).log_probs
        for size in (1e-5, -1e-5)
    )
    return np.asarray(((up - down) - (up - down).mean()) / 2e-5 / (1 + free(i).eta))


def linearised(i: Duel, turn: float = 1) -> Floats:
    """(1 - eta tau) v + eta M C v, C = diag(pi*) - pi* pi*^T, less its mean, in units of 1 + eta."""
    v, p, algorithm = direction(i), i.star.probs, free(i)
    change = explicit(algorithm) * v + turn * algorithm.eta * (i.skew @ (p * (v - p @ v)))
    return np.asarray((change - change.mean()) / (1 + algorithm.eta))


def near(i: Duel) -> tuple[Any, Any, Any]:
    """Three algorithms, whose steps are as large as they allow, or 10."""
    return free(i), MagneticMD(10 * share(i), i.tau), MirrorProx(10 * share(i), i.tau)


def shrinkage(i: Duel) -> Floats:
    """(3,) KL(pi*, pi+) / KL(pi*, pi) on rock-paper-scissors, from within 1e-6 of pi* = mu, the uniform policy."""
    circle = replace(i, win_prob=MatrixGame.rock_paper_scissors().matrix, reference=np.zeros(3))
    start = Tabular.from_logits(1e-6 * i.policy / np.ptp(i.policy))
    before, after = np.array([divergences(circle, algorithm, start, 1) for algorithm in near(i)]).T
    return np.asarray(after / before)


def eigenvalues(i: Duel, omega2: float = 1 / 12) -> Floats:
    """(3,) |lambda|^2 of their linearisations."""
    plain, implicit_one, _ = near(i)
    eta, s = 10 * share(i), 1 / implicit(implicit_one)
    return np.array(
        [
            explicit(plain) ** 2 + plain.eta**2 * omega2,
            (1 + eta**2 * omega2) / s**2,
            ((1 - eta**2 * omega2 / s) ** 2 + eta**2 * omega2 / s**2) / s**2,
        ]
    )


# --- the optimistic method, averages, the proximal point --------------------------------------------------------------


def two_sequences(i: Duel) -> Floats:
    """(5, n) log h_t as printed: h_t and w_t are both taken from w_{t-1}, against h_{t-1} and against h_t."""
    w, h, eta, found = i.pi.log_probs, i.pi.log_probs, optimistic(i).eta, []
    for _ in range(5):
        anchor = (1 - eta * i.tau) * w + eta * i.tau * i.mu.log_probs
        h = log_softmax(anchor + eta * i.win_prob @ np.exp(h))
        w = log_softmax(anchor + eta * i.win_prob @ np.exp(h))
        found.append(h)
    return np.stack(found)


def kept(i: Duel) -> Floats:
    """(26,) KL(pi*, w_t), w_0 = pi_0, w_t ∝ h_t exp(eta P (h_t - h_{t-1})), of the policies h_t that are played."""
    algorithm = optimistic(i)
    h = path(algorithm, i, i.pi)
    w = h + algorithm.eta * np.diff(np.exp(h), axis=0, prepend=np.exp(h[:1])) @ i.win_prob.T
    return metrics.kl_rows(i.star.log_probs, log_softmax(w, axis=-1))


def averaging(i: Duel, decay: float) -> Floats:
    """(5, n) log pi_t of Nash-EMA, written out."""
    b, eta, found = share(i), share(i) / i.tau, []
    pi = average = i.pi.log_probs
    for _ in range(5):
        average = log_softmax(decay * average + (1 - decay) * pi)
        pi = log_softmax((1 - b) * pi + b * i.mu.log_probs + eta * i.win_prob @ np.exp(average))
        found.append(pi)
    return np.stack(found)


def weights_step(i: Duel) -> float:
    """A step of multiplicative weights in [0.1, 10]."""
    return float(10 ** (2 * i.share - 1))


def exploited(i: Duel, averaged: bool = True) -> Floats:
    """(25,) max_y P(y > mean of pi_0, ..., pi_{T-1}) - 1/2 of multiplicative weights from the uniform policy."""
    probs = np.exp(path(SelfPlay(weights_step(i), 0.0), i, Tabular.from_logits(np.zeros(i.n)), 24))
    policies = np.cumsum(probs, axis=0) / T[:, None] if averaged else probs
    return np.asarray((policies @ i.win_prob.T).max(axis=-1) - 0.5)


def regret(i: Duel, constant: float) -> Floats:
    """(25,) log n / (eta T) + constant eta."""
    return np.asarray(np.log(i.n) / (weights_step(i) * T) + constant * weights_step(i))


def proximal(i: Duel) -> list[Tabular]:
    """pi_0 = mu, ..., pi_4: each the equilibrium of the game with the one before as the reference."""
    found = [i.mu]
    for _ in range(4):
        found.append(regularized_nash(MatrixGame(i.win_prob, found[-1]), i.tau).policy)
    return found


def approached(i: Duel) -> Floats:
    """(4,) KL(pi°, pi_k) - KL(pi°, pi_{k+1}) of an equilibrium pi° without regularisation."""
    return -np.diff(metrics.kl_rows(nash(i.game).policy.log_probs, np.stack([pi.log_probs for pi in proximal(i)])))


def travelled(i: Duel) -> Floats:
    """(4,) KL(pi_{k+1}, pi_k)."""
    found = proximal(i)
    return np.array([metrics.kl(after, before) for before, after in pairwise(found)])


# --- what an algorithm says of itself ---------------------------------------------------------------------------------


def beyond(i: Duel) -> tuple[Any, Any, Any]:
    """Up to twice the largest steps with a linear rate."""
    return self_play(i, 2), magnetic(i, 2), mirror_prox(i, 2)


def declared(i: Duel) -> Floats:
    """(3,) KL / rate(KL), how much an algorithm promises to gain, for a KL >= 1."""
    kl = 1 + metrics.kl(i.star, i.pi)
    return np.array([kl / algorithm.rate(kl, 0) for algorithm in beyond(i)])


def proved(i: Duel, stretch: float = 1) -> Floats:
    """(3,) the same by the theorems; 0 where there is none."""
    (plain, implicit_one, extragradient), kl = beyond(i), 1 + metrics.kl(i.star, i.pi)
    # the largest step itself, rounded up, is a step with a proof
    stretch += 1e-12
    noisy = 0.5 * plain.eta**2 * (plain.eta > stretch * 4 * i.tau / (1 + 4 * i.tau**2))
    return np.array(
        [
            kl / (explicit(plain) * kl + noisy),
            (implicit_one.eta <= stretch * 4 * i.tau) / implicit(implicit_one),
            (extragradient.eta <= stretch * 2 * (i.tau + sqrt(1 + i.tau**2))) / implicit(extragradient),
        ]
    )


def fixed_points(i: Duel) -> Floats:
    """(5, n) pi_1 of five algorithms from pi*."""
    every = (free(i), magnetic(i), mirror_prox(i), optimistic(i), ema(i))
    return np.stack([step(algorithm, i, i.star).probs for algorithm in every])


def iterations(i: Duel) -> Floats:
    """(3,) until KL(pi*, pi_t) < 1e-8 from mu: self-play, mirror prox with eta = 2, the optimistic method with 1/2."""
    every = (SelfPlay.default(i.tau), MirrorProx(2.0, i.tau), OptimisticMD(0.5, i.tau))
    return np.array([np.argmax(divergences(i, algorithm, i.mu, 250) < 1e-8) for algorithm in every])


@st.composite
def arcs(draw: st.DrawFn) -> Duel:
    """Circular tournaments of odd size, each beats the next half; a policy on half of the circle: the largest noise."""
    half, tau, eta = draw(st.integers(1, 10)), draw(st.floats(1e-3, 1e-2)), draw(st.floats(0.3, 2.0))
    n = 2 * half + 1
    policy, flat = np.where(np.arange(n) > half, -30.0, 0.0), np.zeros(n)
    return Duel(MatrixGame.cyclic(n).matrix, flat, policy, policy, flat, tau, tau * eta)


@st.composite
def turning(draw: st.DrawFn) -> Duel:
    """Uneven rock-paper-scissors, tau small, steps large: what turns around its equilibrium does so here."""
    a, b, c = (draw(st.floats(0.2, 0.5)) for _ in range(3))
    skew, flat = np.array([[0, a, -c], [-a, 0, b], [c, -b, 0]]), np.zeros(3)
    policy = np.array([draw(st.floats(-2, 2)) for _ in range(3)])
    return Duel(0.5 + skew, flat, policy, policy, flat, draw(st.floats(0.005, 0.05)), draw(st.floats(0.3, 1.0)))


class Fixed(Duel):
    """One that numbers are printed for: it has no neighbours."""

    def moved(self, rng: np.random.Generator, scale: float) -> Fixed:
        """Itself."""
        return self


RPS = Fixed(
    win_prob=MatrixGame.rock_paper_scissors().matrix,
    reference=np.log([0.5, 0.3, 0.2]),
    policy=np.zeros(3),
    other=np.zeros(3),
    third=np.zeros(3),
    tau=0.1,
    share=1.0,
)
CIRCLE = duels(tau=(0.05, 10.0), sizes=(3, 3), kinds=("cyclic",)).filter(lambda i: bool(np.ptp(i.policy) > 1e-3))
"""For rock-paper-scissors: a tau, a share, a direction."""
ROUND = duels() | turning()

RELATIVE = 1e-6
"""Tolerance of the logarithm of a KL >= 1e-12 from pi*, which is exact to 1e-13 or so: 2 * 1e-13 / sqrt(2 * 1e-12)."""

CLAIMS = (
    Claim(
        id="mirror_descent/magnetic-is-self-play",
        statement="self-play with eta tau < 1 and magnetic mirror descent with eta / (1 - eta tau) are the same",
        source="their exponents of pi, mu and exp(P pi), compared",
        tag="proved",
        instances=duels(),
        where=lambda i: i.share < 0.999,
        lhs=lambda i: path(free(i), i, i.pi, 1),
        identity=lambda i: path(MagneticMD(free(i).eta / explicit(free(i)), i.tau), i, i.pi, 1),
        mutants={
            "the same step": {"identity": lambda i: path(MagneticMD(free(i).eta, i.tau), i, i.pi, 1)},
            "the magnet is the policy": posing(
                MagneticMD, lambda self, state, prox: prox._replace(anchor=state.policy)
            ),
        },
    ),
    Claim(
        id="mirror_descent/euler",
        statement="w - h (w - P pi / tau), pi = mu exp(w) / Z, is self-play with eta = h / tau",
        source="inserted; so that explicit Euler on dw/dt = -(w - P pi / tau) inherits its rates",
        tag="proved",
        instances=duels(),
        lhs=lambda i: step(free(i), i, i.pi).log_probs,
        identity=lambda i: log_softmax(
            i.pi.log_probs - share(i) * (i.pi.log_probs - i.mu.log_probs - i.win_prob @ i.pi.probs / i.tau)
        ),
        mutants={
            "P transposed": {
                "identity": lambda i: log_softmax(
                    i.pi.log_probs - share(i) * (i.pi.log_probs - i.mu.log_probs - i.win_prob.T @ i.pi.probs / i.tau)
                )
            },
            "preferences the wrong way round": lambda: mock.patch.object(
                MatrixGame, "versus", lambda self, probs: self.matrix.T @ probs
            ),
        },
    ),
    Claim(
        id="mirror_descent/optimistic-is-two-sequences",
        statement="optimistic mirror descent plays h_t of h_t ∝ w^(1-b) mu^b exp(eta P h_{t-1}), b = eta tau, "
        "w_t ∝ w^(1-b) mu^b exp(eta P h_t), w = w_{t-1}",
        source=f"{CEN}, Algorithm 2; w_t ∝ h_t exp(eta P (h_t - h_{{t-1}})), inserted",
        tag="proved",
        instances=duels(),
        lhs=lambda i: path(optimistic(i), i, i.pi, 5)[1:],
        identity=two_sequences,
        mutants={
            "not optimistic": posing(OptimisticMD, lambda self, state, prox: prox._replace(opponent=state.policy)),
            "extrapolated from the reference": posing(
                OptimisticMD,
                lambda self, state, prox: prox._replace(
                    opponent=Mixture((prox.opponents[0], (state.reference, prox.opponents[1][1])))
                ),
            ),
        },
    ),
    Claim(
        id="mirror_descent/nash-ema",
        statement="Nash-EMA: a_t ∝ a_{t-1}^d pi_t^(1-d), pi_{t+1} ∝ pi_t^(1-b) mu^b exp(eta P a_t), b = eta tau",
        source="Munos et al. 2024, arXiv:2312.00886, section 6, with the usual recursion of an average",
        tag="proved",
        # steps multiply rounding by up to 1 + eta / 2 each
        instances=duels(tau=(0.1, 10.0)),
        lhs=lambda i: path(ema(i), i, i.pi, 5)[1:],
        identity=lambda i: averaging(i, ema(i).decay),
        mutants={
            "decay and its complement exchanged": {"identity": lambda i: averaging(i, 1 - ema(i).decay)},
            "the opponent is the average before": posing(
                NashEMA, lambda self, state, prox: prox._replace(opponent=state.average)
            ),
        },
    ),
    Claim(
        id="mirror_descent/best-response",
        statement="best response to mu: span(log pi_T / BR(mu)) = (1 - eta tau)^T span(log pi_0 / BR(mu))",
        source="log pi+ - log BR = (1 - eta tau) (log pi - log BR) + const",
        tag="proved",
        instances=duels(),
        lhs=lambda i: np.ptp(
            path(BestResponse(share(i) / i.tau, i.tau), i, i.pi)[1:] - metrics.best_response(i.mu, i.game, i.tau),
            axis=-1,
        ),
        identity=lambda i: (1 - share(i)) ** T * np.ptp(i.pi.log_probs - metrics.best_response(i.mu, i.game, i.tau)),
        mutants={
            "the equilibrium": {"identity": lambda i: (1 - share(i)) ** T * np.ptp(i.pi.log_probs - i.star.log_probs)},
            "the opponent is the policy": posing(
                BestResponse, lambda self, state, prox: prox._replace(opponent=state.policy)
            ),
        },
        axis="iteration T",
    ),
    Claim(
        id="mirror_descent/fixed-point",
        statement="self-play, its magnetic, extragradient and optimistic forms and Nash-EMA stay at pi*",
        source="pi* = mu exp(P pi* / tau) / Z, inserted",
        tag="proved",
        instances=duels(),
        lhs=fixed_points,
        identity=lambda i: np.tile(i.star.probs, (5, 1)),
        mutants={
            "the best response to the reference": {
                "identity": lambda i: np.tile(np.exp(metrics.best_response(i.mu, i.game, i.tau)), (5, 1))
            },
            "the step of the opponent is tau times too large": posing(
                MagneticMD, lambda self, state, prox: prox._replace(eta=prox.eta * (1 + self.eta * self.tau))
            ),
        },
    ),
    Claim(
        id="mirror_descent/self-play-exact",
        statement="self-play: KL(pi*, pi+) = (1 - eta tau) KL(pi*, pi) - eta tau KL(pi, pi*) "
        "+ log E_pi exp(eta (X - E_pi X)), X = P pi - tau log(pi / mu)",
        source="exact mirror step, and P_tau(pi* > pi) = 1/2 + tau KL(pi, pi*)",
        tag="proved",
        instances=duels(),
        lhs=lambda i: metrics.kl(i.star, step(free(i), i, i.pi)) / (1 + free(i).eta),
        identity=lambda i: exact(i, 1) / (1 + free(i).eta),
        mutants={
            "KL(pi*, pi) for KL(pi, pi*)": {"identity": lambda i: exact(i, 0) / (1 + free(i).eta)},
            "the opponent is the reference": posing(
                SelfPlay, lambda self, state, prox: prox._replace(opponent=state.reference)
            ),
        },
    ),
    Claim(
        id="mirror_descent/self-play-step",
        statement="self-play: (KL(pi*, pi+) - (1 - eta tau) KL(pi*, pi)) / eta^2 <= span(P pi - tau log(pi/mu))^2 / 8",
        source="exact mirror step, Hoeffding's lemma, P_tau(pi > pi*) <= 1/2",
        tag="proved",
        instances=duels() | arcs(),
        lhs=lambda i: noise(i, stepping(SelfPlay, i)),
        rhs=lambda i: spans(i) ** 2 / 8,
        mutants={
            "1/10": {"rhs": lambda i: spans(i) ** 2 / 10},
            "the opponent is the reference": posing(
                SelfPlay, lambda self, state, prox: prox._replace(opponent=state.reference)
            ),
        },
        tol=rounding,
    ),
    Claim(
        id="mirror_descent/span",
        statement="self-play from mu with eta tau <= 1 has tau span(log pi_t / mu) <= 1 for all t",
        source="tau log(pi_t / mu) is a weighted mean of 0 and P pi_s, s < t, up to a constant",
        tag="proved",
        instances=duels(),
        lhs=lambda i: departure(i, free(i)),
        rhs=lambda i: 1 + 0 * T,
        mutants={
            "1/2": {"rhs": lambda i: 0.5 + 0 * T},
            "the anchor is the policy": posing(SelfPlay, lambda self, state, prox: prox._replace(anchor=state.policy)),
        },
        axis="iteration t",
    ),
    Claim(
        id="mirror_descent/schedule",
        statement="self-play from mu with eta_t = 2 / (tau (t + 2)): tau^2 (T + 1) KL(pi*, pi_T) <= 2 for T >= 1",
        source="self-play-step and span, by induction; no log(1 / min mu)",
        tag="proved",
        instances=duels(),
        lhs=lambda i: i.tau**2 * (T + 1) * divergences(i, SelfPlay(Harmonic(i.tau), i.tau), i.mu)[1:],
        rhs=lambda i: 2 + 0 * T,
        mutants={
            "1/40": {"rhs": lambda i: 1 / 40 + 0 * T},
            "the anchor is the policy": posing(SelfPlay, lambda self, state, prox: prox._replace(anchor=state.policy)),
        },
        axis="iteration T",
    ),
    Claim(
        id="mirror_descent/self-play-rate",
        statement="self-play, eta <= 4 tau / (1 + 4 tau^2): -T log(1 - eta tau) <= log(KL(pi*, pi_0) / KL(pi*, pi_T))",
        source="magnetic-rate and magnetic-is-self-play",
        tag="proved",
        instances=ROUND,
        where=apart,
        lhs=lambda i: promised(metrics.kl(i.star, i.pi), explicit(self_play(i))),
        rhs=lambda i: gained(divergences(i, self_play(i), i.pi)),
        mutants={
            "8 times the step": {
                "lhs": lambda i: promised(metrics.kl(i.star, i.pi), explicit(self_play(i, 8))),
                "rhs": lambda i: gained(divergences(i, self_play(i, 8), i.pi)),
            },
            "the opponent is the reference": posing(
                SelfPlay, lambda self, state, prox: prox._replace(opponent=state.reference)
            ),
        },
        tol=RELATIVE,
        axis="iteration T",
    ),
    Claim(
        id="mirror_descent/magnetic-rate",
        statement="magnetic mirror descent with eta <= 4 tau: T log(1 + eta tau) <= log(KL(pi*, pi_0) / KL(pi*, pi_T))",
        source=f"{THREE_POINTS}; {SOKOTA}, for eta <= tau / L^2: L = 1/2 in the norm |.|_1",
        tag="proved",
        instances=ROUND,
        where=apart,
        lhs=lambda i: promised(metrics.kl(i.star, i.pi), implicit(magnetic(i))),
        rhs=lambda i: gained(divergences(i, magnetic(i), i.pi)),
        mutants={
            "8 times the step": {
                "lhs": lambda i: promised(metrics.kl(i.star, i.pi), implicit(magnetic(i, 8))),
                "rhs": lambda i: gained(divergences(i, magnetic(i, 8), i.pi)),
            },
            "KL(pi, pi*)": {
                "lhs": lambda i: promised(metrics.kl(i.pi, i.star), implicit(magnetic(i))),
                "rhs": lambda i: gained(metrics.kl_rows(path(magnetic(i), i, i.pi), i.star.log_probs)),
            },
            "the opponent is the reference": posing(
                MagneticMD, lambda self, state, prox: prox._replace(opponent=state.reference)
            ),
        },
        tol=RELATIVE,
        axis="iteration T",
    ),
    Claim(
        id="mirror_descent/mirror-prox-rate",
        statement="mirror prox with eta <= 2 (tau + sqrt(1 + tau^2)): "
        "T log(1 + eta tau) <= log(KL(pi*, pi_0) / KL(pi*, pi_T))",
        source=f"{THREE_POINTS}; the rate of arXiv:2503.08942 and arXiv:2505.19731 with its constants",
        tag="proved",
        instances=ROUND,
        where=apart,
        lhs=lambda i: promised(metrics.kl(i.star, i.pi), implicit(mirror_prox(i))),
        rhs=lambda i: gained(divergences(i, mirror_prox(i), i.pi)),
        mutants={
            "8 times the step": {
                "lhs": lambda i: promised(metrics.kl(i.star, i.pi), implicit(mirror_prox(i, 8))),
                "rhs": lambda i: gained(divergences(i, mirror_prox(i, 8), i.pi)),
            },
            "no look ahead": posing(MirrorProx, lambda self, state, prox: prox._replace(opponent=state.policy)),
        },
        tol=RELATIVE,
        axis="iteration T",
    ),
    Claim(
        id="mirror_descent/mirror-prox-default",
        statement="mirror prox with eta = 2: T log(1 + 2 tau) <= log(KL(pi*, pi_0) / KL(pi*, pi_T))",
        source="mirror-prox-rate; 2 <= 2 (tau + sqrt(1 + tau^2)), so that no size enters",
        tag="proved",
        instances=ROUND,
        where=apart,
        lhs=lambda i: promised(metrics.kl(i.star, i.pi), 1 / (1 + 2 * i.tau)),
        rhs=lambda i: gained(divergences(i, MirrorProx.default(i.tau), i.pi)),
        mutants={
            "log(1 + 4 tau)": {"lhs": lambda i: promised(metrics.kl(i.star, i.pi), 1 / (1 + 4 * i.tau))},
            "no look ahead": posing(MirrorProx, lambda self, state, prox: prox._replace(opponent=state.policy)),
        },
        tol=RELATIVE,
        axis="iteration T",
    ),
    Claim(
        id="mirror_descent/optimistic-rate",
        statement="optimistic method with eta = min(1/(1 + 2 tau), 1/2): "
        "-t log(1 - eta tau) <= log(KL(pi*, pi_0) / KL(pi*, w_t)), w_t ∝ h_t exp(eta P (h_t - h_{t-1})), h_t played",
        source=f"{CEN}, optimistic multiplicative weights, with |P - 1/2| <= 1/2",
        tag="published",
        instances=ROUND,
        where=apart,
        lhs=lambda i: promised(metrics.kl(i.star, i.pi), explicit(optimistic(i))),
        rhs=lambda i: gained(kept(i)),
        mutants={
            "4 times the rate": {"lhs": lambda i: promised(metrics.kl(i.star, i.pi), explicit(optimistic(i)) ** 4)},
            "the opponent is the reference": posing(
                OptimisticMD, lambda self, state, prox: prox._replace(opponent=state.reference)
            ),
        },
        tol=RELATIVE,
        axis="iteration t",
    ),
    Claim(
        id="mirror_descent/multiplicative-weights",
        statement="tau = 0 from the uniform policy: max_y P(y > mean_{t<T} pi_t) - 1/2 <= log(n) / (eta T) + eta / 24",
        source="log mean_y exp(eta sum_t (M pi_t)_y) = sum_t log E_pi_t exp(eta M pi_t) <= T eta^2 / 24 by "
        "nash_md/convex-order; Hoeffding's lemma gives eta / 8",
        tag="proved",
        instances=ROUND,
        lhs=exploited,
        rhs=lambda i: regret(i, 1 / 24),
        mutants={
            "half of log(n)": {"rhs": lambda i: np.log(i.n) / (2 * weights_step(i) * T) + weights_step(i) / 48},
            "the last iterate": {"lhs": lambda i: exploited(i, averaged=False)},
        },
        axis="iterations T",
    ),
    Claim(
        id="mirror_descent/multiplicative-weights-published",
        statement="tau = 0 from the uniform policy: max_y P(y > mean_{t<T} pi_t) - 1/2 <= log(n) / (eta T) + eta / 8",
        source="Freund and Schapire 1999, Games and Economic Behavior 29; Hoeffding's lemma",
        tag="published",
        instances=ROUND | duels(sizes=(2, 3), kinds=("certain", "winner")),
        lhs=exploited,
        rhs=lambda i: regret(i, 1 / 8),
        mutants={
            "half of both": {"rhs": lambda i: regret(i, 1 / 8) / 2},
            "without log(n)": {"rhs": lambda i: weights_step(i) / 8 + 0 * T},
        },
        axis="iterations T",
    ),
    Claim(
        id="mirror_descent/proximal-point",
        statement="pi_{k+1} = equilibrium with reference pi_k: KL(pi_{k+1}, pi_k) <= KL(pi°, pi_k) - KL(pi°, pi_{k+1}) "
        "for an equilibrium pi° of tau = 0",
        source="P_tau(pi > pi_{k+1}) = 1/2 - tau KL(pi, pi_{k+1}) in the game with reference pi_k, at pi = pi°",
        tag="proved",
        instances=duels(),
        lhs=travelled,
        rhs=approached,
        mutants={
            "2 KL(pi_{k+1}, pi_k)": {"lhs": lambda i: 2 * travelled(i)},
            "the reference is forgotten": lambda: mock.patch(
                f"{__name__}.regularized_nash", lambda game, tau: tabular.regularized_nash(MatrixGame(game.matrix), tau)
            ),
        },
        axis="step k",
    ),
    Claim(
        id="mirror_descent/linearised",
        statement="self-play at pi*: d log pi+ = (1 - eta tau) v + eta M C v, v = d log pi, C = diag(pi*) - pi* pi*^T",
        source="d pi = C v; so that its eigenvalues are 1 - eta tau + eta lambda(M C), and those of M C are imaginary",
        tag="proved",
        instances=duels(),
        lhs=derivative,
        identity=linearised,
        mutants={
            "M transposed": {"identity": lambda i: linearised(i, -1)},
            "without M C": {"identity": lambda i: linearised(i, 0)},
        },
        # central differences of 1e-5: rounding of log pi, up to 1e3 * 1e-16, and (1e-5)^2
        tol=3e-8,
    ),
    Claim(
        id="mirror_descent/eigenvalues",
        statement="rock-paper-scissors, uniform mu: KL(pi*, pi+) / KL(pi*, pi) -> |lambda|^2, with w = 1 / (2 sqrt 3), "
        "s = 1 + eta tau: self-play (1 - eta tau)^2 + (eta w)^2, magnetic (1 + (eta w)^2) / s^2, "
        "mirror prox ((1 - (eta w)^2 / s)^2 + (eta w / s)^2) / s^2",
        source="linearised: M C is w times a quarter turn",
        tag="proved",
        instances=CIRCLE,
        lhs=shrinkage,
        identity=eigenvalues,
        mutants={
            "w = 1/4": {"identity": lambda i: eigenvalues(i, 1 / 16)},
            "no look ahead": posing(MirrorProx, lambda self, state, prox: prox._replace(opponent=state.policy)),
        },
        # terms of the third order, eta (1e-6)^3, relative to the second, for eta <= 1 / tau = 20
        tol=1e-4,
    ),
    Claim(
        id="mirror_descent/no-step-is-faster",
        statement="rock-paper-scissors, uniform mu: for no constant step does self-play, plain or magnetic, shrink "
        "KL(pi*, pi_t) near pi* by more than a factor 1 + 12 tau^2",
        source="eigenvalues: (1 - eta tau)^2 + eta^2 / 12 >= 1 / (1 + 12 tau^2), "
        "with equality at eta = 12 tau / (1 + 12 tau^2)",
        tag="proved",
        instances=CIRCLE,
        lhs=lambda i: 1 / shrinkage(i)[:2],
        rhs=lambda i: 1 + 12 * i.tau**2,
        mutants={
            "1 + 6 tau^2": {"rhs": lambda i: 1 + 6 * i.tau**2},
            "mirror prox": {"lhs": lambda i: 1 / shrinkage(i)},
        },
        # as for eigenvalues
        tol=1e-4,
    ),
    Claim(
        id="mirror_descent/declared",
        statement="rate(KL): (1 - eta tau) KL for eta <= 4 tau / (1 + 4 tau^2), else + eta^2 / 2; KL / (1 + eta tau) "
        "for eta <= 4 tau (magnetic), for eta <= 2 (tau + sqrt(1 + tau^2)) (mirror prox), else none",
        source="self-play-rate, self-play-step with span, magnetic-rate, mirror-prox-rate",
        tag="proved",
        instances=duels(),
        lhs=declared,
        identity=proved,
        mutants={
            "proofs for half of the steps": {"identity": lambda i: proved(i, 0.5)},
            "the rate of a step twice as large": lambda: mock.patch.object(
                MagneticMD, "rate", lambda self, kl, t: kl / (1 + 2 * self.eta * self.tau)
            ),
        },
    ),
    Claim(
        id="mirror_descent/iterations",
        statement="rock-paper-scissors, mu = (.5, .3, .2), tau = 0.1, from mu: KL(pi*, pi_t) < 1e-8 after 239 steps of "
        "self-play (largest step with a proof), 25 of mirror prox (eta = 2), 126 of the optimistic method (eta = 1/2)",
        source="computed once, apart from this code",
        tag="checked",
        instances=st.just(RPS),
        lhs=iterations,
        identity=lambda i: np.array([239, 25, 126]),
        mutants={
            "no look ahead": posing(MirrorProx, lambda self, state, prox: prox._replace(opponent=state.policy)),
            "not optimistic": posing(OptimisticMD, lambda self, state, prox: prox._replace(opponent=state.policy)),
        },
    ),
)
