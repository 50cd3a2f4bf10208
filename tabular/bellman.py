"""The distributional Bellman operator on a grid of atoms, in CDF coordinates, where it is affine.

A return table is F (S, A, m - 1), F[s, a, i] = P(G(s, a) <= z_i), the last value of a CDF being 1. Push an atom z_j
through r + gamma z, share its mass between its neighbours: mass up to z_i then is G_i(r + gamma z_j), with
G_i(z) = clip((z_{i+1} - z) / stride, 0, 1), and Abel summation gives

    (T F)(s, a) = D_{s,a} sum_{s',a'} P(s' | s, a) pi(a' | s') F(s', a') + c_{s,a}
    D_{s,a}[i, j] = E[G_i(R + gamma z_j) - G_i(R + gamma z_{j+1})],   c_{s,a}[i] = E[G_i(R + gamma z_m)]

D is non-negative with column sums gamma and at most two entries to a column and reward: T contracts W1 by gamma and
Cramér's distance by sqrt(gamma).

Source: Rowland, Wenliang, Munos, Lyle, Tang and Dabney 2024, arXiv:2402.07598 (the CDF operator).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from math import floor
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike

from nlhf.schedules import check_count
from nlhf.tabular.mdp import MDP
from nlhf.tabular.policy import Floats
from nlhf.tabular.returns import check_atoms

sparse: Any = scipy.sparse  # whose stubs know fewer arguments than it takes


def return_range(mdp: MDP) -> tuple[float, float]:
    """The smallest and the largest return that the rewards allow."""
    low, high = mdp.reward_range
    return low / (1 - mdp.gamma), high / (1 - mdp.gamma)


def grid(mdp: MDP, atoms: int | ArrayLike, clip: bool = False) -> Floats:
    """(m,) atoms: so many from the smallest to the largest return, or those given, which must hold every return.

    Raises ValueError if R + gamma z can leave a grid that is given, unless `clip`.
    """
    low, high = return_range(mdp)
    if np.ndim(atoms) == 0:
        check_count("atoms", atoms, 2)
        m = int(np.asarray(atoms))
        if high == low:  # certain returns: any stride will do
            low, high = low - 0.5, high + 0.5
        return check_atoms(low + (high - low) * np.arange(m) / (m - 1))
    z, slack = check_atoms(atoms), 1e-9 * max(1.0, abs(low), abs(high))
    least, most = mdp.reward_range
    reached = least + mdp.gamma * z[0], most + mdp.gamma * z[-1]
    if not clip and (reached[0] < z[0] - slack or reached[1] > z[-1] + slack):
        raise ValueError(
            f"atoms must hold R + gamma z for every reward and atom: from {reached[0]:.6g} to {reached[1]:.6g}, "
            f"got {z[0]:.6g} to {z[-1]:.6g}; pass clip=True to let mass pile up at the ends"
        )
    return z


@dataclass(frozen=True, eq=False)
class Shift:
    """D and c: what a reward and a discount do to CDFs on the grid, for every state and action.

    Args:
        mdp: the decision process.
        atoms: (m,) the grid.
    """

    mdp: MDP
    atoms: Floats

    @property
    def shape(self) -> tuple[int, int]:
        """(S A, m - 1)."""
        return self.mdp.n_states * self.mdp.n_actions, self.atoms.size - 1

    @cached_property
    def masses(self) -> Floats:
        """(S A, K) the probabilities of the rewards."""
        return np.ascontiguousarray(self.mdp.reward_probs.reshape(self.shape[0], -1))

    @cached_property
    def moves(self) -> Floats:
        """(S A, K) where r + gamma z_1 lands, in strides; moves that leave no mass on the grid are all alike."""
        z, r, m = self.atoms, self.mdp.rewards.reshape(self.shape[0], -1), self.atoms.size
        return np.clip((r + (self.mdp.gamma - 1) * z[0]) / (z[1] - z[0]), -m, m)

    @cached_property
    def _landed(self) -> tuple[Floats, Floats]:
        """(S A, K, m) where r + gamma z_j lands, in strides, and (S A, K) with which probability."""
        return self._land(self.atoms), self.masses

    def _land(self, z: Floats) -> Floats:
        """(S A, K, ...) where r + gamma z lands, in strides, on the grid."""
        r, low, stride = self.mdp.rewards.reshape(self.shape[0], -1, 1), self.atoms[0], self.atoms[1] - self.atoms[0]
        return np.clip((r + self.mdp.gamma * z - low) / stride, 0, self.atoms.size - 1)

    @cached_property
    def band(self) -> tuple[int, int]:
        """How many cells below and above itself a cell of D F draws on, at most."""
        gamma, last = self.mdp.gamma, self.shape[1] - 1
        if not gamma:
            return 0, 0
        lowest, highest = -self.moves.max() / gamma, (last - self.moves.min()) / gamma - last
        return max(0, -floor(lowest)), max(0, floor(highest) + floor(1 / gamma) + 1)

    @cached_property
    def compiles(self) -> bool:
        """Whether compiled sweeps are to be had, and worth loading; they take a gamma of 1/2 or more."""
        n, cells = self.shape
        return n * cells > 50_000 and self.mdp.gamma >= 0.5 and find_spec("numba") is not None

    @cached_property
    def matrix(self) -> Any:
        """(S A (m - 1), S A (m - 1)) D, block-diagonal and sparse; some of the entries stored are 0."""
        n, cells = self.shape
        t, q = self._landed
        rewards = q.shape[1]
        first = np.minimum(t[..., :-1].astype(np.int32), cells - 1)
        left = np.clip(first + 1 - t[..., :-1], 0, 1) - np.clip(first + 1 - t[..., 1:], 0, 1)
        right = np.clip(first + 2 - t[..., :-1], 0, 1) - np.clip(first + 2 - t[..., 1:], 0, 1)
        right[first == cells - 1] = 0.0  # mass that lands above the last cell is the coordinate left out
        base = np.arange(n, dtype=np.int32)[:, None, None] * cells
        rows = np.stack([base + first, base + np.minimum(first + 1, cells - 1)], axis=-1)
        data = np.stack([left, right], axis=-1) * q[..., None, None]
        # column by column: two entries for each reward, of which some are 0
        entries, indices = (np.ascontiguousarray(x.transpose(0, 2, 1, 3)).ravel() for x in (data, rows))
        starts = np.arange(n * cells + 1, dtype=np.int32) * (2 * rewards)
        matrix = sparse.csc_array((entries, indices, starts), shape=(n * cells, n * cells))
        if rewards > 1:
            matrix.sum_duplicates()
        return matrix

    @cached_property
    def constant(self) -> Floats:
        """(S A, m - 1) c."""
        above = np.clip(np.arange(1, self.atoms.size) - self._land(self.atoms[-1:]), 0, 1)
        return np.sum(self.masses[..., None] * above, axis=1)

    def __call__(self, cdf: Floats) -> Floats:
        """D applied to tables (S A, m - 1)."""
        return (self.matrix @ cdf.ravel()).reshape(self.shape)

    def average(self, shares: Floats, law: Floats) -> Floats:
        """(m - 1,) sum_x shares_x D_x law, over state-action pairs x."""
        if self.compiles:
            from nlhf.tabular import sweeps

            return sweeps.average(self, shares, law)
        return shares @ self(np.broadcast_to(law, self.shape))


@dataclass(frozen=True, eq=False)
class Linear:
    """F -> D P (w F), the linear part of the Bellman operator of w (S, A): a policy, or traces times a policy.

    `constant` is what makes it affine where w is a policy.
    """

    shift: Shift
    weights: Floats

    @property
    def shape(self) -> tuple[int, int]:
        """(S A, m - 1)."""
        return self.shift.shape

    @property
    def constant(self) -> Floats:
        """(S A, m - 1) c, of the affine operator of a policy."""
        return self.shift.constant

    @cached_property
    def visits(self) -> Floats:
        """(S,) about how often each state is met in the long run: shares of 1."""
        mdp = self.shift.mdp
        share, change = np.full(mdp.n_states, 1 / mdp.n_states), 1.0
        for step in range(60):
            after = np.asarray((share[:, None] * self.weights).ravel() @ mdp.transitions) + 1e-300
            after /= after.sum()
            if step > 10:  # it may go round in circles
                after = 0.5 * share + 0.5 * after
            change, share = float(np.abs(after - share).sum()), after
            if change < 1e-6:
                break
        return share

    def __call__(self, cdf: Floats) -> Floats:
        """(S A, m - 1)."""
        return self.after(self.mixed(cdf))

    def mixed(self, cdf: Floats) -> Floats:
        """(S, m - 1) w F, the sum over actions."""
        states, actions = self.weights.shape
        if actions > 1:
            return np.asarray((self.weights[:, None, :] @ cdf.reshape(states, actions, -1)).reshape(states, -1))
        return cdf if self._certain else self.weights * cdf

    def after(self, laws: Floats) -> Floats:
        """(S A, m - 1) D P laws, what the laws of states (S, m - 1) are one step before."""
        if self.shift.compiles:
            from nlhf.tabular import sweeps

            return sweeps.after(self.shift, laws)
        return self.shift(np.asarray(self.shift.mdp.transitions @ laws))

    @cached_property
    def _certain(self) -> bool:
        """Whether there is nothing to weigh."""
        return bool((self.weights == 1).all())

    @property
    def stride(self) -> float:
        """The distance between two atoms."""
        return float(self.shift.atoms[1] - self.shift.atoms[0])

    def cramer(self, difference: Floats) -> float:
        """The largest Cramér norm of a row (S A, m - 1)."""
        return float(np.sqrt(self.stride * np.square(difference).sum(axis=1).max()))

    def explicit(self) -> Any:
        """(S A (m - 1), S A (m - 1)) the same as one sparse matrix."""
        chain = sparse.csr_array(self.shift.mdp.pairs(self.weights))
        return sparse.csr_array(self.shift.matrix @ sparse.kron(chain, sparse.eye_array(self.shape[1]), format="csr"))
