"""Optimistic mirror descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from nlhf.core import Geometric, Info, Mixture, Prox, Regularized, Solve
from nlhf.schedules import at, check_tau, mixing


class OptimisticState(NamedTuple):
    """The policy, the reference, and the policy before."""

    policy: Any
    reference: Any
    previous: Any
    t: int = 0


@dataclass(frozen=True)
class OptimisticMD(Regularized):
    """Optimistic mirror descent: one solve per iteration, against a signed extrapolation of yourself.

        pi_{t+1} ∝ pi_t^(1-b) mu^b exp(eta [(2 - b) P pi_t - (1 - b) P pi_{t-1}]),    b = eta tau

    With a constant step these are the half-step iterates of the optimistic multiplicative weights of Cen, Wei and
    Chi, pi_{t+1} ∝ w_t^(1-b) mu^b exp(eta P pi_t) with w_t ∝ w_{t-1}^(1-b) mu^b exp(eta P pi_t), written without w.

    Args:
        eta: step size, 0 < eta tau <= 1, or a schedule; `default` is the largest that the source proves.
        tau: KL strength >= 0.

    Raises ValueError if eta tau > 1.

    >>> from nlhf.tabular import ExactSolver, MatrixGame
    >>> from nlhf import run
    >>> game = MatrixGame.cyclic(3, 5 / 9, reference=[0.6, 0.3, 0.1])
    >>> run(OptimisticMD.default(tau=0.1), ExactSolver(game), steps=500).policy.probs.round(6)
    array([0.64373 , 0.228498, 0.127772])

    Source: Cen, Wei and Chi 2021, arXiv:2105.15186, Algorithm 2.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        mixing(at(self.eta, 0), self.tau)

    @classmethod
    def default(cls, tau: float) -> OptimisticMD:
        """eta = min(1 / (1 + 2 tau), 1 / 2), the source's step for |P - 1/2| <= 1/2."""
        return cls(min(1 / (1 + 2 * check_tau(tau)), 0.5), tau)

    def init(self, policy: Any, reference: Any = None) -> OptimisticState:
        """The state at t = 0: the policy before the first is the first."""
        return OptimisticState(policy, reference or policy.freeze(), policy.freeze())

    def step(self, state: OptimisticState, solve: Solve) -> tuple[OptimisticState, Info]:
        eta = at(self.eta, state.t)
        b = mixing(eta, self.tau)
        anchor = Geometric(((state.policy, 1 - b), (state.reference, b)))
        foreseen = Mixture(((state.policy, 2 - b), (state.previous, b - 1)))
        policy, info = solve(Prox(anchor, foreseen, eta), state.policy)
        return OptimisticState(policy, state.reference, state.policy.freeze(), state.t + 1), info
