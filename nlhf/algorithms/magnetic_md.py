"""Magnetic mirror descent."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from nlhf.core import Geometric, Info, Prox, Regularized, Solve, State
from nlhf.schedules import at, check_tau


@dataclass(frozen=True)
class MagneticMD(Regularized):
    """Magnetic mirror descent: play against yourself, pulled to the reference by an implicit KL step.

        pi_{t+1} ∝ [pi_t mu^(eta tau) exp(eta P pi_t)]^(1 / (1 + eta tau))

    The last iterate converges to the regularised equilibrium for eta <= 4 tau, linearly. Fitted by regression
    on pairs this is INPO; it is `SelfPlay` with step eta / (1 + eta tau).

    Args:
        eta: step size > 0, or a schedule.
        tau: KL strength >= 0.

    >>> from nlhf.tabular import ExactSolver, MatrixGame
    >>> from nlhf import run
    >>> game = MatrixGame.cyclic(3, 5 / 9, reference=[0.6, 0.3, 0.1])
    >>> run(MagneticMD(eta=0.4, tau=0.1), ExactSolver(game), steps=500).policy.probs.round(6)
    array([0.64373 , 0.228498, 0.127772])

    Source: Sokota et al. 2023, arXiv:2206.05825, Eq. 7.
    """

    @classmethod
    def default(cls, tau: float) -> MagneticMD:
        """The largest step with a proof, eta = 4 tau."""
        return cls(4 * check_tau(tau, positive=True), tau)

    def step(self, state: State, solve: Solve) -> tuple[State, Info]:
        eta = at(self.eta, state.t)
        s = 1 + eta * self.tau
        anchor = Geometric(((state.policy, 1 / s), (state.reference, eta * self.tau / s)))
        policy, info = solve(Prox(anchor, state.policy, eta / s), state.policy)
        return State(policy, state.reference, state.t + 1), info

    def rate(self, kl: float, t: int) -> float:
        """kl / (1 + eta tau) for eta <= 4 tau."""
        eta = at(self.eta, t)
        return kl / (1 + eta * self.tau) if eta <= 4 * self.tau else inf
