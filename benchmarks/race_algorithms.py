"""The iterative algorithms as races, against theorems and against the exact solver.

    python benchmarks/race_algorithms.py --tau 0.1 --steps 10000 --out runs/race_algorithms

Every racer starts at the reference. KL(pi*, pi), in nats, is drawn against products with P: two per iteration of mirror
prox, one per iteration of the others. Dashed is what the algorithm's `rate` proves, iterated from KL(pi*, mu). The star
is `regularized_nash`, at the KL that it certifies; the factorisations of its Newton steps come on top of its products.
Prints a table for each game and writes race.csv (tidy), race.png and race.svg. It takes less than a minute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from tqdm import tqdm

from nlhf import MagneticMD, MirrorProx, NashMD, OptimisticMD, metrics, plotting
from nlhf.core import Info, Prox
from nlhf.run import check_folder, write_atomically
from nlhf.tabular import Equilibrium, ExactSolver, LowRankGame, MatrixGame, Tabular, regularized_nash
from nlhf.tabular.operators import TabularGame

GAMES: dict[str, TabularGame] = {
    "rock, paper, scissors": MatrixGame.rock_paper_scissors(reference=[0.5, 0.3, 0.2]),
    "random, 100 responses": MatrixGame.random(100, seed=0),
    "rank 8, 1,000 responses": LowRankGame.random(1000, rank=8, seed=0),
}
# A race ends before rounding errors matter; a certificate below what double precision resolves is cut.
COARSE, FINE, END, RESOLVED = 1e-8, 1e-12, 1e-24, 1e-32
NOTES = """\
to: iterations to that KL(pi*, pi). products: with P, to the smaller. proven: iterations until the theorem says so.
A dash is more than {steps:,}, or no theorem. What is proven of Nash-MD at 4 tau never falls below eta / (8 tau) = 1/2;
that its schedule arrives is proven after 1 / (2 tau^2 KL) = {schedule:.0e} iterations."""


class Racer(NamedTuple):
    """An algorithm, its theorem, and the share of the reference that is mixed into its policy before it is measured."""

    algorithm: Any
    rate: Callable[[float, int], float]
    mixed: float = 0.0


def racers(tau: float) -> dict[str, Racer]:
    """By name, in the order of `plotting.STYLES`.

    With a constant step, the mixtures q_t of Nash-MD converge to the equilibrium of tau / (1 - eta tau). Run at
    tau / (1 + eta tau) that is the one of tau, and the mixtures are the iterates of `MagneticMD(eta, tau)`.
    EGPO writes its exponents out, pi^(1 - eta tau) mu^(eta tau) exp(eta P h): mirror prox of step eta / (1 - eta tau),
    here 1/3. With eta = 2 / (1 + 2 tau) it would be the other mirror prox.
    """
    eta, moved, egpo = 4 * tau, tau / (1 + 4 * tau**2), 1 / (3 + tau)
    magnetic, constant, decaying = MagneticMD(eta, tau), NashMD(eta, tau), NashMD.default(tau)
    slow, fast, optimistic = MirrorProx(egpo / (1 - egpo * tau), tau), MirrorProx(2.0, tau), OptimisticMD.default(tau)
    return {
        "magnetic MD, η = 4τ": Racer(magnetic, magnetic.rate),
        "Nash-MD, η = 4τ, at τ/(1 + ητ), mixtures": Racer(NashMD(eta, moved), magnetic.rate, eta * moved),
        "Nash-MD, η = 4τ": Racer(constant, constant.rate),
        "Nash-MD, η = 2/(τ(t + 2))": Racer(decaying, decaying.rate),
        "EGPO, η = 1/(3 + τ): mirror prox, η = 1/3": Racer(slow, slow.rate),
        f"optimistic MD, η = {optimistic.eta:.2g}": Racer(optimistic, optimistic.rate),
        "mirror prox, η = 2": Racer(fast, fast.rate),
    }


def race(racer: Racer, game: TabularGame, star: Equilibrium, steps: int) -> pd.DataFrame:
    """A row per iteration: step, products, kl (NaN once it has been below `END`), theory (inf where there is none)."""
    solver, products, known = ExactSolver(game), 0, set[Any]()

    def solve(prox: Prox, start: Tabular) -> tuple[Tabular, Info]:
        """Counts products; those of the sub-problem before are remembered, which is what optimism asks for."""
        nonlocal products, known
        opponents = {opponent for opponent, _ in prox.opponents}
        products, known = products + len(opponents - known), opponents
        return solver(prox, start)

    state, kl = racer.algorithm.init(game.reference), [metrics.kl(star.policy, game.reference)]
    theory = [*kl]
    for t in range(steps):
        theory.append(racer.rate(theory[-1], t))
        if kl[-1] > END:
            state, _ = racer.algorithm.step(state, solve)
            kl.append(metrics.kl(star.policy, state.policy.lerp(game.reference, racer.mixed)))
    step, each = np.arange(steps + 1), products // (len(kl) - 1)
    kl += [np.nan] * (len(step) - len(kl))
    return pd.DataFrame({"step": step, "products": each * step, "kl": kl, "theory": theory})


def first(values: NDArray[np.float64], goal: float) -> float:
    """The first iteration with a value of at most `goal`; inf if there is none."""
    return float(np.argmax(values <= goal)) if (values <= goal).any() else np.inf


def report(frame: pd.DataFrame, star: Equilibrium) -> str:
    """The table of one game."""
    rows: dict[str, list[Any]] = {}
    for name, one in frame.groupby("racer", sort=False):
        kl, theory, each = one["kl"].to_numpy(), one["theory"].to_numpy(), one["products"].iloc[1]
        kept = "" if np.isinf(theory[-1]) else "NO" if (kl > theory * (1 + 1e-9)).any() else "yes"
        counts = [first(kl, COARSE), first(kl, FINE), first(kl, FINE) * each, first(theory, FINE)]
        rows[str(name)] = [*counts, kl[np.isfinite(kl)][-1], kept]
    rows["regularized_nash, Newton steps"] = [np.inf, star.iterations, star.products, np.inf, float(star.kl_bound), ""]
    columns = [f"to {COARSE:g}", f"to {FINE:g}", "products", "proven", "last KL", "below theory"]
    formats = [lambda n: f"{n:,.0f}" if n < np.inf else "-"] * 4 + ["{:.1e}".format, str]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).to_string(formatters=formats)


def draw(frames: dict[str, pd.DataFrame], stars: dict[str, Equilibrium], tau: float) -> Figure:
    """A panel per game."""
    figure = Figure(figsize=(14, 6), layout="constrained")
    panels = list(figure.subplots(1, len(frames), sharey=True))
    for ax, (game, frame) in zip(panels, frames.items(), strict=True):
        styles = plotting.styles([str(name) for name in frame["racer"].unique()])
        for (name, style), (_, one) in zip(styles.items(), frame.groupby("racer", sort=False), strict=True):
            plotting.curve(one["products"], one["kl"], "", ax, label=name, **style).set_xlabel("products with P")
            ax.plot(one["products"].clip(lower=0.5), one["theory"], "--", color=style["color"], linewidth=1)
        star = stars[game].products, max(float(stars[game].kl_bound), RESOLVED)
        ax.plot(*star, "k*", markersize=15, markeredgecolor="white", zorder=5)
        ax.set(title=f"{game}, τ = {tau:g}", xlim=(0.4, 1.4 * frame["step"].max()), ylim=(RESOLVED / 30, 100))
        plotting.mark_start(ax)
    panels[0].set_ylabel("KL(π*, π) in nats")
    proven = Line2D([], [], color="0.3", linestyle="--", linewidth=1, label="proven, in the colour of the racer")
    exact = Line2D([], [], color="black", marker="*", linestyle="", markersize=12, label="exact, as certified")
    handles = [*panels[0].get_legend_handles_labels()[0], proven, exact]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def main(out: Path = Path("runs/race_algorithms"), steps: int = 10_000, tau: float = 0.1) -> None:
    """Race the iterative algorithms to the equilibria of three games.

    Args:
        out: folder to write in.
        steps: iterations of a racer at most, >= 1.
        tau: strength of the KL regularisation, 0 < tau < 1/2, for the step 4 tau of Nash-MD.
    """
    if steps < 1 or not 0 < tau < 0.5:
        raise ValueError(f"steps must be at least 1 and tau in (0, 1/2), got {steps} and {tau}")
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    frames, stars = {}, {name: regularized_nash(game, tau) for name, game in GAMES.items()}
    for name, game in GAMES.items():
        field = tqdm(racers(tau).items(), name, disable=None)
        frames[name] = pd.concat([race(one, game, stars[name], steps).assign(racer=who) for who, one in field])
        wrong = regularized_nash(game, tau / (1 - 4 * tau**2)).policy
        limit = metrics.kl(stars[name].policy, Tabular(metrics.best_response(wrong, game, tau)))
        print(f"{name}, tau = {tau:g}", report(frames[name], stars[name]), sep="\n")
        print(f"the limit of Nash-MD at 4 tau, by theory: KL = {limit:.1e}", end="\n\n")
    print(NOTES.format(steps=steps, schedule=0.5 / (tau**2 * FINE)), end="\n\n")
    table = pd.concat([frame.assign(game=name, tau=tau) for name, frame in frames.items()])
    write_atomically(out / "race.csv", table.dropna().to_csv(index=False).encode())
    for path in (out / "race.csv", *plotting.save(draw(frames, stars, tau), out / "race")):
        print(f"wrote {path}")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError) as error:
        sys.exit(f"race_algorithms: {error}")
