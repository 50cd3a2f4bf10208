"""Best response to the reference."""

from __future__ import annotations

from dataclasses import dataclass

from nlhf.core import Geometric, Info, Prox, Regularized, Solve, State
from nlhf.schedules import at, check_tau, mixing


@dataclass(frozen=True)
class BestResponse(Regularized):
    """RLHF with the win rate over the reference as the reward: the opponent never moves.

        pi_{t+1} ∝ pi_t^(1 - eta tau) mu^(eta tau) exp(eta P mu)    ->    mu exp(P mu / tau) / Z

    The limit is the best response to the reference, not the equilibrium: the baseline whose duality gap says
    what playing the game is worth. eta = 1 / tau reaches it in one step.

    Args:
        eta: step size, 0 < eta tau <= 1, or a schedule.
        tau: KL strength >= 0.

    Raises ValueError if eta tau > 1.

    >>> from nlhf.tabular import ExactSolver, MatrixGame
    >>> from nlhf import run
    >>> game = MatrixGame.cyclic(3, 5 / 9, reference=[0.6, 0.3, 0.1])
    >>> run(BestResponse.default(tau=0.1), ExactSolver(game), steps=1).policy.probs.round(4)
    array([0.66  , 0.2237, 0.1163])

    Source: Munos et al. 2024, arXiv:2312.00886, section 7 (the player BR).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        mixing(at(self.eta, 0), self.tau)

    @classmethod
    def default(cls, tau: float) -> BestResponse:
        """eta = 1 / tau: the limit in one step."""
        return cls(1 / check_tau(tau, positive=True), tau)

    def step(self, state: State, solve: Solve) -> tuple[State, Info]:
        eta = at(self.eta, state.t)
        b = mixing(eta, self.tau)
        anchor = Geometric(((state.policy, 1 - b), (state.reference, b)))
        policy, info = solve(Prox(anchor, state.reference, eta), state.policy)
        return State(policy, state.reference, state.t + 1), info
