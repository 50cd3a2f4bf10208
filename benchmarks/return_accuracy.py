"""Return distributions from a generative model: error against samples, atoms and seconds; and random CDFs.

    python benchmarks/return_accuracy.py --out runs/return_accuracy

After Rowland et al. 2024, arXiv:2402.07598, in environments of our own. N next states are drawn for each state, and
the return laws of the empirical chain computed by DCFP (`categorical_fixed_point`), QDP (`quantile_fixed_point`) and
CDP (`CategoricalDP`, 30 or 100 sweeps); categorical laws on the range that the rewards allow. The error is the largest
W1 over states to the true law, for which stands the DCFP of the true chain on 20,001 atoms: printed are its
certificate, and how far it moves from 10,001 atoms, which says more. N = inf is the true chain: what is left is
representation. Then the stochastic CDF equation, Phi(x) = D_x Phi(X') + c_x in law. Its mean is the DCFP; the local
variations sig obey (I - gamma P)^-1 sig <= Gini's difference <= 1 / (4 (1 - gamma)), and the same sum with sqrt(gamma)
and sqrt(sig) is at most (1 + sqrt(gamma)) / (2 (1 - gamma)). Prints tables, writes two CSV and four figures: 3 minutes.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

from nlhf import CategoricalDP, plotting, run
from nlhf.metrics import wasserstein
from nlhf.run import check_folder, write_atomically
from nlhf.tabular import MDP, BackupSolver, Categorical, categorical_fixed_point, certificate, quantile_fixed_point
from nlhf.tabular.bellman import Shift, grid
from nlhf.tabular.policy import Floats

ENVIRONMENTS: dict[str, Any] = {
    "chain of 10": lambda gamma: MDP.chain(10, gamma),
    "two states": lambda gamma: MDP.two_state(gamma, (0.6, 0.8)),  # quantiles tie at 0.5
    "Dirichlet(0.01)": lambda gamma: MDP.dirichlet(10, 0.01, gamma, seed=0),
    "Dirichlet(10)": lambda gamma: MDP.dirichlet(10, 10.0, gamma, seed=0),
}
GAMMAS, SHOWN, ATOMS, SAMPLES = (0.8, 0.9, 0.95, 0.99), (0.9, 0.99), (30, 100, 300), 10.0 ** np.arange(1, 6)
CDP, MANY = {"CDP, 30 sweeps": 30, "CDP, 100 sweeps": 100}, ", 100,000 samples"
STYLE = {**plotting.styles(["DCFP", "QDP", *CDP]), "CDP": plotting.STYLES[2]}
STYLE |= {name + MANY: {**STYLE[name], "linestyle": "--", "linewidth": 1.4} for name in ("DCFP", "QDP")}


def truth(mdp: MDP) -> tuple[Categorical, float, float]:
    """The law of returns, its certificate, and its W1 to the one of half as many atoms."""
    (low, high), (mean, square) = grid(mdp, 2), mdp.moments(mdp.uniform)
    reach = 10 * np.sqrt(np.maximum(square - mean**2, 0)) + 0.01 * (high - low)  # what lies beyond is certified, too
    ends = max(low, (mean - reach).min()), min(high, (mean + reach).max())
    sweeps, algorithm, laws = int(16 / (1 - mdp.gamma)), cast(Any, CategoricalDP(mdp.uniform)), []
    for z in (np.linspace(*ends, m) for m in (10_001, 20_001)):
        if mdp.gamma < 0.95:  # where a direct solution has a wide band
            laws.append(run(algorithm, BackupSolver(mdp, z, clip=True), sweeps, progress=False).policy)
        else:
            laws.append(categorical_fixed_point(mdp, mdp.uniform, z, 1e-9, clip=True).returns)
    return laws[1], float(certificate(mdp, mdp.uniform, laws[1]).max()), float(wasserstein(*laws).max())


def solve(name: str, mdp: MDP, m: int, sweeps: int = 0) -> tuple[Any, float]:
    """The return laws and the seconds they took."""
    began, algorithm = perf_counter(), cast(Any, CategoricalDP(mdp.uniform))
    if name == "DCFP":
        found: Any = categorical_fixed_point(mdp, mdp.uniform, m, tol=1e-6).returns
    elif name == "QDP":
        found = quantile_fixed_point(mdp, mdp.uniform, m, tol=1e-4 / (1 - mdp.gamma)).returns
    else:
        found = run(algorithm, BackupSolver(mdp, m), sweeps, progress=False).policy
    return found, perf_counter() - began


def study(gammas: tuple[float, ...], seeds: int, seed: int) -> pd.DataFrame:
    """A row per environment, discount, samples, seed, atoms and algorithm."""
    rows: list[dict[str, Any]] = []
    few = [(name, m, 0) for m in ATOMS for name in ("DCFP", "QDP")] + [(name, 300, n) for name, n in CDP.items()]
    many = [(name, m, 0) for m in (10, *ATOMS, 1000) for name in ("DCFP", "QDP")]
    many += [("CDP", 300, sweeps) for sweeps in (3, 10, 30, 100, 300, 1000)]
    for (name, make), gamma in tqdm([(e, g) for e in ENVIRONMENTS.items() for g in gammas], "chains", disable=None):
        law, bound, moved = truth(mdp := make(gamma))
        about = {"environment": name, "gamma": gamma, "truth_bound": bound, "truth_moved": moved}
        for n, k in [(np.inf, 0)] + [(n, seed + k) for n in SAMPLES for k in range(seeds)]:
            model, times = mdp, 3  # the first is not the fastest
            if n < np.inf:
                drawn = np.random.default_rng((k, int(n))).multinomial(int(n), mdp.transitions)
                model, times = MDP(drawn[:, None] / n, mdp.rewards[:, 0, 0], gamma), 1
            for algorithm, m, sweeps in many if n == np.inf else few:
                found, seconds = min((solve(algorithm, model, m, sweeps) for _ in range(times)), key=lambda x: x[1])
                row = {**about, "samples": n, "seed": k, "algorithm": algorithm, "m": m, "sweeps": sweeps}
                rows.append({**row, "error": float(wasserstein(found, law).max()), "seconds": seconds})
    return pd.DataFrame(rows)


def simulate(mdp: MDP, m: int, copies: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """(S, copies, m - 1) random CDFs, and (S, m - 1) the DCFP: the same maps, one along a path and one on average."""
    (d, c), upper = maps(mdp, m), np.cumsum(mdp.transitions[:, :-1], axis=1)
    paths = [path := np.broadcast_to(np.arange(mdp.n_states)[:, None], (mdp.n_states, copies))]
    for _ in range(int(30 / (1 - mdp.gamma))):  # gamma to that power is e^-30
        paths.append(path := (rng.uniform(size=path.shape)[..., None] >= upper[path]).sum(-1))
    phi = np.ones((*path.shape, m - 1))
    for path in paths[::-1]:
        phi = sum((path == x)[..., None] * (phi @ d[x].T + c[x]) for x in range(mdp.n_states))
    return phi, categorical_fixed_point(mdp, mdp.uniform, m).returns.cdf[:, 0]


def maps(mdp: MDP, m: int) -> tuple[Floats, Floats]:
    """(S, m - 1, m - 1) D and (S, m - 1) c of a chain."""
    shift, x = Shift(mdp, grid(mdp, m)), np.arange(mdp.n_states)
    return shift.matrix.toarray().reshape(x.size, m - 1, x.size, m - 1)[x, :, x], shift.constant


def variation(count: int, seed: int) -> pd.DataFrame:
    """Of random chains: what variations sum to, Gini's differences and their violations; shares of their bounds."""
    rng, rows = np.random.default_rng(seed), []
    for gamma, m, _ in product((0.5, 0.8, 0.9, 0.95, 0.99), (2, 5, 20, 60, 150), range(count)):
        mdp = MDP.dirichlet(int(rng.integers(2, 7)), float(rng.choice([0.05, 0.5, 1, 10])), gamma, rng)
        p, rewards = mdp.transitions, [0.0, 1.0, *mdp.rewards[2:, 0, 0]]
        (d, c), stride = maps(mdp := MDP(p[:, None], rewards, gamma), m), 1 / (1 - gamma) / (m - 1)
        f = categorical_fixed_point(mdp, mdp.uniform, m).returns.cdf[:, 0]
        change = np.einsum("xij,yj->xyi", d, f) + (c - f)[:, None]
        sig, gini = np.sum(p * stride * np.sum(change**2, axis=-1), axis=1), stride * np.sum(f * (1 - f), axis=1)
        total, roots = (np.linalg.solve(np.eye(len(p)) - g * p, v) for g, v in ((gamma, sig), (gamma**0.5, sig**0.5)))
        row = {"gamma": gamma, "m": m, "bellman": (gamma * p @ gini + sig - gini).max(), "sum": (total - gini).max()}
        row |= {"total": 4 * (1 - gamma) * total.max(), "gini": 4 * (1 - gamma) * gini.max()}
        rows.append({**row, "roots": roots.max() * 2 * (1 - gamma) / (1 + np.sqrt(gamma))})
    return pd.DataFrame(rows)


def draw(frame: pd.DataFrame, x: str, by: list[str], label: str, title: str) -> Figure:
    """A panel per environment and shown discount, a line per `line`: medians over what has the same `by`."""
    figure = Figure(figsize=(15, 7.5), layout="constrained")
    axes = figure.subplots(len(SHOWN), len(ENVIRONMENTS), sharex=True, sharey="row")
    for (gamma, name), ax in zip(product(SHOWN, ENVIRONMENTS), axes.flat, strict=True):
        part = frame[(frame["environment"] == name) & (frame["gamma"] == gamma)]
        for line in (line for line in STYLE if (part["line"] == line).any()):
            mine = part[part["line"] == line]
            groups = mine[(mine["samples"] < np.inf) | (x != "samples")].groupby(by)
            low, middle, high = (groups["error"].quantile(q) for q in (0.1, 0.5, 0.9))
            plotting.curve(groups[x].median(), middle, "", ax, label=line, **{**STYLE[line], "markevery": 1})
            if [x] == by:
                ax.fill_between(groups[x].median(), low, high, color=STYLE[line]["color"], alpha=0.18, linewidth=0)
            if x == "samples" and line in ("DCFP", "QDP"):
                floor = mine[mine["samples"] == np.inf]["error"].item()
                ax.axhline(floor, color=STYLE[line]["color"], linestyle=":", label=f"{line}, true chain")
            if x == "samples" and line == "QDP":
                ax.plot(SAMPLES, middle.iloc[0] / 2 * (10 / SAMPLES) ** 0.5, "-.", color="0.5", label="slope -1/2")
        ax.set(xlabel=label if gamma == SHOWN[-1] else "", ylabel="", title=f"{name}, γ = {gamma:g}")
    figure.supylabel("largest W₁ to the true law (reward)", fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    figure.suptitle(title)
    return figure


def draw_random(phi: Floats, mean: Floats, rows: pd.DataFrame) -> Figure:
    """Random CDFs around their mean, and what variations sum to."""
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    (*states, left, right), z = figure.subplots(1, 4), np.linspace(0, 10, mean.shape[1] + 1)[:-1]
    for x, ax in enumerate(states):
        ax.step(z, phi[x, :5].T, where="post", linewidth=1, color=STYLE["CDP, 100 sweeps"]["color"])
        ax.step(z, mean[x], "k", where="post", linewidth=2.5, label="DCFP")
        ax.step(z, phi[x].mean(0), "--", where="post", color=STYLE["QDP"]["color"], label=f"mean of {phi.shape[1]:,}")
        ax.set(title=f"two states, γ = 0.9, in state {x}", xlabel="return (reward)", ylabel="CDF", xlim=(0, 10))
    states[1].legend(title="five random CDFs and", title_fontsize=8, frameon=False, fontsize=8, loc="center right")
    for style, (m, part) in zip(plotting.STYLES[1:], rows.groupby("m"), strict=False):
        for ax, what in ((left, "total"), (right, "roots")):
            ax.plot(part["gini"], part[what], style["marker"], color=style["color"], ms=3.5, label=f"{m} atoms")
            ax.set(xlabel="Gini's difference × 4 (1 - γ)", xlim=(-0.02, 1.04), ylim=(-0.02, 1.04))
    left.plot([0, 1], [0, 1], color="0.4", linewidth=1)
    left.set(title="(I - γP)⁻¹ σ² ≤ Gini's difference", ylabel="sum of variations × 4 (1 - γ)")
    right.set(title="(I - √γ P)⁻¹ σ, random chains", ylabel="share of (1 + √γ) / (2 (1 - γ))")
    right.legend(frameon=False, fontsize=8)
    return figure


def report(frame: pd.DataFrame, rows: pd.DataFrame, phi: Floats, mean: Floats) -> None:
    """Tables and checks."""
    index, most = ["environment", "gamma"], frame[(frame["samples"] == SAMPLES[-1]) & (frame["m"] == 300)]
    exact = frame[frame["samples"] == np.inf].set_index([*index, "m"])
    one, other = (exact[exact["algorithm"] == name] for name in ("DCFP", "QDP"))
    for what in ("error", "seconds"):
        table = most.pivot_table(index=index, columns="algorithm", values=what, aggfunc="median", sort=False)
        print(f"median {what}{MANY} per state, 300 atoms", table.map("{:.2g}".format), "", sep="\n")
        print(f"{what} of QDP / {what} of DCFP, true chain", (other[what] / one[what]).unstack().round(2), "", sep="\n")
    checked = frame.groupby(index, sort=False)[["truth_bound", "truth_moved"]].first().map("{:.1e}".format)
    print("W1 of the stand-in for the truth", checked, "", sep="\n")
    gamma, m = (one.index.get_level_values(name).to_numpy() for name in ("gamma", "m"))
    shares = (one["error"] * 2 * (m - 1) * (1 - gamma) ** 2).max(), (other["error"] * 2 * m * (1 - gamma) ** 2).max()
    print("largest error on the true chain / its bound: DCFP {:.2f}, QDP {:.2f}".format(*shares))
    off, noise = np.abs(phi.mean(axis=1) - mean).max(), np.sqrt(np.log(2e6 * mean.size) / (2 * phi.shape[1]))
    print(f"|mean of {phi.shape[1]:,} random CDFs - DCFP| is {off:.1e}, to be at most {noise:.1e}")
    found = "(I - γP)^-1 sig - Gini <= {sum:.0e}, shares of bounds: Gini {gini:.3f}, roots {roots:.3f}\n"
    print(f"{len(rows):,} random chains:", found.format(**rows.max()))


def main(out: Path = Path("runs/return_accuracy"), seed: int = 0, quick: bool = False) -> None:
    """Measure errors of return distributions.

    Args:
        out: folder to write in.
        seed: of the samples, >= 0.
        quick: fewer seeds and chains.
    """
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    rows = variation(5 if quick else 30, seed)
    phi, mean = simulate(MDP.two_state(0.9), 101, 2000, np.random.default_rng(seed))
    frame = study(SHOWN if quick else GAMMAS, 1 if quick else 5, seed)
    report(frame, rows, phi, mean)
    write_atomically(out / "accuracy.csv", frame.to_csv(index=False).encode())
    write_atomically(out / "variation.csv", rows.to_csv(index=False).encode())
    whole, both = frame.assign(line=frame["algorithm"]), frame[frame["algorithm"].isin(["DCFP", "QDP"])]
    exact, samples = whole[whole["samples"] == np.inf], whole[(whole["m"] == 300) & (whole["algorithm"] != "CDP")]
    many = both[both["samples"] == SAMPLES[-1]].assign(line=both["algorithm"] + MANY)
    atoms, title = pd.concat([exact[exact["algorithm"] != "CDP"], many]), "true chain; 10 to 1,000 atoms, CDP of 300"
    figures = {
        "samples": draw(samples, "samples", ["samples"], "samples per state", "300 atoms; median and 10-90 % of seeds")
    }
    figures["atoms"] = draw(atoms, "m", ["m"], "atoms", "true chain, and 100,000 samples per state: 10-90 %")
    figures["seconds"] = draw(exact, "seconds", ["m", "sweeps"], "seconds", f"{title} after 3 to 1,000 sweeps")
    figures["random_cdfs"] = draw_random(phi, mean, rows)
    for name, figure in figures.items():
        print("wrote", *plotting.save(figure, out / name))


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError) as error:
        sys.exit(f"return_accuracy: {error}")
