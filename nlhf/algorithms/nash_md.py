"""Nash mirror descent."""

from __future__ import annotations

from dataclasses import dataclass

from nlhf.core import Geometric, Info, Prox, Regularized, Solve, State
from nlhf.schedules import Harmonic, at, mixing


@dataclass(frozen=True)
class NashMD(Regularized):
    """Nash-MD: step from, and play against, the mixture of the policy and the reference.

        q_t ∝ pi_t^(1 - eta tau) mu^(eta tau),    pi_{t+1} ∝ q_t exp(eta P q_t)

    With `Harmonic(tau)` the last iterate converges to the regularised equilibrium. With a constant step it does
    not: the mixtures q_t are self-play with tau' = tau / (1 - eta tau) and eta' = eta (1 - eta tau), so that for
    eta' <= 4 tau' / (1 + 4 tau'^2) they converge to the equilibrium of tau'; with larger steps they may cycle.

    Args:
        eta: step size, 0 < eta tau <= 1, or a schedule.
        tau: KL strength >= 0.

    Raises ValueError if eta tau > 1.

    >>> from nlhf.tabular import ExactSolver, MatrixGame
    >>> from nlhf import run
    >>> game = MatrixGame.cyclic(3, 5 / 9, reference=[0.6, 0.3, 0.1])
    >>> run(NashMD.default(tau=0.1), ExactSolver(game), steps=1000).policy.probs.round(3)
    array([0.644, 0.228, 0.128])

    Source: Munos et al. 2024, arXiv:2312.00886, section 5.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        mixing(at(self.eta, 0), self.tau)

    @classmethod
    def default(cls, tau: float) -> NashMD:
        """The paper's schedule, eta_t = 2 / (tau (t + 2))."""
        return cls(Harmonic(tau), tau)

    def step(self, state: State, solve: Solve) -> tuple[State, Info]:
        eta = at(self.eta, state.t)
        b = mixing(eta, self.tau)
        mix = Geometric(((state.policy, 1 - b), (state.reference, b)))
        policy, info = solve(Prox(mix, mix, eta), state.policy)
        return State(policy, state.reference, state.t + 1), info

    def rate(self, kl: float, t: int) -> float:
        """(1 - eta tau) kl + eta^2 / 24, the best constant; the published one is 2.

        The gains P(y > q) - 1/2, y ~ q, are below the uniform law on [-1/2, 1/2] in the convex order, because those of
        any set of responses cancel among themselves: log E_q exp(eta (P q - 1/2)) <= log(sinh(eta/2) / (eta/2)).
        """
        eta = at(self.eta, t)
        return (1 - mixing(eta, self.tau)) * kl + eta**2 / 24
