"""Return distributions on a grid of atoms, perhaps signed, and as quantiles."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from nlhf.schedules import check_count
from nlhf.tabular.policy import Floats


class Categorical:
    """Laws on common, equally spaced atoms: sum_i probs_i delta(atoms_i). Mass 1; entries may be negative.

    Args:
        probs: (..., m) masses; every row sums to 1 (within 1e-9 of the sum of their sizes).
        atoms: (m,) increasing, equally spaced, m >= 2.

    Raises ValueError naming the argument and the value that is wrong.

    >>> law = Categorical([0.25, 0.5, 0.25], [0.0, 1.0, 2.0])
    >>> float(law.mean), float(law.variance), float(law.cvar(0.5))
    (1.0, 0.5, 0.5)
    """

    def __init__(self, probs: ArrayLike, atoms: ArrayLike) -> None:
        self.atoms = check_atoms(atoms)
        table = np.array(probs, dtype=np.float64)
        if table.ndim < 1 or table.shape[-1] != self.atoms.size:
            raise ValueError(f"probs must have shape (..., {self.atoms.size}), got {table.shape}")
        if not np.isfinite(table).all():
            raise ValueError("probs must be finite numbers, got NaN or inf")
        total, size = table.sum(axis=-1), np.abs(table).sum(axis=-1)
        if (np.abs(total - 1) > 1e-9 * np.maximum(size, 1.0)).any():  # large masses of both signs cancel to rounding
            raise ValueError(f"probs must sum to 1, got {float(np.ravel(total)[np.argmax(np.abs(total - 1))])}")
        table.flags.writeable = False
        self.probs: Floats = table

    @classmethod
    def from_cdf(cls, cdf: Floats, atoms: Floats) -> Categorical:
        """From the values (..., m - 1) of the CDF at all atoms but the last, where it is 1."""
        ones = np.ones((*cdf.shape[:-1], 1))
        return cls(np.diff(cdf, axis=-1, prepend=0 * ones, append=ones), atoms)

    @property
    def stride(self) -> float:
        """The distance between two atoms."""
        return float(self.atoms[1] - self.atoms[0])

    @property
    def cdf(self) -> Floats:
        """(..., m - 1) F(atoms_i) for all atoms but the last, where it is 1."""
        return np.cumsum(self.probs[..., :-1], axis=-1)

    @property
    def mean(self) -> Floats:
        """(...) sum_i probs_i atoms_i."""
        return self.probs @ self.atoms

    @property
    def variance(self) -> Floats:
        """(...) sum_i probs_i (atoms_i - mean)^2; of a signed measure it may be negative."""
        return np.sum(self.probs * (self.atoms - self.mean[..., None]) ** 2, axis=-1)

    @property
    def negative_mass(self) -> Floats:
        """(...) the sum of what is below zero, as a number >= 0."""
        return np.maximum(-self.probs, 0.0).sum(axis=-1)

    def quantile(self, level: float) -> Floats:
        """(...) the smallest atom with F >= level in (0, 1]. Raises ValueError for a signed measure."""
        self._refuse_signed("quantile")
        if not 0 < level <= 1:
            raise ValueError(f"level must be in (0, 1], got {level!r}")
        reached = np.cumsum(self.probs, axis=-1) >= level - 1e-12
        return self.atoms[np.where(reached.any(axis=-1), np.argmax(reached, axis=-1), self.atoms.size - 1)]

    def cvar(self, level: float) -> Floats:
        """(...) the mean of the worst `level` of outcomes, in (0, 1]. Raises ValueError for a signed measure."""
        self._refuse_signed("cvar")
        if not 0 < level <= 1:
            raise ValueError(f"level must be in (0, 1], got {level!r}")
        below = np.minimum(np.cumsum(self.probs, axis=-1), level)
        return np.diff(below, axis=-1, prepend=0.0) @ self.atoms / level

    def sample(self, rng: np.random.Generator, size: int) -> Floats:
        """(..., size) independent draws. Raises ValueError for a signed measure."""
        self._refuse_signed("sample")
        check_count("size", size, 1)
        u = rng.uniform(size=(*self.probs.shape[:-1], size))
        upper = np.cumsum(self.probs, axis=-1)[..., :-1]
        return self.atoms[np.sum(u[..., None, :] >= upper[..., :, None], axis=-2)]

    def to_quantiles(self, m: int) -> Quantile:
        """The W1-closest m equal atoms: the quantiles of levels (2 i - 1) / (2 m)."""
        check_count("m", m, 1)
        return Quantile(np.stack([self.quantile((2 * i + 1) / (2 * m)) for i in range(m)], axis=-1))

    def freeze(self) -> Categorical:
        """Itself: it is immutable."""
        return self

    def arrays(self) -> dict[str, Floats]:
        """The masses, for a checkpoint."""
        return {"probs": self.probs}

    def replace(self, arrays: dict[str, Floats]) -> Categorical:
        """The same atoms with these masses."""
        return Categorical(arrays["probs"], self.atoms)

    def _refuse_signed(self, what: str) -> None:
        if (self.probs < -1e-12).any():
            raise ValueError(f"{what} needs a probability law, got masses down to {self.probs.min():.3g}")

    def __repr__(self) -> str:
        return f"Categorical({self.probs.shape}, atoms={self.atoms[0]:g} ... {self.atoms[-1]:g})"


class Quantile:
    """Laws of m equally likely values.

    Args:
        values: (..., m), in any order; stored sorted.

    >>> law = Quantile([3.0, 1.0])
    >>> law.values, float(law.mean)
    (array([1., 3.]), 2.0)
    """

    def __init__(self, values: ArrayLike) -> None:
        table = np.sort(np.array(values, dtype=np.float64), axis=-1)
        if table.ndim < 1 or table.size == 0 or not np.isfinite(table).all():
            raise ValueError(f"values must be finite numbers of shape (..., m), got shape {table.shape}")
        table.flags.writeable = False
        self.values: Floats = table

    @property
    def mean(self) -> Floats:
        """(...) the average."""
        return self.values.mean(axis=-1)

    @property
    def variance(self) -> Floats:
        """(...) the average squared distance from the mean."""
        return self.values.var(axis=-1)

    def cvar(self, level: float) -> Floats:
        """(...) the mean of the worst `level` of outcomes, in (0, 1]."""
        if not 0 < level <= 1:
            raise ValueError(f"level must be in (0, 1], got {level!r}")
        below = np.minimum(np.arange(1, self.values.shape[-1] + 1) / self.values.shape[-1], level)
        return self.values @ np.diff(below, prepend=0.0) / level

    def to_categorical(self, atoms: ArrayLike) -> Categorical:
        """Its Cramér projection on the atoms: each value shared between its two neighbours."""
        grid = check_atoms(atoms)
        return Categorical(project(self.values, np.full(self.values.shape, 1 / self.values.shape[-1]), grid), grid)

    def __repr__(self) -> str:
        return f"Quantile({self.values.shape})"


def check_atoms(atoms: ArrayLike) -> Floats:
    """(m,) atoms as an array; ValueError unless they are at least two, increasing and equally spaced."""
    grid = np.array(atoms, dtype=np.float64)
    if grid.ndim != 1 or grid.size < 2 or not np.isfinite(grid).all():
        raise ValueError(f"atoms must be at least 2 finite numbers, got {atoms!r}")
    gaps = np.diff(grid)
    if not (gaps > 0).all() or np.ptp(gaps) > 1e-9 * np.abs(grid).max():
        raise ValueError(f"atoms must increase in equal steps, got steps from {gaps.min():.6g} to {gaps.max():.6g}")
    grid.flags.writeable = False
    return grid


def project(values: Floats, masses: Floats, atoms: Floats) -> Floats:
    """(..., m) the Cramér projection of sum_j masses_j delta(values_j), (..., K) each, on the atoms.

    The mass of a value goes to its two neighbours in proportion, which keeps the mean; outside of the grid to its end.
    Source: Bellemare, Dabney and Munos 2017, arXiv:1707.06887; Rowland et al. 2018, arXiv:1802.08163 (why Cramér).

    >>> project(np.array([0.25]), np.array([1.0]), np.array([0.0, 1.0]))
    array([0.75, 0.25])
    """
    m = atoms.size
    position = np.clip((values - atoms[0]) / (atoms[1] - atoms[0]), 0, m - 1)
    lower = np.minimum(position.astype(np.int64), m - 2)
    upper_share = position - lower
    rows = np.arange(int(np.prod(values.shape[:-1]))).reshape(*values.shape[:-1], 1) * m
    flat = np.zeros(rows.size * m)
    np.add.at(flat, (rows + lower).ravel(), (masses * (1 - upper_share)).ravel())
    np.add.at(flat, (rows + lower + 1).ravel(), (masses * upper_share).ravel())
    return flat.reshape(*values.shape[:-1], m)
