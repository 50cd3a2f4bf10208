"""What win probabilities were estimated from, and games that would have fitted it as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nlhf.tabular.policy import Floats


class Evidence(Protocol):
    """Data behind a game."""

    def draw(self, rng: np.random.Generator, size: int) -> Floats:
        """(size, n, n), or (size, X, n, n) for X prompts: win probabilities as uncertain as the data leave them."""
        ...


@dataclass(frozen=True)
class Counts:
    """Judged pairs: P[y, z] ~ Beta(wins[y, z] + prior, wins[z, y] + prior), whose mean is the game's P[y, z].

    Args:
        wins: (n, n) how often y beat z; a tie is half a win for both.
        prior: pseudo-wins for either side.
    """

    wins: Floats
    prior: float

    @property
    def mean(self) -> Floats:
        """(n, n) the win probabilities."""
        ours, total = self.wins + self.prior, self.wins + self.wins.T + 2 * self.prior
        return np.where(np.eye(len(ours), dtype=bool), 0.5, ours / np.where(total > 0, total, 1.0))

    def draw(self, rng: np.random.Generator, size: int) -> Floats:
        """(size, n, n) draws from the posterior."""
        y, z = np.triu_indices(len(self.wins), 1)
        ours, theirs = self.wins[y, z] + self.prior, self.wins[z, y] + self.prior
        drawn = rng.beta(np.maximum(ours, 1e-300), np.maximum(theirs, 1e-300), size=(size, y.size))
        drawn = np.where(ours == 0, 0.0, np.where(theirs == 0, 1.0, drawn))  # without a prior a clean sweep is certain
        games = np.full((size, *self.wins.shape), 0.5)
        games[:, y, z], games[:, z, y] = drawn, 1 - drawn
        return games


@dataclass(frozen=True)
class Outcomes:
    """Items scored on questions: P[y, z] is the share of questions on which y scores higher, a tie counting half.

    All pairs are judged on the same questions, so it is questions that are drawn again: the bootstrap.

    Args:
        scores: (Q, n).
        groups: (Q,) the prompt that each question belongs to, 0 ... X - 1, or None for one game of all questions.
    """

    scores: Floats
    groups: NDArray[np.int64] | None = None

    @property
    def mean(self) -> Floats:
        """(n, n) or (X, n, n) the win probabilities."""
        return self._weighed(np.ones((1, len(self.scores))))[0]

    def draw(self, rng: np.random.Generator, size: int) -> Floats:
        """(size, n, n) or (size, X, n, n): every group keeps its number of questions."""
        times = np.zeros((size, len(self.scores)))
        for members in self._members():
            times[:, members] = rng.multinomial(members.size, np.full(members.size, 1 / members.size), size=size)
        return self._weighed(times)

    def _members(self) -> list[NDArray[np.intp]]:
        if self.groups is None:
            return [np.arange(len(self.scores))]
        return [np.flatnonzero(self.groups == g) for g in range(int(self.groups.max()) + 1)]

    def _weighed(self, times: Floats) -> Floats:
        size, n = len(times), self.scores.shape[1]
        games = []
        for members in self._members():
            s = self.scores[members]
            ahead = 0.5 + 0.5 * np.sign(s[:, :, None] - s[:, None, :]).reshape(members.size, n * n)
            games.append((times[:, members] @ ahead).reshape(size, n, n) / members.size)
        return games[0] if self.groups is None else np.stack(games, axis=1)


@dataclass(frozen=True)
class Rounds:
    """The same items compared on Q questions: P[y, z] is the mean over questions, which are drawn again: the bootstrap.

    Args:
        wins: (Q, n, n) the share of the comparisons on each question that y won against z.
    """

    wins: Floats

    @property
    def mean(self) -> Floats:
        """(n, n) the win probabilities."""
        return self.wins.mean(axis=0)

    def draw(self, rng: np.random.Generator, size: int) -> Floats:
        """(size, n, n)."""
        count = len(self.wins)
        return np.tensordot(rng.multinomial(count, np.full(count, 1 / count), size=size) / count, self.wins, axes=1)
