"""Equilibria of preference data beside their Bradley-Terry ranking: what `nlhf solve` prints, writes and draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nlhf import plotting
from nlhf.run import write_atomically
from nlhf.tabular import (
    EquilibriumPath,
    Interval,
    MatrixGame,
    equilibrium_interval,
    equilibrium_path,
)
from nlhf.tabular.evidence import Counts
from nlhf.tabular.tournament import Cycles, bradley_terry_scores, cycles

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PATH = np.geomspace(10, 1e-3, 41)
"""The taus that the figure draws."""


@dataclass(frozen=True)
class Standings:
    """A game, its equilibria and what simpler methods make of it."""

    name: str
    game: MatrixGame
    path: EquilibriumPath
    """At the taus asked for."""
    intervals: tuple[Interval, ...] | None
    """For each tau, if the game was estimated from data."""
    level: float

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the items."""
        return self.game.labels or tuple(f"{i}" for i in range(self.game.n))

    @cached_property
    def pooled(self) -> Any:
        """(n, n) win probabilities, averaged over prompts."""
        game = self.game
        return game.matrix if game.matrix.ndim == 2 else np.tensordot(game.prompt_weights, game.matrix, axes=1)

    @cached_property
    def scores(self) -> Any:
        """(n,) Bradley-Terry scores of the pooled win probabilities; NaN where no finite ones exist."""
        evidence = self.game.evidence
        weights = evidence.wins + evidence.wins.T + 2 * evidence.prior if isinstance(evidence, Counts) else None
        try:
            return bradley_terry_scores(self.pooled, weights)
        except ValueError:
            return np.full(self.game.n, np.nan)

    @cached_property
    def cycles(self) -> Cycles:
        """Of the pooled win probabilities."""
        return cycles(self.pooled)

    @property
    def frame(self) -> pd.DataFrame:
        """One row per prompt and item, sorted by the equilibrium at the smallest tau, then by score."""
        import pandas as pd

        game, frames = self.game, []
        against = np.atleast_2d(game.versus(game.reference.probs))
        rank = np.argsort(np.argsort(-self.scores, kind="stable"), kind="stable") + 1.0
        for x in game.prompts:
            columns: dict[str, Any] = {"prompt": x} if game.matrix.ndim == 3 else {}
            columns |= {"item": self.labels, "bt_rank": rank, "bt_score": self.scores, "win_rate": against[x]}
            for i, equilibrium in enumerate(self.path.equilibria):
                tau = plain(equilibrium.tau)
                columns[f"tau={tau}"] = np.atleast_2d(equilibrium.policy.probs)[x]
                if self.intervals is not None:
                    interval = self.intervals[i]
                    columns[f"low({tau})"] = np.atleast_2d(interval.low)[x]
                    columns[f"high({tau})"] = np.atleast_2d(interval.high)[x]
                    columns[f"played({tau})"] = np.atleast_2d(interval.played)[x]
            last = f"tau={plain(self.path.taus[-1])}"
            frames.append(pd.DataFrame(columns).sort_values([last, "bt_score"], ascending=False, kind="stable"))
        frame = pd.concat(frames, ignore_index=True)
        frame["bt_rank"] = frame.bt_rank.where(np.isfinite(frame.bt_score)).astype("Int64")
        return frame

    @property
    def certificates(self) -> pd.DataFrame:
        """One row per tau: the worst prompt's gap, the bound on KL(pi*, pi), uniqueness, and what it cost."""
        import pandas as pd

        return pd.DataFrame(
            {
                "tau": e.tau,
                "gap": float(e.gap.max()),
                "kl_bound": float(e.kl_bound.max()),
                "unique": bool(e.unique.all()),
                "steps": e.iterations,
                "products": e.products,
            }
            for e in self.path.equilibria
        )

    def summary(self) -> str:
        """What there is to say in words."""
        game, found = self.game, self.cycles
        kind = f" for each of {len(game.prompts)} prompts" if game.matrix.ndim == 3 else ""
        lines = [f"{self.name}: {game.n} items{kind}"]
        pooled = " on average over prompts" if kind else ""
        if found.condorcet is not None:
            lines.append(f"{self.labels[found.condorcet]} beats every other item{pooled} (Condorcet winner)")
        else:
            lines.append(f"no item beats every other one{pooled}")
        lines.append(f"3-cycles of majorities: {found.total}" + (", the strongest" if found.total else ""))
        for y, z, w, least in found.strongest:
            names = " > ".join(self.labels[i] for i in (y, z, w, y))
            lines.append(f"  {names}, each with probability at least {least:.3f}")
        if np.isnan(self.scores).any():
            lines.append("no finite Bradley-Terry scores fit: some items never lose to the others")
        return "\n".join(lines)

    def rows(self) -> str:
        """The table to print: of each prompt the items with the largest probabilities at any tau."""
        most = 15 if self.game.matrix.ndim == 2 else 6
        shown, taus = self.frame, [plain(tau) for tau in self.path.taus]
        shown["largest"] = shown[[f"tau={tau}" for tau in taus]].max(axis=1)
        prompt = shown["prompt"] if "prompt" in shown else np.zeros(len(shown))
        shown = shown[shown.groupby(prompt).largest.rank(ascending=False, method="first") <= most]
        for tau in taus:
            text = shown[f"tau={tau}"].map("{:.3f}".format)
            if self.intervals is not None:
                text += shown[f"low({tau})"].map(" [{:.3f},".format) + shown[f"high({tau})"].map(" {:.3f}]".format)
            shown = shown.assign(**{f"tau={tau}": text})
        columns = [
            c for c in shown if c in ("prompt", "item", "bt_rank", "bt_score", "win_rate") or str(c).startswith("tau=")
        ]
        left_out = self.game.n - most
        table = shown[columns].to_string(index=False, na_rep="-", float_format="{:.3f}".format)
        return table + (f"\nand {left_out} more items, with smaller probabilities" if left_out > 0 else "")

    def figure(self) -> Figure:
        """The path of the equilibrium in tau, and equilibria beside the Bradley-Terry ranking."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        taus = sorted({*PATH.tolist(), 0.0}, reverse=True)
        contextual = self.game.matrix.ndim == 3
        plotting.paths(np.array(taus), self._averaged(equilibrium_path(self.game, taus).probs), self.labels, left)
        left.set_title(
            "averaged over prompts" if contextual else "from the reference to the maximal lottery", fontsize=10
        )

        tau = f"tau = {plain(self.path.taus[0])}"
        if contextual:
            series: dict[str, tuple[int, Any]] = {
                f"prompt {x} ({w:.0%})": (0, x) for x, w in enumerate(self.game.prompt_weights)
            }
            title = f"equilibrium at {tau}, prompt by prompt"
        else:
            series = {f"tau = {plain(tau)}": (t, ...) for t, tau in enumerate(self.path.taus)}
            title = "at the taus asked for"
        top = np.argsort(-self._averaged(self.path.probs).max(axis=0), kind="stable")[:12]
        order = top[np.argsort(-np.nan_to_num(self.scores[top]), kind="stable")]
        for i, (label, (t, x)) in enumerate(series.items()):
            style = plotting.STYLES[i % len(plotting.STYLES)]
            height = np.arange(order.size) + 0.6 / len(series) * (i - (len(series) - 1) / 2)
            if self.intervals is not None:
                low, high = self.intervals[t].low[x], self.intervals[t].high[x]
                right.hlines(height, low[order], high[order], color=style["color"], linewidth=1.2)
            mark = {"marker": style["marker"], "color": style["color"], "markeredgecolor": "white", "markersize": 5}
            right.plot(self.path.probs[t][x][order], height, linestyle="", label=label, markeredgewidth=0.5, **mark)
        ranked = bool(np.isfinite(self.scores).all())
        right.set_yticks(np.arange(order.size), [self._named(i, ranked) for i in order])
        right.invert_yaxis()
        right.set(xlabel="equilibrium probability", xlim=(-0.02, 1.02))
        right.set_title(title, fontsize=10)
        right.grid(True, axis="x", linewidth=0.4, alpha=0.5)
        right.spines[["top", "right"]].set_visible(False)
        notes = ["(n): Bradley-Terry rank"] * ranked + [f"lines: {self.level:.0%} intervals"] * bool(self.intervals)
        right.legend(frameon=False, title="\n".join(notes), fontsize=8, title_fontsize=8)
        return figure

    def _averaged(self, probs: Any) -> Any:
        """(T, n): averaged over prompts, if there are several."""
        return probs if probs.ndim == 2 else np.einsum("txn,x->tn", probs, self.game.prompt_weights)

    def _named(self, item: int, ranked: bool) -> str:
        name = plotting.shortened(self.labels[item])
        return f"{name} ({1 + int(np.sum(self.scores > self.scores[item]))})" if ranked else name

    def save(self, out: Path) -> list[Path]:
        """Write standings.csv, certificates.csv and the figure into the folder `out`."""
        figure, contents = self.figure(), {"standings.csv": self.frame, "certificates.csv": self.certificates}
        out.mkdir(parents=True, exist_ok=True)
        for name, frame in contents.items():
            write_atomically(out / name, frame.to_csv(index=False).encode())
        return [*(out / name for name in contents), *plotting.save(figure, out / "standings")]


def standings(
    name: str, game: MatrixGame, taus: Sequence[float], draws: int = 1000, level: float = 0.9, seed: int = 0
) -> Standings:
    """Solve a game at each tau, with intervals where it was estimated from data.

    Args:
        name: what to call it.
        game: one game, or one per prompt.
        taus: numbers >= 0.
        draws: of the game from its evidence, for the intervals.
        level: coverage of the intervals.
        seed: of the draws.
    """
    path = equilibrium_path(game, taus)
    intervals = None
    if game.evidence is not None:
        intervals = tuple(equilibrium_interval(game, float(tau), draws, level, seed) for tau in path.taus)
    return Standings(name, game, path, intervals, level)


def clustered(scores: Any, count: int, seed: int) -> Any:
    """(Q,) integers: the questions grouped by who does well on them, by k-means on the rows of the scores (Q, n)."""
    from scipy.cluster.vq import kmeans2

    if not 1 <= count <= len(scores):
        raise ValueError(f"clusters must be between 1 and the number of questions, {len(scores)}, got {count}")
    _, member = kmeans2(scores, count, minit="++", rng=np.random.default_rng(seed))
    _, compact = np.unique(member, return_inverse=True)
    return compact


def plain(tau: float) -> str:
    """tau in full, without an exponent: a name that no other tau shares."""
    return np.format_float_positional(tau, trim="-")
