"""Figures: log-log, colour-blind-safe, and told apart in grey by their markers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from nlhf.run import write_atomically

# Okabe and Ito's palette, ordered dark to light and back so that neighbours differ in grey, too.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#000000", "marker": "o", "linewidth": 3.5},  # seen under whatever agrees with it
    {"color": "#E69F00", "marker": "s"},
    {"color": "#0072B2", "marker": "^"},
    {"color": "#56B4E9", "marker": "D"},
    {"color": "#D55E00", "marker": "v"},
    {"color": "#009E73", "marker": "P"},
    {"color": "#CC79A7", "marker": "X"},
)

LABELS = {
    "duality_gap": "duality gap (win probability)",
    "prox_residual": "prox residual (nats)",
    "oracle_calls": "win probabilities looked up",
}


def curve(steps: Any, values: Any, metric: str, ax: Axes | None = None, **style: Any) -> Axes:
    """One metric against the iteration, log-log, on `ax` or on a new figure. Step 0 is drawn at 1/2."""
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    x = np.where(np.asarray(steps) == 0, 0.5, steps)
    marks = {
        "markevery": _log_spaced(x),
        "markersize": 4.5,
        "linewidth": 1.4,
        "markeredgewidth": 0.6,
        "markeredgecolor": "white",
    }
    ax.plot(x, np.where(np.asarray(values) > 0, values, np.nan), **{**marks, **style})
    ax.set(xscale="log", yscale="log", xlabel="iteration", ylabel=LABELS.get(metric, metric))
    ax.grid(True, which="major", linewidth=0.4, alpha=0.5)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def paths(taus: Any, probs: Any, labels: Sequence[str] | None = None, ax: Axes | None = None, named: int = 7) -> Axes:
    """Probabilities (T, n) against tau (T,), log scale, tau = 0 at the left end; the `named` largest have a name."""
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    if np.ndim(probs) != 2:
        raise ValueError(f"probs must be those of one game, (T, n), got shape {np.shape(probs)}")
    taus = np.asarray(taus, dtype=float)
    least = taus[taus > 0].min() if (taus > 0).any() else 1.0
    x = np.where(taus > 0, taus, least / 3)
    largest = np.argsort(-np.max(probs, axis=0), kind="stable")
    names = [f"{i}" for i in range(np.shape(probs)[1])] if labels is None else list(labels)
    for i in largest[named:]:
        ax.plot(x, probs[:, i], color="0.75", linewidth=0.6, zorder=1)
    marks = {"markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.5, "linewidth": 1.4}
    for style, i in zip(STYLES, largest[:named], strict=False):
        every = max(1, len(x) // 8)
        ax.plot(x, probs[:, i], label=shortened(names[i]), markevery=every, **{**marks, **style, "linewidth": 1.4})
    ax.set(xscale="log", xlabel="tau (win probability per nat)", ylabel="equilibrium probability")
    ax.set_ylim(-0.02 * np.max(probs), 1.04 * np.max(probs))
    if (taus == 0).any():
        decades = [10.0**k for k in range(-12, 13) if least <= 10.0**k <= taus.max()]
        ax.set_xticks([least / 3, *decades], ["0", *(f"{d:g}" for d in decades)])
        ax.axvline(least / 1.7, color="0.6", linewidth=0.6, linestyle=":")  # the axis is broken here
    ax.minorticks_off()
    ax.grid(True, which="major", linewidth=0.4, alpha=0.5)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def shortened(name: str, length: int = 28) -> str:
    """The name, its middle left out where it is long, and without mathematics."""
    name = name.replace("$", r"\$")
    return name if len(name) <= length else f"{name[: length // 2]}...{name[-(length // 2 - 3) :]}"


def mark_start(ax: Axes) -> None:
    """Label the tick at 1/2 with the step it stands for, 0."""
    low, high = ax.get_xlim()
    decades = [10.0**k for k in range(0, int(np.ceil(np.log10(high))) + 1) if 10.0**k <= high]
    ax.set_xticks([0.5, *decades], ["0", *(f"{d:,.0f}" for d in decades)])
    ax.xaxis.set_minor_locator(LogLocator(subs=range(2, 10)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlim(max(low, 0.4), high)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg, atomically."""
    written = []
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nlhf"}):
        for kind, options in (("png", {"dpi": 160}), ("svg", {"metadata": {"Date": None}})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, **options)
            written.append(stem.with_suffix(f".{kind}"))
            write_atomically(written[-1], buffer.getvalue())
    return written


def _log_spaced(x: Any, per_decade: int = 6) -> Sequence[int]:
    """Indices of points about evenly spaced on a log axis."""
    positions = np.log10(np.asarray(x, dtype=float)) * per_decade
    _, first = np.unique(np.floor(positions), return_index=True)
    return [int(i) for i in first]


def styles(names: Sequence[str]) -> Mapping[str, dict[str, Any]]:
    """A style for each name, in order."""
    return {name: STYLES[i % len(STYLES)] for i, name in enumerate(names)}
