"""Assertions."""

from __future__ import annotations

from typing import Any

import numpy as np


def assert_close(actual: Any, expected: Any, atol: float) -> None:
    """Every entry within atol, in absolute terms: NumPy's own check would also allow 1e-7 of the expected value."""
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=atol)
