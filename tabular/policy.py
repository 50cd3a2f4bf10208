"""Policies as tables of log-probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax, logsumexp

Floats = NDArray[np.float64]


class Tabular:
    """A policy over n listed responses, for one prompt or for each of X prompts.

    Args:
        log_probs: (n,) or (X, n) log pi(y | x) in nats; every row sums to one in probability (within 1e-9).

    Raises ValueError for NaN, a wrong shape or an unnormalised row.

    >>> Tabular(np.log([0.2, 0.8])).probs
    array([0.2, 0.8])
    >>> Tabular([0.0, 0.0])
    Traceback (most recent call last):
    ValueError: log_probs must be normalised: sum of exp(log_probs) is 2.0, not 1
    """

    def __init__(self, log_probs: ArrayLike) -> None:
        table = np.array(log_probs, dtype=np.float64)
        if table.ndim not in (1, 2) or table.size == 0:
            raise ValueError(f"log_probs must have shape (n,) or (X, n), got {table.shape}")
        if np.isnan(table).any() or (table == np.inf).any():
            raise ValueError("log_probs must be numbers < inf, got NaN or inf")
        total = logsumexp(table, axis=-1)
        worst = np.ravel(total)[np.argmax(np.abs(total))]
        if not abs(worst) <= 1e-9:
            raise ValueError(f"log_probs must be normalised: sum of exp(log_probs) is {np.exp(worst)}, not 1")
        self._set(table)

    @classmethod
    def from_logits(cls, logits: Floats) -> Tabular:
        """pi ∝ exp(logits), normalised over the last axis.

        >>> Tabular.from_logits(np.zeros(2)).probs
        array([0.5, 0.5])
        """
        log_probs = log_softmax(logits, axis=-1)
        if np.isnan(log_probs).any():
            raise ValueError("logits must be numbers < inf, one of each row > -inf, got NaN, inf or a row of -inf")
        policy = cls.__new__(cls)
        policy._set(log_probs)
        return policy

    def _set(self, table: Floats) -> None:
        table.flags.writeable = False
        self.log_probs: Floats = table

    @property
    def probs(self) -> Floats:
        """pi(y | x), the shape of log_probs."""
        return np.exp(self.log_probs)

    def log_prob(self, x: Any = ..., y: Any = ...) -> Floats:
        """(B, n) log pi(y | x): x (B,) prompts, y (B, n) responses; `...` is all of them, as they are stored."""
        if x is ... and y is ...:
            return self.log_probs
        table = np.atleast_2d(self.log_probs)[x]
        return table if y is ... else np.take_along_axis(table, y, axis=-1)

    def freeze(self) -> Tabular:
        """Itself: a table is immutable."""
        return self

    def lerp(self, other: Tabular, weight: float) -> Tabular:
        """pi ∝ self^(1 - weight) other^weight: the parameters of a table are its log-probabilities."""
        return Tabular.from_logits((1 - weight) * self.log_probs + weight * other.log_probs)

    def arrays(self) -> dict[str, Floats]:
        """The log-probabilities, for a checkpoint."""
        return {"log_probs": self.log_probs}

    def replace(self, arrays: dict[str, Floats]) -> Tabular:
        """The table with these log-probabilities, to the last bit."""
        return Tabular(arrays["log_probs"])

    def __repr__(self) -> str:
        return f"Tabular({np.array2string(self.log_probs, threshold=8, precision=4)})"
