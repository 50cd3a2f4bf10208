"""Preference games too large for a matrix: they are known by their products with a vector."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nlhf.tabular.games import MatrixGame, random_features, reference_policy
from nlhf.tabular.policy import Floats, Tabular


class OperatorGame:
    """P = 1/2 + M for a skew-symmetric operator M that multiplies vectors: one prompt, any number of responses.

    Args:
        skew: (n, n), anything with `shape` and `@`: a SciPy sparse array or `LinearOperator`. That M is skew-symmetric
            is tested on random vectors; that |M| <= 1/2 is not, for no entry may be known.
        reference: mu, a `Tabular` or probabilities (n,), full support; uniform by default.

    Raises ValueError naming the argument and the value that is wrong.

    >>> from scipy.sparse import csr_array
    >>> game = OperatorGame(csr_array([[0, 0.4], [-0.4, 0]]))
    >>> game.versus(game.reference.probs)
    array([0.7, 0.3])
    """

    def __init__(self, skew: Any, reference: Tabular | ArrayLike | None = None) -> None:
        shape = tuple(getattr(skew, "shape", ()))
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 1:
            raise ValueError(f"skew must be a square operator with `shape` and `@`, got shape {shape}")
        if np.issubdtype(getattr(skew, "dtype", np.float64), np.complexfloating):
            raise ValueError("skew must be real, got a complex operator")
        self.skew = skew
        self.n = int(shape[0])
        self.reference = reference_policy(reference, (self.n,))
        self.prompt_weights = np.ones(())
        u, v = np.random.default_rng(0).standard_normal((2, self.n)) / np.sqrt(self.n)
        one, other = float(u @ self._times(v)), float(v @ self._times(u))
        if not abs(one + other) <= 1e-9 * max(1.0, abs(one)):
            raise ValueError(f"skew must satisfy M + M^T = 0: u M v + v M u = {one + other:.3g} for some u, v")

    def _times(self, vector: Floats) -> Floats:
        return np.asarray(self.skew @ vector, dtype=np.float64)

    @property
    def prompts(self) -> NDArray[np.int64]:
        """(1,) the prompt, 0."""
        return np.arange(1)

    def versus(self, probs: Floats) -> Floats:
        """(n,) P(y > pi) for all y. One product with the operator."""
        return 0.5 * probs.sum() + self._times(probs)

    def win_prob(self, x: Any, y: Any, z: Any) -> Floats:
        """(1, m, k) P(y > z | x) of the responses y (1, m) against z (1, k), by one product for each z."""
        columns = np.arange(self.n) if z is ... else np.asarray(z)[0]
        rows = slice(None) if y is ... else np.asarray(y)[0]
        unit = np.zeros(self.n)
        table = []
        for column in columns:
            unit[column] = 1.0
            table.append(0.5 + self._times(unit)[rows])
            unit[column] = 0.0
        return np.stack(table, axis=-1)[None]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n={self.n})"


class LowRankGame:
    """P = 1/2 + U V^T - V U^T: n responses with k features of attack and k of defence, up to millions of them.

    Args:
        left: (n, k) U.
        right: (n, k) V.
        reference: mu, a `Tabular` or probabilities (n,), full support; uniform by default.

    Raises ValueError naming the argument and the value that is wrong, such as a pair of responses whose win probability
    is not in [0, 1]. Only pairs of rows whose norms allow that are looked at.

    >>> game = LowRankGame([[0.0], [0.4]], [[0.5], [0.0]])
    >>> game.versus(game.reference.probs)
    array([0.4, 0.6])
    """

    def __init__(self, left: ArrayLike, right: ArrayLike, reference: Tabular | ArrayLike | None = None) -> None:
        u, v = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
        if u.ndim != 2 or u.shape != v.shape or u.size == 0:
            raise ValueError(f"left and right must have one shape (n, k), got {u.shape} and {v.shape}")
        self.features: Floats = np.concatenate([u, v], axis=1)
        if not np.isfinite(self.features).all():
            raise ValueError("left and right must hold finite numbers, got NaN or inf")
        self.features.flags.writeable = False
        self.n, self.rank = int(u.shape[0]), 2 * int(u.shape[1])
        half = np.eye(u.shape[1])
        self.symplectic: Floats = np.block([[0 * half, half], [-half, 0 * half]])
        self._check_range()
        self.reference = reference_policy(reference, (self.n,))
        self.prompt_weights = np.ones(())

    @classmethod
    def random(cls, n: int, rank: int, seed: int | np.random.Generator, **kwargs: Any) -> LowRankGame:
        """Features on the unit sphere, scaled so that every win probability is in [0, 1]; `rank` is even."""
        features = np.sqrt(0.5) * random_features(n, rank, seed)
        return cls(features[:, ::2], features[:, 1::2], **kwargs)

    @property
    def prompts(self) -> NDArray[np.int64]:
        """(1,) the prompt, 0."""
        return np.arange(1)

    def versus(self, probs: Floats) -> Floats:
        """(n,) P(y > pi) for all y. Two passes over the features."""
        return 0.5 * probs.sum() + self.features @ (self.symplectic @ (probs @ self.features))

    def win_prob(self, x: Any, y: Any, z: Any) -> Floats:
        """(1, m, k) P(y > z | x) of the responses y (1, m) against z (1, k); `...` is all of them."""
        rows, columns = (self.features if a is ... else self.features[np.asarray(a)[0]] for a in (y, z))
        return (0.5 + rows @ self.symplectic @ columns.T)[None]

    def _check_range(self) -> None:
        """|M[y, z]| <= |w_y| |w_z|, so only long rows can break the bound of 1/2; of those, all pairs are tried."""
        length = np.sqrt(np.einsum("ij,ij->i", self.features, self.features))
        long = np.flatnonzero(length * length.max() > 0.5 + 1e-9)
        turned = self.features[long] @ self.symplectic
        for at in range(0, long.size, 1024):
            block = np.abs(turned[at : at + 1024] @ self.features[long].T)
            if block.max() > 0.5 + 1e-9:
                y, z = (int(long[i]) for i in np.unravel_index(block.argmax(), block.shape) + np.array([at, 0]))
                p = float(self.win_prob(0, [[y]], [[z]])[0, 0, 0])
                raise ValueError(f"left and right must give win probabilities in [0, 1], got P[{y}, {z}] = {p:.6g}")

    def __repr__(self) -> str:
        return f"LowRankGame(n={self.n}, rank={self.rank})"


TabularGame: TypeAlias = MatrixGame | OperatorGame | LowRankGame
"""What has `versus`, `win_prob`, `reference` and `prompt_weights` as arrays."""
