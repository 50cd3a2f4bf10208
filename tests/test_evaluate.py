"""The command `nlhf evaluate`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nlhf import cli
from nlhf.evaluate import load_process
from nlhf.tabular import (
    MDP,
)
from tests.checks import assert_close

# --- the command ------------------------------------------------------------------------------------------------------


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
