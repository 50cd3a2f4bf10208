"""Games from matrices, constructors and files, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from nlhf import metrics
from nlhf.tabular import MatrixGame, Tabular, regularized_nash
from tests.checks import assert_close
from tests.strategies import Instance, instances

GOOD = [[0.5, 0.9], [0.1, 0.5]]
ALPACA = Path(__file__).parents[2] / "shared" / "data" / "alpaca_eval_win_rates.csv"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"win_prob": [[0.5, 0.9]]}, r"win_prob must have shape \(n, n\) or \(X, n, n\), got \(1, 2\)"),
        ({"win_prob": []}, "win_prob must have shape"),
        ({"win_prob": [[0.5, 0.9], [0.2, 0.5]]}, r"P \+ P\^T = 1: P\[0, 1\] \+ P\[1, 0\] = 1.1"),
        ({"win_prob": [[0.5, 0.9], [0.1 + 3e-9, 0.5]]}, r"P\[0, 1\] \+ P\[1, 0\] = 1.000000003"),
        ({"win_prob": [[0.6, 0.9], [0.1, 0.5]]}, r"P\[0, 0\] \+ P\[0, 0\] = 1.2"),
        ({"win_prob": [[0.5, np.nan], [0.1, 0.5]]}, r"probabilities in \[0, 1\], got P\[0, 1\] = nan"),
        ({"win_prob": [[0.5, 1.5], [-0.5, 0.5]]}, r"got P\[0, 1\] = 1.5"),
        ({"win_prob": [GOOD, [[0.5, 0.3], [0.3, 0.5]]]}, r"P\[1, 0, 1\] \+ P\[1, 1, 0\] = 0.6"),
        ({"reference": [1.0, 0.0]}, "reference must give every response a probability > 0, got 0.0"),
        ({"reference": [0.5, 0.6]}, "reference must sum to 1, got 1.1"),
        ({"reference": [0.5, np.nan]}, "reference must give every response a probability > 0, got nan"),
        ({"reference": [0.2, 0.3, 0.5]}, r"reference must have shape \(2,\) or \(2,\), got \(3,\)"),
        ({"reference": Tabular([0.0, -np.inf])}, "reference must give every response a probability > 0"),
        ({"prompt_weights": [1.0]}, r"prompt_weights must have shape \(\), got \(1,\)"),
        (
            {"win_prob": [GOOD, GOOD], "prompt_weights": [0.5, 0.6]},
            "prompt_weights must be probabilities that sum to 1",
        ),
        ({"labels": ["a"]}, "labels must be 2 distinct names, got 1 of 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatrixGame(**{"win_prob": GOOD, **arguments})


@pytest.mark.parametrize("table", [[[[0.0]]], [], [np.nan, 0.0], [0.0, 0.0], [np.inf, 0.0]])
def test_bad_policies(table: Any) -> None:
    with pytest.raises(ValueError, match="log_probs must"):
        Tabular(table)


@given(instances(prompts=True))
def test_win_prob_is_the_matrix_by_index(instance: Instance) -> None:
    game = instance.game
    rng = np.random.default_rng(0)
    y, z = (rng.integers(0, game.n, (len(game.prompts), k)) for k in (3, 5))
    p = game.win_prob(game.prompts, y, z)
    assert p.shape == (len(game.prompts), 3, 5)
    for x in game.prompts:
        np.testing.assert_array_equal(p[x], game.matrix[x][np.ix_(y[x], z[x])])
    assert_close(p + np.swapaxes(game.win_prob(game.prompts, z, y), 1, 2), 1, atol=1e-15)
    np.testing.assert_array_equal(game.win_prob(..., ..., ...), game.matrix)


@given(instances(prompts=True))
def test_metrics_average_over_prompts(instance: Instance) -> None:
    game, tau, policy = instance
    rng = np.random.default_rng(1)
    weights = rng.dirichlet(np.ones(len(game.prompts)))
    game = MatrixGame(game.matrix, game.reference, weights)
    singles = [MatrixGame(game.matrix[x], Tabular(game.reference.log_probs[x])) for x in game.prompts]
    rows = [Tabular(policy.log_probs[x]) for x in game.prompts]
    for of_batch, of_single in (
        (
            metrics.duality_gap(policy, game, tau),
            [metrics.duality_gap(p, g, tau) for p, g in zip(rows, singles, strict=True)],
        ),
        (
            metrics.duality_gap(policy, game, 0),
            [metrics.duality_gap(p, g, 0) for p, g in zip(rows, singles, strict=True)],
        ),
        (
            metrics.win_rate(policy, game),
            [metrics.win_rate(p, g) for p, g in zip(rows, singles, strict=True)],
        ),
        (metrics.entropy(policy, weights), [metrics.entropy(p) for p in rows]),
    ):
        assert of_batch == pytest.approx(weights @ of_single, abs=1e-13)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8])
def test_constructors_make_games(n: int) -> None:
    """The constructor checks P + P^T = 1, so being made is being right; here, what else they promise."""
    for game in (MatrixGame.cyclic(n, 0.8), MatrixGame.random(n, seed=0), MatrixGame.low_rank(n, 4, seed=0)):
        assert game.n == n
    assert np.linalg.matrix_rank(MatrixGame.low_rank(n, 2, seed=0).matrix - 0.5) <= 2
    assert MatrixGame.random(n, seed=0, prompts=3).matrix.shape == (3, n, n)
    assert_close(MatrixGame.cyclic(n, 0.8).matrix.sum(1), n / 2, atol=1e-12)


def test_annotators_may_be_transitive_each_and_cyclic_together() -> None:
    voters = [MatrixGame.bradley_terry(40 * np.roll([2.0, 1, 0], k)) for k in range(3)]
    assert_close(MatrixGame.annotators(voters).matrix, MatrixGame.cyclic(3, 2 / 3).matrix, atol=1e-12)
    with pytest.raises(ValueError, match="weights must be probabilities"):
        MatrixGame.annotators(voters, [0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="at least one annotator"):
        MatrixGame.annotators([])


def test_csv_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "matrix.csv"
    game = MatrixGame.random(5, seed=0)
    rows = [",".join(["name", *"abcde"])]
    rows += [",".join(["abcde"[i], *map(repr, map(float, game.matrix[i]))]) for i in range(5)]
    file.write_text("\ufeff" + "\r\n".join(rows) + "\r\n\r\n", encoding="utf-8")
    again = MatrixGame.from_csv(file)
    np.testing.assert_array_equal(again.matrix, game.matrix)
    assert again.labels == tuple("abcde")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a header and at least one row, got 0 lines"),
        (",a,b\na,0.5,0.9\nb,0.1", "line 3: expected a name and 2 numbers, got 2 cells"),
        (",a,b\na,0.5,x\nb,0.1,0.5", "line 2: expected a probability in .*, got 'x'"),
        (",a,b\na,0.5,0.9\nb,nan,0.5", "line 3: expected a probability in .*, got 'nan'"),
        (",a,b\n\n\na,0.5,7\nb,0.1,0.5", "line 4: expected a probability in .*, got '7'"),
        (",a,a\na,0.5,0.9\na,0.1,0.5", "line 1: names must be distinct, got 'a' twice"),
        (",a,b\nb,0.5,0.9\na,0.1,0.5", "first difference 'b' against 'a'"),
        (",a,b\na,0.5,0.9\nb,0.2,0.5", r"P\[0, 1\] \+ P\[1, 0\] = 1.1"),
        (",a,b\na,0.5,0.9", "got 1 rows and 2 columns"),
    ],
)
def test_bad_matrix_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "matrix.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"matrix.csv.*{message}"):
        MatrixGame.from_csv(file)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        MatrixGame.from_csv(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.csv: not UTF-8 text"):
        MatrixGame.from_csv(tmp_path / "binary.csv")


def test_comparisons_count(tmp_path: Path) -> None:
    rows: list[tuple[Any, ...]] = [
        ("b", "a", "b"),
        ("a", "b", "a", 2),
        ("b", "c", "tie"),
        ("a", "c", "c", 0.5),
    ]
    game = MatrixGame.from_comparisons(rows, prior=0)
    expected = [[0.5, 2 / 3, 0.0], [1 / 3, 0.5, 0.5], [1.0, 0.5, 0.5]]
    assert_close(game.matrix, expected, atol=1e-15)
    swapped = [(row[1], row[0], *row[2:]) for row in rows]
    assert_close(MatrixGame.from_comparisons(swapped, prior=0).matrix, game.matrix, atol=1e-15)
    file = tmp_path / "log.csv"
    file.write_text("winner,item_a,item_b,weight\n" + "\n".join(f"{r[2]},{r[0]},{r[1]},{(*r, 1)[3]}" for r in rows))
    np.testing.assert_array_equal(MatrixGame.from_comparisons(file, prior=0).matrix, game.matrix)
    smoothed = MatrixGame.from_comparisons(rows).matrix  # one pseudo-win each
    assert smoothed[0, 1] == pytest.approx((2 + 1) / (3 + 2))
    assert_close(np.diag(smoothed), 0.5, atol=1e-15)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item_a,item_b\na,b", "line 1: expected the columns item_a, item_b, winner"),
        ("item_a,item_b,winner\na,b,c", "line 2: winner must be 'a', 'b' or 'tie', got 'c'"),
        ("item_a,item_b,winner\na,b,a\na,a,a", "line 3: item_a and item_b must differ"),
        ("item_a,item_b,winner\na,b", "line 2: expected 3 cells, got 2"),
        ("item_a,item_b,winner,weight\na,b,a,-1", "line 2: weight must be a finite number > 0, got '-1'"),
        ("item_a,item_b,winner,weight\na,b,a,inf", "line 2: weight must be a finite number > 0, got 'inf'"),
    ],
)
def test_bad_comparison_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "log.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"log.csv, {message}"):
        MatrixGame.from_comparisons(file)


def test_bad_comparisons() -> None:
    with pytest.raises(ValueError, match="comparisons, row 1: expected item_a, item_b, winner"):
        MatrixGame.from_comparisons([("a", "b", "a"), ("a", "b")])
    with pytest.raises(ValueError, match="at least one judged pair"):
        MatrixGame.from_comparisons([])
    with pytest.raises(ValueError, match="never pair 'a' with 'c': give a prior > 0"):
        MatrixGame.from_comparisons([("a", "b", "a"), ("b", "c", "c")], prior=0)
    with pytest.raises(ValueError, match="prior must be a finite number >= 0, got -1"):
        MatrixGame.from_comparisons([("a", "b", "a")], prior=-1)


@pytest.mark.parametrize("tau", [1e-4, 1e-3, 1e-2, 1.0, 10.0])
@pytest.mark.parametrize("n", [1, 2, 33])
def test_equilibrium_at_extreme_tau_and_references(tau: float, n: int) -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        reference = Tabular.from_logits(-rng.uniform(0, 200 if seed else 0, n))
        game = MatrixGame.random(n, rng, reference=reference)
        found = regularized_nash(game, tau)
        assert 0 <= found.duality_gap < 1e-18 * max(1.0, 1 / tau)
        assert found.duality_gap == metrics.duality_gap(found.policy, game, tau)


@pytest.mark.parametrize("seed", range(40))
def test_equilibrium_stops_at_rounding(seed: int) -> None:
    """Games whose residual stalls at the rounding floor, where a line search alone goes on for ever."""
    for game in (MatrixGame.random(64, seed), MatrixGame.cyclic(3 + seed, 0.9)):
        for tau in (0.1, 0.01, 0.001):
            assert regularized_nash(game, tau).duality_gap < 1e-18


@pytest.mark.parametrize("tau", [0, -1.0, float("nan"), "0.1"])
def test_equilibrium_needs_positive_tau(tau: Any) -> None:
    with pytest.raises(ValueError, match="tau must be a finite number > 0"):
        regularized_nash(MatrixGame(GOOD), tau)


@pytest.mark.skipif(not ALPACA.exists(), reason="the AlpacaEval win rates are not beside the project")
def test_alpaca_eval() -> None:
    game = MatrixGame.from_csv(ALPACA)
    assert game.n == 58
    assert game.labels is not None
    winner = int(np.argmax((game.matrix > 0.5).sum(1)))
    assert (game.matrix[winner] > 0.5).sum() == 57  # a Condorcet winner, which tau -> 0 finds
    assert regularized_nash(game, 1e-3).policy.probs[winner] > 0.99
