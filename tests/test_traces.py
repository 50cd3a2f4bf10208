"""Multi-step backups: exact and sampled, against enumeration and what is declared of them."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from nlhf import CategoricalDP, NStep, QLambda, Retrace, TreeBackup, metrics, run
from nlhf.evaluation import Backup, EvalState
from nlhf.tabular import (
    MDP,
    BackupSolver,
    Categorical,
    SampledBackupSolver,
    categorical_fixed_point,
    random_off_policy,
)
from nlhf.tabular.bellman import grid
from nlhf.tabular.returns import project
from nlhf.tabular.sampling import Trajectories
from tests.checks import assert_close
from tests.processes import Process, processes, scale

# --- off-policy -------------------------------------------------------------------------------------------------------


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


@given(processes(), st.floats(0.0, 1.0), st.sampled_from([1.0, 2.0]))
def test_traces_that_do_not_overshoot_always_contract(process: Process, lam: float, p: float) -> None:
    """Claim 55: Retrace and tree backup by at most gamma^(1/p), however far apart the policies are."""
    for kind in (Retrace, TreeBackup):
        modulus = kind(process.policy, process.behaviour, lam).modulus(process.mdp.gamma, p)
        assert modulus <= process.mdp.gamma ** (1 / p) + 1e-12


def test_a_run_that_diverges_is_recorded() -> None:
    """Masses of both signs that cancel to 1 up to rounding are a signed measure all the same."""
    mdp = MDP(np.eye(2)[np.tile([0, 1], (2, 1))], [[0.0, 1.0], [0.3, 0.0]], 0.9)
    algorithm = QLambda(1 - np.eye(2), np.eye(2), 0.9)

    def largest(returns: Any, game: Any, tau: Any) -> float:
        return float(np.abs(returns.probs).max())

    _, sizes = run(algorithm, BackupSolver(mdp, 15), 12, metrics=(largest,)).values("largest")
    assert sizes[-1] > 1e6


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


# --- samples ----------------------------------------------------------------------------------------------------------


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
