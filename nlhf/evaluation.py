"""Algorithms that evaluate a policy by its return distribution: they pose `Backup` sub-problems.

All but one differ only in the trace c(s, a) that they give to later temporal-difference errors,

    A_c eta = eta + (I - T^{c mu})^{-1} (T^pi eta - eta)

with T^w the distributional Bellman operator that averages the next pair by the weights w. No array library is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nlhf.core import Array, Info
from nlhf.schedules import check_count, is_number


class Backup(NamedTuple):
    """eta + (I - T^{c mu})^{-1} (T^pi eta - eta), projected: what to do with a return table once."""

    returns: Any
    """eta(s, a): laws, or signed measures of mass 1."""
    target: Array
    """(S, A) pi, the policy to evaluate."""
    behaviour: Array
    """(S, A) mu, the policy that acts after the first action."""
    trace: Array | float
    """c(s, a) >= 0, (S, A) or a number: how much of each later temporal-difference error is kept."""


class EvalState(NamedTuple):
    """What the next iteration needs."""

    returns: Any
    t: int = 0

    @property
    def policy(self) -> Any:
        """The returns: what `nlhf.run` measures and keeps."""
        return self.returns


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What the algorithms share.

    Args:
        target: (S, A) pi, the policy to evaluate.
    """

    target: Array = field(repr=False)

    def init(self, returns: Any, reference: Any = None) -> EvalState:
        """The state at t = 0."""
        return EvalState(returns)

    def step(self, state: EvalState, solve: Any) -> tuple[EvalState, Info]:
        """One iteration, as a function: the state that comes in is left as it is."""
        returns, info = solve(Backup(state.returns, self.target, self.behaviour_or_target, self.trace), state.returns)
        return EvalState(returns, state.t + 1), info

    @property
    def behaviour_or_target(self) -> Array:
        """mu, which is pi on policy."""
        return self.target

    @property
    def trace(self) -> Array | float:
        """c(s, a)."""
        return 0.0

    def modulus(self, gamma: float, p: float = 2.0) -> float:
        """The factor by which an iteration shrinks sup_{s,a} l_p of CDFs (p = 1: W1, p = 2: Cramér), if below 1.

        max_s  g sum_a |pi - c mu| / (1 - g sum_a c mu),   g = gamma^(1/p)

        because A d = T^{c mu} A d + T^{pi - c mu} d for a difference d: at the worst next state the norm x of A d is at
        most g sum_a c mu x + g sum_a |pi - c mu| |d|.
        """
        g, weights = gamma ** (1 / p), self.trace * self.behaviour_or_target
        kept, left = g * weights.sum(-1), g * abs(self.target - weights).sum(-1)
        return float((left / (1 - kept)).max()) if (kept < 1).all() else float("inf")


@dataclass(frozen=True, eq=False)
class CategoricalDP(Evaluation):
    """One distributional Bellman backup per iteration, eta <- T^pi eta. c = 0.

    Args:
        target: (S, A) pi, the policy to evaluate.

    >>> from nlhf import run
    >>> from nlhf.tabular import MDP, BackupSolver
    >>> mdp = MDP([[[1.0]]], [[[0.0, 1.0]]], gamma=0.5, reward_probs=[[[0.5, 0.5]]])
    >>> run(CategoricalDP(mdp.uniform), BackupSolver(mdp, atoms=5), steps=60).policy.probs[0, 0].round(9)
    array([0.125, 0.25 , 0.25 , 0.25 , 0.125])

    Source: Rowland et al. 2018, arXiv:1802.08163.
    """


@dataclass(frozen=True, eq=False)
class _OffPolicy(Evaluation):
    behaviour: Array = field(repr=False)
    lam: float

    def __post_init__(self) -> None:
        if not is_number(self.lam) or not 0 <= self.lam <= 1:
            raise ValueError(f"lam must be a number in [0, 1], got {self.lam!r}")
        if self.target.shape != self.behaviour.shape:
            raise ValueError(
                f"behaviour must have the shape of target, {self.target.shape}, got {self.behaviour.shape}"
            )

    @property
    def behaviour_or_target(self) -> Array:
        return self.behaviour

    @property
    def _ratio(self) -> Array:
        """pi / mu, and 0 where mu is 0 and no trace passes."""
        acts = self.behaviour > 0
        return self.target / (self.behaviour + ~acts) * acts


class QLambda(_OffPolicy):
    """Off-policy distributional Q(lambda), without importance weights: c = lambda.

    Iterates are signed measures. In l_p it contracts for |pi - mu|_1 < (1 - gamma^(1/p)) / (lambda gamma^(1/p)).

    Args:
        target: (S, A) pi, the policy to evaluate.
        behaviour: (S, A) mu, the policy that acts.
        lam: lambda in [0, 1].

    Raises ValueError for a lam outside of [0, 1] or policies of two shapes.

    >>> from nlhf import run
    >>> from nlhf.tabular import BackupSolver, random_off_policy
    >>> mdp, target, behaviour = random_off_policy(5, actions=2, distance=0.2, gamma=0.9, seed=0)
    >>> algorithm = QLambda(target, behaviour, lam=0.5)
    >>> trace = run(algorithm, BackupSolver(mdp, atoms=21), steps=200)
    >>> float(abs(trace.policy.mean - mdp.values(target)).max()) < 1e-9
    True

    Source: Tang et al. 2024, arXiv:2402.05766.
    """

    @property
    def trace(self) -> float:
        """lambda."""
        return self.lam


class Retrace(_OffPolicy):
    """Distributional Retrace: c = lambda min(1, pi / mu), which never overshoots the target.

    Args:
        target: (S, A) pi, the policy to evaluate.
        behaviour: (S, A) mu, the policy that acts.
        lam: lambda in [0, 1].

    Raises ValueError for a lam outside of [0, 1] or policies of two shapes.

    Source: Munos et al. 2016, arXiv:1606.02647; Tang et al. 2022, arXiv:2207.07570 (distributional).
    """

    @property
    def trace(self) -> Array:
        """lambda min(1, pi / mu)."""
        ratio = self._ratio
        return self.lam * (ratio * (ratio < 1) + 1.0 * (ratio >= 1))


class TreeBackup(_OffPolicy):
    """Distributional tree backup: c = lambda pi.

    Args:
        target: (S, A) pi, the policy to evaluate.
        behaviour: (S, A) mu, the policy that acts.
        lam: lambda in [0, 1].

    Raises ValueError for a lam outside of [0, 1] or policies of two shapes.

    Source: Precup, Sutton and Singh 2000.
    """

    @property
    def trace(self) -> Array:
        """lambda pi."""
        return self.lam * self.target


@dataclass(frozen=True, eq=False)
class NStep(Evaluation):
    """Uncorrected n-step backups, (T^mu)^(n-1) T^pi eta: one backup by pi, then n - 1 by mu.

    Biased off policy: its fixed point is the law of acting by mu for n - 1 steps, then once by pi, and so on.

    Args:
        target: (S, A) pi, the policy to evaluate.
        behaviour: (S, A) mu, the policy that acts.
        n: number of steps >= 1.

    Raises ValueError unless n is a positive integer.

    Source: Hessel et al. 2018, arXiv:1710.02298 (its use); the bias is computed here.
    """

    behaviour: Array = field(repr=False)
    n: int

    def __post_init__(self) -> None:
        check_count("n", self.n, 1)

    def step(self, state: EvalState, solve: Any) -> tuple[EvalState, Info]:
        returns, info = solve(Backup(state.returns, self.target, self.behaviour, 0.0), state.returns)
        for _ in range(self.n - 1):
            returns, more = solve(Backup(returns, self.behaviour, self.behaviour, 0.0), returns)
            info = info + more
        return EvalState(returns, state.t + 1), info

    def modulus(self, gamma: float, p: float = 2.0) -> float:
        """gamma^(n / p)."""
        return gamma ** (self.n / p)
