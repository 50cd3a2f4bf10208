"""The loop, its record, and checkpoints that resume to the last bit."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from nlhf.core import Algorithm, Info, Policy, Prox, Solve
from nlhf.metrics import Metric, duality_gap, table
from nlhf.schedules import check_count

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Trace:
    """What a run did: the record, the last state, and what is needed to do it again."""

    config: dict[str, Any]
    """algorithm, solver, seed: the columns that are the same in every row."""
    records: tuple[tuple[int, str, float], ...]
    """(step, metric, value), one row per metric and recorded step; step 0 is the initial policy."""
    state: Any
    """The algorithm's last state: `algorithm.step` goes on from here."""
    seconds: float = field(compare=False)
    """Time spent in `algorithm.step`, without metrics."""

    @property
    def policy(self) -> Any:
        """The last policy."""
        return self.state.policy

    @property
    def frame(self) -> pd.DataFrame:
        """Tidy table, one row per step and metric, with the columns of `config` in front."""
        import pandas as pd

        frame = pd.DataFrame(self.records, columns=["step", "metric", "value"])
        for name, value in reversed(self.config.items()):
            frame.insert(0, name, value)
        return frame

    def values(self, metric: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """(steps, values) of one metric. KeyError names the metrics there are."""
        rows = [(step, value) for step, name, value in self.records if name == metric]
        if not rows:
            raise KeyError(f"no metric {metric!r} in this trace, there are {sorted({m for _, m, _ in self.records})}")
        steps, values = zip(*rows, strict=True)
        return np.array(steps), np.array(values)

    def plot(self, metric: str = "duality_gap", ax: Axes | None = None, **style: Any) -> Axes:
        """The metric against the iteration, log-log, on `ax` or a new figure."""
        from nlhf.plotting import curve

        return curve(*self.values(metric), metric, ax=ax, **style)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `trace.csv` (tidy) and `config.json` in the folder `path`, each atomically."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "trace.csv", self.frame.to_csv(index=False).encode())
        write_atomically(folder / "config.json", json.dumps(self.config, indent=2).encode())


def run(
    algorithm: Algorithm,
    solver: Any,
    steps: int,
    *,
    policy: Policy | None = None,
    reference: Policy | None = None,
    metrics: Sequence[Metric] | None = None,
    every: int = 1,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    on_record: Callable[[Trace], None] | None = None,
    status: Callable[[], str] | None = None,
) -> Trace:
    """Run an algorithm with a solver and record how it goes.

    Args:
        algorithm: any `nlhf.core.Algorithm`.
        solver: answers the algorithm's sub-problems and holds the game, `solver.game`.
        steps: number of iterations, >= 0.
        policy: where to start; by default the reference of an `ExactSolver`'s game.
        reference: what tau pulls to; by default the reference of an `ExactSolver`'s game, and otherwise the policy. It
            must agree with `game.reference` where the game has one, for that is what the duality gap refers to.
        metrics: functions (policy, game, tau) -> number, or -> {name: number}, recorded by name next to the
            solver's own `prox_residual` and `oracle_calls` (cumulative). By default the duality gap of an algorithm
            that has a tau, and nothing for one that evaluates returns. The list `memory` of a metric that has one, an
            entry of JSON for each record, is emptied when the run begins and kept in its checkpoint.
        every: record every so many steps; the first and the last are always recorded.
        seed: >= 0. The randomness of step t depends on (seed, t) alone.
        progress: show a progress bar; by default on a terminal and not in a pipe.
        checkpoint: a file, written at every recorded step and read if it is there: the run goes on from it and
            ends as if it had never stopped, to the last bit. An .npz archive, or, if it is called so, a .safetensors
            file with a JSON header (needs `nlhf[llm]`); neither holds anything that is unpickled.
        on_record: called with the trace so far after every recorded step, once it is in the checkpoint, and when a run
            resumes; by all of several processes, which gather a sharded policy together. The first alone writes the
            checkpoint and shows progress.
        status: what the progress bar shows behind the time that is left, such as tokens per second.

    Raises ValueError for bad arguments, before any work; FloatingPointError if a metric is not a number.

    >>> from nlhf import MirrorProx
    >>> from nlhf.tabular import ExactSolver, MatrixGame
    >>> trace = run(MirrorProx(eta=2, tau=0.1), ExactSolver(MatrixGame.random(64, seed=0)), steps=100)
    >>> steps, gaps = trace.values("duality_gap")
    >>> bool(gaps[-1] < 1e-12 < gaps[0])
    True
    """
    for name, value, least in (("steps", steps, 0), ("every", every, 1), ("seed", seed, 0)):
        check_count(name, value, least)
    steps, every, seed = int(steps), int(every), int(seed)
    tau: Any = getattr(algorithm, "tau", None)
    if metrics is None:
        metrics = () if tau is None else (duality_gap,)
    names = [getattr(metric, "__name__", "<lambda>") for metric in metrics]
    if len(set(names)) < len(names) or "<lambda>" in names:
        raise ValueError(f"metrics must have distinct names of their own (__name__), got {names}")
    state = algorithm.init(*_ends(solver, policy, reference))
    config = {"algorithm": _plain(algorithm), "solver": _plain(solver), "seed": seed}
    records: list[tuple[int, str, float]] = []
    start, info, file = 0, Info(), None if checkpoint is None else Path(checkpoint)
    first, remembering = state, {name: m for name, m in zip(names, metrics, strict=True) if hasattr(m, "memory")}
    for metric in remembering.values():
        metric.memory.clear()

    def record(t: int) -> None:
        measured: dict[str, float] = {}
        for metric in metrics:
            value = metric(state.policy, solver.game, tau)
            measured |= value if isinstance(value, Mapping) else {metric.__name__: value}
        if info.prox_residual is not None:
            measured["prox_residual"] = info.prox_residual
        measured["oracle_calls"] = info.oracle_calls
        for name, value in measured.items():
            if np.isnan(value):
                raise FloatingPointError(f"{name} is not a number after step {t} of {algorithm}")
            records.append((t, name, float(value)))
        arrays = {} if file is None else _arrays(state, first)  # of sharded policies all processes gather them
        if file is not None and first_process():
            memory = {name: metric.memory for name, metric in remembering.items()}
            about = {"run": identity, "t": t, "records": records, "memory": memory}
            _save(file, about | {"info": [info.prox_residual, info.oracle_calls]}, arrays)
        if on_record is not None:
            on_record(Trace(config, tuple(records), state, clock.step.total))

    identity: dict[str, Any] = {**config, "every": every, "metrics": names}
    if file is not None:
        identity |= {"start": _fingerprint(_arrays(state)), "game": _fingerprint(_numbers(solver.game))}
    clock = _Clock(steps, every)
    if file is not None and file.exists():
        start, state, records, info, memory = _load(file, identity, state)
        if start > steps:
            raise ValueError(f"steps must be at least the {start} that checkpoint {file} has done, got {steps}")
        kept = [t % every == 0 or t == steps for t in dict.fromkeys(t for t, *_ in records)]
        records = [row for row in records if row[0] % every == 0 or row[0] == steps]  # others are of a shorter run
        for name, metric in remembering.items():
            metric.memory.extend(compress(memory.get(name, []), kept))
        if on_record is not None:
            on_record(Trace(config, tuple(records), state, 0.0))
    elif file is not None and not os.access(file.parent, os.W_OK):
        raise ValueError(f"checkpoint must be in a folder that can be written, got {file}")
    else:
        with clock.record:
            record(0)
    shown = first_process() and (sys.stderr.isatty() if progress is None else progress)
    # The bar's own guess of the time that is left knows nothing of records.
    look: Any = {
        "desc": type(algorithm).__name__,
        "bar_format": "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
    }
    bar = tqdm(range(start, steps), initial=start, total=steps, disable=not shown, **look)
    for t in bar:
        with clock.step:
            state, spent = algorithm.step(state, seeded(solver, seed, t))
        info = Info(spent.prox_residual, info.oracle_calls + spent.oracle_calls)
        if (t + 1) % every == 0 or t + 1 == steps:
            with clock.record:
                record(t + 1)
        if shown:
            bar.set_postfix_str(clock.left(t + 1) + (f", {status()}" if status else ""), refresh=False)
    return Trace(config, tuple(records), state, clock.step.total)


def seeded(solver: Any, seed: int, t: int) -> Solve:
    """`solver` with the randomness of iteration t: every call within the iteration draws its own.

    Use it in a loop of your own: `state, info = algorithm.step(state, seeded(solver, seed, t))`.
    """
    calls: Iterator[int] = iter(range(sys.maxsize))

    def solve(prox: Prox, start: Policy) -> tuple[Any, Info]:
        # 63 bits, the range of torch.Generator.manual_seed
        drawn = np.random.SeedSequence((seed, t, next(calls))).generate_state(1, np.uint64)[0] >> 1
        return solver(prox, start, int(drawn))

    return solve


def check_folder(out: Path) -> None:
    """ValueError unless the folder `out` is there to write in, or can be made."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"out must be a folder that can be written, got {str(out)!r}")


def write_atomically(path: Path, content: bytes) -> None:
    """Write the whole file or nothing: a reader, or a kill, never meets half of it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(file.name, 0o666 & ~umask)  # a temporary file starts out private
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _ends(solver: Any, policy: Policy | None, reference: Policy | None) -> tuple[Policy, Policy]:
    """Where a run starts, and the reference that it is pulled to."""
    own = solver.init() if hasattr(solver, "init") else None
    policy = own if policy is None else policy
    if policy is None:
        raise ValueError(f"policy must be given: {type(solver).__name__} has none to start from")
    reference = reference or own or policy
    if (expected := getattr(solver.game, "reference", None)) is not None:
        here, there = np.atleast_2d(np.exp(table(reference))), np.atleast_2d(np.exp(table(expected)))
        if here.shape != there.shape or np.abs(here - there).max() > 1e-6:  # a float32 policy is 1e-7 away
            raise ValueError("reference (by default the policy) must agree with game.reference, got another law")
    return policy, reference.freeze()


def first_process() -> bool:
    """Whether this process is the only one, or the first of those that `torchrun` or `accelerate launch` has started:
    the one that writes and shows.
    """
    return os.environ.get("RANK", "0") == "0"


def _plain(value: Any) -> str:
    """The repr without memory addresses, which differ from process to process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _arrays(state: Any, first: Any = None) -> dict[str, np.ndarray[Any, Any]]:
    """The parameters of every policy in a state, by field and name; of those that differ from the first state's."""
    policies = {name: value for name, value in state._asdict().items() if not isinstance(value, int)}
    new = {name: policy for name, policy in policies.items() if first is None or policy is not getattr(first, name)}
    return {f"{name}.{key}": array for name, policy in new.items() for key, array in policy.arrays().items()}


def _numbers(game: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of a matrix game; none of a game that asks a judge."""
    arrays = {name: value for name, value in vars(game).items() if isinstance(value, np.ndarray)}
    return arrays | ({"reference": table(game.reference)} if hasattr(game, "reference") else {})


def _fingerprint(arrays: Mapping[str, np.ndarray[Any, Any]]) -> int:
    """Of the numbers that a repr does not show."""
    total = 0
    for name, array in arrays.items():
        total = zlib.crc32(array.tobytes(), zlib.crc32(name.encode(), total))
    return total


def _save(file: Path, about: dict[str, Any], arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    if file.suffix == ".safetensors":
        from safetensors.numpy import save

        write_atomically(file, save(arrays, {"about": json.dumps(about)}))
    else:
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, about=np.array(json.dumps(about)), **arrays)
        write_atomically(file, buffer.getvalue())


def _read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="numpy") as opened:
                return json.loads(opened.metadata()["about"]), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        except SafetensorError as error:
            raise ValueError(str(error)) from None
    with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as archive:
        arrays = dict(archive)
    return json.loads(str(arrays.pop("about"))), arrays


def _load(file: Path, identity: dict[str, Any], state: Any) -> tuple[int, Any, list[Any], Info, dict[str, list[Any]]]:
    try:
        about, arrays = _read(file)
        before = dict(about["run"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"checkpoint {file} cannot be read: {error!r}") from None
    if different := [key for key, value in identity.items() if before.get(key) != value]:
        here, there = ({key: run.get(key) for key in different} for run in (identity, before))
        raise ValueError(f"checkpoint {file} is of another run: it has {there}, this one {here}")
    fields = {}
    for name, value in state._asdict().items():
        prefix = f"{name}."
        own = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
        fields[name] = about["t"] if isinstance(value, int) else value.replace(own) if own else value
    records = [tuple(row) for row in about["records"]]
    return about["t"], type(state)(**fields), records, Info(*about["info"]), about.get("memory", {})


class _Watch:
    """Seconds spent in its `with` blocks, and how many there were."""

    total, laps, began = 0.0, 0, 0.0

    def __enter__(self) -> None:
        self.began = perf_counter()

    def __exit__(self, *error: object) -> None:
        self.total, self.laps = self.total + perf_counter() - self.began, self.laps + 1


class _Clock:
    """Foretells when a run ends: its steps, and its records, which may take longer."""

    def __init__(self, steps: int, every: int) -> None:
        self.steps, self.every, self.step, self.record = steps, every, _Watch(), _Watch()

    def left(self, t: int) -> str:
        """The time left after t steps, once a record was timed; records are due at multiples and at the end."""
        records = -(-self.steps // self.every) - t // self.every if t < self.steps else 0
        if records and not self.record.laps:
            return "? left"
        seconds = (self.steps - t) * self.step.total / self.step.laps
        seconds += records * self.record.total / max(1, self.record.laps)
        return f"{tqdm.format_interval(int(seconds))} left"
