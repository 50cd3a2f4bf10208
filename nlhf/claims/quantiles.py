"""Quantile dynamic programming: Dabney et al. 2018 (arXiv:1710.10044), Rowland et al. 2024 (arXiv:2301.04462).

Pi_Q nu is m equally likely values: the lower quantiles of nu of levels (2 i - 1) / (2 m).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np

from nlhf.claims.claim import Claim
from nlhf.claims.distances import Laws, coupled, pairs_of_laws, span
from nlhf.claims.instances import Floats, Process, processes
from nlhf.metrics import wasserstein, wasserstein_inf
from nlhf.tabular import (
    MDP,
    Categorical,
    Quantile,
    categorical_fixed_point,
    certificate,
    quantile_dp,
    quantile_fixed_point,
)

PAPER = "Rowland et al. 2024, arXiv:2301.04462"


def upper_ends(law: Categorical, m: int) -> Quantile:
    """A bug: the quantiles of levels i / m."""
    return Quantile(np.stack([law.quantile((k + 1) / m) for k in range(m)], axis=-1))


def challengers(i: Laws) -> Quantile:
    """(64, count) equal atoms: the middle quantiles a little moved, or any."""
    law, rng = i.pair[0], np.random.default_rng(i.seed)
    levels = (np.arange(i.count) + 0.5) / i.count
    middle = law.atoms[np.minimum(np.searchsorted(np.cumsum(law.probs), levels - 1e-11), law.atoms.size - 1)]
    scales = np.repeat(np.ptp(law.atoms) * np.array([0.0, 1e-3, 0.1, 1.0]), 16)[:, None]
    return Quantile(middle + scales * rng.standard_normal((64, i.count)))


def furthest(i: Laws) -> Any:
    """sup_u |F^-1(u) - F'^-1(u)|, where it is so on more than a rounding error of levels."""
    lengths, apart = coupled(*i.pair)
    return apart[lengths > 1e-11].max()


def projected(i: Laws) -> Floats:
    """(2,) W_inf of the projections, and what it lacks to their W1."""
    one, two = (law.to_quantiles(i.count) for law in i.pair)
    return np.array([wasserstein_inf(one, two), wasserstein(one, two) - wasserstein_inf(one, two)])


def backed_up(i: Process, theta: Floats) -> Any:
    """(S A, m) one step of quantile dynamic programming."""
    r, q = (table.reshape(-1, table.shape[-1]) for table in (i.mdp.rewards, i.mdp.reward_probs))
    return quantile_dp._backup(i.mdp.pairs(i.target), theta, i.gamma, r, q)


exact = quantile_dp._backup


def undiscounted(chain: Any, theta: Floats, gamma: float, r: Floats, q: Floats) -> Floats:
    """A bug: r + theta."""
    return exact(chain, theta, 1.0, r, q)


def discounted_twice(chain: Any, theta: Floats, gamma: float, r: Floats, q: Floats) -> Floats:
    """A bug: gamma (r + theta)."""
    return exact(chain, theta, gamma, gamma * r, q)


def starts(i: Process) -> Floats:
    """(2, S A, m) two sorted tables: of one value each, or of values less far apart."""
    shape = 2, i.target.size, i.atoms
    return np.sort(i.rng.uniform(size=shape) if i.seed % 2 else np.tile(i.rng.uniform(size=(*shape[:2], 1)), i.atoms))


def step_factor(i: Process) -> Floats:
    """(2,) max |theta'_1 - theta'_2| / max |theta_1 - theta_2| of one step; how far that of theta + 1 is from gamma."""
    one, two = starts(i)
    found = backed_up(i, one)
    factor = np.abs(found - backed_up(i, two)).max() / np.abs(one - two).max()
    return np.array([factor, np.abs(backed_up(i, one + 1) - found - i.gamma).max()])


def early(i: Process) -> Any:
    """The iteration when it may stop about half-way."""
    return quantile_fixed_point(i.mdp, i.target, i.atoms, 0.05 * span(i))


def late(i: Process) -> Any:
    """The iteration when little is left of its change."""
    return quantile_fixed_point(i.mdp, i.target, i.atoms, 1e-6)


def error(i: Process) -> Any:
    """(S, A) W1 of the fixed point from the return laws, less what is not known of either."""
    found, fine = late(i), categorical_fixed_point(i.mdp, i.target, 8 * i.atoms).returns
    return wasserstein(found.returns, fine) - certificate(i.mdp, i.target, fine) - found.bound


def settled(i: Process) -> bool:
    """Whether nothing is random, so that returns are numbers."""
    return bool(np.isin(i.transitions, (0, 1)).all())


def settle(i: Process) -> Process:
    """The same with certain transitions, to the likeliest state."""
    return replace(i, transitions=np.eye(len(i.transitions))[i.transitions.argmax(axis=-1)])


CERTAIN = processes(actions=1, gamma_max=0.9, certain=True).map(settle)


def on_grid(i: Process) -> tuple[MDP, Floats, Floats]:
    """A process with certain returns that are whole numbers V, V (S, 1), and all whole numbers that it needs."""
    values = np.floor(5 * i.rewards[..., 0])
    rewards = values - i.gamma * i.transitions[:, 0] @ values
    ends = np.floor(rewards.min() / (1 - i.gamma)), np.ceil(rewards.max() / (1 - i.gamma))
    return MDP(i.transitions, rewards, i.gamma), values, np.arange(ends[0] - 1, ends[1] + 2)


def whole(i: Process, offset: float = 0.0) -> Any:
    """(S, m) masses of the categorical fixed point on whole numbers, moved by an offset."""
    mdp, _, z = on_grid(i)
    return categorical_fixed_point(mdp, mdp.uniform, z + offset, method="banded", clip=True).probs[:, 0]


def nearest(i: Process) -> Floats:
    """(S, 1) (z_{k+1} - V)(V - z_k) for the atoms next to V."""
    z, values = i.grid, i.mdp.values(i.target)
    k = np.clip(np.searchsorted(z, values, side="right") - 1, 0, z.size - 2)
    return np.maximum((z[k + 1] - values) * (values - z[k]), 0.0)


CLAIMS = (
    Claim(
        id="quantiles/projection-error",
        statement="W1(Pi_Q nu, nu) <= (b - a) / (2 m) for nu on [a, b]",
        source="on either half of [i / m, (i + 1) / m] quantiles are at most its rise from the middle one",
        tag="proved",
        instances=pairs_of_laws(),
        lhs=lambda i: wasserstein(i.pair[0], i.pair[0].to_quantiles(i.count)),
        rhs=lambda i: np.ptp(i.atoms(0)) / (2 * i.count),
        mutants={
            "(b - a) / (3 m)": {"rhs": lambda i: np.ptp(i.atoms(0)) / (3 * i.count)},
            "levels i / m": lambda: mock.patch.object(Categorical, "to_quantiles", upper_ends),
        },
    ),
    Claim(
        id="quantiles/best",
        statement="W1(Pi_Q nu, nu) <= W1(xi, nu) for every xi of m equally likely values",
        source="the middle quantile is the median of each m-th of nu, which minimises the mean distance",
        tag="proved",
        instances=pairs_of_laws(),
        lhs=lambda i: wasserstein(i.pair[0], i.pair[0].to_quantiles(i.count)),
        rhs=lambda i: wasserstein(i.pair[0], challengers(i)).min(),
        mutants={
            "levels i / m": lambda: mock.patch.object(Categorical, "to_quantiles", upper_ends),
            "by a tenth": {"rhs": lambda i: 0.9 * wasserstein(i.pair[0], challengers(i)).min()},
        },
    ),
    Claim(
        id="quantiles/nonexpansive",
        statement="W1(Pi_Q nu, Pi_Q nu') <= W_inf(Pi_Q nu, Pi_Q nu') <= W_inf(nu, nu')",
        source=f"{PAPER}; the left side is the largest of some of the values whose supremum is on the right",
        tag="proved",
        instances=pairs_of_laws(),
        lhs=projected,
        rhs=lambda i: np.array([furthest(i), 0]),
        mutants={
            "W1(nu, nu')": {"rhs": lambda i: np.array([wasserstein(*i.pair), 0])},
            "0.9": {"rhs": lambda i: np.array([0.9 * furthest(i), 0])},
        },
    ),
    Claim(
        id="quantiles/contraction",
        statement="max |theta'_1 - theta'_2| / max |theta_1 - theta_2| <= gamma, theta' = Pi_Q T^pi theta, which is "
        "theta' + gamma for theta + 1",
        source=f"{PAPER}: T scales W_inf by gamma, Pi_Q does not expand it",
        tag="proved",
        instances=processes(),
        lhs=step_factor,
        rhs=lambda i: np.array([i.gamma, 0]),
        mutants={
            "gamma^2": {"rhs": lambda i: np.array([i.gamma**2, 0])},
            "gamma forgotten": lambda: mock.patch.object(quantile_dp, "_backup", undiscounted),
        },
    ),
    Claim(
        id="quantiles/stopping",
        statement="W_inf(theta_k, theta*) <= gamma / (1 - gamma) W_inf(theta_k, theta_{k-1})",
        source="the contraction, summed over all later steps; theta* up to the bound of its own iteration",
        tag="proved",
        instances=processes(actions=2, gamma_max=0.8),
        lhs=lambda i: wasserstein_inf(early(i).returns, late(i).returns).max() - late(i).bound,
        rhs=lambda i: early(i).bound,
        mutants={
            "half": {"rhs": lambda i: 0.5 * early(i).bound},
            "gamma": {"rhs": lambda i: i.gamma * early(i).change},
        },
        where=lambda i: i.gamma <= 0.8,
    ),
    Claim(
        id="quantiles/error",
        statement="theta* = Pi_Q T^pi theta*: W1(theta*, eta^pi) <= (b - a) / (2 m (1 - gamma)) for returns in [a, b]",
        source=f"{PAPER}, section 5; W1(theta*, eta^pi) <= W1(Pi_Q T theta*, T theta*) + gamma W1(theta*, eta^pi)",
        tag="proved",
        instances=processes(actions=1, gamma_max=0.8),
        lhs=error,
        rhs=lambda i: span(i) / (2 * i.atoms * (1 - i.gamma)),
        mutants={
            "(b - a) / (4 m)": {"rhs": lambda i: span(i) / (4 * i.atoms)},
            "rewards discounted, too": lambda: mock.patch.object(quantile_dp, "_backup", discounted_twice),
        },
        where=lambda i: i.gamma <= 0.8,
    ),
    Claim(
        id="quantiles/certain",
        statement="theta*_i(x) = V(x) for every m and i where transitions and rewards are certain",
        source="Pi_Q delta_V = delta_V",
        tag="proved",
        instances=CERTAIN,
        lhs=lambda i: quantile_fixed_point(i.mdp, i.target, i.atoms).returns.values,
        identity=lambda i: i.mdp.values(i.target)[..., None],
        mutants={
            "rewards discounted, too": lambda: mock.patch.object(quantile_dp, "_backup", discounted_twice),
            "rewards alone": {"identity": lambda i: i.rewards},
        },
        where=settled,
    ),
    Claim(
        id="quantiles/certain-on-a-grid",
        statement="eta = Pi T^pi eta is delta_V(x) for every x where returns are certain and every V(x) is an atom",
        source="Pi delta_z = delta_z for atoms z, and eta is unique",
        tag="proved",
        instances=CERTAIN,
        lhs=whole,
        identity=lambda i: on_grid(i)[1] == on_grid(i)[2],
        mutants={"half-way between atoms": {"lhs": lambda i: whole(i, 0.5)}},
        where=settled,
    ),
    Claim(
        id="quantiles/certain-off-the-grid",
        statement="(z_{k+1} - V)(V - z_k) <= Var(eta), V between the atoms z_k and z_{k+1}, eta = Pi T^pi eta",
        source="the least variance of a law on the grid with the mean V, which eta has; so eta = delta_V needs V on it",
        tag="proved",
        instances=processes(),
        lhs=nearest,
        rhs=lambda i: categorical_fixed_point(i.mdp, i.target, i.atoms).returns.variance,
        mutants={
            "half": {"rhs": lambda i: 0.5 * categorical_fixed_point(i.mdp, i.target, i.atoms).returns.variance},
        },
        # a variance is a sum of squares of atoms, and so is its rounding
        tol=lambda i: 1e-11 * max(1.0, float(np.square(i.grid).max())) / (1 - i.gamma),
    ),
)
