"""Judges made of judges: a mixture of annotators, and one that remembers what it was asked."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from nlhf.llm.data import Message, Prompt
from nlhf.llm.preference import Judge, ask
from nlhf.metrics import Floats
from nlhf.schedules import is_number


class Annotators:
    """A mixture of judges: whoever compares two responses is drawn anew for every question.

        P(a > b | x) = sum_k w_k P_k(a > b | x)

    A mixture of Bradley-Terry judges is in general no Bradley-Terry judge, and may be intransitive (Condorcet 1785).

    Args:
        judges: at least one.
        weights: w, numbers >= 0 that sum to 1; all equal by default.

    Raises ValueError if the weights are none, or a judge returns anything but probabilities.

    >>> from nlhf.llm.preference import cycle_judge
    >>> longer = lambda prompts, a, b: [float(len(s) > len(t)) for s, t in zip(a, b)]
    >>> Annotators([cycle_judge, longer], [0.75, 0.25])(["Say hello."], ["hello"], ["hello"])
    array([0.375])
    """

    def __init__(self, judges: Sequence[Judge], weights: Sequence[float] | None = None) -> None:
        if not judges:
            raise ValueError("judges must be at least one, got none")
        shares = [1 / len(judges)] * len(judges) if weights is None else list(weights)
        if len(shares) != len(judges) or not all(is_number(w) and w >= 0 for w in shares):
            raise ValueError(f"weights must be {len(judges)} numbers >= 0, one for each judge, got {weights!r}")
        if not math.isclose(math.fsum(shares), 1, rel_tol=0, abs_tol=1e-9):
            raise ValueError(f"weights must sum to 1, got {weights!r}, whose sum is {math.fsum(shares):.10g}")
        self.judges, self.weights = tuple(judges), tuple(w / math.fsum(shares) for w in shares)
        self.antisymmetric = all(getattr(judge, "antisymmetric", False) for judge in judges)

    def __call__(self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]) -> Floats:
        """(N,) P(a > b | x)."""
        answers = [ask(judge, prompts, a, b) for judge in self.judges]
        return np.clip(np.average(answers, axis=0, weights=self.weights), 0, 1)

    def __repr__(self) -> str:
        return f"Annotators({len(self.judges)} judges, weights={self.weights})"


class Cached:
    """A judge that is asked every question once. A question is the exact strings (prompt, a, b), in this order.

    With a file, answers outlive the process: each is appended as a line of JSON before it is returned. What a kill or a
    full disk leaves of a last line is cut off.

    Args:
        judge: whom to ask.
        path: a .jsonl file, made if it is not there. One file belongs to one judge, and to one process at a time.

    Raises ValueError if a whole line of the file is no answer, OSError if the file cannot be written.

    >>> from nlhf.llm.preference import cycle_judge
    >>> judge = Cached(cycle_judge)
    >>> p = judge(["Hi!"] * 3, ["hello", "hello", "good"], ["good", "good", "hello"])
    >>> judge.calls, judge.hits
    (2, 1)
    """

    def __init__(self, judge: Judge, path: str | PathLike[str] | None = None) -> None:
        self.judge, self.path = judge, None if path is None else Path(path)
        self.antisymmetric = bool(getattr(judge, "antisymmetric", False))
        self.calls = 0
        """Questions that the judge was asked."""
        self.hits = 0
        """Questions that were answered from memory."""
        self._known: dict[tuple[Prompt, str, str], float] = {}
        if self.path is not None:
            self._append([])  # complain now, not after an expensive judge has answered
            for line, text in enumerate(self.path.read_bytes().splitlines(), 1):
                self._remember(text, f"{self.path}, line {line}")

    def __call__(self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]) -> Floats:
        """(N,) P(a > b | x)."""
        asked = list(zip(prompts, a, b, strict=True))
        new = list(dict.fromkeys(question for question in asked if question not in self._known))
        if new:
            answers = ask(self.judge, *zip(*new, strict=True)).tolist()
            self._append([(*question, p) for question, p in zip(new, answers, strict=True)])
            self._known.update(zip(new, answers, strict=True))
        self.calls += len(new)
        self.hits += len(asked) - len(new)
        return np.array([self._known[question] for question in asked])

    def _remember(self, text: bytes, where: str) -> None:
        try:
            row = json.loads(text)
            prompt, a, b, p = (row[name] for name in ("prompt", "a", "b", "p"))
            known = prompt if isinstance(prompt, str) else tuple(Message(*message) for message in prompt)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: expected an object with prompt, a, b, p, got {error!r}") from None
        if not is_number(p) or not 0 <= p <= 1:
            raise ValueError(f"{where}: p must be a probability in [0, 1], got {p!r}")
        self._known[known, a, b] = p

    def _append(self, answers: Sequence[tuple[Any, ...]]) -> None:
        if self.path is None:
            return
        lines = [json.dumps(dict(zip(("prompt", "a", "b", "p"), answer, strict=True))) + "\n" for answer in answers]
        with open(self.path, "a+b") as file:
            _cut_torn_line(file)
            file.write("".join(lines).encode())

    def __repr__(self) -> str:
        return f"Cached({self.judge!r})"  # not how much it knows: a run that resumes is the same run


def _cut_torn_line(file: Any) -> None:
    """Truncate a file, open to append and read, after its last whole line."""
    end = position = file.seek(0, 2)
    while position:
        position = max(0, end - 65536)
        file.seek(position)
        if (newline := file.read(end - position).rfind(b"\n")) >= 0:
            end = position + newline + 1
            break
        end = position
    file.truncate(end)
