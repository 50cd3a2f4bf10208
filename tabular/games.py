"""Preference games as matrices of win probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray
from scipy.special import expit

from nlhf.schedules import check_count, is_number
from nlhf.tabular import tables
from nlhf.tabular.evidence import Counts, Evidence, Outcomes
from nlhf.tabular.policy import Floats, Tabular
from nlhf.tabular.tables import Path


class MatrixGame:
    """A preference game on n responses, for one prompt or for each of X prompts.

    Args:
        win_prob: (n, n) or (X, n, n), P[y, z] = P(y > z) in [0, 1] with P + P^T = 1 (within 1e-9).
        reference: mu, a `Tabular` or probabilities (n,) or (X, n), full support; uniform by default.
        prompt_weights: (X,) probabilities of the prompts; uniform by default.
        labels: names of the n responses.
        dtype: how the matrix is stored. float32 halves its memory: then P + P^T = 1 must hold within 1e-6, entries
            are rounded so that it holds exactly, and products with it are still summed in float64.

    `evidence` is what the win probabilities were estimated from, where a constructor did that, else None.

    Raises ValueError naming the argument and the value that is wrong.

    >>> game = MatrixGame([[0.5, 0.9], [0.1, 0.5]])
    >>> game.versus(game.reference.probs)
    array([0.7, 0.3])
    >>> MatrixGame([[0.5, 0.9], [0.2, 0.5]])
    Traceback (most recent call last):
    ValueError: win_prob must satisfy P + P^T = 1: P[0, 1] + P[1, 0] = 1.1
    """

    def __init__(
        self,
        win_prob: ArrayLike,
        reference: Tabular | ArrayLike | None = None,
        prompt_weights: ArrayLike | None = None,
        labels: Sequence[str] | None = None,
        dtype: DTypeLike = np.float64,
    ) -> None:
        if np.dtype(dtype) not in (np.float64, np.float32):
            raise ValueError(f"dtype must be float64 or float32, got {dtype!r}")
        if np.iscomplexobj(win_prob):
            raise ValueError("win_prob must hold real numbers, got complex ones")
        try:
            matrix = np.array(win_prob, dtype=dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(f"win_prob must be an array of numbers: {error}") from None
        _check_matrix(matrix)
        if matrix.dtype == np.float32:  # 1 - p is exact in float32 for p >= 1/2
            swapped = np.swapaxes(matrix, -1, -2)
            matrix = np.where(matrix < swapped, 1 - swapped, np.where(matrix == swapped, np.float32(0.5), matrix))
        matrix.flags.writeable = False
        self.matrix: Floats = matrix
        self.evidence: Evidence | None = None
        self.reference = reference_policy(reference, matrix.shape[:-1])
        self.prompt_weights = _weights(prompt_weights, matrix.shape[:-2])
        self.labels = None if labels is None else tuple(labels)
        if self.labels is not None and (len(self.labels) != self.n or len(set(self.labels)) != self.n):
            raise ValueError(
                f"labels must be {self.n} distinct names, got {len(set(self.labels))} of {len(self.labels)}"
            )

    @property
    def n(self) -> int:
        """Number of responses."""
        return int(self.matrix.shape[-1])

    @property
    def prompts(self) -> NDArray[np.int64]:
        """(X,) the prompts, 0 ... X - 1."""
        return np.arange(self.prompt_weights.size)

    def versus(self, probs: Floats) -> Floats:
        """(n,) or (X, n): P(y > pi | x) for all y, given pi(z | x) of the same shape. One product with the matrix."""
        return times(self.matrix, probs)

    def win_prob(self, x: Any, y: Any, z: Any) -> Floats:
        """(B, n, m) P(y > z | x): x (B,) prompts, y (B, n) and z (B, m) responses; `...` is all of them."""
        table = (self.matrix if self.matrix.ndim == 3 else self.matrix[None])[x]
        if y is not ...:
            table = np.take_along_axis(table, np.asarray(y)[..., None], axis=-2)
        if z is not ...:
            table = np.take_along_axis(table, np.asarray(z)[..., None, :], axis=-1)
        return table

    def with_reference(self, reference: Tabular | ArrayLike) -> MatrixGame:
        """The same game, and evidence, with another reference."""
        game = MatrixGame(self.matrix, reference, self.prompt_weights, self.labels, self.matrix.dtype)
        game.evidence = self.evidence
        return game

    def __repr__(self) -> str:
        return f"MatrixGame(n={self.n}, prompts={len(self.prompts)})"

    @classmethod
    def rock_paper_scissors(cls, win: float = 1.0, **kwargs: Any) -> MatrixGame:
        """Three responses, 0 beats 1 beats 2 beats 0, each with probability `win`."""
        return cls.cyclic(3, win, **kwargs)

    @classmethod
    def cyclic(cls, n: int, win: float = 1.0, **kwargs: Any) -> MatrixGame:
        """Circular tournament: y beats the next (n - 1) // 2 responses with probability `win`; opposite ones tie.

        >>> MatrixGame.cyclic(4, 0.9).matrix[0]
        array([0.5, 0.9, 0.5, 0.1])
        """
        check_count("n", n, 1)
        if not 0 <= win <= 1:
            raise ValueError(f"win must be a probability, got {win!r}")
        ahead = (np.arange(n) - np.arange(n)[:, None]) % n
        half = (n - 1) // 2
        sign = np.where((ahead >= 1) & (ahead <= half), 1.0, 0.0) - np.where(ahead >= n - half, 1.0, 0.0)
        return cls(0.5 + (win - 0.5) * sign, **kwargs)

    @classmethod
    def bradley_terry(cls, scores: ArrayLike, **kwargs: Any) -> MatrixGame:
        """P[y, z] = sigmoid(r(y) - r(z)) for scores r (n,) or (X, n): the transitive games that a reward can express.

        >>> MatrixGame.bradley_terry([0.0, np.log(9)]).matrix[1].round(12)
        array([0.9, 0.5])
        """
        r = np.asarray(scores, dtype=np.float64)
        if r.ndim not in (1, 2) or not np.isfinite(r).all():
            raise ValueError(f"scores must be finite numbers of shape (n,) or (X, n), got {scores!r}")
        return cls(expit(r[..., :, None] - r[..., None, :]), **kwargs)

    @classmethod
    def random(cls, n: int, seed: int | np.random.Generator, prompts: int | None = None, **kwargs: Any) -> MatrixGame:
        """Independent uniform win probabilities, intransitive as soon as n > 2; (prompts, n, n) if prompts is given."""
        check_count("n", n, 1)
        rng = np.random.default_rng(seed)
        upper = np.triu(rng.uniform(-0.5, 0.5, size=(n, n) if prompts is None else (prompts, n, n)), 1)
        return cls(0.5 + upper - np.swapaxes(upper, -1, -2), **kwargs)

    @classmethod
    def low_rank(cls, n: int, rank: int, seed: int | np.random.Generator, **kwargs: Any) -> MatrixGame:
        """P = 1/2 + F S F^T with features F (n, rank) random on the unit sphere and 2 S a rotation by 90 degrees.

        `rank` must be even: a skew-symmetric matrix has even rank.
        """
        features = random_features(n, rank, seed)
        skew = features[:, ::2] @ features[:, 1::2].T
        return cls(0.5 + 0.5 * (skew - skew.T), **kwargs)

    @classmethod
    def annotators(cls, games: Sequence[MatrixGame], weights: ArrayLike | None = None, **kwargs: Any) -> MatrixGame:
        """The population of annotators: sum_i weights_i P_i. Each may be transitive while the population is not.

        >>> voters = [MatrixGame.bradley_terry(30 * np.roll([2.0, 1, 0], k)) for k in range(3)]
        >>> MatrixGame.annotators(voters).matrix[0].round(6)
        array([0.5     , 0.666667, 0.333333])
        """
        if not games:
            raise ValueError("games must hold at least one annotator, got none")
        if len({game.matrix.shape for game in games}) > 1:
            raise ValueError(f"games must have one shape, got {[game.matrix.shape for game in games]}")
        share = _weights(weights, (len(games),), name="weights")
        return cls(np.tensordot(share, np.stack([game.matrix for game in games]), axes=1), **kwargs)

    @classmethod
    def from_file(cls, path: Path, **kwargs: Any) -> MatrixGame:
        """`from_comparisons`, `from_csv` or `from_scores`, by what the file holds.

        A log has the columns item_a, item_b and winner; the rows of a matrix are named as its columns are.
        """
        match tables.kind(path):
            case "comparisons":
                return cls.from_comparisons(path, **kwargs)
            case "matrix":
                return cls.from_csv(path, **kwargs)
            case _:
                return cls.from_scores(path, **kwargs)

    @classmethod
    def from_csv(cls, path: Path, **kwargs: Any) -> MatrixGame:
        """A square table of win probabilities: a header of names, then one row per name, P(row > column).

        Raises FileNotFoundError, or ValueError with the file and line that is wrong.
        """
        names, values = tables.read_matrix(path)
        try:
            return cls(values, labels=names, **kwargs)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_scores(cls, scores: Path | ArrayLike, groups: ArrayLike | None = None, **kwargs: Any) -> MatrixGame:
        """Win probabilities of items that were scored on the same questions.

            P[y, z] = share of questions on which y scores higher than z, a tie counting half

        Only the order of scores matters, question by question: no scale is assumed.

        Args:
            scores: (Q, n), or a CSV file: a header of names, then one row per question, which begins with its name.
            groups: (Q,) the prompt 0 ... X - 1 that each question belongs to: one game per prompt, weighed by its share
                of the questions. None for one game.

        Raises FileNotFoundError, or ValueError with the argument, or the file and line, that is wrong.

        >>> MatrixGame.from_scores([[3, 1], [2, 2], [0, 9], [7, 5]]).matrix[0]
        array([0.5  , 0.625])
        """
        if groups is not None and "prompt_weights" in kwargs:
            raise ValueError("prompt_weights must be left out where groups are given: they are the groups' shares")
        if isinstance(scores, (str, PathLike)):
            kwargs["labels"], values = tables.read_scores(scores)
        else:
            values = np.asarray(scores, dtype=np.float64)
        if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
            raise ValueError(f"scores must be finite numbers of shape (Q, n), got shape {values.shape}")
        if groups is None:
            evidence = Outcomes(values)
        else:
            member = np.asarray(groups)
            if member.shape != values.shape[:1] or not np.issubdtype(member.dtype, np.integer):
                raise ValueError(f"groups must be {len(values)} integers, got {member.dtype} of shape {member.shape}")
            share = np.bincount(member) / len(values) if member.min() >= 0 else np.zeros(1)
            if not (share > 0).all():
                raise ValueError(f"groups must be 0 ... X - 1, each at least once, got {np.unique(member).tolist()}")
            kwargs["prompt_weights"], evidence = share, Outcomes(values, member)
        game = cls(evidence.mean, **kwargs)
        game.evidence = evidence
        return game

    @classmethod
    def from_comparisons(
        cls, comparisons: Path | Iterable[Sequence[Any]], prior: float = 1.0, **kwargs: Any
    ) -> MatrixGame:
        """Win probabilities estimated from judged pairs.

            P[y, z] = (wins of y over z + prior) / (comparisons of y and z + 2 prior)

        a tie being half a win for both. The responses are numbered in the order of their names.

        Args:
            comparisons: a CSV file with the columns item_a, item_b, winner[, weight], or rows of these. The winner
                is the name of the item, or "tie".
            prior: pseudo-wins for either side; with 0, every pair must have been compared.

        Raises FileNotFoundError, or ValueError with the file and line (the row) that is wrong.

        >>> game = MatrixGame.from_comparisons([("a", "b", "a"), ("a", "b", "tie")], prior=0)
        >>> game.labels, game.matrix[0]
        (('a', 'b'), array([0.5 , 0.75]))
        """
        if not is_number(prior) or prior < 0:
            raise ValueError(f"prior must be a finite number >= 0, got {prior!r}")
        if isinstance(comparisons, (str, PathLike)):
            judged = tables.read_comparisons(comparisons)
        else:
            judged = [tables.comparison(row, f"comparisons, row {i}") for i, row in enumerate(comparisons)]
        if not judged:
            raise ValueError("comparisons must hold at least one judged pair, got none")
        labels = sorted({c.item_a for c in judged} | {c.item_b for c in judged})
        index = {label: i for i, label in enumerate(labels)}
        wins = np.zeros((len(labels), len(labels)))
        for item_a, item_b, winner, weight in judged:
            a, b = index[item_a], index[item_b]
            share = 0.5 if winner == "tie" else float(winner == item_a)
            wins[a, b] += share * weight
            wins[b, a] += (1 - share) * weight
        unjudged = (wins + wins.T == 0) & ~np.eye(len(labels), dtype=bool)  # nobody is compared with itself
        if prior == 0 and unjudged.any():
            a, b = np.argwhere(unjudged)[0]
            raise ValueError(f"comparisons never pair {labels[a]!r} with {labels[b]!r}: give a prior > 0")
        evidence = Counts(wins, prior)
        game = cls(evidence.mean, labels=labels, **kwargs)
        game.evidence = evidence
        return game


def times(matrix: Floats, probs: Floats) -> Floats:
    """matrix @ probs over the last axes, summed in float64 whatever the matrix is stored in."""
    if matrix.dtype == np.float64:
        return np.matvec(matrix, probs)
    n = matrix.shape[-1]
    rows = max(1, 262_144 // n)  # a block of the matrix in float64 stays in the cache
    blocks = (matrix[..., at : at + rows, :].astype(np.float64) for at in range(0, n, rows))
    return np.concatenate([np.matvec(block, probs) for block in blocks], axis=-1)


def _check_matrix(matrix: Floats) -> None:
    if matrix.ndim not in (2, 3) or matrix.shape[-1] != matrix.shape[-2] or matrix.size == 0:
        raise ValueError(f"win_prob must have shape (n, n) or (X, n, n), got {matrix.shape}")
    # Written so that NaN is found wrong: every comparison with it is false.
    if not (bad := (matrix >= 0) & (matrix <= 1)).all():
        at = tuple(int(i) for i in np.argwhere(~bad)[0])
        raise ValueError(f"win_prob must hold probabilities in [0, 1], got P{list(at)} = {float(matrix[at])}")
    total = matrix + np.swapaxes(matrix, -1, -2)
    if (wrong := np.abs(total - 1) > (1e-9 if matrix.dtype == np.float64 else 1e-6)).any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        swap = (*at[:-2], at[-1], at[-2])
        raise ValueError(f"win_prob must satisfy P + P^T = 1: P{list(at)} + P{list(swap)} = {total[at]:.10g}")


def random_features(n: int, rank: int, seed: int | np.random.Generator) -> Floats:
    """(n, rank) rows on the unit sphere."""
    check_count("n", n, 1)
    if rank < 2 or rank % 2:
        raise ValueError(f"rank must be even and at least 2, got {rank}")
    features = np.random.default_rng(seed).standard_normal((n, rank))
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def reference_policy(reference: Tabular | ArrayLike | None, shape: tuple[int, ...]) -> Tabular:
    """The reference as a `Tabular` of that shape: uniform if None; ValueError unless it has full support."""
    if reference is None:
        return Tabular.from_logits(np.zeros(shape))
    if isinstance(reference, Tabular):
        log_probs: Floats = reference.log_probs
    else:
        probs = np.asarray(reference, dtype=np.float64)
        if not (good := probs > 0).all():
            raise ValueError(f"reference must give every response a probability > 0, got {float(probs[~good][0])}")
        total = probs.sum(axis=-1)
        if not (good := np.abs(total - 1) <= 1e-9).all():
            raise ValueError(f"reference must sum to 1, got {float(np.ravel(total)[~np.ravel(good)][0])}")
        log_probs = np.log(probs)
    if log_probs.shape not in (shape, shape[-1:]):
        raise ValueError(f"reference must have shape {shape[-1:]} or {shape}, got {log_probs.shape}")
    if np.isneginf(log_probs).any():
        raise ValueError("reference must give every response a probability > 0, got 0.0")
    return Tabular(np.broadcast_to(log_probs, shape))


def _weights(weights: ArrayLike | None, shape: tuple[int, ...], name: str = "prompt_weights") -> Floats:
    if weights is None:
        return np.full(shape, 1 / max(1, int(np.prod(shape))))
    share = np.array(weights, dtype=np.float64)
    if share.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {share.shape}")
    if not ((share >= 0).all() and abs(share.sum() - 1) <= 1e-9):
        raise ValueError(f"{name} must be probabilities that sum to 1, got {share.tolist()}")
    return share
