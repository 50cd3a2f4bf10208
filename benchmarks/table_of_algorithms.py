"""The table of algorithms: every outer algorithm with every inner solver, on one intransitive game.

    python benchmarks/table_of_algorithms.py --out runs/table-of-algorithms --steps 150 --tau 0.1 --seed 0 --n 16

The outer algorithm says which `Prox` to solve, the inner solver says how; many cells have a name of their own in
the literature. Where the solver finds the answer, the cell shows the gap of the exact one in its row, whatever
that is: the constant steps converge to the equilibrium, Nash-MD's schedule comes closer as about 1 / T^2, and the
best response to the reference is another point. One policy gradient step does not find the answer, so it lags.

Prints a table for a logit table and one for a transformer, both enumerated, and writes table.csv (tidy), table.png
and table.svg. It takes about four minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from tqdm import tqdm

from nlhf import algorithms, llm, plotting, run
from nlhf.llm.losses import cross_entropy, logistic, variance
from nlhf.run import check_folder, write_atomically
from nlhf.tabular import ExactSolver, MatrixGame

ORDER = ["SelfPlay", "MagneticMD", "NashMD", "NashEMA", "OptimisticMD", "MirrorProx", "BestResponse"]
ROWS = sorted(algorithms.__all__, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
POLICIES: dict[str, Callable[..., Any]] = {
    "logit table": llm.LogitTable,
    "tiny transformer": partial(llm.TinyTransformer, vocab=4, width=32, layers=1),
}
SOLVERS: dict[str, Callable[..., Any]] = {
    "exact": ExactSolver,
    "variance": partial(llm.RegressionSolver, loss=variance),
    "logistic": partial(llm.RegressionSolver, loss=logistic),
    "cross-entropy": partial(llm.RegressionSolver, loss=cross_entropy),
    "pairs": llm.ContrastiveSolver,
    "PG 1 step": partial(llm.PolicyGradientSolver, steps=1),
    "PG 20 steps": partial(llm.PolicyGradientSolver, steps=20),
}
NAMES = {
    ("SelfPlay", "variance"): "SPPO¹",
    ("SelfPlay", "logistic"): "DNO¹",
    ("SelfPlay", "pairs"): "INPO²",
    ("SelfPlay", "PG 1 step"): "SP³",
    ("MagneticMD", "pairs"): "INPO",
    ("NashMD", "pairs"): "IPO-MD⁴",
    ("NashMD", "PG 1 step"): "Nash-MD-PG⁴",
    ("NashEMA", "PG 1 step"): "Nash-EMA-PG",
    ("MirrorProx", "pairs"): "EGPO⁵",
    ("BestResponse", "variance"): "AGRO, CoPG⁶",
    ("BestResponse", "pairs"): "IPO⁷",
    ("BestResponse", "PG 1 step"): "RLHF⁶",
    ("BestResponse", "PG 20 steps"): "RLHF⁶",
}
NOTES = """\
¹ SPPO and DNO have tau = 0; SPPO fixes the free constant of the regression at eta / 2.
² At this eta, as at every eta < 1 / tau; with eta = 1 / tau the cell is online IPO.
³ The self-play player of the Nash-MD-PG paper: mixture weight 0.
⁴ Both keep the mixture weight constant, here it is eta_t tau; IPO-MD takes one gradient step per round.
⁵ EGPO draws the pairs uniformly and takes one gradient step for each of the two solves.
⁶ With the win rate over the reference as the reward.
⁷ With pairs from the reference.
PG: policy gradient. The default steps of SelfPlay and MagneticMD make one and the same iteration."""
# A loss in double precision tells policies 1e-8 apart, and the gap is quadratic: below this it is rounding.
FLOOR = 1e-14


def fill(game: MatrixGame, steps: int, tau: float, seed: int) -> tuple[pd.DataFrame, dict[str, str]]:
    """Run every cell.

    Returns:
        Every recorded number (policy, algorithm, solver, name, n, tau, seed, step, metric, value), and why the cells
        (by "algorithm x solver") that cannot be run are left out.
    """
    frames, refused = [], {}
    cells = [(p, a, s) for p in POLICIES for a in ROWS for s in SOLVERS]
    for policy, row, column in tqdm(cells, disable=None, desc="cells"):
        algorithm = getattr(algorithms, row).default(tau)
        solver = SOLVERS[column](game)  # the torch solvers enumerate unless told otherwise
        start = None if column == "exact" else POLICIES[policy](game.reference)
        try:
            trace = run(algorithm, solver, steps, policy=start, every=steps, seed=seed, progress=False)
        except ValueError as error:
            if not isinstance(solver, llm.ContrastiveSolver):
                raise
            refused[f"{row} x {column}"] = str(error)
            continue
        about = {"policy": policy, "algorithm": row, "solver": column, "name": NAMES.get((row, column), "")}
        frames.append(trace.frame[["step", "metric", "value"]].assign(**about, n=game.n, tau=tau, seed=seed))
    columns = ["policy", "algorithm", "solver", "name", "n", "tau", "seed", "step", "metric", "value"]
    return pd.concat(frames, ignore_index=True)[columns], refused


def last(frame: pd.DataFrame, policy: str, metric: str) -> pd.DataFrame:
    """One metric of one policy after the last step: algorithms down, solvers across, NaN where there is none."""
    chosen = (frame["policy"] == policy) & (frame["metric"] == metric) & (frame["step"] == frame["step"].max())
    table = frame[chosen].pivot(index="algorithm", columns="solver", values="value")
    return table.reindex(index=ROWS, columns=list(SOLVERS))


def short(gap: float) -> str:
    """1.2e-9; a dash for a cell that was not run."""
    digits, _, exponent = f"{gap:.1e}".partition("e")
    return "–" if np.isnan(gap) else f"< {FLOOR:g}" if gap < FLOOR else f"{digits}e{int(exponent)}"


def report(frame: pd.DataFrame, policy: str) -> str:
    """The table of one policy, and how far its columns are from the exact one."""
    gaps = last(frame, policy, "duality_gap")
    ratio = gaps.clip(lower=FLOOR).div(gaps["exact"].clip(lower=FLOOR), axis=0)
    residual = last(frame, policy, "prox_residual").median()
    lines = [[policy, *SOLVERS]]
    for row, *values in gaps.itertuples():
        lines.append([row, *map(short, values)])
        lines.append(["", *(NAMES.get((row, column), "") for column in SOLVERS)])
    lines.append(["largest ratio", *(f"{value:#.3g}" for value in ratio.max())])
    lines.append(["residual", *(f"{value:.0e}" for value in residual)])
    table = "\n".join("".join([f"{row:16}", *(f"{cell:>14}" for cell in cells)]).rstrip() for row, *cells in lines)
    worst = str(ratio.max().idxmax())
    return f"""{table}
Ratio of a gap to the exact one of its row, both at least {FLOOR:g}: at most {ratio[worst].max():.3g}, in
{ratio[worst].idxmax()} x {worst}, and at most {ratio.drop(columns=worst).max().max():.3f} in the other columns.
Residual of the last solve, in nats: the median of the column."""


def draw(frame: pd.DataFrame, notes: str) -> Figure:
    """A heat map per policy, with the gap and the name in every cell."""
    figure = Figure(figsize=(14, 6), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, len(POLICIES), sharey=True))
    gaps = {policy: last(frame, policy, "duality_gap") for policy in POLICIES}
    norm = LogNorm(FLOOR, max(10 * FLOOR, *(table.max().max() for table in gaps.values())))
    colours = colormaps["viridis"].with_extremes(bad="0.92")
    columns = np.array_split(notes.splitlines(), len(panels))
    for ax, (policy, table), lines in zip(panels, gaps.items(), columns, strict=True):
        image = ax.imshow(table.clip(lower=FLOOR), norm=norm, cmap=colours, aspect="auto")
        for (i, j), gap in np.ndenumerate(table.to_numpy()):
            red, green, blue, _ = colours(norm(gap)) if np.isfinite(gap) else (1.0, 1.0, 1.0, 1.0)
            ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.46 else "white"
            name = NAMES.get((ROWS[i], list(SOLVERS)[j]), "")
            ax.text(j, i - 0.12 * bool(name), short(gap), color=ink, ha="center", va="center", fontsize=9)
            ax.text(j, i + 0.22, name, color=ink, ha="center", va="center", fontsize=7)
        ax.set_xticks(range(len(SOLVERS)), [column.replace(" ", "\n", 1) for column in SOLVERS], fontsize=8)
        ax.set_yticks(range(len(ROWS)), ROWS)
        ax.set_xticks(np.arange(1, len(SOLVERS)) - 0.5, minor=True)
        ax.set_yticks(np.arange(1, len(ROWS)) - 0.5, minor=True)
        ax.grid(which="minor", color="white", linewidth=1.2)
        ax.tick_params(which="both", length=0)
        ax.spines[:].set_visible(False)
        ax.set(title=f"{policy}, enumerated", xlabel="inner solver")
        ax.text(0, -0.19, "\n".join(lines), transform=ax.transAxes, va="top", fontsize=7, linespacing=1.5)
    panels[0].set_ylabel("outer algorithm")
    figure.colorbar(image, ax=panels, label=plotting.LABELS["duality_gap"], extend="min", pad=0.01)
    return figure


def main(
    out: Path = Path("runs/table-of-algorithms"), steps: int = 150, tau: float = 0.1, seed: int = 0, n: int = 16
) -> None:
    """Fill the table of algorithms: outer algorithm x inner solver.

    Args:
        out: folder to write in.
        steps: outer iterations of every cell, >= 1.
        tau: strength of the KL regularisation, > 0.
        seed: of the game, >= 0.
        n: number of responses.
    """
    for name, value, least in (("steps", steps, 1), ("seed", seed, 0), ("n", n, 2)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    # Matrices this small gain nothing from a second thread, and lose much where it has to wait for a core.
    torch.set_num_threads(1)
    frame, refused = fill(MatrixGame.random(n, seed), steps, tau, seed)
    start = frame["value"][(frame["metric"] == "duality_gap") & (frame["step"] == 0)].iloc[0]
    print(f"Duality gap after {steps} steps, tau = {tau:g}, {n} responses; {short(start)} at the start\n")
    print("\n\n".join(report(frame, policy) for policy in POLICIES), end="\n\n")
    notes = "\n".join([NOTES, *(f"– {cell}: {reason}" for cell, reason in refused.items())])
    print(notes, end="\n\n")
    write_atomically(out / "table.csv", frame.to_csv(index=False).encode())
    for path in (out / "table.csv", *plotting.save(draw(frame, notes), out / "table")):
        print(f"wrote {path}")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError) as error:
        sys.exit(f"table_of_algorithms: {error}")
