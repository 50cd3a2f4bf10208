"""What claims are tried on: games with policies, and decision processes, from ordinary to degenerate.

An instance is plain numbers. It prints as code that makes it again, and it can be moved a little in every direction
that keeps it one of its kind, which is how the search for the worst case goes about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, get_type_hints

import hypothesis.strategies as st
import numpy as np
from numpy.typing import NDArray

from nlhf import metrics
from nlhf.tabular import MDP, MatrixGame, Tabular, regularized_nash
from nlhf.tabular.bellman import Linear, Shift, grid

Floats = NDArray[np.float64]
Move = Callable[[Any, np.random.Generator, float], Any]

TAU = (1e-3, 10.0)
"""The KL strengths that games are drawn and moved in."""


class Instance:
    """A frozen dataclass of numbers and arrays; a field that may be moved says how in its annotation."""

    moves: ClassVar[dict[str, Move]] = {}

    def __init_subclass__(cls) -> None:
        hints = get_type_hints(cls, include_extras=True)
        cls.moves = {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}

    def __post_init__(self) -> None:
        for name in self.moves:
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))

    def moved(self, rng: np.random.Generator, scale: float) -> Any:
        """A neighbour, about `scale` away in every field, itself a valid instance."""
        some: Any = self
        return replace(some, **{name: move(getattr(self, name), rng, scale) for name, move in self.moves.items()})

    def __repr__(self) -> str:
        some: Any = self
        shown = (getattr(self, f.name) for f in fields(some))
        plain = (value.tolist() if isinstance(value, np.ndarray) else value for value in shown)
        inside = ", ".join(f"{f.name}={value!r}" for f, value in zip(fields(some), plain, strict=True))
        return f"{type(self).__name__}({inside})".replace("-inf", 'float("-inf")')


def _win_prob(value: Floats, rng: np.random.Generator, scale: float) -> Floats:
    upper = np.triu(rng.standard_normal(value.shape), 1)
    # bounds are often attained where preferences are certain: stay on the faces once there, one time in two
    there = np.clip(value + scale * (upper - upper.T), 0, 1)
    there = np.where((value * (1 - value) == 0) & (rng.uniform() < 0.5), value, there)
    return 0.5 + (np.triu(there - 0.5, 1) - np.triu(there - 0.5, 1).T)


def _logits(value: Floats, rng: np.random.Generator, scale: float) -> Floats:
    return value + 4 * scale * rng.standard_normal(value.shape)


def _tau(value: float, rng: np.random.Generator, scale: float) -> float:
    return float(np.clip(value * np.exp(2 * scale * rng.standard_normal()), *TAU))


def _share(value: float, rng: np.random.Generator, scale: float) -> float:
    return float(np.clip(value + scale * rng.standard_normal(), 0, 1))


def _rows(value: Floats, rng: np.random.Generator, scale: float) -> Floats:
    """Rows of probabilities: towards another law, which may be certain."""
    other = rng.dirichlet(np.full(value.shape[-1], 0.3), size=value.shape[:-1])
    there = (1 - scale) * value + scale * other
    return there / there.sum(axis=-1, keepdims=True)


def _units(value: Floats, rng: np.random.Generator, scale: float) -> Floats:
    return np.clip(value + scale * rng.standard_normal(value.shape), 0, 1)


def _gamma(value: float, rng: np.random.Generator, scale: float) -> float:
    return float(np.clip(1 - (1 - value) * np.exp(scale * rng.standard_normal()), 0.05, 0.97))


@dataclass(frozen=True, repr=False)
class Duel(Instance):
    """A preference game with a reference, a KL strength and three policies.

    Args:
        win_prob: (n, n) P(y > z).
        reference, policy, other, third: (n,) logits.
        tau: KL strength, in [1e-3, 10].
        share: in [0, 1], for whatever a claim takes a share of, such as the largest step size that it allows.
    """

    win_prob: Annotated[Floats, _win_prob]
    reference: Annotated[Floats, _logits]
    policy: Annotated[Floats, _logits]
    other: Annotated[Floats, _logits]
    third: Annotated[Floats, _logits]
    tau: Annotated[float, _tau]
    share: Annotated[float, _share]

    @property
    def n(self) -> int:
        """Number of responses."""
        return self.win_prob.shape[0]

    @cached_property
    def mu(self) -> Tabular:
        """The reference."""
        return Tabular.from_logits(self.reference)

    @cached_property
    def pi(self) -> Tabular:
        """A policy."""
        return Tabular.from_logits(self.policy)

    @cached_property
    def q(self) -> Tabular:
        """Another policy."""
        return Tabular.from_logits(self.other)

    @cached_property
    def p(self) -> Tabular:
        """A third policy."""
        return Tabular.from_logits(self.third)

    @cached_property
    def game(self) -> MatrixGame:
        """The game, with its reference."""
        return MatrixGame(self.win_prob, self.mu)

    @cached_property
    def skew(self) -> Floats:
        """(n, n) M = P - 1/2, antisymmetric."""
        return np.asarray(self.win_prob - 0.5)

    @cached_property
    def star(self) -> Tabular:
        """pi*, the equilibrium of the game regularised by tau."""
        return regularized_nash(self.game, self.tau).policy

    def prefers(self, one: Any, two: Any) -> float:
        """P_tau(one > two) = P(one > two) - tau KL(one, mu) + tau KL(two, mu), from its definition."""
        win = float(np.exp(metrics.table(one)) @ self.win_prob @ np.exp(metrics.table(two)))
        return win - self.tau * metrics.kl(one, self.mu) + self.tau * metrics.kl(two, self.mu)


def win_probs(rng: np.random.Generator, n: int, kind: str) -> Floats:
    """(n, n): independent, certain, transitive, a circular tournament, all ties, few values, or with a winner."""
    if kind == "bradley-terry":
        return np.asarray(MatrixGame.bradley_terry(2 * rng.standard_normal(n)).matrix)
    if kind == "cyclic":
        return np.asarray(MatrixGame.cyclic(n, float(rng.choice([0.6, 0.9, 1.0]))).matrix)
    upper = np.triu(rng.uniform(-0.5, 0.5, (n, n)), 1)
    if kind == "few":
        upper = np.round(2 * upper) / 2
    skew = upper - upper.T
    if kind == "winner":
        skew[0, 1:], skew[1:, 0] = np.abs(skew[0, 1:]), -np.abs(skew[0, 1:])
    return np.asarray(0.5 + {"certain": 0.5 * np.sign(skew), "ties": 0 * skew}.get(kind, skew))


KINDS = ("independent", "certain", "bradley-terry", "cyclic", "ties", "few", "winner")


@st.composite
def duels(
    draw: st.DrawFn, tau: tuple[float, float] = TAU, sizes: tuple[int, int] = (2, 8), kinds: tuple[str, ...] = KINDS
) -> Duel:
    """Mostly small games, some with up to 60 responses; policies from flat to a mass of 1e-12."""
    n = draw(st.integers(*sizes) | st.sampled_from([13, 31, 60])) if sizes == (2, 8) else draw(st.integers(*sizes))
    kind, spread = draw(st.sampled_from(kinds)), draw(st.sampled_from([1.0, 0.1, 4.0, 0.0]))
    tiny = draw(st.sampled_from([False, False, False, True]))
    strength = float(np.exp(draw(st.floats(*np.log(tau)))))
    share = draw(st.floats(0, 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    laws = spread * rng.standard_normal((4, n))
    if tiny:
        laws[np.arange(4), rng.integers(0, n, 4)] -= np.log(1e12)
    return Duel(win_probs(rng, n, kind), laws[0], laws[1], laws[2], laws[3], float(np.clip(strength, *tau)), share)


@dataclass(frozen=True, repr=False)
class Process(Instance):
    """A decision process, a policy to evaluate, one that acts, and a grid of atoms.

    Args:
        transitions: (S, A, S) probabilities.
        rewards: (S, A, K) in [0, 1].
        reward_probs: (S, A, K) their law.
        gamma: discount in [0, 1).
        target, behaviour: (S, A) probabilities: pi and mu.
        lam: trace parameter in [0, 1].
        atoms: m >= 2.
        seed: of whatever else a claim draws.
    """

    transitions: Annotated[Floats, _rows]
    rewards: Annotated[Floats, _units]
    reward_probs: Annotated[Floats, _rows]
    gamma: Annotated[float, _gamma]
    target: Annotated[Floats, _rows]
    behaviour: Annotated[Floats, _rows]
    lam: Annotated[float, _share]
    atoms: int
    seed: int

    @property
    def rng(self) -> np.random.Generator:
        """The same draws every time."""
        return np.random.default_rng(self.seed)

    @cached_property
    def mdp(self) -> MDP:
        """The process."""
        certain = self.rewards.shape[-1] == 1
        rewards = self.rewards[..., 0] if certain else self.rewards
        return MDP(self.transitions, rewards, self.gamma, None if certain else self.reward_probs)

    @cached_property
    def grid(self) -> Floats:
        """(m,) atoms over all returns that are possible."""
        return grid(self.mdp, self.atoms)

    @cached_property
    def operator(self) -> Linear:
        """T: a table (S A, m - 1) of CDFs -> that of the projected Bellman backup under the target policy."""
        return Linear(Shift(self.mdp, self.grid), self.target)


@st.composite
def processes(draw: st.DrawFn, actions: int = 3, gamma_max: float = 0.97, certain: bool = False) -> Process:
    """1 to 5 states: spread-out, certain, absorbing or sparse transitions; rewards in [0, 1], at its ends, or laws."""
    n, a = draw(st.integers(1, 5)), draw(st.integers(1, actions))
    kind = draw(st.sampled_from(["dirichlet", "certain", "absorbing", "sparse"]))
    paid = draw(st.sampled_from(["uniform", "ends", "law"][: 2 if certain else 3]))
    gamma, m = draw(st.floats(0.05, gamma_max)), draw(st.integers(2, 30))
    lam, concentration = draw(st.floats(0, 1)), draw(st.sampled_from([1.0, 0.05, 10.0]))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    if kind == "dirichlet":
        rows = rng.dirichlet(np.full(n, concentration), size=(n, a))
    else:
        towards = np.tile(np.arange(n)[:, None], (1, a)) if kind == "absorbing" else rng.integers(0, n, (n, a))
        rows = np.eye(n)[towards]
        if kind == "sparse":
            rows = 0.5 * rows + 0.5 * np.eye(n)[rng.integers(0, n, (n, a))]
    rows = rows / rows.sum(axis=-1, keepdims=True)
    shape = (n, a, 3 if paid == "law" else 1)
    rewards = rng.integers(0, 2, shape).astype(float) if paid == "ends" else rng.uniform(size=shape)
    laws = rng.dirichlet(np.ones(shape[-1]), size=(n, a))
    target, behaviour = (rng.dirichlet(np.ones(a), size=n) for _ in range(2))
    return Process(rows, rewards, laws, gamma, target, behaviour, lam, m, seed)
