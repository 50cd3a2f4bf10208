"""Mirror prox, also called extragradient."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt

from nlhf.core import Geometric, Info, Prox, Regularized, Solve, State
from nlhf.schedules import at


@dataclass(frozen=True)
class MirrorProx(Regularized):
    """Mirror prox: look ahead by one magnetic step, then step from where you were against what you saw.

        h_t     ∝ [pi_t mu^(eta tau) exp(eta P pi_t)]^(1 / (1 + eta tau))
        pi_{t+1} ∝ [pi_t mu^(eta tau) exp(eta P h_t)]^(1 / (1 + eta tau))

    KL(pi*, pi_t) shrinks by 1 / (1 + eta tau) per iteration for eta <= 2 (tau + sqrt(1 + tau^2)), so eta = 2
    serves every tau: a linear rate that knows neither the number of responses nor the reference.

    Args:
        eta: step size > 0, or a schedule.
        tau: KL strength >= 0.

    >>> from nlhf.tabular import ExactSolver, MatrixGame
    >>> from nlhf import run
    >>> game = MatrixGame.cyclic(3, 5 / 9, reference=[0.6, 0.3, 0.1])
    >>> run(MirrorProx(eta=2, tau=0.1), ExactSolver(game), steps=100).policy.probs.round(6)
    array([0.64373 , 0.228498, 0.127772])

    Source: Nemirovski 2004; Zhou, Fazel and Du 2025, arXiv:2503.08942 (EGPO); arXiv:2505.19731 (Nash mirror prox).
    """

    @classmethod
    def default(cls, tau: float) -> MirrorProx:
        """eta = 2."""
        return cls(2.0, tau)

    def step(self, state: State, solve: Solve) -> tuple[State, Info]:
        eta = at(self.eta, state.t)
        s = 1 + eta * self.tau
        anchor = Geometric(((state.policy, 1 / s), (state.reference, eta * self.tau / s)))
        half, seen = solve(Prox(anchor, state.policy, eta / s), state.policy)
        policy, info = solve(Prox(anchor, half, eta / s), half)
        return State(policy, state.reference, state.t + 1), seen + info

    def rate(self, kl: float, t: int) -> float:
        """kl / (1 + eta tau) for eta <= 2 (tau + sqrt(1 + tau^2))."""
        eta = at(self.eta, t)
        return kl / (1 + eta * self.tau) if eta <= 2 * (self.tau + sqrt(1 + self.tau**2)) else inf
