"""Preference games as matrices of win probabilities."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from nlhf.schedules import check_count
from nlhf.tabular.policy import Floats, Tabular

Path = str | PathLike[str]


class Comparison(NamedTuple):
    """One judged pair: `winner` is `item_a`, `item_b` or "tie"; `weight` > 0 counts it that many times."""

    item_a: str
    item_b: str
    winner: str
    weight: float = 1.0


class MatrixGame:
    """A preference game on n responses, for one prompt or for each of X prompts.

    Args:
        win_prob: (n, n) or (X, n, n), P[y, z] = P(y > z) in [0, 1] with P + P^T = 1 (within 1e-9).
        reference: mu, a `Tabular` or probabilities (n,) or (X, n), full support; uniform by default.
        prompt_weights: (X,) probabilities of the prompts; uniform by default.
        labels: names of the n responses.

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
    ) -> None:
        try:
            matrix = np.array(win_prob, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"win_prob must be an array of numbers: {error}") from None
        _check_matrix(matrix)
        matrix.flags.writeable = False
        self.matrix: Floats = matrix
        self.reference = _reference(reference, matrix.shape[:-1])
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
        return np.matvec(self.matrix, probs)

    def win_prob(self, x: Any, y: Any, z: Any) -> Floats:
        """(B, n, m) P(y > z | x): x (B,) prompts, y (B, n) and z (B, m) responses; `...` is all of them."""
        table = (self.matrix if self.matrix.ndim == 3 else self.matrix[None])[x]
        if y is not ...:
            table = np.take_along_axis(table, np.asarray(y)[..., None], axis=-2)
        if z is not ...:
            table = np.take_along_axis(table, np.asarray(z)[..., None, :], axis=-1)
        return table

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
        check_count("n", n, 1)
        if rank < 2 or rank % 2:
            raise ValueError(f"rank must be even and at least 2, got {rank}")
        features = np.random.default_rng(seed).standard_normal((n, rank))
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        left, right = features[:, ::2], features[:, 1::2]
        skew = left @ right.T
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
        """`from_comparisons` if the file has the columns item_a, item_b and winner, else `from_csv`."""
        log = {"item_a", "item_b", "winner"} <= set(_read_csv(path)[0][1])
        return (cls.from_comparisons if log else cls.from_csv)(path, **kwargs)

    @classmethod
    def from_csv(cls, path: Path, **kwargs: Any) -> MatrixGame:
        """A square table of win probabilities: a header of names, then one row per name, P(row > column).

        Raises FileNotFoundError, or ValueError with the file and line that is wrong.
        """
        rows = _read_csv(path)
        first, header = rows[0][0], rows[0][1][1:]
        if len(set(header)) != len(header):
            raise ValueError(f"{path}, line {first}: names must be distinct, got {_repeated(header)!r} twice")
        names, values = [], []
        for line, row in rows[1:]:
            if len(row) != len(header) + 1:
                raise ValueError(
                    f"{path}, line {line}: expected a name and {len(header)} numbers, got {len(row)} cells"
                )
            names.append(row[0])
            values.append([_probability(cell, path, line) for cell in row[1:]])
        if names != header:
            raise ValueError(f"{path}: rows and columns must have the same names in the same order, "
                             f"got {len(names)} rows and {len(header)} columns, "
                             f"first difference {_first_difference(names, header)}")  # fmt: skip
        try:
            return cls(values, labels=names, **kwargs)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

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
        if not (np.isfinite(prior) and prior >= 0):
            raise ValueError(f"prior must be a finite number >= 0, got {prior!r}")
        if isinstance(comparisons, (str, PathLike)):
            judged = _read_comparisons(comparisons)
        else:
            judged = [_comparison(row, f"comparisons, row {i}") for i, row in enumerate(comparisons)]
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
        total = wins + wins.T
        np.fill_diagonal(total, 1.0)  # nobody is compared with itself
        np.fill_diagonal(wins, 0.5)
        if prior == 0 and (total == 0).any():
            a, b = np.argwhere(total == 0)[0]
            raise ValueError(f"comparisons never pair {labels[a]!r} with {labels[b]!r}: give a prior > 0")
        return cls((wins + prior) / (total + 2 * prior), labels=labels, **kwargs)


def _check_matrix(matrix: Floats) -> None:
    if matrix.ndim not in (2, 3) or matrix.shape[-1] != matrix.shape[-2] or matrix.size == 0:
        raise ValueError(f"win_prob must have shape (n, n) or (X, n, n), got {matrix.shape}")
    # Written so that NaN is found wrong: every comparison with it is false.
    if not (bad := (matrix >= 0) & (matrix <= 1)).all():
        at = tuple(int(i) for i in np.argwhere(~bad)[0])
        raise ValueError(f"win_prob must hold probabilities in [0, 1], got P{list(at)} = {float(matrix[at])}")
    total = matrix + np.swapaxes(matrix, -1, -2)
    if (wrong := np.abs(total - 1) > 1e-9).any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        swap = (*at[:-2], at[-1], at[-2])
        raise ValueError(f"win_prob must satisfy P + P^T = 1: P{list(at)} + P{list(swap)} = {total[at]:.10g}")


def _reference(reference: Tabular | ArrayLike | None, shape: tuple[int, ...]) -> Tabular:
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


def _read_csv(path: Path) -> list[tuple[int, list[str]]]:
    """The rows of a CSV file with their line numbers, blank lines left out."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    if len(rows) < 2:
        raise ValueError(f"{path}: expected a header and at least one row, got {len(rows)} lines")
    return rows


def _probability(cell: str, path: Path, line: int) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = np.nan
    if not 0 <= value <= 1:
        raise ValueError(f"{path}, line {line}: expected a probability in [0, 1], got {cell!r}")
    return value


def _read_comparisons(path: Path) -> list[Comparison]:
    (first, header), *rows = _read_csv(path)
    needed, known = ["item_a", "item_b", "winner"], ["item_a", "item_b", "winner", "weight"]
    if not (set(needed) <= set(header) <= set(known) and len(set(header)) == len(header)):
        raise ValueError(f"{path}, line {first}: expected the columns item_a, item_b, winner[, weight], got {header}")
    judged = []
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{path}, line {line}: expected {len(header)} cells, got {len(row)}")
        cells = dict(zip(header, row, strict=True))
        judged.append(_comparison([cells[name] for name in known if name in cells], f"{path}, line {line}"))
    return judged


def _comparison(row: Sequence[Any], where: str) -> Comparison:
    if len(row) not in (3, 4):
        raise ValueError(f"{where}: expected item_a, item_b, winner[, weight], got {len(row)} values")
    item_a, item_b, winner = map(str, row[:3])
    if "tie" in (item_a, item_b):
        raise ValueError(f"{where}: an item must not be called 'tie', which is how a tie is written")
    if item_a == item_b:
        raise ValueError(f"{where}: item_a and item_b must differ, got {item_a!r} twice")
    if winner not in (item_a, item_b, "tie"):
        raise ValueError(f"{where}: winner must be {item_a!r}, {item_b!r} or 'tie', got {winner!r}")
    try:
        weight = float(row[3]) if len(row) == 4 else 1.0
    except ValueError:
        weight = np.nan
    if not (np.isfinite(weight) and weight > 0):
        raise ValueError(f"{where}: weight must be a finite number > 0, got {row[3]!r}")
    return Comparison(item_a, item_b, winner, weight)


def _repeated(names: Sequence[str]) -> str:
    return next(name for i, name in enumerate(names) if name in names[:i])


def _first_difference(rows: Sequence[str], columns: Sequence[str]) -> str:
    return next((f"{r!r} against {c!r}" for r, c in zip(rows, columns, strict=False) if r != c), "in length")
