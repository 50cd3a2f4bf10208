"""Self-play online mirror descent."""

from __future__ import annotations

from dataclasses import dataclass

from nlhf.core import Geometric, Info, Prox, Regularized, Solve, State
from nlhf.schedules import at, check_tau, mixing


@dataclass(frozen=True)
class SelfPlay(Regularized):
    """Online mirror descent in self-play: step from the mixture, play against yourself.

        pi_{t+1} ∝ pi_t^(1 - eta tau) mu^(eta tau) exp(eta P pi_t)

    With tau = 0 these are multiplicative weights (SPPO, DNO), of which only the average converges; with
    eta = 1 / tau every step is the best response to the last (online IPO).

    Args:
        eta: step size, 0 < eta tau <= 1, or a schedule.
        tau: KL strength >= 0.

    Raises ValueError if eta tau > 1.

    >>> from nlhf.tabular import ExactSolver, MatrixGame
    >>> from nlhf import run
    >>> game = MatrixGame.cyclic(3, 5 / 9, reference=[0.6, 0.3, 0.1])
    >>> run(SelfPlay.default(tau=0.1), ExactSolver(game), steps=500).policy.probs.round(6)
    array([0.64373 , 0.228498, 0.127772])

    Source: Calandriello et al. 2024, arXiv:2403.08635; Shani et al. 2024, arXiv:2405.14655 with one turn.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        mixing(at(self.eta, 0), self.tau)

    @classmethod
    def default(cls, tau: float) -> SelfPlay:
        """The largest step with a linear rate, eta = 4 tau / (1 + 4 tau^2)."""
        return cls(4 * check_tau(tau, positive=True) / (1 + 4 * tau**2), tau)

    def step(self, state: State, solve: Solve) -> tuple[State, Info]:
        eta = at(self.eta, state.t)
        b = mixing(eta, self.tau)
        anchor = Geometric(((state.policy, 1 - b), (state.reference, b)))
        policy, info = solve(Prox(anchor, state.policy, eta), state.policy)
        return State(policy, state.reference, state.t + 1), info

    def rate(self, kl: float, t: int) -> float:
        """(1 - eta tau) kl for eta <= 4 tau / (1 + 4 tau^2); beyond it, started at the reference, + eta^2 / 2."""
        eta = at(self.eta, t)
        # The default step is the bound itself, so its rounding must not cross it.
        noise = 0.0 if eta <= 4 * self.tau / (1 + 4 * self.tau**2) * (1 + 1e-12) else eta**2 / 2
        return (1 - mixing(eta, self.tau)) * kl + noise
