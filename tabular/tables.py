"""CSV files of preferences: every complaint names the file and the line."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Sequence
from os import PathLike, fspath
from typing import Any, NamedTuple

import numpy as np

from nlhf.tabular.policy import Floats

Path = str | PathLike[str]


class Comparison(NamedTuple):
    """One judged pair: `winner` is `item_a`, `item_b` or "tie"; `weight` > 0 counts it that many times."""

    item_a: str
    item_b: str
    winner: str
    weight: float = 1.0


def kind(path: Path) -> str:
    """What the file holds: "comparisons" (judged pairs), "matrix" (of win probabilities) or "scores" (on questions)."""
    (_, header), *rows = _read_csv(path)
    if {"item_a", "item_b", "winner"} <= set(header):
        return "comparisons"
    names, columns = {row[0] for _, row in rows}, set(header[1:])
    if names == columns:
        return "matrix"
    if shared := names & columns:
        raise ValueError(
            f"{path}: rows and columns share {sorted(shared)[0]!r} but not all names: "
            "a matrix of win probabilities has the same names in both, a table of scores has none in common"
        )
    return "scores"


def read_matrix(path: Path) -> tuple[list[str], Floats]:
    """Names and win probabilities (n, n): a header of names, then one row per name."""
    names, header, values = _read_table(path, probabilities=True)
    if names != header:
        raise ValueError(f"{path}: rows and columns must have the same names in the same order, "
                         f"got {len(names)} rows and {len(header)} columns, "
                         f"first difference {_first_difference(names, header)}")  # fmt: skip
    return names, values


def read_scores(path: Path) -> tuple[list[str], Floats]:
    """Names and scores (Q, n): a header of names, then one row per question, which begins with the question's name."""
    _, header, values = _read_table(path, probabilities=False)
    return header, values


def read_distribution(path: Path, names: Sequence[str] | None) -> Floats:
    """(n,) probabilities of these names, from a file with the columns item, probability."""
    (first, header), *rows = _read_csv(path)
    if header != ["item", "probability"]:
        raise ValueError(f"{path}, line {first}: expected the columns item, probability, got {header}")
    found: dict[str, float] = {}
    for line, row in rows:
        if len(row) != 2:
            raise ValueError(f"{path}, line {line}: expected 2 cells, got {len(row)}")
        if row[0] in found or row[0] not in (names or ()):
            raise ValueError(f"{path}, line {line}: expected each item of the game once, got {row[0]!r}")
        found[row[0]] = _number(row[1], path, line, probability=True)
    if missing := [name for name in names or () if name not in found]:
        raise ValueError(f"{path}: expected a probability for every item, none for {missing[0]!r}")
    if not abs(sum(found.values()) - 1) <= 1e-9:
        raise ValueError(f"{path}: probabilities must sum to 1, got {sum(found.values()):.10g}")
    return np.array([found[name] for name in names or ()])


def _read_table(path: Path, probabilities: bool) -> tuple[list[str], list[str], Floats]:
    (first, header), *rows = _read_csv(path)
    header = header[1:]
    if not header:
        raise ValueError(f"{path}, line {first}: expected names separated by commas, got one column")
    if "" in header:
        raise ValueError(f"{path}, line {first}: names must not be empty")
    if len(set(header)) != len(header):
        raise ValueError(f"{path}, line {first}: names must be distinct, got {_repeated(header)!r} twice")
    names, values = [], []
    for line, row in rows:
        if len(row) != len(header) + 1:
            raise ValueError(f"{path}, line {line}: expected a name and {len(header)} numbers, got {len(row)} cells")
        names.append(row[0])
        values.append([_number(cell, path, line, probabilities) for cell in row[1:]])
    return names, header, np.array(values)


def read_comparisons(path: Path) -> list[Comparison]:
    """The rows of a log with the columns item_a, item_b, winner[, weight]."""
    (first, header), *rows = _read_csv(path)
    needed, known = ["item_a", "item_b", "winner"], ["item_a", "item_b", "winner", "weight"]
    if not (set(needed) <= set(header) <= set(known) and len(set(header)) == len(header)):
        raise ValueError(f"{path}, line {first}: expected the columns item_a, item_b, winner[, weight], got {header}")
    judged = []
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{path}, line {line}: expected {len(header)} cells, got {len(row)}")
        cells = dict(zip(header, row, strict=True))
        judged.append(comparison([cells[name] for name in known if name in cells], f"{path}, line {line}"))
    return judged


def comparison(row: Sequence[Any], where: str) -> Comparison:
    """A checked row of a log."""
    if len(row) not in (3, 4):
        raise ValueError(f"{where}: expected item_a, item_b, winner[, weight], got {len(row)} values")
    item_a, item_b, winner = map(str, row[:3])
    if "tie" in (item_a, item_b):
        raise ValueError(f"{where}: an item must not be called 'tie', which is how a tie is written")
    if "" in (item_a, item_b):
        raise ValueError(f"{where}: names must not be empty")
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


def _read_csv(path: Path) -> list[tuple[int, list[str]]]:
    """The rows of a CSV file, perhaps compressed, with their line numbers, blank lines left out."""
    opened = gzip.open if fspath(path).endswith(".gz") else open
    try:
        with opened(path, "rt", newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: not a gzip file ({error})") from None
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    if len(rows) < 2:
        raise ValueError(f"{path}: expected a header and at least one row, got {len(rows)} lines")
    return rows


def _number(cell: str, path: Path, line: int, probability: bool) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = np.nan
    if not (0 <= value <= 1 if probability else np.isfinite(value)):
        wanted = "probability in [0, 1]" if probability else "finite number"
        raise ValueError(f"{path}, line {line}: expected a {wanted}, got {cell!r}")
    return value


def _repeated(names: Sequence[str]) -> str:
    return next(name for i, name in enumerate(names) if name in names[:i])


def _first_difference(rows: Sequence[str], columns: Sequence[str]) -> str:
    return next((f"{r!r} against {c!r}" for r, c in zip(rows, columns, strict=False) if r != c), "in length")
