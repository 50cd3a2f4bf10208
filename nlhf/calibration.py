"""How good win probabilities are: accuracy, log loss, Brier score, and whether 70 % means 70 %."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy
from numpy.typing import ArrayLike

from nlhf.metrics import Floats
from nlhf.run import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

BINS = 10
METRICS = ("accuracy", "log_loss", "brier", "ece")


class Estimate(NamedTuple):
    """A mean over the comparisons and its bootstrap interval, beside what the labels themselves would have scored."""

    value: float
    low: float
    high: float
    labels: float


@dataclass(frozen=True)
class Calibration:
    """The measures of `calibration`, and its table of reliability."""

    metrics: dict[str, Estimate]
    """accuracy, log_loss (nats), brier, ece."""
    bins: Floats
    """(10, 5) by confidence in the preferred side, 0.5 to 1: n, mean confidence, share won, and its Wilson interval."""
    n: int
    """Comparisons."""
    groups: int
    """Groups (prompts) that they belong to."""
    level: float
    """Coverage of the intervals."""

    @property
    def frame(self) -> pd.DataFrame:
        """One row per measure, with n."""
        import pandas as pd

        rows = [{"metric": name, **estimate._asdict(), "n": self.n} for name, estimate in self.metrics.items()]
        return pd.DataFrame(rows)

    @property
    def reliability(self) -> pd.DataFrame:
        """One row per bin that is not empty."""
        import pandas as pd

        table = pd.DataFrame(self.bins, columns=["n", "confidence", "won", "low", "high"]).astype({"n": int})
        return table[table.n > 0].reset_index(drop=True)

    def figure(self) -> Figure:
        """The share won against the confidence, with intervals; on the diagonal 70 % means 70 %."""
        from matplotlib.figure import Figure

        from nlhf import plotting

        figure = Figure(figsize=(5, 4.6), layout="constrained")
        ax, table, style = figure.subplots(), self.reliability, plotting.STYLES[2]
        ax.plot([0.5, 1], [0.5, 1], color="0.6", linestyle="--", linewidth=1, label="calibrated")
        ax.vlines(table.confidence, table.low, table.high, color=style["color"], linewidth=1.2)
        ax.plot(table.confidence, table.won, linestyle="", color=style["color"], marker=style["marker"],
                markeredgecolor="white", label=f"held out, {self.level:.0%} intervals")  # fmt: skip
        for row in table.itertuples():
            ax.annotate(f"{row.n}", (row.confidence, 0.0), (0, 3), textcoords="offset points", ha="center", fontsize=7)
        ax.set(xlabel="confidence in the preferred response", ylabel="share that it won", xlim=(0.48, 1.02))
        ax.set_ylim(-0.02, 1.02)
        ece = self.metrics["ece"].value
        ax.set_title(f"{self.n} comparisons (numbers: of each point), ECE {ece:.3f}", fontsize=10)
        ax.grid(True, linewidth=0.4, alpha=0.5)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8, loc="upper left")
        return figure

    def save(self, out: Path) -> list[Path]:
        """Write calibration.csv, reliability.csv and the figure into the folder `out`."""
        from nlhf import plotting

        out.mkdir(parents=True, exist_ok=True)
        for name, table in (("calibration.csv", self.frame), ("reliability.csv", self.reliability)):
            write_atomically(out / name, table.to_csv(index=False).encode())
        written = [out / "calibration.csv", out / "reliability.csv"]
        return [*written, *plotting.save(self.figure(), out / "reliability")]


def calibration(
    predicted: ArrayLike,
    labels: ArrayLike,
    groups: Sequence[Hashable] | None = None,
    *,
    level: float = 0.9,
    draws: int = 1000,
    seed: int = 0,
) -> Calibration:
    """How good probabilities q are against labels p, on average over outcomes w ~ Bernoulli(p).

        accuracy   E[w = (q > 1/2)], q = 1/2 counting half
        log_loss   E[-w log q - (1 - w) log(1 - q)], q within 1e-12 of 0 or 1 taken to be 1e-12 away
        brier      E[(q - w)^2]
        ece        sum_b n_b / N |confidence_b - won_b|, ten bins of the confidence max(q, 1 - q), which errs high

    No measure depends on which response of a pair is called a. Intervals: of the four, percentiles of a bootstrap that
    draws whole groups, since comparisons on one prompt are alike (single comparisons where there is one group); of a
    bin, Wilson's, as if they were independent.

    Args:
        predicted: (N,) q in [0, 1].
        labels: (N,) p in [0, 1].
        groups: (N,) what each comparison belongs to, its prompt; by default each to itself.
        level: coverage of the intervals.
        draws: of the bootstrap.
        seed: of the draws.

    Raises ValueError if q and p are not equally many probabilities, at least one.

    >>> found = calibration([0.9, 0.8, 0.3, 0.6], [1, 1, 0, 0])
    >>> found.metrics["accuracy"].value, round(found.metrics["brier"].value, 3)
    (0.75, 0.125)

    Source: Guo et al. 2017, arXiv:1706.04599 (ECE); Wilson 1927.
    """
    q, p = np.asarray(predicted, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    for name, value in (("predicted", q), ("labels", p)):
        if value.shape != (len(p),) or not value.size or not ((value >= 0) & (value <= 1)).all():
            raise ValueError(f"{name} must be (N,) probabilities in [0, 1], as many as labels, got {value!r}")
    index: dict[Hashable, int] = {}
    group = [index.setdefault(g, len(index)) for g in (range(q.size) if groups is None else groups)]
    unit = np.array(group) if len(index) > 1 else np.arange(q.size)
    units = int(unit.max()) + 1
    sums = np.stack([np.bincount(unit, column, units) for column in _columns(q, p).T], axis=1)
    rng = np.random.default_rng(seed)
    drawn = [
        _measures(np.bincount(rng.integers(units, size=units), minlength=units).astype(float) @ sums)
        for _ in range(draws)
    ]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    total = sums.sum(axis=0)
    best = _measures(_columns(p, p).sum(axis=0))
    values = zip(_measures(total).tolist(), low.tolist(), high.tolist(), best.tolist(), strict=True)
    metrics = dict(zip(METRICS, (Estimate(*row) for row in values), strict=True))
    return Calibration(metrics, _reliability(total, level), q.size, len(index), level)


def _columns(q: Floats, p: Floats) -> Floats:
    """(N, 4 + 30): what the measures are ratios of, once it is summed over comparisons."""
    inside = np.clip(q, 1e-12, 1 - 1e-12)
    right = np.where(q > 0.5, p, np.where(q < 0.5, 1 - p, 0.5))
    log_loss = -p * np.log(inside) - (1 - p) * np.log1p(-inside)
    brier = p * (1 - q) ** 2 + (1 - p) * q**2
    confidence = np.maximum(q, 1 - q)
    in_bin = np.eye(BINS)[np.minimum((2 * BINS * (confidence - 0.5)).astype(int), BINS - 1)]
    by_bin = [in_bin, in_bin * confidence[:, None], in_bin * right[:, None]]
    return np.concatenate([np.stack([np.ones_like(q), right, log_loss, brier], axis=1), *by_bin], axis=1)


def _measures(total: Floats) -> Floats:
    """(4,) the measures of summed columns."""
    _, confidence, won = total[4:].reshape(3, BINS)
    return np.array([*total[1:4], np.abs(confidence - won).sum()]) / total[0]


def _reliability(total: Floats, level: float) -> Floats:
    """(BINS, 5), NaN in an empty bin."""
    n, confidence, won = total[4:].reshape(3, BINS)
    z: Any = scipy.special.ndtri((1 + level) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = won / n
        middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
        return np.stack([n, confidence / n, share, middle - half, middle + half], axis=1)
