"""How fast multi-step off-policy backups evaluate a policy, against what theory promises.

    python benchmarks/off_policy_traces.py --out runs/off_policy_traces

Random MDPs with a target pi and a behaviour mu that are up to eps = max_s |pi - mu|_1 apart. Q(lambda), Retrace and
tree backup are run to the categorical fixed point of pi; the uncorrected n-step backup to its own, which is not that
of pi. It is drawn at lambda = 1 - 1 / n, the lambda of the same mean length. The factor is by how much a sweep of the
later half of a run shrinks the largest Cramér distance to the fixed point, and beta_p what `modulus(gamma, p)` proves
of every sweep: p = 1 of W1, p = 2 of Cramér's distance. Then an example for which beta_1 is tight, its negative mass,
and the bias of n-step backups. Prints factors and claims that were checked; writes traces.csv, example.csv and two
figures as PNG and SVG. It takes about a minute.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tqdm import tqdm

from nlhf import NStep, QLambda, Retrace, TreeBackup, metrics, plotting, run
from nlhf.run import check_folder, write_atomically
from nlhf.schedules import check_count
from nlhf.tabular import MDP, BackupSolver, Categorical, categorical_fixed_point, random_off_policy
from nlhf.tabular.policy import Floats

GAMMA, STATES, ACTIONS, ATOMS = 0.9, 6, 3, 31
DISTANCES, LAMBDAS, LENGTHS = (0.0, 0.1, 0.2, 0.5, 1.0), tuple(np.arange(11) / 10), (1, 2, 3, 4, 5, 7, 10)
TRACES = {"Q(λ)": QLambda, "Retrace": Retrace, "tree backup": TreeBackup}
COLUMNS, NAMES = ["cramer", "w1", "negative"], [*TRACES, "n-step, n = 1/(1 - λ)"]
STYLE = plotting.styles(NAMES)
# A run ends where rounding errors take over or when it has clearly diverged.
GOAL, END, LOST, ROUNDING = 1e-8, 1e-11, 1e2, 1e-9


def sweep(algorithm: Any, solver: BackupSolver, fixed: Categorical, start: Any, most: int = 1500) -> Floats:
    """(sweeps + 1, 3) largest Cramér distance to the fixed point, largest W1, largest negative mass."""

    def spread(policy: Categorical, game: Any, tau: Any) -> dict[str, float]:
        columns = metrics.cramer(policy, fixed), metrics.wasserstein(policy, fixed), policy.negative_mass
        return {name: float(column.max()) for name, column in zip(COLUMNS, columns, strict=True)}

    returns, rows = start, np.zeros((0, 3))
    while not len(rows) or (END < rows[-1, 0] < LOST and len(rows) <= most):
        trace = run(algorithm, solver, 4, policy=returns, metrics=(spread,), progress=False)
        new, returns = np.stack([trace.values(name)[1] for name in COLUMNS], axis=1), trace.policy
        rows = np.concatenate([rows, new[len(rows) > 0 :]])
    return rows


def measure(algorithm: Any, solver: BackupSolver, fixed: Categorical) -> dict[str, Any]:
    """A row of the table; ratios of less than `ROUNDING` are left out."""
    d, clear = (rows := sweep(algorithm, solver, fixed, solver.init()))[:, 0], rows[1:, 0] > ROUNDING
    last = max(1, int(np.max(np.flatnonzero(d > 10 * END))))
    first, total, ratios = last // 2, 1 + 2 * rows[:, 2], rows[1:, :2] / rows[:-1, :2]
    target, weights = algorithm.target, algorithm.trace * algorithm.behaviour
    moved, passed = np.abs(target - weights).sum(1), np.abs(weights).sum(1)
    growth = moved.max() / (1 - passed.max()) if passed.max() < 1 - ROUNDING else np.inf  # of total variation
    return {
        "factor": (d[last] / d[first]) ** (1 / (last - first)),
        "beta1": algorithm.modulus(GAMMA, 1.0),
        "beta2": algorithm.modulus(GAMMA, 2.0),
        "sharp1": float((GAMMA * moved / (1 - GAMMA * passed)).max()),  # of W1, each state for itself
        "worst1": ratios[clear, 1].max(initial=0.0),
        "worst2": ratios[clear, 0].max(initial=0.0),
        "iterations": float(np.argmax(d <= GOAL)) if d[-1] <= GOAL else np.inf,
        "converged": bool(d[-1] <= GOAL),
        "negative": rows[:, 2].max(),
        "below": bool((weights <= target + 1e-15).all()),  # c mu <= pi
        "growth": float((total[1:] / total[:-1]).max() / growth),
    }


def study(seeds: int, lambdas: tuple[float, ...], seed: int) -> pd.DataFrame:
    """A row per MDP, distance, algorithm and lambda or n."""
    rows: list[dict[str, Any]] = []
    for k, distance in tqdm([(k, x) for k in range(seeds) for x in DISTANCES], "MDPs", disable=None):
        mdp, target, behaviour = random_off_policy(STATES, ACTIONS, distance, GAMMA, seed + k)
        solver, fixed = BackupSolver(mdp, ATOMS), categorical_fixed_point(mdp, target, ATOMS, tol=1e-13).returns
        about = {"seed": seed + k, "distance": distance, "epsilon": float(np.abs(target - behaviour).sum(1).max())}
        for name, make in TRACES.items():
            for lam in map(float, lambdas):
                row = {**about, "algorithm": name, "lam": lam}
                rows.append({**row, **measure(make(target, behaviour, lam), solver, fixed)})
        for n in LENGTHS:
            algorithm: Any = NStep(target, behaviour, n)
            own = run(algorithm, solver, 700 // n, progress=False).policy
            row = {**about, "algorithm": NAMES[-1], "lam": 1 - 1 / n, "n": n}
            rows.append({**row, "bias": metrics.cramer(own, fixed).max(), **measure(algorithm, solver, own)})
    return pd.DataFrame(rows)


def example(epsilon: float, lambdas: tuple[float, ...]) -> pd.DataFrame:
    """Action a leads to state a and pays nothing; mu always stays, pi switches with probability epsilon / 2.

    (-1)^a grows by gamma |1 - epsilon - lambda| / (1 - gamma lambda): beta_1 for lambda >= 1 - epsilon / 2.
    """
    mdp = MDP([[[1.0, 0.0], [0.0, 1.0]]] * 2, [0.0, 0.0], GAMMA)
    behaviour, atoms, start = np.eye(2), np.linspace(-1, 1, 21), np.zeros((2, 2, 21))
    target, frames = (1 - epsilon / 2) * np.eye(2) + epsilon / 2 * (1 - np.eye(2)), []
    start[:, 0, -1] = start[:, 1, 0] = 1.0  # +1 or -1, by the action
    solver, fixed = BackupSolver(mdp, atoms), categorical_fixed_point(mdp, target, atoms).returns
    for lam in lambdas:
        algorithm = QLambda(target, behaviour, lam)
        rows = pd.DataFrame(sweep(algorithm, solver, fixed, Categorical(start, atoms), 400), columns=COLUMNS)
        frames.append(rows.assign(epsilon=epsilon, lam=lam, beta1=algorithm.modulus(GAMMA, 1.0), sweep=rows.index))
    return pd.concat(frames)


def claims(frame: pd.DataFrame, near: pd.DataFrame) -> str:
    """What theory says, and how often it held."""
    traces, steps = frame[frame["n"].isna()], frame[frame["n"].notna()]
    q, kept = traces[traces["algorithm"] == "Q(λ)"], traces[traces["algorithm"] != "Q(λ)"]
    faster = q["factor"] < q.groupby(["seed", "distance"])["factor"].transform("first") - 1e-4  # than at lambda = 0
    radius, common = q["lam"] * q["epsilon"] * GAMMA < 1 - GAMMA, GAMMA * (1 - q["lam"]) / (1 - GAMMA * q["lam"])
    ratio = near["w1"] / near.groupby(["epsilon", "lam"])["w1"].shift() / near["beta1"]
    sign = ratio[(near["lam"] >= 1 - near["epsilon"] / 2) & (near["w1"] > ROUNDING)].dropna()
    more, slack = (steps["n"] > 1) & (steps["epsilon"] > 0), 1e-4
    checks = {
        "every sweep shrinks Cramér's distance by beta_2": frame["worst2"] <= frame["beta2"] + 1e-5,
        "every sweep shrinks W1 by beta_1": frame["worst1"] <= frame["beta1"] + 1e-5,
        "every sweep shrinks W1 by max_s γ|π - cμ|/(1 - γ|cμ|) <= beta_1": traces["worst1"] <= traces["sharp1"] + 1e-5,
        "which is at most γ for Retrace and tree backup": kept["sharp1"] <= GAMMA + ROUNDING,
        "(no claim) beta_1 is, for Retrace and tree backup": kept["beta1"] <= GAMMA + ROUNDING,
        "the late factor is at most beta_1, also in Cramér's distance": frame["factor"] <= frame["beta1"] + slack,
        "the late factor of Q(λ) is at least γ(1 - λ)/(1 - γλ), whatever ε": q["factor"] >= common - slack,
        "(no claim) it is just that, but for λ = 1": (q["factor"] - common).abs()[q["lam"] < 1] < slack,
        "Q(λ) converges if λ < (1 - γ)/(γε)": q[radius]["converged"],
        "(no claim) Q(λ) converges beyond that": q[~radius]["converged"],
        "Retrace and tree backup converge, whatever λ and ε": kept["converged"],
        "Q(λ), λ > 0, beats one step if ε < 1 - γ, and here for larger ε, too": faster[q["lam"] > 0],
        "no negative mass where cμ ≤ π": traces[traces["below"]]["negative"] < ROUNDING,
        "(no claim) negative mass where λμ > π somewhere": q[~q["below"]]["negative"] > ROUNDING,
        "total variation grows by at most max |π - cμ|/(1 - max |cμ|)": traces["growth"] <= 1 + slack,
        "n-step shrinks by γ^n late": (steps["factor"] - GAMMA ** steps["n"]).abs() <= slack,
        "n-step is biased if n > 1 and ε > 0, and only then": (steps["bias"] > ROUNDING) == more,
        "the sign mode grows or shrinks by beta_1, to 1e-6": (sign - 1).abs() < 1e-6,
    }
    return "\n".join(f"{int(held.sum()):5d} of {len(held):5d}  {what}" for what, held in checks.items())


def draw(frame: pd.DataFrame) -> Figure:
    """Factors and iterations against lambda, a column per distance."""
    figure = Figure(figsize=(15, 7), layout="constrained")
    panels = figure.subplots(2, len(DISTANCES), sharex=True, sharey="row")
    for column, (distance, here) in zip(panels.T, frame.groupby("distance"), strict=True):
        for name, style in STYLE.items():
            part = here[here["algorithm"] == name]
            for ax, what in zip(column, ("factor", "iterations"), strict=True):
                values = part.groupby("lam")[what].agg(["mean", "min", "max"]).replace(np.inf, np.nan)
                marks = {"linewidth": 1.4, **style, "markersize": 5, "markeredgecolor": "white", "label": name}
                ax.plot(values.index, values["mean"], **marks)
                ax.fill_between(values.index, values["min"], values["max"], color=style["color"], alpha=0.15, lw=0)
            column[0].plot(part.groupby("lam")["beta1"].mean(), "--", color=style["color"], linewidth=1)
        beta2 = here[here["algorithm"] == "Q(λ)"].groupby("lam")["beta2"].mean()
        column[0].plot(beta2, "k:", linewidth=1.3, label="β₂ of Q(λ)")
        column[0].axhline(1, color="0.5", linewidth=0.8)
        column[0].set(title=f"ε ≤ {distance:g}", ylim=(0, 1.6))
        column[1].set(xlabel="λ", yscale="log", ylim=(0.8, 300))
        for ax in column:
            ax.grid(True, linewidth=0.4, alpha=0.5)
    panels[0, 0].set_ylabel("factor per sweep, Cramér's distance")
    panels[1, 0].set_ylabel(f"sweeps to a distance of {GOAL:g}")
    proven = Line2D([], [], color="0.3", linestyle="--", label="β₁, in the colour of its algorithm")
    handles = [*panels[0, 0].get_legend_handles_labels()[0], proven]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(f"γ = {GAMMA:g}, {STATES} states, {ACTIONS} actions, {ATOMS} atoms; mean and range over MDPs")
    return figure


def draw_signed(frame: pd.DataFrame, near: pd.DataFrame) -> Figure:
    """The example, its negative mass, the bias of n-step backups."""
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    left, middle, right = panels = figure.subplots(1, 3)
    for ax, epsilon, what in ((left, 2.0, "w1"), (middle, 1.0, "negative")):
        groups = near[near["epsilon"] == epsilon].groupby("lam")
        for style, (lam, part) in zip(plotting.STYLES[1:], groups, strict=False):
            label = f"λ = {lam:g}, β₁ = {part['beta1'].iloc[0]:.3g}" + ", none" * bool(part[what].max() < ROUNDING)
            plotting.curve(part["sweep"], part[what], "", ax, label=label, **{**style, "markevery": 8})
        ax.set(xscale="linear", xlabel="sweep", xlim=(-2, 120))
    left.set(title="tight example, ε = 2", ylabel="W₁ to the fixed point (reward)", ylim=(1e-6, 1e3))
    middle.set(title="the same, ε = 1: laws stay laws for λ ≤ 1/2", ylabel="largest negative mass", ylim=(1e-6, 1e3))
    biased = frame[(frame["distance"] > 0) & (frame["n"] > 1)].pivot_table("bias", "n", "distance")
    for style, (distance, bias) in zip(plotting.STYLES[1:], biased.items(), strict=False):
        plotting.curve(bias.index, bias, "", right, label=f"ε ≤ {distance:g}", **{**style, "markevery": 1})
    right.set(title="bias of uncorrected n-step backups", xlabel="n", ylabel="Cramér distance to the law of π")
    right.set(ylim=(8e-3, 1), xticks=LENGTHS[1:], xticklabels=[f"{n}" for n in LENGTHS[1:]])
    right.minorticks_off()
    for ax in panels:
        ax.legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def main(out: Path = Path("runs/off_policy_traces"), seed: int = 0, quick: bool = False) -> None:
    """Measure the contraction of multi-step off-policy backups.

    Args:
        out: folder to write in.
        seed: of the first random MDP, >= 0.
        quick: one MDP for each distance and fewer lambda, in seconds.
    """
    check_count("seed", seed, 0)
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    frame = study(1 if quick else 3, LAMBDAS[::2] if quick else LAMBDAS, seed)
    lambdas = {2.0: (0.0, 0.03, 0.05, 0.06, 0.1, 0.9), 1.0: (0.4, 0.5, 0.52, 0.54, 0.55, 0.58)}
    near = pd.concat([example(*about) for about in lambdas.items()], ignore_index=True)
    pivot = frame.pivot_table(index=["algorithm", "distance"], columns="lam", values="factor", sort=False)
    print("factor per sweep", pivot.drop(NAMES[-1]).dropna(axis=1).round(3).to_string(), sep="\n", end="\n\n")
    bias = frame.pivot_table(index="distance", columns="n", values="bias")
    print("bias of n-step backups, in Cramér's distance", bias.map("{:.1e}".format).to_string(), sep="\n", end="\n\n")
    print("checked", claims(frame, near), sep="\n", end="\n\n")
    write_atomically(out / "traces.csv", frame.to_csv(index=False).encode())
    write_atomically(out / "example.csv", near.to_csv(index=False).encode())
    written = plotting.save(draw(frame), out / "traces") + plotting.save(draw_signed(frame, near), out / "signed")
    print(*(f"wrote {path}" for path in (out / "traces.csv", out / "example.csv", *written)), sep="\n")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError) as error:
        sys.exit(f"off_policy_traces: {error}")
