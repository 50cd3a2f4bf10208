"""The command, its files, its numbers and its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nlhf import MirrorProx, cli, metrics
from nlhf.ladder import RUNGS, climb, load_game

FILES = {"ladder.csv", "table.csv", "config.json", "ladder.png", "ladder.svg"}


def nlhf(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would."""
    command = [sys.executable, "-c", "from nlhf.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_ladder_writes_a_table_a_figure_and_its_config(tmp_path: Path) -> None:
    done = nlhf("ladder", "nash-md", "--game", "dice", "--steps", "5", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar in a pipe
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    for rung in RUNGS[:5]:
        assert rung in done.stdout
    frame = pd.read_csv(tmp_path / "out" / "ladder.csv")
    assert list(frame.columns) == ["rung", "game", "algorithm", "solver", "seed", "step", "metric", "value"]
    assert set(frame.metric) == {"duality_gap", "kl_to_equilibrium", "prox_residual", "oracle_calls"}
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert table.rung.tolist() == list(RUNGS[:5])
    assert {"duality_gap", "kl_to_equilibrium", "prox_residual", "oracle_calls", "seconds"} <= set(table.columns)
    # rungs 1 and 2 are the same numbers, by two routes
    gaps = frame[frame.metric == "duality_gap"].pivot(index="step", columns="rung", values="value")
    np.testing.assert_allclose(gaps[RUNGS[0]], gaps[RUNGS[1]], rtol=1e-6, atol=1e-14)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["algorithm"] == "NashMD(eta=Harmonic(tau=0.1), tau=0.1)"
    assert config["game"] == "dice"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["no-such"], "algorithm must be one of best-response, magnetic-md, .* got 'no-such'"),
        (["nash-md", "--game", "chess"], "game must be one of random, .* or a CSV file, got 'chess'"),
        (["nash-md", "--tau", "-1"], r"tau must be a finite number > 0, got -1.0"),
        (["nash-md", "--tau", "0"], r"tau must be a finite number > 0, got 0.0"),
        (["nash-md", "--tau", "nan"], r"tau must be a finite number > 0, got nan"),
        (["nash-md", "--eta", "20"], r"eta \* tau must be <= 1, got eta = 20.0, tau = 0.1"),
        (["nash-md", "--eta", "-1"], "eta must be a finite number > 0 or a schedule .* got -1.0"),
        (["nash-md", "--steps", "0"], "steps must be at least 1, got 0"),
        (["nash-md", "--seed", "-1"], "seed must be >= 0, got -1"),
        (["nash-md", "--model", "nowhere"], "model nowhere: no such file or folder"),
        (["nash-md", "--game", "bad.csv"], "bad.csv, line 3: expected a probability in .* got 'x'"),
        (["nash-md", "--game", "log.csv"], "log.csv, line 2: winner must be 'a', 'b' or 'tie', got 'c'"),
        (["nash-md", "--out", "bad.csv"], "out must be a folder that can be written, got 'bad.csv'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    flags: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    (tmp_path / "bad.csv").write_text(",a,b\na,0.5,0.9\nb,x,0.5\n")
    (tmp_path / "log.csv").write_text("item_a,item_b,winner\na,b,c\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["nlhf", "ladder", *flags])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert pytest.importorskip("re").search(f"^nlhf: {message}", printed.err)
    assert printed.out == ""
    assert {path.name for path in tmp_path.iterdir()} == {"bad.csv", "log.csv"}


def test_games_by_name_and_by_file(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("item_a,item_b,winner\na,b,a\nb,c,b\nc,a,c\n")
    game, name = load_game(str(log), 0)
    assert (game.labels, name) == (("a", "b", "c"), "log")
    assert load_game("random", 3)[0].matrix[0, 1] != load_game("random", 4)[0].matrix[0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 3])
def test_the_default_ladder_holds_what_it_promises(seed: int) -> None:
    """MirrorProx(eta=2), tau = 0.1, 64 responses: where each rung ends, and that the sampled ones end well below mu."""
    game, name = load_game("random", seed)
    climbed = climb(MirrorProx(eta=2, tau=0.1), game, name, 60, seed)
    gap = dict(zip(climbed.table.rung, climbed.table.duality_gap, strict=True))
    start = metrics.duality_gap(game.reference, game, 0.1)
    assert gap[RUNGS[0]] <= 1e-11  # 1e-12 after 70 iterations, tests/test_contract.py goes on
    assert gap[RUNGS[1]] <= 1e-8
    assert gap[RUNGS[3]] <= 1e-6
    assert gap[RUNGS[4]] <= start / 5
    steps, bound = climbed.bound()
    exact = climbed.traces[RUNGS[0]].values("duality_gap")[1]
    assert (exact <= bound).all()
    assert bound[-1] == pytest.approx(bound[0] / 1.2 ** steps[-1])


def test_mirror_prox_reaches_machine_precision() -> None:
    from nlhf import run
    from nlhf.tabular import ExactSolver

    game, _ = load_game("random", 0)
    _, gap = run(MirrorProx(eta=2, tau=0.1), ExactSolver(game), 200).values("duality_gap")
    assert gap[200] <= 1e-12
    assert gap[:30].min() > 1e-8  # not by starting there
