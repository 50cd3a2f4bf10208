"""Random decision processes, degenerate corners included."""

from __future__ import annotations

from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
import scipy.sparse

from nlhf.tabular import (
    MDP,
)
from nlhf.tabular.bellman import Linear, Shift, grid


class Process(NamedTuple):
    """A decision process, a policy to evaluate, one that acts, and a number of atoms."""

    mdp: MDP
    policy: Any
    behaviour: Any
    atoms: int


@st.composite
def processes(draw: st.DrawFn, actions: int = 3, gamma_max: float = 0.97) -> Process:
    """1 to 5 states: certain, absorbing, sparse or spread-out transitions; rewards in [0, 1], at both ends, or laws."""
    n, a = draw(st.integers(1, 5)), draw(st.integers(1, actions))
    kind = draw(st.sampled_from(["dirichlet", "certain", "absorbing", "sparse"]))
    paid = draw(st.sampled_from(["uniform", "ends", "law", "negative"]))
    gamma, m = draw(st.floats(0.05, gamma_max)), draw(st.integers(2, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if kind == "dirichlet":
        rows: Any = rng.dirichlet(np.full(n, draw(st.sampled_from([0.05, 1.0, 10.0]))), size=(n, a))
    elif kind == "sparse":
        rows = np.eye(n)[rng.integers(0, n, (n, a, 2))].mean(axis=2)
    else:
        rows = np.eye(n)[rng.integers(0, n, (n, a)) if kind == "certain" else np.tile(np.arange(n)[:, None], (1, a))]
    rows = rows / rows.sum(axis=-1, keepdims=True)
    shape = (n, a, 3) if paid == "law" else (n, a)
    rewards = rng.integers(0, 2, shape).astype(float) if paid == "ends" else rng.uniform(size=shape)
    rewards = rewards - 2.0 if paid == "negative" else rewards
    probs = rng.dirichlet(np.ones(3), size=(n, a)) if paid == "law" else None
    if kind == "sparse":
        rows = scipy.sparse.csr_array(rows.reshape(n * a, n))
    policy, behaviour = (rng.dirichlet(np.ones(a), size=n) for _ in range(2))
    return Process(MDP(rows, rewards, gamma, probs), policy, behaviour, m)


def linear(process: Process, weights: Any = None) -> Linear:
    mdp, policy, _, m = process
    return Linear(Shift(mdp, grid(mdp, m)), policy if weights is None else weights)


def scale(process: Process) -> float:
    """What a rounding error may grow to: the range of returns, times what a solve may add."""
    low, high = process.mdp.reward_range
    return 1e-11 * max(1.0, abs(low), abs(high)) / (1 - process.mdp.gamma) ** 2
