"""What else win probabilities say: the Bradley-Terry scores that fit them best, and who beats whom in circles."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, log_expit

from nlhf.tabular.policy import Floats


def bradley_terry_scores(win_prob: Floats, weights: Floats | None = None) -> Floats:
    """(n,) the scores r, mean zero, of maximal likelihood, by Newton.

        max sum_{y < z} N[y, z] (P[y, z] log sigma(r_y - r_z) + P[z, y] log sigma(r_z - r_y))

    Args:
        win_prob: (n, n) P.
        weights: (n, n) symmetric, N[y, z] > 0 how often y and z were compared; all equal by default.

    Raises ValueError if no finite scores are best: where some never lose a single comparison to the others.

    >>> bradley_terry_scores(np.array([[0.5, 0.9], [0.1, 0.5]])).round(6)
    array([ 1.098612, -1.098612])

    Source: Bradley and Terry 1952; Ford 1957 (when a maximum exists).
    """
    n = len(win_prob)
    count = np.ones_like(win_prob) if weights is None else weights
    groups, member = connected_components(win_prob > 0, directed=True, connection="strong")
    if groups > 1:
        unbeaten = int(np.argmin([(win_prob[member != g][:, member == g] > 0).any() for g in range(groups)]))
        raise ValueError(
            f"win_prob must let every group lose to the others: {np.flatnonzero(member == unbeaten)[:5]} never "
            "do, and have no finite Bradley-Terry score"
        )
    scores = np.zeros(n)

    def loss(r: Floats) -> float:
        return -float(np.sum(count * win_prob * log_expit(r[:, None] - r)))

    for _ in range(200):
        fitted = expit(scores[:, None] - scores)
        gradient = np.sum(count * (win_prob - fitted), axis=1)
        if (np.abs(gradient) <= 1e-12 * count.sum(axis=1)).all():  # of each: some are rarely compared
            break
        curvature = count * fitted * (1 - fitted)
        laplacian = np.diag(curvature.sum(axis=1)) - curvature
        # scaled to a unit diagonal, since weights may differ by many orders; equal scores change nothing: fix their sum
        root = np.sqrt(laplacian.diagonal())
        scale = np.outer(root, root)
        step = np.linalg.solve(laplacian / scale + scale / (root @ root), gradient / root) / root
        step -= step.mean()
        t, now = 1.0, loss(scores)
        while t > 1e-6 and not loss(scores + t * step) <= now * (1 + 1e-12):  # the loss is positive
            t /= 2
        scores = scores + t * step
        if np.abs(t * step).max() <= 1e-12:
            break
    return scores


class Cycles(NamedTuple):
    """Circles of majorities."""

    condorcet: int | None
    """Who beats everyone else with probability above 1/2."""
    total: int
    """Number of 3-cycles, y beats z beats w beats y."""
    strongest: tuple[tuple[int, int, int, float], ...]
    """At most five of them with the smallest of their three win probabilities, largest first."""


def cycles(win_prob: Floats) -> Cycles:
    """The Condorcet winner and the 3-cycles of majorities. O(n^3).

    >>> cycles(np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]]))
    Cycles(condorcet=None, total=1, strongest=((0, 1, 2, 0.7),))
    """
    n = len(win_prob)
    beats = (win_prob > 0.5).astype(np.float64)
    winners = np.flatnonzero(beats.sum(axis=1) == n - 1)
    count = round(float(np.sum((beats @ beats) * beats.T)) / 3)
    found: list[tuple[float, int, int, int]] = []
    for y in range(n if count else 0):  # y the smallest of the three, so that each cycle is found once
        weakest = np.minimum(np.minimum(win_prob[y, y:, None], win_prob[y:, y:]), win_prob[y:, y])
        best = np.argpartition(weakest, -min(5, weakest.size), axis=None)[-5:]
        for z, w in zip(*np.unravel_index(best, weakest.shape), strict=True):
            if weakest[z, w] > 0.5:
                found.append((-float(weakest[z, w]), y, y + int(z), y + int(w)))
    strongest = tuple((y, z, w, -negative) for negative, y, z, w in sorted(found)[:5])
    return Cycles(int(winners[0]) if n > 1 and winners.size else None, count, strongest)
