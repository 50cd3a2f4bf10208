"""Quantile dynamic programming: return laws as m equally likely values."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike

from nlhf.schedules import check_count, is_number
from nlhf.tabular.mdp import MDP
from nlhf.tabular.policy import Floats
from nlhf.tabular.returns import Quantile


@dataclass(frozen=True)
class QuantileFixedPoint:
    """Return laws, and how far the iteration has come."""

    returns: Quantile
    iterations: int
    change: float
    """W_inf between the last two iterates."""
    bound: float
    """W_inf to the fixed point of the iteration is at most gamma change / (1 - gamma)."""


def quantile_fixed_point(mdp: MDP, policy: ArrayLike, m: int = 51, tol: float = 1e-10) -> QuantileFixedPoint:
    """The return laws theta = Pi_Q T^pi theta of a policy (QDP), by iteration: a gamma-contraction in W_inf.

    Pi_Q takes the quantiles of levels (2 i - 1) / (2 m). W1 to the true return law is at most range / (2 m (1 - gamma))
    for the range of returns. Where rewards are certain r + gamma z keeps the order, so one sort of all values serves
    every state and action. Where F equals a level on an interval its lower end is taken: with ties, as in a fair coin's
    process near gamma = 1, this pulls the means down.

    Args:
        mdp: the decision process.
        policy: (S, A).
        m: number of values.
        tol: stop when `bound` is at most this.

    Raises ValueError naming the argument and the value that is wrong; ArithmeticError if rounding keeps it from tol.

    >>> mdp = MDP([[[1.0]]], [[[0.0, 1.0]]], gamma=0.5, reward_probs=[[[0.5, 0.5]]])  # the return is uniform on [0, 2]
    >>> quantile_fixed_point(mdp, [[1.0]], m=4).returns.values[0, 0].round(9)
    array([0. , 0.5, 1. , 1.5])

    Source: Bellemare, Dabney and Rowland 2023, Distributional Reinforcement Learning, chapter 5; Rowland et al. 2024,
    arXiv:2301.04462 (the fixed point and its error).
    """
    pi = mdp.check_policy(policy)
    check_count("m", m, 1)
    if not is_number(tol) or tol <= 0:
        raise ValueError(f"tol must be a number > 0, got {tol!r}")
    low, high = mdp.reward_range
    chain, r, q = mdp.pairs(pi), *(x.reshape(-1, x.shape[-1]) for x in (mdp.rewards, mdp.reward_probs))
    theta = np.full((r.shape[0], m), 0.5 * (low + high) / (1 - mdp.gamma))
    rounding = 8 * np.finfo(np.float64).eps * max(abs(low), abs(high)) / (1 - mdp.gamma) ** 2
    if tol < rounding:
        raise ArithmeticError(f"tol = {tol!r} is out of reach: rounding alone may leave {rounding:.1e}")
    iterations = 0
    while True:
        new = _backup(chain, theta, mdp.gamma, r, q)
        change, theta, iterations = float(np.abs(new - theta).max()), new, iterations + 1
        if mdp.gamma * change <= tol * (1 - mdp.gamma):
            break
    returns = Quantile(theta.reshape(mdp.n_states, mdp.n_actions, m))
    return QuantileFixedPoint(returns, iterations, change, mdp.gamma * change / (1 - mdp.gamma))


def _backup(chain: Any, theta: Floats, gamma: float, r: Floats, q: Floats) -> Floats:
    """(N, m) the quantiles of sum_k q_k sum_y chain[x, y] law(r_k + gamma theta[y])."""
    n, m = theta.shape
    levels = (np.arange(m) + 0.5) / m
    if r.shape[1] == 1 and not scipy.sparse.issparse(chain):
        order = np.argsort(theta, axis=None, kind="stable")
        rows, values = order // m, theta.ravel()[order]
        if find_spec("numba") is not None:
            from nlhf.tabular import sweeps

            mixed = sweeps.quantiles(np.ascontiguousarray(chain), rows, values, m)
        else:
            mixed = np.empty_like(theta)
            for x in range(n):  # a table of all rows would not fit the cache
                mixed[x] = values[np.searchsorted(np.cumsum(chain[x][rows]) / m, levels - 1e-12)]
        return r + gamma * mixed
    new = np.empty_like(theta)
    sparse_chain = scipy.sparse.csr_array(chain)
    for x in range(n):
        part = slice(sparse_chain.indptr[x], sparse_chain.indptr[x + 1])
        following = theta[sparse_chain.indices[part]]
        values = (r[x][:, None, None] + gamma * following).ravel()
        masses = np.repeat(np.outer(q[x], sparse_chain.data[part]) / m, m)
        order = np.argsort(values, kind="stable")
        reached = np.cumsum(masses[order])
        new[x] = values[order][np.minimum(np.searchsorted(reached, levels - 1e-12), values.size - 1)]
    return new
