"""From data to standings: estimates and their uncertainty, rankings and cycles, and the command `nlhf solve`."""

from __future__ import annotations

import gzip
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from scipy.special import expit, softmax

from nlhf import cli
from nlhf.solve import clustered, standings
from nlhf.tabular import MatrixGame, equilibrium_interval, nash, regularized_nash
from nlhf.tabular.evidence import Counts, Outcomes
from nlhf.tabular.tournament import bradley_terry_scores, cycles
from tests.checks import assert_close
from tests.strategies import matrix

ALPACA = Path(__file__).parents[2] / "shared" / "data"
LOG = "item_a,item_b,winner,weight\n" + "\n".join(
    f"{a},{b},{w},{k}"
    for a, b, w, k in [("rock", "scissors", "rock", 30), ("scissors", "paper", "scissors", 20),
                       ("paper", "rock", "paper", 10), ("paper", "rock", "tie", 4), ("rock", "scissors", "scissors", 6)]
)  # fmt: skip


# --- evidence ----------------------------------------------------------------------------------------------------


def test_counts_are_drawn_from_the_posterior() -> None:
    """Beta(wins + prior, losses + prior): mean and variance of each pair, and P + P^T = 1 in every draw."""
    rng = np.random.default_rng(0)
    wins = rng.integers(0, 20, (4, 4)).astype(float)
    np.fill_diagonal(wins, 0)
    counts = Counts(wins, prior=1.0)
    drawn = counts.draw(rng, 20_000)
    a, b = wins + 1, wins.T + 1
    mean = np.where(np.eye(4, dtype=bool), 0.5, a / (a + b))
    std = np.where(np.eye(4, dtype=bool), 0, np.sqrt(a * b / (a + b + 1)) / (a + b))
    assert_close(counts.mean, mean, atol=1e-15)
    np.testing.assert_array_equal(drawn + np.swapaxes(drawn, 1, 2), 1.0)
    assert_close(drawn.mean(axis=0), mean, atol=5 * 0.2 / np.sqrt(20_000))  # five standard errors, no std is above 0.2
    assert_close(drawn.std(axis=0), std, atol=0.01)


def test_a_clean_sweep_is_certain_without_a_prior() -> None:
    counts = Counts(np.array([[0.0, 5.0], [0.0, 0.0]]), prior=0.0)
    np.testing.assert_array_equal(counts.draw(np.random.default_rng(0), 3), [[[0.5, 1.0], [0.0, 0.5]]] * 3)


def test_outcomes_by_hand_and_by_enumeration() -> None:
    """The share of questions won, and the bootstrap's mean over all 3^3 ways to draw three questions from three."""
    scores = np.array([[3.0, 1.0, 1.0], [2.0, 2.0, 5.0], [0.0, 9.0, 4.0]])
    outcomes = Outcomes(scores)
    by_hand = [
        [np.mean([0.5 if s[y] == s[z] else float(s[y] > s[z]) for s in scores]) for z in range(3)] for y in range(3)
    ]
    np.testing.assert_array_equal(outcomes.mean, by_hand)
    times = np.array([np.bincount(drawn, minlength=3) for drawn in itertools.product(range(3), repeat=3)], dtype=float)
    assert_close(outcomes._weighed(times).mean(axis=0), by_hand, atol=1e-15)
    drawn = outcomes.draw(np.random.default_rng(0), 50)
    assert {tuple(np.round(3 * game.ravel(), 9)) for game in drawn} <= {
        tuple(np.round(3 * game.ravel(), 9)) for game in outcomes._weighed(times)
    }


def test_groups_are_games_of_their_own() -> None:
    rng = np.random.default_rng(0)
    scores, groups = rng.standard_normal((40, 5)), np.repeat([0, 1, 1, 2], 10)
    game = MatrixGame.from_scores(scores, groups)
    assert_close(game.prompt_weights, [0.25, 0.5, 0.25], atol=1e-15)
    for g in range(3):
        np.testing.assert_array_equal(game.matrix[g], MatrixGame.from_scores(scores[groups == g]).matrix)
    assert game.evidence is not None
    assert game.evidence.draw(rng, 7).shape == (7, 3, 5, 5)
    pooled = np.tensordot(game.prompt_weights, game.matrix, axes=1)
    assert_close(pooled, MatrixGame.from_scores(scores).matrix, atol=1e-14)


def test_intervals_against_the_delta_method() -> None:
    """Var pi = sum over pairs of Var P (d pi / d P)^2, the derivative by central differences: exact as counts grow."""
    rng = np.random.default_rng(0)
    n, tau, h = 4, 0.2, 1e-5
    wins = np.triu(rng.integers(2000, 4000, (n, n)), 1) + np.tril(rng.integers(2000, 4000, (n, n)), -1)
    counts = Counts(wins.astype(float), prior=1.0)
    game = MatrixGame(counts.mean, [0.4, 0.3, 0.2, 0.1])
    game.evidence = counts
    variance = np.zeros(n)
    for y, z in itertools.combinations(range(n), 2):
        bump = np.zeros((n, n))
        bump[y, z], bump[z, y] = h, -h
        plus, minus = (regularized_nash(MatrixGame(game.matrix + s * bump, game.reference), tau) for s in (1, -1))
        slope = (plus.policy.probs - minus.policy.probs) / (2 * h)
        a, b = wins[y, z] + 1, wins[z, y] + 1
        variance += slope**2 * a * b / ((a + b) ** 2 * (a + b + 1))
    found = equilibrium_interval(game, tau, draws=4000)
    # a standard deviation of 4000 draws has a relative error of 1 / sqrt(8000), five of which are 0.056
    np.testing.assert_allclose(found.std, np.sqrt(variance), rtol=0.06)
    centre = regularized_nash(game, tau).policy.probs
    assert_close(0.5 * (found.high + found.low), centre, atol=0.2 * found.std.max())
    assert_close(found.high - found.low, 2 * 1.645 * np.sqrt(variance), atol=0.2 * found.std.max())  # a normal law


def test_intervals_of_few_questions_on_many_items() -> None:
    """Every draw has many ties, and several equilibria."""
    game = MatrixGame.from_scores(np.random.default_rng(0).normal(size=(20, 40)))
    found = equilibrium_interval(game, 0, draws=100)
    assert (found.low <= found.high).all()


def test_intervals_are_reproducible_and_hold_the_whole_story_at_tau_0() -> None:
    game = MatrixGame.from_comparisons([line.split(",") for line in LOG.splitlines()[1:]])
    first, again = (equilibrium_interval(game, 0, draws=300, seed=1) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first.played >= 0.9).all()  # a cycle, all but surely
    probs = nash(game).policy.probs
    assert (first.low < probs).all()
    assert (probs < first.high).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": -1}, "tau must be a finite number >= 0"),
        ({"draws": 1}, "draws must be an integer >= 2"),
        ({"level": 1.0}, r"level must be in \(0, 1\), got 1.0"),
        ({"game": MatrixGame.cyclic(3)}, "game must be estimated from data, by from_comparisons or from_scores"),
    ],
)
def test_interval_arguments(options: dict[str, Any], message: str) -> None:
    given_ = {"game": MatrixGame.from_comparisons([("a", "b", "a")]), "tau": 0.1, **options}
    with pytest.raises(ValueError, match=message):
        equilibrium_interval(**given_)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MatrixGame.from_scores([1.0, 2.0]), r"scores must be finite numbers of shape \(Q, n\)"),
        (lambda: MatrixGame.from_scores([[1.0, np.nan]]), "scores must be finite numbers"),
        (lambda: MatrixGame.from_scores([[1.0, 2.0]], [0, 1]), r"groups must be 1 integers, got int64 of shape \(2,\)"),
        (lambda: MatrixGame.from_scores([[1.0, 2.0]], [0.5]), "groups must be 1 integers, got float64"),
        (lambda: MatrixGame.from_scores([[1.0, 2.0]], [1]), r"groups must be 0 ... X - 1, each at least once"),
        (lambda: MatrixGame.from_scores([[1.0, 2.0]], [-1]), r"groups must be 0 ... X - 1, each at least once"),
        (lambda: clustered(np.zeros((3, 2)), 4, 0), "clusters must be between 1 and the number of questions, 3, got 4"),
    ],
)
def test_scores_are_checked(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- tournaments -------------------------------------------------------------------------------------------------


@given(st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_bradley_terry_is_stationary_and_finds_the_truth(n: int, seed: int) -> None:
    """Scores are recovered exactly from their own win probabilities, whatever the weights; else the gradient is 0."""
    rng = np.random.default_rng(seed)
    scores = 2 * rng.standard_normal(n)
    weights = rng.uniform(0.5, 2, (n, n))
    weights = weights + weights.T
    truth = expit(scores[:, None] - scores)
    assert_close(bradley_terry_scores(truth, weights), scores - scores.mean(), atol=1e-8)
    law = 10 ** rng.uniform(-18, 0, n)  # the gradient vanishes to 1e-12 of each weight
    assert_close(bradley_terry_scores(truth, np.outer(law, law)), scores - scores.mean(), atol=1e-8)
    mixed = 0.9 * matrix(rng, n, "iid") + 0.05
    r = bradley_terry_scores(mixed, weights)
    assert_close(np.sum(weights * (mixed - expit(r[:, None] - r)), axis=1), 0, atol=1e-9)
    assert r.mean() == pytest.approx(0, abs=1e-12)


def test_bradley_terry_golden() -> None:
    """Golden G-E: the ring of 2/3 fitted on pairs drawn from (.6, .3, .1)."""
    ring = MatrixGame.cyclic(3, 2 / 3).matrix
    for pi, expected in (((0.6, 0.3, 0.1), (-0.4759, 0.0680)), ((0.1, 0.3, 0.6), (0.5438, 0.0680))):
        r = bradley_terry_scores(ring, np.outer(pi, pi))
        assert_close(r[1:] - r[0], expected, atol=5e-5)  # four digits are printed


def test_bradley_terry_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"win_prob must let every group lose to the others: \[1\] never do"):
        bradley_terry_scores(np.array([[0.5, 0.0, 0.4], [1.0, 0.5, 1.0], [0.6, 0.0, 0.5]]))


@given(st.integers(1, 9), st.sampled_from(["iid", "sign", "cyclic", "bradley_terry", "tie"]), st.integers(0, 2**32 - 1))
def test_cycles_by_brute_force(n: int, kind: str, seed: int) -> None:
    p = matrix(np.random.default_rng(seed), n, kind)
    every = {}
    for trio in itertools.combinations(range(n), 3):
        for y, z, w in (trio, (trio[0], trio[2], trio[1])):
            if min(p[y, z], p[z, w], p[w, y]) > 0.5:
                every[(y, z, w)] = min(p[y, z], p[z, w], p[w, y])
    found = cycles(p)
    assert found.total == len(every)
    assert [f[3] for f in found.strongest] == sorted(every.values(), reverse=True)[:5]
    assert all(every[f[:3]] == f[3] for f in found.strongest)
    beats_all = [y for y in range(n) if all(p[y, z] > 0.5 for z in range(n) if z != y)]
    assert found.condorcet == (beats_all[0] if beats_all and n > 1 else None)


# --- the command -------------------------------------------------------------------------------------------------


def solve(monkeypatch: pytest.MonkeyPatch, capsys: Any, *flags: str) -> str:
    monkeypatch.setattr(sys, "argv", ["nlhf", "solve", *flags])
    cli.main()
    printed = capsys.readouterr()
    assert printed.err == ""
    return str(printed.out)


def test_a_log_of_comparisons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "log.csv").write_text(LOG)
    monkeypatch.chdir(tmp_path)
    out = solve(monkeypatch, capsys, "log.csv", "--tau", "0.1,0", "--draws", "50")
    assert "log: 3 items" in out
    assert "no item beats every other one" in out
    assert "3-cycles of majorities: 1, the strongest" in out
    assert re.search(r"paper > rock > scissors > paper, each with probability at least 0\.81", out)
    folder = tmp_path / "runs" / "solve-log"
    written = {"standings.csv", "certificates.csv", "standings.png", "standings.svg"}
    assert {path.name for path in folder.iterdir()} == written
    frame = pd.read_csv(folder / "standings.csv").set_index("item")
    game = MatrixGame.from_comparisons(tmp_path / "log.csv")
    assert game.labels == ("paper", "rock", "scissors")
    for column, found in (("tau=0.1", regularized_nash(game, 0.1)), ("tau=0", nash(game))):
        assert_close(frame.loc[list(game.labels), column], found.policy.probs, atol=1e-12)
    assert (frame["low(0.1)"] < frame["tau=0.1"]).all()
    assert (frame["tau=0.1"] < frame["high(0.1)"]).all()
    assert_close(frame.loc[list(game.labels), "win_rate"], game.matrix.mean(axis=1), atol=1e-12)
    certificates = pd.read_csv(folder / "certificates.csv")
    assert certificates.unique.all()
    assert (certificates.gap < 1e-14).all()


def test_a_matrix_with_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    game = MatrixGame.cyclic(3, 5 / 9)
    rows = [",a,b,c", *(f"{'abc'[i]},{','.join(map(repr, map(float, row)))}" for i, row in enumerate(game.matrix))]
    (tmp_path / "dice.csv").write_text("\n".join(rows))
    (tmp_path / "mu.csv").write_text("item,probability\nc,0.1\na,0.6\nb,0.3\n")
    monkeypatch.chdir(tmp_path)
    out = solve(monkeypatch, capsys, "dice.csv", "--tau", "0.1", "--reference", "mu.csv", "--out", "here")
    frame = pd.read_csv(tmp_path / "here" / "standings.csv").set_index("item")
    assert_close(frame.loc[["a", "b", "c"], "tau=0.1"], [0.6437299335, 0.2284984188, 0.1277716477], atol=1e-9)
    assert "[" not in out  # a matrix says nothing of how it was estimated


def test_scores_in_clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Two kinds of questions: on half a beats b beats c, on the other half the reverse."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 2, 60)
    scores = np.where(kinds[:, None] == 0, [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]) + 0.01 * rng.standard_normal((60, 3))
    lines = ["question,a,b,c", *(f"q{i},{','.join(map(str, row))}" for i, row in enumerate(scores))]
    with gzip.open(tmp_path / "scores.csv.gz", "wt") as file:
        file.write("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    out = solve(monkeypatch, capsys, "scores.csv.gz", "--clusters", "2", "--tau", "0", "--draws", "20")
    assert "3 items for each of 2 prompts" in out
    frame = pd.read_csv(tmp_path / "runs" / "solve-scores" / "standings.csv")
    winners = set(frame[frame["tau=0"] == 1].item)
    assert winners == {"a", "c"}
    member = clustered(scores, 2, 0)
    assert len(set(zip(member.tolist(), kinds.tolist(), strict=True))) == 2


def test_names_that_look_like_mathematics_and_taus_that_look_alike(tmp_path: Path) -> None:
    game = MatrixGame([[0.5, 0.9], [0.1, 0.5]], labels=[r"$\frac$", "b"])
    found = standings("odd", game, [0.12345678, 0.123456781])
    assert len(found.save(tmp_path)) == 4
    assert {"tau=0.12345678", "tau=0.123456781"} <= set(found.frame.columns)


def test_names_of_prompts_and_unbounded_scores(tmp_path: Path) -> None:
    """One item that never loses: no Bradley-Terry scores, but an equilibrium and a figure."""
    game = MatrixGame([[0.5, 1.0, 1.0], [0.0, 0.5, 0.7], [0.0, 0.3, 0.5]])
    found = standings("sweep", game, [0.1, 0.0])
    assert "no finite Bradley-Terry scores fit" in found.summary()
    assert found.frame.bt_rank.isna().all()
    assert found.frame["tau=0"].tolist() == [1, 0, 0]
    assert found.labels == ("0", "1", "2")
    assert len(found.save(tmp_path / "new")) == 4
    assert "-" in found.rows()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["missing.csv"], "No such file or directory"),
        (["bad.csv"], "bad.csv, line 3: expected a probability in .* got 'x'"),
        (["log.csv"], "log.csv, line 2: winner must be 'a', 'b' or 'tie', got 'c'"),
        (["scores.csv"], "scores.csv, line 3: expected a finite number, got 'inf'"),
        (["short.csv"], "short.csv, line 2: expected a name and 2 numbers, got 2 cells"),
        (["broken.csv.gz"], "broken.csv.gz: not a gzip file"),
        (["mixed.csv"], "mixed.csv: rows and columns share '1' but not all names: a matrix of win probabilities has"),
        (["semi.csv"], "semi.csv, line 1: expected names separated by commas, got one column"),
        (["unnamed.csv"], "unnamed.csv, line 1: names must not be empty"),
        (["fine.csv", "--reference", "much.csv"], "much.csv: probabilities must sum to 1, got 1.1"),
        (["fine.csv", "--tau", "0.1,x"], "tau must be numbers >= 0 separated by commas, got '0.1,x'"),
        (["fine.csv", "--tau", "-1"], "tau must be numbers >= 0 separated by commas, got '-1'"),
        (["fine.csv", "--draws", "1"], "draws must be at least 2, got 1"),
        (["fine.csv", "--seed", "-1"], "seed must be >= 0, got -1"),
        (["fine.csv", "--clusters", "2"], "clusters need scores by question, fine.csv holds matrix"),
        (["fine.csv", "--reference", "mu.csv"], "mu.csv, line 3: expected each item of the game once, got 'z'"),
        (["fine.csv", "--reference", "half.csv"], "half.csv: expected a probability for every item, none for 'b'"),
        (["fine.csv", "--reference", "zero.csv"], "reference must give every response a probability > 0, got 0.0"),
        (["fine.csv", "--out", "bad.csv"], "out must be a folder that can be written, got 'bad.csv'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    flags: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "bad.csv": ",a,b\na,0.5,0.9\nb,x,0.5\n",
        "log.csv": "item_a,item_b,winner\na,b,c\n",
        "scores.csv": "q,a,b\nq1,0.5,2\nq2,0.1,inf\n",
        "short.csv": "q,a,b\nq1,0.5\n",
        "broken.csv.gz": "item_a,item_b,winner\n",
        "fine.csv": ",a,b\na,0.5,0.9\nb,0.1,0.5\n",
        "mixed.csv": "q,1,2\n1,0.5,3\n9,0.1,4\n",
        "semi.csv": "q;a;b\nq1;0.5;2\n",
        "unnamed.csv": "q,a,\nq1,0.5,2\n",
        "much.csv": "item,probability\na,0.5\nb,0.6\n",
        "mu.csv": "item,probability\na,0.5\nz,0.5\n",
        "half.csv": "item,probability\na,1\n",
        "zero.csv": "item,probability\na,1\nb,0\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["nlhf", "solve", *flags])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert re.search(f"^nlhf: .*{message}", printed.err)
    assert {path.name for path in tmp_path.iterdir()} == set(files)


@pytest.mark.skipif(not ALPACA.exists(), reason="the AlpacaEval scores are not beside the project")
def test_alpaca_eval_scores_are_the_published_win_rates_up_to_rounding() -> None:
    """The scores are printed with four digits, so that a few of the 797 questions tie that did not."""
    scores = MatrixGame.from_file(ALPACA / "alpaca_eval_scores.csv.gz")
    published = MatrixGame.from_file(ALPACA / "alpaca_eval_win_rates.csv")
    assert scores.labels == published.labels
    best = int(np.argmax((published.matrix > 0.5).sum(axis=1)))
    for game in (scores, published):
        assert nash(game).policy.probs[best] == 1.0
    assert softmax(scores.matrix[best]).argmax() != best
