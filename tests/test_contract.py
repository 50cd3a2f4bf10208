"""What every algorithm owes. They are found in `nlhf.algorithms`: a new file is tested without being listed."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nlhf
from nlhf import algorithms, run
from nlhf.core import Info
from nlhf.tabular import ExactSolver, MatrixGame, Tabular, regularized_nash
from tests.checks import assert_close
from tests.strategies import Instance, instances

FOUND = sorted(
    {
        cls
        for module in pkgutil.iter_modules(algorithms.__path__, "nlhf.algorithms.")
        for _, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
        if cls.__module__ == module.name and hasattr(cls, "step")
    },
    key=lambda cls: cls.__name__,
)
EVERY = pytest.mark.parametrize("cls", FOUND, ids=lambda cls: cls.__name__)
UNBIASED = {"MagneticMD", "MirrorProx", "NashEMA", "OptimisticMD", "SelfPlay"}


def test_found_are_exported() -> None:
    assert {cls.__name__ for cls in FOUND} == set(algorithms.__all__) <= set(nlhf.__all__)
    assert len(FOUND) >= 7


def after(algorithm: Any, game: MatrixGame, steps: int = 3, policy: Tabular | None = None) -> Tabular:
    found: Tabular = run(algorithm, ExactSolver(game), steps, policy=policy, metrics=()).policy
    return found


@EVERY
def test_config_is_frozen_and_compared_by_value(cls: Any) -> None:
    algorithm = cls(eta=0.5, tau=0.1)
    assert algorithm == cls(eta=0.5, tau=0.1) != cls(eta=0.5, tau=0.2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        algorithm.tau = 0.3
    assert cls.default(0.1).tau == 0.1


@EVERY
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"eta": 0.0}, "eta"),
        ({"eta": -1.0}, "eta"),
        ({"eta": float("nan")}, "eta"),
        ({"eta": float("inf")}, "eta"),
        ({"eta": True}, "eta"),
        ({"eta": "fast"}, "eta"),
        ({"tau": -0.1}, "tau"),
        ({"tau": float("nan")}, "tau"),
        ({"tau": None}, "tau"),
    ],
)
def test_bad_numbers_are_named(cls: Any, wrong: dict[str, Any], named: str) -> None:
    (value,) = wrong.values()
    with pytest.raises(ValueError, match=f"{named} must be .*got {value!r}"):
        cls(**{"eta": 0.5, "tau": 0.1, **wrong})


@EVERY
def test_a_mixture_needs_eta_tau_at_most_one(cls: Any) -> None:
    if cls.__name__ in ("MagneticMD", "MirrorProx"):  # implicit steps take any
        assert cls(eta=20.0, tau=0.1).step
    else:
        with pytest.raises(ValueError, match=r"eta \* tau must be <= 1, got eta = 20.0, tau = 0.1"):
            cls(eta=20.0, tau=0.1)


@EVERY
@given(instance=instances(prompts=True))
def test_step_is_pure_and_deterministic(cls: Any, instance: Instance) -> None:
    game, tau, policy = instance
    algorithm = cls(eta=0.3, tau=min(tau, 3.0))
    state = algorithm.init(policy)
    before = policy.log_probs.copy()
    once, info = algorithm.step(state, ExactSolver(game))
    twice, _ = algorithm.step(state, ExactSolver(game))
    assert isinstance(info, Info)
    assert state.t == 0
    assert once.t == 1
    np.testing.assert_array_equal(policy.log_probs, before)
    np.testing.assert_array_equal(once.policy.log_probs, twice.policy.log_probs)
    assert_close(once.policy.probs.sum(-1), 1, atol=1e-12)


@EVERY
@given(instance=instances(), seed=st.integers(0, 1000))
def test_permuting_the_responses_permutes_the_policy(cls: Any, instance: Instance, seed: int) -> None:
    game, tau, _ = instance
    p = np.random.default_rng(seed).permutation(game.n)
    shuffled = MatrixGame(game.matrix[np.ix_(p, p)], Tabular(game.reference.log_probs[p]))
    algorithm = cls(eta=0.3, tau=tau)
    assert_close(after(algorithm, shuffled).log_probs, after(algorithm, game).log_probs[p], atol=1e-11)


@EVERY
@given(instance=instances())
def test_swapping_the_players_changes_nothing(cls: Any, instance: Instance) -> None:
    """The column player of a symmetric game maximises 1 - P^T, which is P again, so it moves as the row player."""
    game, tau, _ = instance
    swapped = MatrixGame(1 - game.matrix.T, game.reference)
    algorithm = cls(eta=0.3, tau=tau)
    assert_close(after(algorithm, swapped).log_probs, after(algorithm, game).log_probs, atol=1e-11)


@EVERY
@given(instance=instances(prompts=True))
def test_a_batch_of_games_is_a_loop_over_games(cls: Any, instance: Instance) -> None:
    game, tau, policy = instance
    algorithm = cls(eta=0.3, tau=tau)
    batch = after(algorithm, game, policy=policy).log_probs
    for x in game.prompts:
        single = MatrixGame(game.matrix[x], Tabular(game.reference.log_probs[x]))
        alone = after(algorithm, single, policy=Tabular(policy.log_probs[x])).log_probs
        assert_close(batch[x], alone, atol=1e-12)


@EVERY
@given(instance=instances())
def test_tau_zero_never_looks_at_the_reference(cls: Any, instance: Instance) -> None:
    """Legal for every algorithm with a step size; only `BestResponse` still plays against the reference."""
    game, _, policy = instance
    algorithm = cls(eta=0.3, tau=0.0)
    state = algorithm.init(policy)
    first, _ = algorithm.step(state, ExactSolver(game))
    other = Tabular.from_logits(np.zeros(game.n))
    if cls.__name__ != "BestResponse":
        second, _ = algorithm.step(state._replace(reference=other), ExactSolver(game))
        np.testing.assert_array_equal(first.policy.log_probs, second.policy.log_probs)
    assert np.isfinite(first.policy.log_probs).all()


@EVERY
def test_ties_leave_the_reference_alone(cls: Any) -> None:
    game = MatrixGame(np.full((4, 4), 0.5), [0.1, 0.2, 0.3, 0.4])
    assert_close(after(cls(eta=0.5, tau=0.5), game, 10).probs, game.reference.probs, atol=1e-14)


@EVERY
@given(instance=instances(tau_min=0.1))
def test_fixed_point(cls: Any, instance: Instance) -> None:
    """Started at the equilibrium, an unbiased algorithm stays; the others do not, unless nothing is at stake."""
    game, tau, _ = instance
    star = regularized_nash(game, tau).policy
    algorithm = cls(eta=min(0.4, 0.9 / tau), tau=tau)
    state = algorithm.init(game.reference)._replace(policy=star)
    fields = {name: star for name in ("average", "previous") if name in state._fields}
    moved, _ = algorithm.step(state._replace(**fields), ExactSolver(game))
    shift = np.abs(moved.policy.log_probs - star.log_probs).max()
    if cls.__name__ in UNBIASED:
        assert shift < 1e-10


@pytest.mark.parametrize("name", ["NashMD", "BestResponse"])
def test_biased_algorithms_leave_the_equilibrium(name: str) -> None:
    game = MatrixGame.random(6, seed=0)
    star = regularized_nash(game, 0.1).policy
    algorithm = getattr(nlhf, name)(eta=1.0, tau=0.1)
    moved, _ = algorithm.step(algorithm.init(game.reference)._replace(policy=star), ExactSolver(game))
    assert np.abs(moved.policy.log_probs - star.log_probs).max() > 1e-3


@EVERY
def test_default_converges(cls: Any) -> None:
    game = MatrixGame.random(10, seed=3)
    found = after(cls.default(0.2), game, 2000)
    target = regularized_nash(game, 0.2).policy
    if cls.__name__ == "BestResponse":
        target = Tabular(nlhf.metrics.best_response(game.reference, game, 0.2))
    # With its schedule Nash-MD is at the equilibrium of tau / (1 - eta_T tau), about tau (1 + 2 / T): 1e-3 away in tau.
    tolerance = 1e-4 if cls.__name__ == "NashMD" else 1e-10
    assert_close(found.probs, target.probs, atol=tolerance)


@pytest.mark.parametrize("path", sorted(Path(algorithms.__path__[0]).glob("*.py")), ids=lambda path: path.name)
def test_algorithm_files_are_short_and_import_no_array_library(path: Path) -> None:
    source = path.read_text()
    imported = {
        alias.name.split(".")[0] if isinstance(node, ast.Import) else str(node.module).split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert imported <= {"__future__", "dataclasses", "math", "nlhf", "typing"}
    assert len(source.splitlines()) <= 100
