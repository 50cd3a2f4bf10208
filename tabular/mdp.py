"""Finite Markov decision processes with known transitions and rewards."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike
from scipy.sparse.linalg import spsolve

from nlhf.schedules import check_count, is_number
from nlhf.tabular.policy import Floats

Transitions: TypeAlias = Any
"""A dense array (S A, S), or a SciPy sparse array of that shape."""

sparse: Any = scipy.sparse  # whose stubs know fewer arguments than it takes


class MDP:
    """S states, A actions; in state s action a pays R ~ law(s, a) and leads to s' with probability P(s' | s, a).

    Args:
        transitions: (S, A, S) dense, or a SciPy sparse array (S A, S) with row s A + a; rows sum to 1 (within 1e-9).
        rewards: (S,), (S, A), or (S, A, K) with `reward_probs`; the reward is independent of s' given s and a.
        gamma: discount in [0, 1).
        reward_probs: (S, A, K) probabilities of the K rewards; None if rewards are certain.

    Raises ValueError naming the argument, the index and the value that is wrong.

    >>> mdp = MDP([[[0.0, 1.0]], [[1.0, 0.0]]], rewards=[1.0, 0.0], gamma=0.5)
    >>> mdp.values(mdp.uniform)[:, 0].round(12)
    array([1.33333333, 0.66666667])
    """

    def __init__(
        self, transitions: Any, rewards: ArrayLike, gamma: float, reward_probs: ArrayLike | None = None
    ) -> None:
        if not is_number(gamma) or not 0 <= gamma < 1:
            raise ValueError(f"gamma must be a number in [0, 1), got {gamma!r}")
        self.gamma = float(gamma)
        if sparse.issparse(transitions):
            self.transitions: Transitions = sparse.csr_array(transitions, dtype=np.float64)
            rows, states = self.transitions.shape
            values = self.transitions.data
        else:
            dense = np.array(transitions, dtype=np.float64)
            if dense.ndim != 3:
                raise ValueError(f"transitions must have shape (S, A, S) or be sparse (S A, S), got {dense.shape}")
            rows, states = dense.shape[0] * dense.shape[1], dense.shape[2]
            self.transitions = values = dense.reshape(rows, states)
            if dense.shape[0] != states:
                raise ValueError(f"transitions must have shape (S, A, S), got {dense.shape}")
        if not states or not rows or rows % states:
            raise ValueError(f"transitions must have S A rows for S columns, got {rows} and {states}")
        self.n_states, self.n_actions = int(states), rows // int(states)
        if not (values >= 0).all():
            raise ValueError(f"transitions must hold probabilities, got {values[~(values >= 0)][0]}")
        total = np.asarray(self.transitions.sum(axis=1)).ravel()
        if (wrong := ~(np.abs(total - 1) <= 1e-9)).any():
            s, a = divmod(int(np.argmax(wrong)), self.n_actions)
            raise ValueError(f"transitions must sum to 1, got {total[wrong][0]:.10g} for state {s}, action {a}")
        self.rewards, self.reward_probs = self._law(rewards, reward_probs)

    def _law(self, rewards: ArrayLike, probs: ArrayLike | None) -> tuple[Floats, Floats]:
        """(S, A, K) rewards and their probabilities."""
        shape, r = (self.n_states, self.n_actions), np.array(rewards, dtype=np.float64)
        if not np.isfinite(r).all():
            at = tuple(int(i) for i in np.argwhere(~np.isfinite(r))[0])
            raise ValueError(f"rewards must be finite numbers, got {r[at]} at {at}")
        if probs is None:
            if r.shape not in (shape[:1], shape):
                raise ValueError(f"rewards must have shape {shape[:1]} or {shape}, got {r.shape}")
            r = np.broadcast_to(r.reshape(*r.shape, *(1,) * (2 - r.ndim)), shape)[..., None]
            return r, np.ones_like(r)
        q = np.array(probs, dtype=np.float64)
        if r.shape[:2] != shape or r.ndim != 3 or q.shape != r.shape:
            raise ValueError(f"rewards and reward_probs must have shape (*{shape}, K), got {r.shape} and {q.shape}")
        if not ((q >= 0).all() and (np.abs(q.sum(axis=-1) - 1) <= 1e-9).all()):
            raise ValueError(f"reward_probs must be probabilities that sum to 1, got sums from {q.sum(axis=-1).min()}")
        return r, q

    @property
    def uniform(self) -> Floats:
        """(S, A) the policy that takes all actions alike."""
        return np.full((self.n_states, self.n_actions), 1 / self.n_actions)

    @property
    def reward_range(self) -> tuple[float, float]:
        """The smallest and the largest reward that can be paid."""
        paid = self.rewards[self.reward_probs > 0]
        return float(paid.min()), float(paid.max())

    @property
    def mean_rewards(self) -> Floats:
        """(S, A) E[R | s, a]."""
        return np.sum(self.rewards * self.reward_probs, axis=-1)

    def check_policy(self, policy: ArrayLike, name: str = "policy") -> Floats:
        """The policy as an array (S, A); ValueError unless its rows are probabilities that sum to 1."""
        table, shape = np.asarray(policy, dtype=np.float64), (self.n_states, self.n_actions)
        if table.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {table.shape}")
        total = table.sum(axis=1)
        if not ((table >= 0).all() and (np.abs(total - 1) <= 1e-9).all()):
            s = int(np.argmax(~((table >= 0).all(axis=1) & (np.abs(total - 1) <= 1e-9))))
            raise ValueError(f"{name} must be probabilities that sum to 1, got {table[s].tolist()} in state {s}")
        return table

    def expect(self, table: Floats) -> Floats:
        """(S, A, ...) E[table(s') | s, a] of a table (S, ...)."""
        flat = table.reshape(self.n_states, -1)
        return np.asarray(self.transitions @ flat).reshape(self.n_states, self.n_actions, *table.shape[1:])

    def pairs(self, policy: Floats) -> Any:
        """(S A, S A) the Markov chain of state-action pairs, as a sparse or dense matrix like the transitions."""
        pairs = sparse.csr_array(
            (policy.ravel(), np.arange(policy.size), np.arange(0, policy.size + 1, self.n_actions)),
            shape=(self.n_states, policy.size),
        )
        return self.transitions @ pairs

    def values(self, policy: ArrayLike) -> Floats:
        """(S, A) Q(s, a) = E[sum_t gamma^t R_t], by one linear solve."""
        return self.moments(policy, 1)[0]

    def moments(self, policy: ArrayLike, order: int = 2) -> Floats:
        """(order, S, A) E[G^k], k = 1 ... order, of the return G: one linear solve each.

        E[G^k] = sum_j C(k, j) E[R^(k-j)] gamma^j E[G'^j]
        """
        from math import comb

        pi, found = self.check_policy(policy), [np.ones((self.n_states, self.n_actions))]
        for k in range(1, order + 1):
            known = np.zeros_like(found[0])
            for j in range(k):
                powers = np.sum(self.rewards ** (k - j) * self.reward_probs, axis=-1)
                known += comb(k, j) * powers * self.gamma**j * self.expect(np.sum(pi * found[j], axis=1))
            found.append(self._solve(pi, known, self.gamma**k))
        return np.stack(found[1:])

    def accumulate(self, policy: Floats, amounts: Floats) -> Floats:
        """(S, A) x = amounts + gamma P (pi x): amounts (S, A) summed along the way, discounted."""
        return self._solve(policy, amounts, self.gamma)

    def _solve(self, policy: Floats, known: Floats, discount: float) -> Floats:
        """x with x = known + discount P (pi x), by its state averages."""
        weigh = sparse.csr_array(
            (policy.ravel(), np.arange(policy.size), np.arange(0, policy.size + 1, self.n_actions)),
            shape=(self.n_states, policy.size),
        )
        averaged = weigh @ self.transitions
        rhs = np.sum(policy * known, axis=1)
        if sparse.issparse(averaged):
            system = sparse.eye_array(self.n_states, format="csc") - discount * sparse.csc_array(averaged)
            states = spsolve(system, rhs)
        else:
            states = np.linalg.solve(np.eye(self.n_states) - discount * averaged, rhs)
        return known + discount * self.expect(states)

    def __repr__(self) -> str:
        return f"MDP(states={self.n_states}, actions={self.n_actions}, gamma={self.gamma:g})"

    @classmethod
    def chain(cls, n: int, gamma: float, reset: float = 0.1) -> MDP:
        """x leads to x + 1 with probability 1 - reset and to 0 otherwise; only the last state pays, 1, then 0 follows.

        >>> MDP.chain(3, gamma=0.9, reset=0.5).transitions
        array([[0.5, 0.5, 0. ],
               [0.5, 0. , 0.5],
               [1. , 0. , 0. ]])
        """
        check_count("n", n, 1)
        _check_probability("reset", reset)
        rows = np.zeros((n, 1, n))
        rows[np.arange(n), 0, (np.arange(n) + 1) % n] += 1 - reset
        rows[:, 0, 0] += reset
        return cls(rows, np.arange(n) == n - 1, gamma)

    @classmethod
    def two_state(cls, gamma: float, stay: tuple[float, float] = (0.5, 0.5)) -> MDP:
        """State 0 pays 1 and state 1 nothing; each is kept with its probability `stay`."""
        for p in stay:
            _check_probability("stay", p)
        p, q = stay
        return cls([[[p, 1 - p]], [[1 - q, q]]], [1.0, 0.0], gamma)

    @classmethod
    def dirichlet(cls, n: int, alpha: float, gamma: float, seed: int | np.random.Generator, actions: int = 1) -> MDP:
        """Transitions from Dirichlet(alpha, ..., alpha), nearly certain for small alpha; rewards uniform on [0, 1]."""
        check_count("n", n, 1)
        check_count("actions", actions, 1)
        if not (is_number(alpha) and alpha > 0):
            raise ValueError(f"alpha must be a number > 0, got {alpha!r}")
        rng = np.random.default_rng(seed)
        rows = rng.dirichlet(np.full(n, alpha), size=(n, actions))
        rows /= rows.sum(axis=-1, keepdims=True)
        return cls(rows, rng.uniform(size=(n, actions)), gamma)

    @classmethod
    def garnet(cls, n: int, branches: int, gamma: float, seed: int | np.random.Generator, actions: int = 1) -> MDP:
        """Sparse: every action leads to `branches` random states with random probabilities; rewards uniform on [0, 1].

        Source: Archibald, McKinnon and Thomas 1995.
        """
        check_count("n", n, 1)
        check_count("actions", actions, 1)
        check_count("branches", branches, 1)
        if branches > n:
            raise ValueError(f"branches must be at most the number of states, {n}, got {branches}")
        rng = np.random.default_rng(seed)
        where = np.stack([rng.choice(n, branches, replace=False) for _ in range(n * actions)])
        share = rng.exponential(size=where.shape)
        share /= share.sum(axis=1, keepdims=True)
        rows = np.repeat(np.arange(n * actions), branches)
        transitions = sparse.csr_array((share.ravel(), (rows, where.ravel())), shape=(n * actions, n))
        return cls(transitions, rng.uniform(size=(n, actions)), gamma)

    @classmethod
    def windy_grid(cls, side: int, gamma: float, wind: float = 0.2) -> MDP:
        """A square grid, sparse, four actions: the step succeeds with probability 1 - wind, else goes anywhere nearby.

        Steps off the grid stay. The goal in the last corner pays 1 and is left for the first corner.
        """
        check_count("side", side, 2)
        _check_probability("wind", wind)
        n = side * side
        i, j = np.divmod(np.arange(n), side)
        steps = ((1, 0), (-1, 0), (0, 1), (0, -1))
        near = np.stack([np.clip(i + u, 0, side - 1) * side + np.clip(j + v, 0, side - 1) for u, v in steps], axis=1)
        near[n - 1] = 0
        share = np.full((n, 4, 4), wind / 4) + (1 - wind) * np.eye(4)
        rows = np.repeat(np.arange(n * 4), 4)
        to = np.broadcast_to(near[:, None], (n, 4, 4))
        transitions = sparse.csr_array((share.ravel(), (rows, to.ravel())), shape=(n * 4, n))
        return cls(transitions, np.arange(n) == n - 1, gamma)


def random_off_policy(
    n: int, actions: int, distance: float, gamma: float, seed: int | np.random.Generator
) -> tuple[MDP, Floats, Floats]:
    """A random MDP, a target and a behaviour policy (S, A) with |target - behaviour|_1 <= distance in every state.

    target = (1 - a) behaviour + a other for random policies, a as large as the distance allows, which is reached in the
    state where they differ most if 0 <= distance <= their largest distance.
    """
    mdp = MDP.dirichlet(n, 1.0, gamma, seed := np.random.default_rng(seed), actions)
    if not (is_number(distance) and 0 <= distance <= 2):
        raise ValueError(f"distance must be in [0, 2], got {distance!r}")
    behaviour, other = seed.dirichlet(np.full(actions, 0.3), size=(2, n))
    widest = float(np.abs(other - behaviour).sum(axis=1).max())
    share = min(1.0, distance / widest) if widest > 0 else 0.0
    target = (1 - share) * behaviour + share * other
    return mdp, target / target.sum(axis=1, keepdims=True), behaviour / behaviour.sum(axis=1, keepdims=True)


def _check_probability(name: str, value: float) -> None:
    if not (is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name} must be a probability, got {value!r}")
