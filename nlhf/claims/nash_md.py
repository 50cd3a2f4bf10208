"""Nash mirror descent: Munos et al. 2024 (arXiv:2312.00886), with sharper constants where there are proofs."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from nlhf import NashMD, metrics
from nlhf.claims.claim import Claim
from nlhf.claims.instances import Duel, duels
from nlhf.core import Geometric
from nlhf.tabular import ExactSolver, Tabular

PAPER = "Munos et al. 2024, arXiv:2312.00886"


def mixture(i: Duel, pi: Tabular, b: float) -> Tabular:
    """q ∝ pi^(1 - b) mu^b."""
    return Tabular.from_logits(Geometric(((pi, 1 - b), (i.mu, b))).log_prob(..., ...))


def stepped(i: Duel, pi: Tabular, eta: float) -> Tabular:
    """One step of Nash-MD."""
    algorithm = NashMD(eta, i.tau)
    state, _ = algorithm.step(algorithm.init(i.mu)._replace(policy=pi), ExactSolver(i.game))
    return state.policy


def noise(i: Duel) -> Any:
    """(3,) KL(pi*, pi+) - (1 - eta tau) KL(pi*, pi), in units of eta^2, from pi, mu and pi* itself."""
    eta = max(i.share, 1e-2) / i.tau
    return (
        np.array(
            [
                metrics.kl(i.star, stepped(i, pi, eta)) - (1 - eta * i.tau) * metrics.kl(i.star, pi)
                for pi in (i.pi, i.mu, i.star)
            ]
        )
        / eta**2
    )


def distances(i: Duel, steps: int = 40) -> Any:
    """KL(pi*, pi_t) of the schedule at t = 1, ..., steps, from pi."""
    algorithm = NashMD.default(i.tau)
    state, found = algorithm.init(i.mu)._replace(policy=i.pi), []
    for _ in range(steps):
        state, _ = algorithm.step(state, ExactSolver(i.game))
        found.append(metrics.kl(i.star, state.policy))
    return np.array(found)


def envelope(i: Duel, constant: float) -> Any:
    """constant / (tau^2 (T + 1))."""
    return constant / (i.tau**2 * np.arange(2, 42))


CLAIMS = (
    Claim(
        id="nash_md/one-step",
        statement="(KL(pi*, pi+) - (1 - eta tau) KL(pi*, pi)) / eta^2 <= 1/8 for 0 < eta tau <= 1",
        source="Hoeffding's lemma in the exact mirror step; the published constant is 2",
        tag="proved",
        instances=duels(),
        lhs=noise,
        rhs=lambda i: 1 / 8,
        mutants={"1/64": {"rhs": lambda i: 1 / 64}},
        # the difference of two numbers of the size of KL(pi*, pi), which eta^2 divides
        tol=lambda i: 1e-13 * (1 + metrics.kl(i.star, i.pi)) * (i.tau / max(i.share, 1e-2)) ** 2 + 1e-12,
    ),
    Claim(
        id="nash_md/schedule",
        statement="eta_t = 2 / (tau (t + 2)) gives KL(pi*, pi_T) <= 1 / (2 tau^2 (T + 1)) for T >= 1, any pi_0",
        source=f"one-step, by induction; {PAPER}, Theorem 1 has 8 / (tau^2 (T + 1))",
        tag="proved",
        instances=duels(tau=(0.05, 10.0)),
        lhs=distances,
        rhs=partial(envelope, constant=0.5),
        mutants={"1 / (20 tau^2 (T + 1))": {"rhs": partial(envelope, constant=0.05)}},
        axis="iteration T",
    ),
)
