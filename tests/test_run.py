"""The loop: records, resuming, refusing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nlhf
from nlhf import MirrorProx, NashMD, algorithms, metrics, run
from nlhf.llm import Enumerate, LogitTable, RegressionSolver, Sample, TinyTransformer
from nlhf.run import write_atomically
from nlhf.schedules import Harmonic, PowerDecay
from nlhf.tabular import ExactSolver, MatrixGame, regularized_nash

GAME = MatrixGame.random(6, seed=0)


def test_trace_is_tidy(tmp_path: Path) -> None:
    trace = run(
        NashMD.default(0.2),
        ExactSolver(GAME),
        7,
        every=3,
        metrics=(metrics.duality_gap, metrics.win_rate_over()),
    )
    frame = trace.frame
    assert list(frame.columns) == ["algorithm", "solver", "seed", "step", "metric", "value"]
    assert sorted(frame.step.unique()) == [0, 3, 6, 7]
    assert set(frame.metric) == {"duality_gap", "win_rate", "prox_residual", "oracle_calls"}
    assert frame[frame.metric == "oracle_calls"].value.tolist() == [0, 3 * 36, 6 * 36, 7 * 36]
    assert trace.values("win_rate")[1][0] == pytest.approx(0.5)
    with pytest.raises(KeyError, match=r"no metric 'gap' in this trace, there are \['duality_gap'"):
        trace.values("gap")
    trace.save(tmp_path / "deep" / "folder")
    assert json.loads((tmp_path / "deep" / "folder" / "config.json").read_text()) == trace.config
    assert (tmp_path / "deep" / "folder" / "trace.csv").read_text().count("\n") == len(frame) + 1


def test_config_is_the_same_in_every_process() -> None:
    trace = run(NashMD.default(0.2), RegressionSolver(GAME), 0, policy=LogitTable(GAME.reference))
    assert "loss=<function variance>" in trace.config["solver"]


def test_trace_draws_itself() -> None:
    ax = run(MirrorProx(2, 0.1), ExactSolver(GAME), 20).plot("duality_gap")
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert ax.get_xlabel() == "iteration"
    assert "duality gap" in ax.get_ylabel()
    assert ax.lines[0].get_xdata()[0] == 0.5  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps must be an integer >= 0, got -1"),
        ({"steps": 1.5}, "steps must be an integer >= 0, got 1.5"),
        ({"every": 0}, "every must be an integer >= 1, got 0"),
        ({"seed": -3}, "seed must be an integer >= 0, got -3"),
        ({"seed": True}, "seed must be an integer >= 0, got True"),
        ({"metrics": (lambda *a: 0.0,)}, "metrics must have distinct names"),
        ({"metrics": (metrics.duality_gap, metrics.duality_gap)}, "metrics must have distinct names"),
        ({"checkpoint": "/nowhere/at/all.npz"}, "checkpoint must be in a folder that can be written"),
    ],
)
def test_bad_arguments_come_before_any_work(arguments: dict[str, Any], message: str) -> None:
    class Never:
        game = GAME

        def init(self) -> Any:
            return GAME.reference

        def __call__(self, *a: Any) -> Any:
            raise AssertionError("work was done")

    with pytest.raises(ValueError, match=message):
        run(NashMD(1.0, 0.1), Never(), **{"steps": 3, **arguments})


def test_a_metric_that_is_not_a_number_stops_the_run() -> None:
    def broken(policy: Any, game: Any, tau: float) -> float:
        return float("nan")

    with pytest.raises(FloatingPointError, match="broken is not a number after step 0"):
        run(NashMD(1.0, 0.1), ExactSolver(GAME), 3, metrics=(broken,))


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", algorithms.__all__)
@pytest.mark.parametrize("world", ["exact", "table", "transformer"])
def test_resuming_ends_as_if_never_stopped(name: str, world: str, tmp_path: Path) -> None:
    algorithm = getattr(nlhf, name)(eta=0.5, tau=0.1)
    solver, policy = {
        "exact": (ExactSolver(GAME), None),
        "table": (RegressionSolver(GAME, Enumerate(), steps=3), LogitTable(GAME.reference)),
        "transformer": (
            RegressionSolver(GAME, Sample(4), steps=2),
            TinyTransformer(GAME.reference, vocab=3, width=8, layers=1, heads=2),
        ),
    }[world]
    file = tmp_path / "run.npz"
    seen: list[None] = []

    def fragile(policy: Any, game: Any, tau: float) -> float:
        seen.append(None)
        if len(seen) == 4:
            raise Killed
        return metrics.duality_gap(policy, game, tau)

    options: Any = {"policy": policy, "metrics": (fragile,), "every": 2, "seed": 5}
    with pytest.raises(Killed):
        run(algorithm, solver, 8, checkpoint=file, **options)
    resumed = run(algorithm, solver, 8, checkpoint=file, **options)
    straight = run(algorithm, solver, 8, **options)
    np.testing.assert_array_equal(metrics.table(resumed.policy), metrics.table(straight.policy))
    assert resumed.records == straight.records
    assert len(list(tmp_path.iterdir())) == 1  # no half-written file is left


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.npz"
    run(NashMD(1.0, 0.1), ExactSolver(GAME), 2, checkpoint=file)
    with pytest.raises(ValueError, match="is of another run"):
        run(NashMD(1.0, 0.2), ExactSolver(GAME), 2, checkpoint=file)
    other = MatrixGame.random(6, seed=1)
    with pytest.raises(ValueError, match=r"is of another run: it has \{'game'"):
        run(NashMD(1.0, 0.1), ExactSolver(other), 2, checkpoint=file)
    with pytest.raises(ValueError, match=r"is of another run: it has \{'start'"):
        run(NashMD(1.0, 0.1), ExactSolver(GAME), 2, checkpoint=file, policy=regularized_nash(GAME, 0.1).policy)
    weighed = MatrixGame(GAME.matrix, [0.5, 0.1, 0.1, 0.1, 0.1, 0.1])
    with pytest.raises(ValueError, match=r"is of another run: it has \{'start'"):
        run(NashMD(1.0, 0.1), ExactSolver(weighed), 2, checkpoint=file)
    with pytest.raises(ValueError, match="steps must be at least the 2 that checkpoint"):
        run(NashMD(1.0, 0.1), ExactSolver(GAME), 1, checkpoint=file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        run(NashMD(1.0, 0.1), ExactSolver(GAME), 2, checkpoint=file)


def test_a_longer_run_goes_on_from_a_shorter_one(tmp_path: Path) -> None:
    file = tmp_path / "run.npz"
    run(NashMD(1.0, 0.1), ExactSolver(GAME), 10, every=3, checkpoint=file)
    longer = run(NashMD(1.0, 0.1), ExactSolver(GAME), 20, every=3, checkpoint=file)
    assert longer.records == run(NashMD(1.0, 0.1), ExactSolver(GAME), 20, every=3).records


@pytest.mark.parametrize("content", [b"", b"PK", {"about": "[1]"}, {"about": "{}"}, {"other": "{}"}])
def test_what_is_no_checkpoint_is_refused(content: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.savez(file, allow_pickle=False, **{name: np.array(text) for name, text in content.items()})
    with pytest.raises(ValueError, match="cannot be read"):
        run(NashMD(1.0, 0.1), ExactSolver(GAME), 2, checkpoint=file)


def test_the_reference_is_the_games(tmp_path: Path) -> None:
    other = regularized_nash(GAME, 0.5).policy
    started = run(MirrorProx(2, 0.1), ExactSolver(GAME), 200, policy=other)
    assert started.values("duality_gap")[1][-1] < 1e-20
    fitted = run(
        MirrorProx(2, 0.1), RegressionSolver(GAME), 60, policy=LogitTable(other), reference=LogitTable(GAME.reference)
    )
    assert fitted.values("duality_gap")[1][-1] < 1e-9
    with pytest.raises(ValueError, match=r"must agree with game\.reference"):
        run(MirrorProx(2, 0.1), RegressionSolver(GAME), 3, policy=LogitTable(other))
    with pytest.raises(ValueError, match="policy must be given: RegressionSolver"):
        run(MirrorProx(2, 0.1), RegressionSolver(GAME), 3)


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_atomically(file, b"old")

    def full(*a: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_schedules() -> None:
    assert Harmonic(0.1)(0) * 0.1 == pytest.approx(1)
    assert PowerDecay(2.0, 0.5)(3) == 1.0
    state = NashMD(PowerDecay(0.5, 1.0), 0.1).init(GAME.reference)
    assert NashMD(PowerDecay(0.5, 1.0), 0.1).step(state, ExactSolver(GAME))[0].t == 1
    for make in (lambda: Harmonic(0.0), lambda: PowerDecay(0.0, 1.0), lambda: PowerDecay(1.0, -1.0)):
        with pytest.raises(ValueError, match="must be a finite number"):
            make()
    with pytest.raises(ValueError, match="eta must be a finite number > 0"):
        NashMD(lambda t: -1.0, 0.1)
