"""Nash-EMA: play against the moving average of your past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from nlhf.core import Geometric, Info, Prox, Regularized, Solve
from nlhf.schedules import at, check_tau, is_number, mixing


class EMAState(NamedTuple):
    """The policy, the reference, and the average of past policies, which is the opponent."""

    policy: Any
    reference: Any
    average: Any
    t: int = 0


@dataclass(frozen=True)
class NashEMA(Regularized):
    """Nash-EMA: the opponent is the exponential average of past parameters, a cheap fictitious play.

        bar_t = decay bar_{t-1} + (1 - decay) pi_t   (parameters; on a table, log-probabilities)
        pi_{t+1} ∝ pi_t^(1 - eta tau) mu^(eta tau) exp(eta P bar_t)

    A fixed point is the regularised equilibrium; no theorem says that the last iterate reaches it. On a network the
    average of parameters is not that of log-probabilities, so there the path differs from the table's.

    Args:
        eta: step size, 0 < eta tau <= 1, or a schedule.
        tau: KL strength >= 0.
        decay: weight of the past in the average, in [0, 1); 0 is `SelfPlay`.

    Raises ValueError if eta tau > 1 or decay is out of range.

    >>> from nlhf.tabular import ExactSolver, MatrixGame
    >>> from nlhf import run
    >>> game = MatrixGame.cyclic(3, 5 / 9, reference=[0.6, 0.3, 0.1])
    >>> run(NashEMA.default(tau=0.1), ExactSolver(game), steps=500).policy.probs.round(6)
    array([0.64373 , 0.228498, 0.127772])

    Source: Munos et al. 2024, arXiv:2312.00886, section 6; the recursion is the usual one for averages.
    """

    decay: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        mixing(at(self.eta, 0), self.tau)
        if not (is_number(self.decay) and 0 <= self.decay < 1):
            raise ValueError(f"decay must be in [0, 1), got {self.decay!r}")

    @classmethod
    def default(cls, tau: float) -> NashEMA:
        """The step of `SelfPlay.default`, eta = 4 tau / (1 + 4 tau^2)."""
        return cls(4 * check_tau(tau, positive=True) / (1 + 4 * tau**2), tau)

    def init(self, policy: Any, reference: Any = None) -> EMAState:
        """The state at t = 0: the average is the initial policy."""
        return EMAState(policy, reference or policy.freeze(), policy.freeze())

    def step(self, state: EMAState, solve: Solve) -> tuple[EMAState, Info]:
        eta = at(self.eta, state.t)
        b = mixing(eta, self.tau)
        average = state.average.lerp(state.policy, 1 - self.decay)
        anchor = Geometric(((state.policy, 1 - b), (state.reference, b)))
        policy, info = solve(Prox(anchor, average, eta), state.policy)
        return EMAState(policy, state.reference, average, state.t + 1), info
