"""Return distributions: operators against brute force, fixed points against closed forms, claims on random cases."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given

from nlhf import NStep, QLambda, Retrace, metrics
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
from tests.checks import assert_close
from tests.processes import Process, linear, processes, scale

# --- laws, projections and distances ----------------------------------------------------------------------------------


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


# --- the operator -----------------------------------------------------------------------------------------------------


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


# --- fixed points -----------------------------------------------------------------------------------------------------


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


# --- bad input --------------------------------------------------------------------------------------------------------

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


def compiled(operator: Linear, compiles: bool = True) -> Linear:
    """The same backup, forced to be compiled, or not to be, whatever its size."""
    shift = Shift(operator.shift.mdp, operator.shift.atoms)
    shift.__dict__["compiles"] = compiles
    return Linear(shift, operator.weights)


@given(processes(), st.booleans(), st.integers(0, 2**32 - 1))
def test_compiled_backups_are_the_products(process: Process, narrow: bool, seed: int) -> None:
    """Claims 8 to 14 for the compiled operator, on signed tables; a grid too narrow clips alike. Values are at most 1,
    and rounding moves the borders between them by some roundings of an atom, in strides.
    """
    pytest.importorskip("numba")
    mdp, policy, _, m = process
    assume(mdp.gamma >= 0.5)
    atoms = grid(mdp, m)
    if narrow:
        atoms = np.linspace(0.7 * atoms[0] + 0.3 * atoms[-1], 0.4 * atoms[0] + 0.6 * atoms[-1], m)
    plain = compiled(Linear(Shift(mdp, atoms), policy), False)
    rng = np.random.default_rng(seed)
    cdf = rng.uniform(-1, 1, plain.shape)
    rounding = 4e-15 * (10 * m + np.abs(atoms).max() / plain.stride)
    assert_close(compiled(plain)(cdf), plain(cdf), atol=rounding)
    one, other = (operator.shift.average(policy.ravel(), cdf[0]) for operator in (compiled(plain), plain))
    assert_close(one, other, atol=mdp.n_states * rounding)


@given(
    processes(gamma_max=0.9), st.sampled_from(["aggregation", "iteration"]), st.booleans(), st.integers(0, 2**32 - 1)
)
def test_compiled_sweeps_find_the_same(process: Process, method: str, signed: bool, seed: int) -> None:
    """Both within tol / (1 - sqrt(gamma)) of one fixed point, in Cramér's norm, whatever the right-hand side."""
    pytest.importorskip("numba")
    assume(process.mdp.gamma >= 0.5)
    plain, tol = compiled(linear(process), False), 1e-11
    rhs = np.random.default_rng(seed).uniform(-1, 1, plain.shape) if signed else None
    tol *= plain.stride**0.5 * (plain.shape[1] ** 0.5)
    found, expected = (solve(operator, rhs, tol, method).cdf for operator in (compiled(plain), plain))
    assert plain.cramer(found - expected) <= 2 * tol / (1 - process.mdp.gamma**0.5)


def test_large_processes_compile() -> None:
    """What is solved by default: sparse and dense, one action and several, each with a residual as asked for."""
    pytest.importorskip("numba")
    for mdp in (MDP.garnet(600, 3, 0.9, 0), MDP.windy_grid(16, 0.9), MDP.dirichlet(600, 1.0, 0.9, 0)):
        assert Shift(mdp, grid(mdp, 101)).compiles
        found = categorical_fixed_point(mdp, mdp.uniform, 101, 1e-10)
        assert found.residual <= 1e-10
        assert_close(found.returns.mean, mdp.values(mdp.uniform), atol=1e-8)
