"""Unregularised equilibria against linear programmes: degenerate games, several equilibria, near-ties."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from scipy import optimize
from scipy.sparse import csr_array

from nlhf import metrics
from nlhf.tabular import (
    LowRankGame,
    MatrixGame,
    OperatorGame,
    Tabular,
    nash,
    regularized_nash,
)
from tests.checks import assert_close
from tests.strategies import KINDS, matrix, tied

scipy: Any = optimize  # whose stubs know less than its documentation
EPS = float(np.finfo(np.float64).eps)


def exploitability(game: MatrixGame, probs: Any) -> float:
    return float((game.matrix @ probs).max() - 0.5)


def face(game: MatrixGame) -> tuple[Any, Any]:
    """The least and the largest probability that each response has in any unregularised equilibrium: 2 n programmes."""
    n = game.n
    skew = game.matrix - 0.5
    found = np.array(
        [
            [
                scipy.linprog(
                    sign * np.eye(n)[i],
                    A_ub=skew,
                    b_ub=np.full(n, 1e-12),
                    A_eq=np.ones((1, n)),
                    b_eq=[1],
                    bounds=(0, 1),
                    options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
                ).fun
                * sign
                for sign in (1, -1)
            ]
            for i in range(n)
        ]
    )
    return found[:, 0], found[:, 1]


# --- unregularised ----------------------------------------------------------------------------------------------------


@given(st.integers(2, 9), st.sampled_from([*KINDS, "tied"]), st.integers(0, 2**32 - 1))
def test_nash_against_linear_programmes(n: int, kind: str, seed: int) -> None:
    """It is an equilibrium, inside the face that 2 n programmes span, and unique where that is a point."""
    game = tied(seed, n) if kind == "tied" else MatrixGame(matrix(np.random.default_rng(seed), n, kind))
    found = nash(game)
    assert 0 <= found.gap <= 1e-12
    assert found.gap == pytest.approx(2 * max(0, exploitability(game, found.policy.probs)), abs=1e-15)
    low, high = face(game)
    assert (found.policy.probs >= low - 1e-7).all()
    assert (found.policy.probs <= high + 1e-7).all()
    width = float((high - low).max())
    if width > 1e-5:
        assert not found.unique
    elif found.unique:
        assert_close(found.policy.probs, 0.5 * (low + high), atol=1e-5)


@pytest.mark.parametrize("kind", ["iid", "bradley_terry", "sign"])
@pytest.mark.parametrize("n", [30, 31, 200])
def test_nash_of_larger_games(n: int, kind: str) -> None:
    """Independent entries have one equilibrium, of odd support, with probability one; HiGHS finds it, too."""
    game = MatrixGame(matrix(np.random.default_rng(n), n, kind))
    found = nash(game)
    assert found.gap < 1e-14
    assert found.unique
    assert np.count_nonzero(found.policy.probs) % 2 == 1
    theirs = scipy.linprog(
        np.append(np.zeros(n), 1.0),
        A_ub=np.hstack([game.matrix - 0.5, -np.ones((n, 1))]),
        b_ub=np.zeros(n),
        A_eq=np.append(np.ones(n), 0.0)[None],
        b_eq=[1],
        bounds=[(0, 1)] * n + [(None, None)],
    )
    assert_close(found.policy.probs, theirs.x[:n], atol=1e-6)


@pytest.mark.parametrize(
    ("game", "unique", "probs"),
    [
        (MatrixGame([[0.5]]), True, [1.0]),
        (MatrixGame(np.full((4, 4), 0.5)), False, [0.25] * 4),
        (MatrixGame.rock_paper_scissors(), True, [1 / 3] * 3),
        (MatrixGame.cyclic(4), False, [0.25] * 4),
        (MatrixGame.cyclic(3, 0.6, reference=[0.6, 0.3, 0.1]), True, [1 / 3] * 3),
        (MatrixGame.bradley_terry([0.0, 3.0, 1.0]), True, [0.0, 1.0, 0.0]),
        (MatrixGame.bradley_terry([3.0, 3.0, 1.0], reference=[0.2, 0.6, 0.2]), False, [0.25, 0.75, 0.0]),
        (  # three annotators, golden G-B at tau = 0
            MatrixGame([[0.5, 1 - 0.61666666666666667, 0.69166666666666667],
                        [0.61666666666666667, 0.5, 1 - 0.69166666666666667],
                        [1 - 0.69166666666666667, 0.69166666666666667, 0.5]]),
            True,
            [23 / 60, 23 / 60, 14 / 60],
        ),
    ],
)  # fmt: skip
def test_nash_that_can_be_known(game: MatrixGame, unique: bool, probs: list[float]) -> None:
    found = nash(game)
    assert bool(found.unique) is unique
    assert_close(found.policy.probs, probs, atol=1e-9)
    assert found.kl_bound == np.inf


def test_duplicates_share_by_the_reference() -> None:
    """Rock, paper, paper', scissors: the maximal-entropy equilibrium splits the third of paper."""
    copies = [0, 1, 1, 2]
    rps = MatrixGame.rock_paper_scissors().matrix[np.ix_(copies, copies)]
    assert_close(nash(MatrixGame(rps)).policy.probs, [1 / 3, 1 / 6, 1 / 6, 1 / 3], atol=1e-9)
    skewed = MatrixGame(rps, reference=[0.1, 0.6, 0.2, 0.1])
    assert_close(nash(skewed).policy.probs, [1 / 3, 1 / 4, 1 / 12, 1 / 3], atol=1e-9)


@given(st.integers(3, 7), st.integers(0, 2**32 - 1))
def test_nash_is_the_limit_of_the_regularised_path_and_the_closest_to_the_reference(n: int, seed: int) -> None:
    """Where several equilibria exist: against SciPy's SLSQP on the face, and against the path near tau = 0."""
    rng = np.random.default_rng(seed)
    game = tied(seed, n).with_reference(Tabular.from_logits(rng.standard_normal(n)))
    found, mu = nash(game), game.reference
    skew = game.matrix - 0.5
    theirs = scipy.minimize(
        lambda p: float(p @ (np.log(np.maximum(p, 1e-300)) - mu.log_probs)),
        nash(MatrixGame(game.matrix)).policy.probs,
        jac=lambda p: np.log(np.maximum(p, 1e-300)) - mu.log_probs + 1,
        bounds=[(0, 1)] * n,
        constraints=[
            {"type": "eq", "fun": lambda p: p.sum() - 1, "jac": lambda p: np.ones(n)},
            {"type": "ineq", "fun": lambda p: -skew @ p, "jac": lambda p: -skew},
        ],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    if theirs.success:
        assert metrics.kl(found.policy, mu) <= theirs.fun + 1e-6
    apart = [np.abs(regularized_nash(game, tau).policy.probs - found.policy.probs).max() for tau in (1e-3, 1e-5)]
    assert apart[1] <= 1e-3
    assert apart[1] <= apart[0] + 1e-9


def test_nash_of_operators_and_prompts() -> None:
    low = LowRankGame.random(60, 4, seed=2)
    dense = MatrixGame(low.win_prob([0], ..., ...)[0])
    sparse = OperatorGame(csr_array(dense.matrix - 0.5))
    expected = nash(dense)
    for game in (low, sparse):
        found = nash(game)
        assert found.gap < 1e-14
        assert bool(found.unique) is bool(expected.unique)
        assert_close(found.policy.probs, expected.policy.probs, atol=1e-7)
    games = MatrixGame.random(9, 0, prompts=5, prompt_weights=[0.1, 0.2, 0.3, 0.2, 0.2])
    found = nash(games)
    assert found.gap.shape == found.unique.shape == (5,)
    for x in range(5):
        assert_close(found.policy.probs[x], nash(MatrixGame(games.matrix[x])).policy.probs, atol=1e-12)


@given(st.integers(3, 11), st.sampled_from([0.0, 1e-11, 1e-9, 1e-7, 1e-5]), st.integers(0, 2**32 - 1))
def test_near_ties(n: int, away: float, seed: int) -> None:
    """Ties and duplicates, shaken a little: what is unique by less than rounding must at least be an equilibrium."""
    rng = np.random.default_rng(seed)
    noise = np.triu(rng.standard_normal((n, n)), 1) * away
    skew = np.clip(tied(seed, n).matrix - 0.5 + noise - noise.T, -0.5, 0.5)
    assert nash(MatrixGame(0.5 + 0.5 * (skew - skew.T))).gap <= 1e-10


@pytest.mark.parametrize("depth", [10, 100, 690])
@pytest.mark.parametrize("n", [3, 40])
def test_all_ties_leave_the_reference_as_it_is(n: int, depth: float) -> None:
    game = MatrixGame(np.full((n, n), 0.5), Tabular.from_logits(-np.linspace(0, depth, n)))
    assert_close(nash(game).policy.log_probs, game.reference.log_probs, atol=1e-9)
    assert not nash(game).unique
