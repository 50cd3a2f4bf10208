"""The ladder: one algorithm object on a table, a logit table, a tiny transformer and a pretrained model."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nlhf import metrics, plotting
from nlhf.core import Regularized
from nlhf.run import Trace, run, write_atomically
from nlhf.tabular import ExactSolver, MatrixGame, Tabular, regularized_nash

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

GAMES: dict[str, Callable[[int], MatrixGame]] = {
    "random": lambda seed: MatrixGame.random(64, seed),
    "low-rank": lambda seed: MatrixGame.low_rank(64, 4, seed),
    "bradley-terry": lambda seed: MatrixGame.bradley_terry(np.random.default_rng(seed).standard_normal(64)),
    "rock-paper-scissors": lambda seed: MatrixGame.rock_paper_scissors(reference=[0.5, 0.3, 0.2]),
    "dice": lambda seed: MatrixGame.cyclic(3, 5 / 9, reference=[0.6, 0.3, 0.1]),
}
"""The games that `nlhf ladder --game` knows by name, made from the seed."""

PROMPTS = ("In one short sentence, how was the film?", "In one short sentence, what do you think of winter?")
MODEL_STEPS = 5
RUNGS = (
    "1 exact table",
    "2 logit table, enumerated",
    "3 logit table, sampled",
    "4 transformer, enumerated",
    "5 transformer, sampled",
    "6 language model, sampled",
)


@dataclass(frozen=True)
class Ladder:
    """The traces of the rungs, and what they share."""

    algorithm: Any
    game: MatrixGame
    game_name: str
    equilibrium: Tabular
    seed: int
    traces: dict[str, Trace]
    """By rung, in order. Rungs 1-5 play `game`; rung 6 plays a judged game of its own."""

    @property
    def frame(self) -> pd.DataFrame:
        """Every recorded number: rung, algorithm, solver, seed, step, metric, value."""
        import pandas as pd

        frames = [trace.frame.assign(rung=name) for name, trace in self.traces.items()]
        frame = pd.concat(frames, ignore_index=True).assign(game=self.game_name)
        return frame[["rung", "game", "algorithm", "solver", "seed", "step", "metric", "value"]]

    @property
    def table(self) -> pd.DataFrame:
        """One row per rung: where it ended and what it cost.

        `prox_residual` is the root mean square of the last ten steps: a single sampled one may be too small to see.
        """
        import pandas as pd

        rows = []
        for name, trace in self.traces.items():
            last = {metric: value for step, metric, value in trace.records}
            interval = [last.get(f"duality_gap_{end}", np.nan) for end in ("low", "high")]
            rows.append(
                {
                    "rung": name,
                    "steps": max(step for step, _, _ in trace.records),
                    "duality_gap": last["duality_gap"],
                    "gap_low": interval[0],
                    "gap_high": interval[1],
                    "kl_to_equilibrium": last.get("kl_to_equilibrium", np.nan),
                    "prox_residual": float(np.sqrt(np.mean(trace.values("prox_residual")[1][1:][-10:] ** 2))),
                    "oracle_calls": int(last["oracle_calls"]),
                    "seconds": trace.seconds,
                }
            )
        return pd.DataFrame(rows)

    def bound(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """(steps, gaps) what theory promises of the gap on rung 1; inf where no theorem is known."""
        steps = max(trace.records[-1][0] for name, trace in self.traces.items() if name != RUNGS[5])
        kl = [metrics.kl(self.equilibrium, self.game.reference, self.game.prompt_weights)]
        for t in range(steps):
            kl.append(self.algorithm.rate(kl[-1], t))
        tau = self.algorithm.tau
        return np.arange(steps + 1), np.array([metrics.gap_from_kl(value, tau) for value in kl])

    def figure(self) -> Figure:
        """The duality gap against iterations, one curve per rung, theory dashed; rung 6 in a panel of its own."""
        from matplotlib.figure import Figure

        model = self.traces.get(RUNGS[5])
        figure = Figure(figsize=(11 if model else 7, 4.6), layout="constrained")
        axes = figure.subplots(1, 2 if model else 1, squeeze=False, width_ratios=[1.6, 1] if model else None)[0]
        looks = plotting.styles(RUNGS)
        for name, trace in self.traces.items():
            if name != RUNGS[5]:
                trace.plot("duality_gap", axes[0], label=name, **looks[name])
        steps, gaps = self.bound()
        if np.isfinite(gaps[-1]):
            axes[0].plot(np.where(steps == 0, 0.5, steps), gaps, "k--", linewidth=1, label="theory, upper bound")
        bottom = min(np.min(trace.values("duality_gap")[1]) for name, trace in self.traces.items() if name != RUNGS[5])
        # from rounding to where a bound on a probability has long said nothing
        axes[0].set_ylim(max(bottom / 3, 1e-20), min(axes[0].get_ylim()[1], 20))
        axes[0].set_title(f"{self.label}\n{self.game_name}: {self.game.n} responses", fontsize=10)
        axes[0].legend(fontsize=8, frameon=False, loc="lower left")
        plotting.mark_start(axes[0])
        if model:
            at, low = model.values("duality_gap_low")
            axes[1].fill_between(at, low, model.values("duality_gap_high")[1], color="0.85", label="90 % of resamples")
            axes[1].plot(at, model.values("duality_gap")[1], label=RUNGS[5], linewidth=1.4, **looks[RUNGS[5]])
            axes[1].axhline(0, color="k", linewidth=0.6)
            axes[1].set(xlabel="iteration", ylabel="estimated duality gap (win probability)", xticks=at)
            axes[1].set_title("a game of its own: scripted judge, sampled responses\nestimate, errs low", fontsize=10)
            axes[1].legend(fontsize=8, frameon=False)
            axes[1].spines[["top", "right"]].set_visible(False)
        return figure

    @property
    def label(self) -> str:
        """The algorithm and its parameters, short."""
        eta = self.algorithm.eta
        shown = "2 / (tau (t + 2))" if callable(eta) else f"{eta:.4g}"
        return f"{type(self.algorithm).__name__}(eta={shown}, tau={self.algorithm.tau:g})"

    def save(self, out: Path) -> list[Path]:
        """Write ladder.csv (tidy), table.csv, config.json, ladder.png and ladder.svg in the folder `out`."""
        out.mkdir(parents=True, exist_ok=True)
        packages = {name: version(name) for name in ("nlhf", "numpy", "scipy", "torch")}
        config = {
            "algorithm": repr(self.algorithm),
            "game": self.game_name,
            "seed": self.seed,
            "steps": {name: trace.records[-1][0] for name, trace in self.traces.items()},
            "solvers": {name: trace.config["solver"] for name, trace in self.traces.items()},
            "versions": {"python": platform.python_version(), **packages},
        }
        contents = {
            "ladder.csv": self.frame.to_csv(index=False),
            "table.csv": self.table.to_csv(index=False),
            "config.json": json.dumps(config, indent=2) + "\n",
        }
        for name, text in contents.items():
            write_atomically(out / name, text.encode())
        return [*(out / name for name in contents), *plotting.save(self.figure(), out / "ladder")]


def climb(
    algorithm: Regularized,
    game: MatrixGame,
    game_name: str,
    steps: int,
    seed: int = 0,
    model: Any = None,
    progress: bool | None = None,
) -> Ladder:
    """Run the algorithm object on every rung.

    Args:
        algorithm: the one object.
        game: what rungs 1-5 play.
        game_name: its name, for the record.
        steps: iterations of rungs 1-5; the language model takes `MODEL_STEPS`.
        seed: of the samples, and of the transformer's weights.
        model: a `CausalLM` for rung 6, or none.
        progress: as in `nlhf.run`.
    """
    equilibrium = regularized_nash(game, algorithm.tau).policy
    measured = (metrics.duality_gap, metrics.kl_from(equilibrium, "kl_to_equilibrium"))
    import torch

    # Operations this small gain nothing from a second thread, and lose everything to one that waits for a busy core.
    threads, traces = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    try:
        for name, solver, policy in _rungs(game, seed):
            traces[name] = run(algorithm, solver, steps, policy=policy, metrics=measured, seed=seed, progress=progress)
    finally:
        torch.set_num_threads(threads)
    if model is not None:
        traces[RUNGS[5]] = _language_model(algorithm, model, seed, progress)
    return Ladder(algorithm, game, game_name, equilibrium, seed, traces)


def _rungs(game: MatrixGame, seed: int) -> Iterator[tuple[str, Any, Any]]:
    from nlhf.llm import Enumerate, LogitTable, RegressionSolver, Sample, TinyTransformer

    yield RUNGS[0], ExactSolver(game), None
    samples = Sample(64, opponents=256)
    yield RUNGS[1], RegressionSolver(game, Enumerate()), LogitTable(game.reference)
    yield RUNGS[2], RegressionSolver(game, samples), LogitTable(game.reference)
    yield RUNGS[3], RegressionSolver(game, Enumerate()), TinyTransformer(game.reference, seed=seed)
    yield RUNGS[4], RegressionSolver(game, samples), TinyTransformer(game.reference, seed=seed)


def _language_model(algorithm: Regularized, model: Any, seed: int, progress: bool | None) -> Trace:
    from torch.optim import Adam

    from nlhf.llm import JudgedGame, RegressionSolver, Sample
    from nlhf.llm.preference import cycle_judge, sampled_gap

    game = JudgedGame(cycle_judge, PROMPTS, model.text)
    # Long responses: a few importance weights would take all, so the opponent stays the token-level mixture. Two small
    # steps: on 32 responses of a model of any size, more of them fit the sample and unfit what is held out.
    solver = RegressionSolver(game, Sample(16, 32, correct=False), steps=2, optimizer=partial(Adam, lr=1e-4))
    gap = sampled_gap(model, 64, seed)
    return run(algorithm, solver, MODEL_STEPS, policy=model, metrics=(gap,), seed=seed, progress=progress)


def load_game(name: str, seed: int) -> tuple[MatrixGame, str]:
    """A game of `GAMES`, or of a CSV file of win probabilities or of comparisons, and what to call it.

    Raises ValueError if it is neither, or the file is malformed.
    """
    if name in GAMES:
        return GAMES[name](seed), name
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"game must be one of {', '.join(GAMES)} or a CSV file, got {name!r}")
    return MatrixGame.from_file(path), path.stem
