"""Return distributions: operators against brute force, fixed points against closed forms, claims on random cases."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from hypothesis import given

from nlhf import CategoricalDP, NStep, QLambda, Retrace, TreeBackup, cli, metrics, run
from nlhf.evaluate import load_process
from nlhf.evaluation import Backup, EvalState
from nlhf.tabular import (
    MDP,
    BackupSolver,
    Categorical,
    Quantile,
    SampledBackupSolver,
    categorical_fixed_point,
    certificate,
    quantile_fixed_point,
    random_off_policy,
    return_distribution,
)
from nlhf.tabular.bellman import Linear, Shift, grid
from nlhf.tabular.fixed_point import solve
from nlhf.tabular.returns import project
from nlhf.tabular.sampling import Trajectories
from tests.checks import assert_close


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


# --- laws, projections and distances -----------------------------------------------------------------------------


@given(st.integers(2, 12), st.integers(1, 8), st.booleans(), st.integers(0, 2**32 - 1))
def test_projection(m: int, k: int, signed: bool, seed: int) -> None:
    """Claims 1 to 7: linear, idempotent, keeps the mean, spreads by at most stride^2 / 4, orthogonal in Cramér."""
    rng = np.random.default_rng(seed)
    atoms = np.linspace(-1.0, 2.0, m)
    stride = atoms[1] - atoms[0]
    values = rng.uniform(-1, 2, k)
    masses = rng.standard_normal(k) if signed else rng.uniform(size=k)
    masses = masses / masses.sum() if abs(masses.sum()) > 0.1 else np.full(k, 1 / k)
    probs = project(values, masses, atoms)
    assert probs.sum() == pytest.approx(1, abs=1e-12)
    assert probs @ atoms == pytest.approx(masses @ values, abs=1e-12 * np.abs(masses).sum())
    assert_close(project(atoms, probs, atoms), probs, atol=1e-12 * np.abs(masses).sum())
    cdf = [
        np.sum(masses * np.clip((z + stride - values) / stride, 0, 1)) for z in atoms[:-1]
    ]  # the average over a cell
    assert_close(np.cumsum(probs)[:-1], cdf, atol=1e-12 * np.abs(masses).sum())
    if not signed:
        spread = probs @ atoms**2 - masses @ values**2
        assert -1e-12 <= spread <= stride**2 / 4 + 1e-12


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_distances(m: int, k: int, seed: int) -> None:
    """Claims 39 and 41, on laws of different atoms: against integrals by brute force and the energy distance."""
    rng = np.random.default_rng(seed)
    p = Categorical(rng.dirichlet(np.ones(m)), np.linspace(0, 3, m))
    q = Categorical(rng.dirichlet(np.ones(k)), np.linspace(-1, 2, k))
    w1, l2, sup = (float(d(p, q)) for d in (metrics.wasserstein, metrics.cramer, metrics.kolmogorov))
    assert abs(float(p.mean - q.mean)) <= w1 + 1e-12
    assert w1 <= 2 * l2 + 1e-12  # sqrt of the length, 4
    assert l2**2 <= w1 + 1e-12
    assert w1 <= 4 * sup + 1e-12
    x, y = p.atoms, q.atoms
    energy = 2 * p.probs @ np.abs(x[:, None] - y) @ q.probs
    energy -= p.probs @ np.abs(x[:, None] - x) @ p.probs + q.probs @ np.abs(y[:, None] - y) @ q.probs
    assert 2 * l2**2 == pytest.approx(energy, abs=1e-12)
    u = np.sort(rng.uniform(size=m))
    one, two = Quantile(u), Quantile(np.sort(rng.uniform(size=m)))
    assert metrics.wasserstein(one, two) == pytest.approx(np.abs(one.values - two.values).mean(), abs=1e-12)
    grid_law = Categorical(np.full(m, 1 / m), np.linspace(0, 1, m))
    assert metrics.wasserstein(grid_law, Quantile(grid_law.atoms)) == pytest.approx(0, abs=1e-12)


@given(st.integers(2, 12), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_quantiles_are_the_closest_equal_atoms(m: int, k: int, seed: int) -> None:
    """Claims 43 and 47: within range / (2 k) in W1, and no other k equal atoms are closer."""
    rng = np.random.default_rng(seed)
    law = Categorical(rng.dirichlet(np.ones(m)), np.linspace(0, 1, m))
    found = law.to_quantiles(k)
    apart = float(metrics.wasserstein(law, found))
    assert apart <= 1 / (2 * k) + 1e-12
    for _ in range(5):
        other = Quantile(found.values + 0.1 * rng.standard_normal(k))
        assert apart <= float(metrics.wasserstein(law, other)) + 1e-12


def test_statistics_of_a_law() -> None:
    law = Categorical([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]], [0.0, 1.0, 2.0])
    assert_close(law.mean, [1.3, 0.0], atol=1e-15)
    assert_close(law.variance, [0.61, 0.0], atol=1e-15)
    assert_close(law.cdf, [[0.2, 0.5], [1.0, 1.0]], atol=1e-15)
    assert_close(law.cvar(0.4), [0.5, 0.0], atol=1e-15)
    assert law.cvar(1.0)[0] == pytest.approx(1.3)
    assert [law.quantile(u)[0] for u in (0.2, 0.21, 0.5, 1.0)] == [0, 1, 1, 2]
    drawn = law.sample(np.random.default_rng(0), 4000)
    assert drawn.shape == (2, 4000)
    assert np.abs((drawn[0][:, None] == law.atoms).mean(axis=0) - law.probs[0]).max() < 5 * 0.5 / np.sqrt(4000)
    assert_close(law.to_quantiles(4).values[0], [0, 1, 2, 2], atol=0)  # levels 1/8, 3/8, 5/8, 7/8
    assert_close(Quantile([0.25, 1.0]).to_categorical([0.0, 1.0]).probs, [0.375, 0.625], atol=1e-15)
    assert Quantile([3.0, 1.0]).cvar(0.5) == 1.0
    signed = Categorical([0.6, -0.2, 0.6], [0.0, 1.0, 2.0])
    assert signed.negative_mass == pytest.approx(0.2)
    for refused in (lambda: signed.cvar(0.5), lambda: signed.quantile(0.5), lambda: signed.to_quantiles(2)):
        with pytest.raises(ValueError, match=r"needs a probability law, got masses down to -0\.2"):
            refused()


# --- the operator ------------------------------------------------------------------------------------------------


@given(processes())
def test_operator_structure(process: Process) -> None:
    """Claims 8 to 11 and 13, and the explicit matrix against the matrix-free one."""
    t = linear(process)
    explicit = t.explicit()
    mdp, policy, _, m = process
    n, cells = t.shape
    assert explicit.min() >= -1e-14
    assert_close(explicit.sum(axis=1) + t.constant.ravel() <= 1 + 1e-12, True, atol=0)
    columns = explicit.toarray().reshape(n, cells, n, cells).sum(axis=1)
    chain = np.asarray(mdp.pairs(policy).toarray() if hasattr(mdp.pairs(policy), "toarray") else mdp.pairs(policy))
    assert_close(columns, np.broadcast_to(mdp.gamma * chain[:, :, None], columns.shape), atol=1e-12)
    assert t.shift.matrix.nnz <= 2 * (m - 1) * n * mdp.rewards.shape[-1]
    table = np.random.default_rng(0).standard_normal(t.shape)
    assert_close(t(table), (explicit @ table.ravel()).reshape(t.shape), atol=1e-12)
    inverse = np.linalg.inv(np.eye(n * cells) - explicit.toarray()).reshape(n, cells, n, cells)
    assert inverse.min() >= -scale(process)
    expected = np.linalg.inv(np.eye(n) - mdp.gamma * chain)[:, :, None]
    assert_close(inverse.sum(axis=1), np.broadcast_to(expected, (n, n, cells)), atol=scale(process))


@given(processes())
def test_operator_is_the_projected_mixture(process: Process) -> None:
    """Claim 14: one application to CDFs is the projection of sum P pi law(r + gamma z), built atom by atom."""
    mdp, policy, _, m = process
    t, z = linear(process), grid(process.mdp, m)
    probs = np.random.default_rng(1).dirichlet(np.ones(m), size=(mdp.n_states, mdp.n_actions))
    following = mdp.expect(np.sum(policy[..., None] * probs, axis=1))
    landed = (mdp.rewards[..., None] + mdp.gamma * z).reshape(*policy.shape, -1)
    masses = (mdp.reward_probs[..., None] * following[:, :, None]).reshape(landed.shape)
    expected = np.cumsum(project(landed, masses, z), axis=-1)[..., :-1].reshape(t.shape)
    cdf = np.cumsum(probs, axis=-1)[..., :-1].reshape(t.shape)
    assert_close(
        t(cdf) + t.constant, expected, atol=1e-9
    )  # an atom that lands within rounding of another moves as much


@given(processes(), st.sampled_from([1.0, 1.5, 2.0, 3.0]))
def test_operator_contracts(process: Process, p: float) -> None:
    """Claim 12: sup-l_p by gamma^(1/p)."""
    t = linear(process)
    d = np.random.default_rng(2).standard_normal(t.shape)

    def norm(x: Any) -> float:
        return float((np.abs(x) ** p).sum(axis=1).max() ** (1 / p))

    assert norm(t(d)) <= process.mdp.gamma ** (1 / p) * norm(d) + 1e-12
    assert np.abs(t(d)).max() <= np.abs(d).max() + 1e-12


# --- fixed points ------------------------------------------------------------------------------------------------


@given(processes())
def test_categorical_fixed_point(process: Process) -> None:
    """Claims 15, 17, 18: a law, with the exact mean for every number of atoms and at most so much too much variance."""
    mdp, policy, _, m = process
    found = categorical_fixed_point(mdp, policy, m)
    assert found.probs.min() >= 0
    first, second = mdp.moments(policy, 2)
    assert_close(found.returns.mean, first, atol=10 * scale(process))
    excess = found.returns.variance - (second - first**2)
    assert (excess >= -100 * scale(process)).all()
    assert (excess <= found.returns.stride**2 / (4 * (1 - mdp.gamma**2)) + 100 * scale(process)).all()
    assert found.bound == found.residual / (1 - np.sqrt(mdp.gamma))


@given(processes())
def test_every_method_finds_the_same(process: Process) -> None:
    """Aggregation, the banded factorisation, iteration, and a dense solve."""
    t = linear(process)
    dense = np.linalg.solve(np.eye(t.constant.size) - t.explicit().toarray(), t.constant.ravel()).reshape(t.shape)
    for method in ("auto", "aggregation", "banded", "iteration"):
        assert_close(solve(t, t.constant, 1e-13, method).cdf, dense, atol=1e-10 / (1 - process.mdp.gamma))


@given(processes(), st.integers(1, 4))
def test_finer_grids(process: Process, k: int) -> None:
    """Claims 19 and 20: nested grids differ by at most their strides, and the coarser law is the more spread."""
    mdp, policy, _, m = process
    coarse, fine = (categorical_fixed_point(mdp, policy, atoms).returns for atoms in (m, k * (m - 1) + 1))
    apart = metrics.wasserstein(coarse, fine)
    assert (apart <= (coarse.stride + fine.stride) / (2 * (1 - mdp.gamma)) + 10 * scale(process)).all()
    assert (coarse.variance - fine.variance >= -100 * scale(process)).all()


@given(processes())
def test_certificates_hold(process: Process) -> None:
    """W1 to a reference of many atoms is within the two certificates; they fall as atoms are added."""
    mdp, policy, behaviour, m = process
    fine = categorical_fixed_point(mdp, policy, 801).returns
    slack = certificate(mdp, policy, fine)
    for law in (categorical_fixed_point(mdp, policy, m).returns, categorical_fixed_point(mdp, behaviour, m).returns):
        assert (metrics.wasserstein(law, fine) <= certificate(mdp, policy, law) + slack + scale(process)).all()
    stride = fine.stride
    assert slack.max() <= stride / (2 * (1 - mdp.gamma)) + 10 * scale(process)  # what theory says of the projection


def test_return_distribution_is_as_accurate_as_asked() -> None:
    for mdp in (MDP.two_state(0.9), MDP.chain(6, 0.8, 0.2), MDP.dirichlet(5, 0.1, 0.9, 0, actions=2)):
        found = return_distribution(mdp, mdp.uniform, accuracy=0.02)
        reference = categorical_fixed_point(mdp, mdp.uniform, 10_001).returns
        error = metrics.wasserstein(found.returns, reference)
        assert found.w1_bound.max() <= 0.02
        assert (error <= found.w1_bound).all()
    with pytest.raises(ArithmeticError, match=r"accuracy = 0\.001 takes more than 100 atoms"):
        return_distribution(MDP.two_state(0.9), np.ones((2, 1)), 1e-3, most=100)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_uniform_return(k: int) -> None:
    """Claims 33 and 34: R uniform on k points and gamma = 1 / k make the return uniform on [0, k / (k - 1)]."""
    rewards = np.arange(k) / (k - 1)
    mdp = MDP([[[1.0]]], rewards[None, None], 1 / k, np.full((1, 1, k), 1 / k))
    found = categorical_fixed_point(mdp, [[1.0]], 201).returns
    exact = Quantile((np.arange(20_000)[None, None] + 0.5) / 20_000 * k / (k - 1))
    assert metrics.wasserstein(found, exact) <= found.stride
    q = quantile_fixed_point(mdp, [[1.0]], 100).returns
    assert metrics.wasserstein(q, exact) <= (k / (k - 1)) / (200 * (1 - 1 / k)) + 1e-4


def test_cantor_return() -> None:
    """Claim 35: gamma = 1/3 and R in {0, 1} make the Cantor law: mean 3/4, variance 9/32, F = 1/2 in the middle."""
    mdp = MDP([[[1.0]]], [[[0.0, 1.0]]], 1 / 3, [[[0.5, 0.5]]])
    for m in (20, 200):
        found = categorical_fixed_point(mdp, [[1.0]], m).returns
        assert found.mean == pytest.approx(0.75, abs=1e-12)
        assert 9 / 32 - 1e-12 <= found.variance <= 9 / 32 + 9 / 32 * found.stride**2 + 1e-12
        assert found.cdf[0, 0, m // 2 - 1] == pytest.approx(0.5, abs=1e-12)


def test_certain_returns() -> None:
    """Claims 22, 23, 36 and 46: constant rewards, and a cycle whose returns quantiles hit exactly."""
    rows = np.eye(3)[[[1], [2], [0]]]
    for c in (0.0, 1.0, 0.3):
        found = categorical_fixed_point(MDP(rows, np.full(3, c), 0.9), np.ones((3, 1)), 11).returns
        assert_close(found.mean, c / 0.1, atol=1e-10)
        assert_close(found.variance, 0.0, atol=1e-9)
    cycle = MDP(rows, [1.0, 0.0, 0.5], 0.8)
    exact = cycle.values(cycle.uniform)[..., None]
    assert_close(quantile_fixed_point(cycle, cycle.uniform, 7).returns.values, np.repeat(exact, 7, axis=-1), atol=1e-9)
    law = categorical_fixed_point(cycle, cycle.uniform, 51).returns
    error = np.sum(law.probs * np.abs(law.atoms - exact), axis=-1)
    assert (error <= law.stride / (2 * 0.2)).all()


@given(processes(gamma_max=0.9))
def test_quantile_fixed_point(process: Process) -> None:
    """Claims 44 and 45: a fixed point of its own projection, within range / (2 m (1 - gamma)) of the truth."""
    mdp, policy, _, m = process
    found = quantile_fixed_point(mdp, policy, m)
    reference = categorical_fixed_point(mdp, policy, 801).returns
    low, high = mdp.reward_range
    span = (high - low) / (1 - mdp.gamma)
    allowed = span / (2 * m * (1 - mdp.gamma)) + certificate(mdp, policy, reference)
    assert (metrics.wasserstein(found.returns, reference) <= allowed + scale(process)).all()
    assert found.bound <= 1e-10


# --- off-policy --------------------------------------------------------------------------------------------------


def algorithms(process: Process, lam: float) -> list[Any]:
    _, pi, mu, _ = process
    return [CategoricalDP(pi), QLambda(pi, mu, lam), Retrace(pi, mu, lam), TreeBackup(pi, mu, lam)]


@given(processes(), st.floats(0.0, 0.99))
def test_every_trace_has_the_fixed_point_of_one_step(process: Process, lam: float) -> None:
    """Claims 48, 55 and 60."""
    mdp, policy, _, m = process
    fixed = categorical_fixed_point(mdp, policy, m).returns
    solver = BackupSolver(mdp, m)
    for algorithm in algorithms(process, lam):
        state, _ = algorithm.step(EvalState(fixed), solver)
        assert_close(state.returns.probs, fixed.probs, atol=scale(process) / (1 - mdp.gamma))


@given(processes(), st.floats(0.0, 0.99), st.sampled_from([1.0, 1.5, 2.0, 4.0]))
def test_backups_contract_as_declared(process: Process, lam: float, p: float) -> None:
    """Claims 49, 54, 55: the declared modulus bounds what happens to any difference of two signed tables."""
    mdp, _, _, m = process
    solver, rng = BackupSolver(mdp, m), np.random.default_rng(3)
    tables = []
    for _ in range(2):
        probs = rng.standard_normal((mdp.n_states, mdp.n_actions, m))
        tables.append(Categorical(probs + (1 - probs.sum(axis=-1, keepdims=True)) / m, solver.shift.atoms))

    def norm(one: Categorical, other: Categorical) -> float:
        return float((np.abs(one.cdf - other.cdf) ** p).sum(axis=-1).max() ** (1 / p))

    for algorithm in [*algorithms(process, lam), NStep(process.policy, process.behaviour, 2)]:
        after = [algorithm.step(EvalState(table), solver)[0].returns for table in tables]
        assert norm(*after) <= algorithm.modulus(mdp.gamma, p) * norm(*tables) * (1 + 1e-9) + 1e-9


@given(processes(), st.floats(0.0, 0.99))
def test_means_and_masses(process: Process, lam: float) -> None:
    """Claims 52, 53 and 54: means follow the classical operator; laws stay laws where lambda mu <= pi."""
    mdp, pi, mu, m = process
    solver = BackupSolver(mdp, m)
    start = Categorical(np.random.default_rng(4).dirichlet(np.ones(m), size=pi.shape), solver.shift.atoms)
    for weights in (lam * mu, lam * np.minimum(pi, mu)):
        trace = np.divide(weights, mu, out=np.zeros_like(mu), where=mu > 0)
        after, _ = solver(Backup(start, pi, mu, trace))
        assert_close(after.probs.sum(axis=-1), 1.0, atol=1e-9)
        q = start.mean
        error = (mdp.mean_rewards + mdp.gamma * mdp.expect(np.sum(pi * q, axis=1)) - q).ravel()
        n = error.size
        chain = np.asarray(mdp.pairs(weights) @ np.eye(n))
        expected = q.ravel() + np.linalg.solve(np.eye(n) - mdp.gamma * chain, error)
        assert_close(after.mean.ravel(), expected, atol=10 * scale(process))
        if (weights <= pi).all():
            assert after.probs.min() >= -1e-9


def test_the_condition_on_lambda_is_tight() -> None:
    """Sheet 2.3: always switching against always staying; the sign mode grows by gamma (1 + lam) / (1 - lam gamma)."""
    rows = np.eye(2)[np.tile([0, 1], (2, 1))]  # action a leads to state a
    mdp = MDP(rows, np.zeros((2, 2)), 0.9)
    stay, switch = np.eye(2), 1 - np.eye(2)
    solver = BackupSolver(mdp, np.linspace(-1, 1, 3))
    base = np.zeros((2, 2, 3))
    base[..., 1] = 1.0
    bump = np.zeros_like(base)
    bump[:, 0, 2], bump[:, 0, 0], bump[:, 1, 2], bump[:, 1, 0] = 0.1, -0.1, -0.1, 0.1
    for lam in (0.05, 0.9):
        algorithm = QLambda(switch, stay, lam)
        start = Categorical(base + bump, solver.shift.atoms)
        after = algorithm.step(EvalState(start), solver)[0].returns
        modulus = 0.9 * (1 + lam) / (1 - lam * 0.9)
        assert algorithm.modulus(0.9, 1) == pytest.approx(modulus)
        assert_close(np.abs(after.mean), modulus * 0.2, atol=1e-12)
    assert QLambda(switch, stay, 0.05).modulus(0.9, 1) < 1 < QLambda(switch, stay, 0.06).modulus(0.9, 1)


def test_negative_mass_comes_and_goes() -> None:
    """Sheet 2.4: with lambda mu > pi somewhere iterates are signed, while the limit is a law."""
    target, behaviour = 1 - np.eye(2), np.eye(2)
    mdp = MDP(np.eye(2)[np.tile([0, 1], (2, 1))], [[0.0, 1.0], [0.3, 0.0]], 0.5)
    fixed = categorical_fixed_point(mdp, target, 15).returns

    def negative(returns: Any, game: Any, tau: Any) -> float:
        return float(returns.negative_mass.max())

    def distance(returns: Any, game: Any, tau: Any) -> float:
        return float(metrics.cramer(returns, fixed).max())

    trace = run(QLambda(target, behaviour, 0.2), BackupSolver(mdp, 15), 80, metrics=(negative, distance))
    _, mass = trace.values("negative")
    assert mass.max() > 1e-4
    assert mass[-1] < 1e-8
    assert trace.values("distance")[1][-1] < 1e-8


def test_uncorrected_n_steps_evaluate_another_policy() -> None:
    """Claim 56: the fixed point of T^mu T^pi is that of acting by mu, then by pi, in turn: a process of two phases."""
    mdp, pi, mu = random_off_policy(3, 2, 1.0, 0.8, seed=1)
    found = run(NStep(pi, mu, 2), BackupSolver(mdp, 21), 200).policy
    rows = mdp.transitions.reshape(3, 2, 3)
    doubled = np.zeros((6, 2, 6))  # states of phase 0 (whose next action is by mu), then of phase 1 (by pi)
    doubled[:3, :, 3:], doubled[3:, :, :3] = rows, rows
    both = MDP(doubled, np.tile(mdp.rewards[..., 0], (2, 1)), 0.8)
    phases = np.concatenate([pi, mu])  # actions taken on arrival in phase 0 and in phase 1
    expected = categorical_fixed_point(both, phases, grid(mdp, 21)).probs[:3]
    assert_close(found.probs, expected, atol=1e-9)
    assert np.abs(found.probs - categorical_fixed_point(mdp, pi, 21).probs).max() > 1e-3


def test_resuming_an_evaluation(tmp_path: Any) -> None:
    mdp, target, behaviour = random_off_policy(4, 2, 0.3, 0.9, seed=2)
    algorithm, solver, file = QLambda(target, behaviour, 0.5), BackupSolver(mdp, 11), tmp_path / "run.npz"
    run(algorithm, solver, 5, checkpoint=file)
    resumed = run(algorithm, solver, 12, checkpoint=file)
    np.testing.assert_array_equal(resumed.policy.probs, run(algorithm, solver, 12).policy.probs)


# --- samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3])
def test_sampled_backups_are_unbiased(length: int) -> None:
    """The estimate over all trajectories against A_n = T^pi eta + T^{c mu} (A_{n-1} - eta) on raw measures."""
    rng = np.random.default_rng(length)
    rows = rng.dirichlet([1, 1], size=(2, 2))
    mdp = MDP(rows, rng.integers(0, 2, (2, 2, 2)).astype(float), 0.7, rng.dirichlet([1, 1], size=(2, 2)))
    pi, mu, trace = rng.dirichlet([1, 1], size=2), rng.dirichlet([1, 1], size=2), rng.uniform(size=(2, 2))
    solver = SampledBackupSolver(mdp, atoms=6, samples=1, length=length)
    z = solver.atoms
    returns = Categorical(rng.dirichlet(np.ones(6), size=(2, 2)), z)
    averaged = np.sum(pi[..., None] * returns.probs, axis=1)
    pairs = list(itertools.product(range(2), range(2)))

    def truncated(s: int, a: int, n: int) -> tuple[Any, Any]:
        """Values and masses of A_n eta(s, a), before any projection."""
        values, masses = [], []
        for k, y in pairs:
            chance = mdp.reward_probs[s, a, k] * rows[s, a, y]
            later = [(z, averaged[y])]
            for b in range(2) if n > 1 else ():
                further, weights = truncated(y, b, n - 1)
                later += [
                    (further, mu[y, b] * trace[y, b] * weights),
                    (z, -mu[y, b] * trace[y, b] * returns.probs[y, b]),
                ]
            for value, mass in later:
                values.append(mdp.rewards[s, a, k] + 0.7 * value)
                masses.append(chance * mass)
        return np.concatenate(values), np.concatenate(masses)

    for s, a in pairs:
        total = np.zeros(6)
        for path in itertools.product(itertools.product(range(2), range(2), range(2)), repeat=length):
            states, actions, rewards, chance = [s], [a], [], 1.0
            for k, y, b in path:
                x, u = states[-1], actions[-1]
                chance *= mdp.reward_probs[x, u, k] * rows[x, u, y] * mu[y, b]
                rewards.append(mdp.rewards[x, u, k])
                states.append(y)
                actions.append(b)
            one = Trajectories(np.array([states]), np.array([actions]), np.array([rewards]))
            total += chance * solver.estimate(returns, pi, trace, one)[0]
        assert_close(total, project(*truncated(s, a, length), z), atol=1e-12)
        assert total.sum() == pytest.approx(1, abs=1e-12)
        if length == 1:
            exact, _ = BackupSolver(mdp, 6)(Backup(returns, pi, mu, 0.0))
            assert_close(total, exact.probs[s, a], atol=1e-12)


def test_trajectories_have_their_law() -> None:
    """Next states, actions and rewards by their frequencies, on a sparse process; five standard errors."""
    mdp = MDP.garnet(6, 3, 0.9, 0, actions=2)
    behaviour = np.random.default_rng(0).dirichlet([1, 1], size=6)
    solver = SampledBackupSolver(mdp, samples=4000, length=2)
    drawn = solver.sample(behaviour, np.random.default_rng(1))
    states, actions = drawn.states.reshape(6, 2, 4000, 3), drawn.actions.reshape(6, 2, 4000, 3)
    rows = mdp.expect(np.eye(6))
    seen = np.stack([(states[..., 1] == y).mean(axis=-1) for y in range(6)], axis=-1)
    assert np.abs(seen - rows).max() < 5 * 0.5 / np.sqrt(4000)
    acted = np.stack([(actions[..., 1] == b).mean(axis=-1) for b in range(2)], axis=-1)
    assert np.abs(acted - rows @ behaviour).max() < 5 * 0.5 / np.sqrt(4000)
    np.testing.assert_array_equal(drawn.rewards[:, 0], mdp.rewards[..., 0].ravel().repeat(4000))


def test_sampled_learning_approaches_the_fixed_point() -> None:
    mdp, target, behaviour = random_off_policy(4, 2, 0.3, 0.8, seed=5)
    fixed = categorical_fixed_point(mdp, target, 21).returns
    for algorithm, length in ((QLambda(target, behaviour, 0.5), 4), (CategoricalDP(target), 1)):
        solver = SampledBackupSolver(mdp, 21, samples=50, length=length, step=0.1)
        first, again = (run(algorithm, solver, 150, seed=3).policy for _ in range(2))
        np.testing.assert_array_equal(first.probs, again.probs)
        assert float(metrics.cramer(first, fixed).max()) < 0.1 < float(metrics.cramer(solver.init(), fixed).max())


# --- the command -------------------------------------------------------------------------------------------------


def evaluate(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["nlhf", "evaluate", *flags])
    cli.main()


@pytest.mark.parametrize("name", ["chain", "two-state", "dirichlet", "garnet", "windy-grid"])
def test_evaluate_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    evaluate(monkeypatch, name, "--accuracy", "0.05", "--gamma", "0.8")
    frame = pd.read_csv(tmp_path / "runs" / f"evaluate-{name}" / "returns.csv")
    process, _ = load_process(name, 0.8, 0)
    assert_close(frame["mean"], process.values(process.uniform).ravel(), atol=1e-3)
    assert frame.w1_bound.max() <= 0.05
    assert (frame["quantile_0.05"] <= frame["quantile_0.95"]).all()
    assert "W1 to the truth is at most" in capsys.readouterr().out
    assert len(list((tmp_path / "runs" / f"evaluate-{name}").iterdir())) == 3


def test_evaluate_a_file_under_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    mdp = MDP.dirichlet(3, 1.0, 0.9, 0, actions=2)
    arrays = {"transitions": mdp.transitions.reshape(3, 2, 3), "rewards": mdp.rewards[..., 0], "gamma": 0.9}
    np.savez(tmp_path / "mine.npz", **arrays)
    policy = np.array([[1.0, 0.0], [0.5, 0.5], [0.25, 0.75]])
    np.savetxt(tmp_path / "pi.csv", policy, delimiter=",")
    monkeypatch.chdir(tmp_path)
    evaluate(monkeypatch, "mine.npz", "--policy", "pi.csv", "--atoms", "31", "--method", "banded", "--out", "here")
    frame = pd.read_csv(tmp_path / "here" / "returns.csv")
    assert_close(frame["mean"], mdp.values(policy).ravel(), atol=1e-9)
    assert "31 atoms by banded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["maze"], "mdp must be one of chain, two-state, dirichlet, garnet, windy-grid or an .npz file, got 'maze'"),
        (["text.npz"], "text.npz: not an .npz file of arrays"),
        (["less.npz"], "less.npz: expected transitions, rewards, gamma\\[, reward_probs\\], got rewards"),
        (["rows.npz"], "rows.npz: transitions must sum to 1, got 0.9 for state 0, action 0"),
        (["chain", "--gamma", "1"], r"gamma must be a number in \[0, 1\), got 1.0"),
        (["chain", "--policy", "greedy"], "policy must be uniform or a CSV file of probabilities, got 'greedy'"),
        (["chain", "--policy", "pi.csv"], r"pi.csv: policy must have shape \(10, 1\), got \(1, 2\)"),
        (["chain", "--policy", "words.csv"], "words.csv: could not convert string 'a' to float64"),
        (["chain", "--atoms", "1"], "atoms must be an integer >= 2, got 1"),
        (["chain", "--atoms", "9", "--method", "lu"], "method must be one of auto, aggregation, banded, iteration"),
        (["chain", "--method", "banded"], "method can be chosen for a given number of atoms only"),
        (["chain", "--accuracy", "-1"], "accuracy must be a number > 0, got -1.0"),
        (["chain", "--accuracy", "0.1", "--atoms", "9"], "atoms and accuracy exclude each other"),
        (["chain", "--accuracy", "1e-9"], "accuracy = 1e-09 takes more than 20000 atoms"),
        (["chain", "--seed", "-1"], "seed must be >= 0, got -1"),
        (["chain", "--out", "pi.csv"], "out must be a folder that can be written, got 'pi.csv'"),
    ],
)
def test_bad_evaluations_are_one_line_and_nothing_is_written(
    flags: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "less.npz", rewards=[1.0])
    np.savez(tmp_path / "rows.npz", transitions=0.9 * np.ones((1, 1, 1)), rewards=[1.0], gamma=0.5)
    (tmp_path / "pi.csv").write_text("0.5,0.5\n")
    (tmp_path / "words.csv").write_text("a,b\n")
    before = {path.name for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        evaluate(monkeypatch, *flags)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert re.search(f"^nlhf: {message}", printed.err)
    assert {path.name for path in tmp_path.iterdir()} == before


# --- bad input ---------------------------------------------------------------------------------------------------

ROWS = np.full((2, 1, 2), 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MDP(ROWS * 0.9, [0, 1], 0.9), "transitions must sum to 1, got 0.9 for state 0, action 0"),
        (lambda: MDP(ROWS - 1, [0, 1], 0.9), "transitions must hold probabilities, got -0.5"),
        (lambda: MDP(np.full((2, 2), 0.5), [0, 1], 0.9), r"transitions must have shape \(S, A, S\) .* got \(2, 2\)"),
        (lambda: MDP(ROWS, [0, np.nan], 0.9), r"rewards must be finite numbers, got nan at \(1,\)"),
        (lambda: MDP(ROWS, [0, 1, 2], 0.9), r"rewards must have shape \(2,\) or \(2, 1\), got \(3,\)"),
        (lambda: MDP(ROWS, [0, 1], 1.0), r"gamma must be a number in \[0, 1\), got 1.0"),
        (lambda: MDP(ROWS, np.zeros((2, 1, 2)), 0.5, np.full((2, 1, 2), 0.4)), "reward_probs must be probabilities"),
        (lambda: MDP.two_state(0.9).check_policy([[0.5]]), r"policy must have shape \(2, 1\), got \(1, 1\)"),
        (lambda: MDP.two_state(0.9).check_policy(np.array([[1], [0.5]])), r"sum to 1, got \[0.5\] in state 1"),
        (lambda: Categorical([0.5, 0.4], [0, 1]), "probs must sum to 1, got 0.9"),
        (lambda: Categorical([0.5, 0.5], [0, 1, 2]), r"probs must have shape \(..., 3\), got \(2,\)"),
        (lambda: Categorical([0.5, 0.5], [1, 0]), "atoms must increase in equal steps"),
        (lambda: Categorical([0.2, 0.3, 0.5], [0, 1, 3]), "atoms must increase in equal steps, got steps from 1 to 2"),
        (lambda: Quantile([np.inf]), "values must be finite numbers"),
        (lambda: BackupSolver(MDP.two_state(0.9), 1), "atoms must be an integer >= 2, got 1"),
        (lambda: BackupSolver(MDP.two_state(0.9), [0.0, 5.0]), "atoms must hold R .* from 0 to 5.5, got 0 to 5"),
        (lambda: categorical_fixed_point(MDP.two_state(0.9), np.ones((2, 1)), method="lu"), "method must be one of"),
        (lambda: categorical_fixed_point(MDP.two_state(0.9), np.ones((2, 1)), tol=0), "tol must be a number > 0"),
        (lambda: quantile_fixed_point(MDP.two_state(0.9), np.ones((2, 1)), m=0), "m must be an integer >= 1"),
        (lambda: return_distribution(MDP.two_state(0.9), np.ones((2, 1)), 0.0), "accuracy must be a number > 0"),
        (lambda: QLambda(np.ones((2, 1)), np.ones((2, 1)), 1.5), r"lam must be a number in \[0, 1\], got 1.5"),
        (lambda: Retrace(np.ones((2, 1)), np.ones((3, 1)), 0.5), "behaviour must have the shape of target"),
        (lambda: NStep(np.ones((2, 1)), np.ones((2, 1)), 0), "n must be an integer >= 1"),
        (lambda: SampledBackupSolver(MDP.two_state(0.9), samples=0), "samples must be an integer >= 1, got 0"),
        (lambda: SampledBackupSolver(MDP.two_state(0.9), length=0), "length must be an integer >= 1, got 0"),
        (lambda: SampledBackupSolver(MDP.two_state(0.9), step=0.0), r"step must be a number in \(0, 1\], got 0.0"),
        (lambda: MDP.dirichlet(3, 0.0, 0.9, 0), "alpha must be a number > 0"),
        (lambda: MDP.garnet(3, 4, 0.9, 0), "branches must be at most the number of states, 3, got 4"),
        (lambda: MDP.chain(3, 0.9, reset=2.0), "reset must be a probability, got 2.0"),
        (lambda: random_off_policy(3, 2, 3.0, 0.9, 0), r"distance must be in \[0, 2\], got 3.0"),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_narrow_grid_says_what_it_clips() -> None:
    """All mass beyond the grid piles up at its end, if that is what was asked for."""
    mdp = MDP.two_state(0.9)
    found = categorical_fixed_point(mdp, mdp.uniform, np.linspace(0, 5, 11), clip=True)
    assert found.clipped > 0.01
    assert categorical_fixed_point(mdp, mdp.uniform, np.linspace(0, 10, 11), clip=True).clipped == 0
    assert (found.returns.mean < mdp.values(mdp.uniform)).all()


@pytest.mark.parametrize("distance", [0.0, 0.2, 1.0])
def test_constructors(distance: float) -> None:
    mdp, target, behaviour = random_off_policy(6, 3, distance, 0.9, seed=3)
    assert np.abs(target - behaviour).sum(axis=1).max() == pytest.approx(distance, abs=1e-12)
    walk = MDP.windy_grid(3, 0.9, wind=0.0)
    assert_close(walk.expect(np.arange(9.0))[4], [7, 1, 5, 3], atol=0)  # down, up, right, left
    assert_close(walk.expect(np.arange(9.0))[8], 0, atol=0)  # the goal starts again
    assert MDP.chain(3, 0.9).rewards[:, 0, 0].tolist() == [0, 0, 1]
    sparse = MDP.garnet(20, 3, 0.9, 0, actions=2)
    assert sparse.transitions.nnz == 120
    for p, q in itertools.pairwise([mdp, MDP(mdp.transitions.reshape(6, 3, 6), mdp.rewards[..., 0], 0.9)]):
        assert_close(p.values(target), q.values(target), atol=1e-12)
