"""Backups of return distributions, compiled: every row goes through the first-level cache once, on every core.

Needs the extra `nlhf[fast]` (numba). The products of `nlhf.tabular.bellman` say the same.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import numba as nb
import numpy as np
import scipy.sparse

from nlhf.tabular.policy import Floats

if TYPE_CHECKING:
    from nlhf.tabular.bellman import Linear, Shift

REORDER = {"reassoc", "contract", "nsz"}  # sums in any order, for SIMD; inf and NaN mean what they do elsewhere


@nb.njit(cache=True, fastmath=REORDER)
def _push(f, margin, move, stride, share, out, ramp):  # type: ignore[no-untyped-def]
    """out += share D f for one reward: averages over cells [i, i + 1) of the step function f[(t - move) / gamma].

    One cell takes `stride` = 1 / gamma <= 2 of f, three values at most. From cell to cell they move on by one and by a
    little more: where no value is skipped the loop runs over neighbours. f has `margin` more values at both ends.
    """
    start, i = -move * stride, 0
    while i < out.size:
        skipped = int(np.floor(start + i * stride)) - i
        end = min(out.size, max(i + 1, int(np.ceil((skipped + 1 - start) / (stride - 1)))))
        near, to = f[margin + skipped + i : margin + skipped + end + 2], out[i:end]
        first = start + i * stride - (skipped + i)
        for j in range(end - i):
            u = first + ramp[j] * (stride - 1)
            third = max(u + stride - 2, 0.0)
            to[j] += share * ((1 - u) * near[j] + (u + stride - 1 - third) * near[j + 1] + third * near[j + 2])
        i = end


@nb.njit(cache=True, nogil=True, fastmath=REORDER)
def _sweep(chain, moved, weights, top, rhs, old, before, added, new, low, high, seidel, back, stale, average, worst):  # type: ignore[no-untyped-def]
    """Rows low ... high of new = w (D P (old + added) + c) and the largest squared change, in worst[0].

    Gauss-Seidel where `seidel`: a row of this range that is done already is read anew, and `added` is in it. `average`
    sums the changes that other rows have not seen, by their weights in `stale`; there is none where it is empty.
    """
    (starts, columns, shares), (moves, masses, gamma, margin) = chain, moved
    actions, cells, common = weights.shape[1], new.shape[1], stale.size > 0
    f, ramp = np.zeros(cells + 2 * margin), np.arange(cells + 0.0)
    f[margin + cells :] = top
    following = f[margin : margin + cells]
    for i in range(average.size):
        average[i] = 0.0
    worst[0] = 0.0
    for turn in range(high - low):
        s = high - 1 - turn if back else low + turn
        out, past = new[s], before[s]
        for i in range(cells):
            out[i] = rhs[s, i] if rhs.size else 0.0
        for a in range(actions):
            x, w, unseen = s * actions + a, weights[s, a], 0.0
            if w == 0:
                continue
            for i in range(cells):
                following[i] = 0.0
            first, last = starts[x], starts[x + 1]
            for e in range(first, last - 1, 2):  # two at a time: half the traffic
                y, z, p, q = columns[e], columns[e + 1], shares[e], shares[e + 1]
                one, two = old[y], old[z]
                if seidel and low <= y < high and (y > s if back else y < s):
                    one = new[y]
                else:
                    unseen += p
                if seidel and low <= z < high and (z > s if back else z < s):
                    two = new[z]
                else:
                    unseen += q
                for i in range(cells):
                    following[i] += p * one[i] + q * two[i]
            if (last - first) % 2:
                y, p = columns[last - 1], shares[last - 1]
                one = old[y]
                if seidel and low <= y < high and (y > s if back else y < s):
                    one = new[y]
                else:
                    unseen += p
                for i in range(cells):
                    following[i] += p * one[i]
            if common:
                for i in range(cells):
                    following[i] += unseen * added[i]
            for k in range(moves.shape[1]):
                _push(f, margin, moves[x, k], 1 / gamma, w * masses[x, k] * gamma, out, ramp)
        total = 0.0
        if common:
            weight = stale[s]
            for i in range(cells):
                change = out[i] - past[i] - added[i]
                total += change * change
                average[i] += weight * change
        else:
            for i in range(cells):
                change = out[i] - past[i]
                total += change * change
        worst[0] = max(worst[0], total)


@nb.njit(cache=True)
def _unseen(starts, columns, shares, weights, visits, edges, back):  # type: ignore[no-untyped-def]
    """(S,) how much of the flow into a state comes from rows that a Gauss-Seidel sweep does before its own."""
    stale, actions, part = np.zeros(visits.size), weights.shape[1], 0
    for s in range(visits.size):
        while s >= edges[part + 1]:
            part += 1
        for a in range(actions):
            x = s * actions + a
            for e in range(starts[x], starts[x + 1]):
                y = columns[e]
                if not (edges[part] <= y < edges[part + 1] and (y > s if back else y < s)):
                    stale[y] += visits[s] * weights[s, a] * shares[e]
    return stale


class Sweeps:
    """M -> w (D P M + c), the laws (S, m - 1) of states; Gauss-Seidel where P is sparse, back and forth.

    Each core has a range of states of its own, and reads what the others do as it was before.

    Args:
        operator: the backup.
        rhs: (S A, m - 1) in place of c, its constant.
        visits: (S,) watch the average of what is left to do, by these shares.
    """

    def __init__(self, operator: Linear, rhs: Floats | None, visits: Floats | None) -> None:
        self.shift, self.weights = operator.shift, np.ascontiguousarray(operator.weights)
        (n, _), cells = self.weights.shape, self.shift.shape[1]
        self.top, self.known = (1.0, np.empty((0, cells))) if rhs is None else (0.0, operator.mixed(rhs))
        self.edges, self.spare, self.back = _edges(n), np.empty((n, cells)), False
        self.seidel = scipy.sparse.issparse(self.shift.mdp.transitions)
        self.stale = [np.empty(0) if visits is None else visits] * 2
        if self.seidel and visits is not None:
            chain = _chain(self.shift)
            self.stale = [_unseen(*chain, self.weights, visits, self.edges, back) for back in (False, True)]
        self.pool = ThreadPoolExecutor(len(self.edges))

    def __call__(self, laws: Floats, left: Floats, shared: Floats) -> tuple[Floats, float, Floats]:
        """See `nlhf.tabular.fixed_point`. The next call may write over the laws that this one was given.

        Corrected are all states by the common part of what they still have to take in, D shared = shared - left on
        average; where there are products it is each by its own.
        """
        order = self.seidel, self.back, self.stale[self.back]
        new, self.spare, self.back = self.spare, laws, not self.back
        source, added = laws, shared - left
        if not self.seidel:
            added = np.zeros_like(added)
            if left.size:
                laws = laws + self._moved(shared)
            source = np.asarray(self.shift.mdp.transitions @ laws)
        rows = (self.weights, self.top, self.known, source, laws, added, new)
        worst, left = _each(self.pool, self.edges, self.shift, rows, order)
        return new, worst, left

    def _moved(self, law: Floats) -> Floats:
        """(S, m - 1) w D law."""
        n, cells, nothing = self.shift.shape[0], law.size, np.empty(0)
        one, new = (np.arange(n + 1, dtype=np.int32), np.zeros(n, np.int32), np.ones(n)), np.empty_like(self.spare)
        rows = (self.weights, 0.0, np.empty((0, cells)), law[None], new, nothing, new)
        _sweep(one, _moved(self.shift), *rows, 0, len(new), False, False, nothing, nothing, np.empty(1))
        return new


def after(shift: Shift, laws: Floats) -> Floats:
    """(S A, m - 1) D P laws."""
    (n, cells), P, nothing = shift.shape, shift.mdp.transitions, np.empty(0)
    source = np.ascontiguousarray(laws if scipy.sparse.issparse(P) else P @ laws)
    new, edges = np.empty((n, cells)), _edges(n)
    rows = (np.ones((n, 1)), 0.0, np.empty((0, cells)), source, new, nothing, new)
    with ThreadPoolExecutor(len(edges)) as pool:
        _each(pool, edges, shift, rows, (False, False, nothing))
    return new


def average(shift: Shift, shares: Floats, law: Floats) -> Floats:
    """(m - 1,) sum_x shares_x D_x law, over state-action pairs x."""
    n, new, nothing = shares.size, np.empty((1, law.size)), np.empty(0)
    one = np.arange(n + 1, dtype=np.int32), np.zeros(n, np.int32), np.ones(n)
    rows = (shares[None], 0.0, np.empty((0, law.size)), law[None], new, nothing, new)
    _sweep(one, _moved(shift), *rows, 0, 1, False, False, nothing, nothing, np.empty(1))
    return new[0]


def _each(pool: ThreadPoolExecutor, edges: Any, shift: Shift, rows: Any, order: Any) -> tuple[float, Floats]:
    """A sweep on all cores: the largest squared change, and the average of what is left."""
    parts, new, stale = len(edges) - 1, rows[-1], order[-1]
    worst, averages = np.empty((parts, 1)), np.empty((parts, new.shape[1] if stale.size else 0))
    chain, moved, submit = _chain(shift), _moved(shift), cast("Any", pool.submit)
    ranges = zip(pairwise(edges.tolist()), averages, worst, strict=True)
    mine, *others = ((chain, moved, *rows, *ends, *order, *out) for ends, *out in ranges)
    jobs = [submit(_sweep, *part) for part in others]
    _sweep(*mine)
    for job in jobs:
        job.result()
    return float(worst.max()), averages.sum(axis=0)


def _chain(shift: Shift) -> tuple[Any, Any, Any]:
    """P in compressed rows; of a dense P, which is multiplied before, row by row."""
    P = shift.mdp.transitions
    if scipy.sparse.issparse(P):
        return P.indptr, P.indices, P.data  # type: ignore[attr-defined]
    pairs = np.arange(shift.shape[0] + 1, dtype=np.int32)
    return pairs, pairs[:-1], np.ones(shift.shape[0])


def _moved(shift: Shift) -> tuple[Floats, Floats, float, int]:
    return shift.moves, shift.masses, float(shift.mdp.gamma), max(shift.band) + 2


def _edges(count: int) -> Any:
    """The ends of equal parts of so many rows, one for each core."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return np.arange(workers + 1) * count // workers


@nb.njit(cache=True, nogil=True)
def quantiles(chain, rows, values, m):  # type: ignore[no-untyped-def]
    """(N, m) the quantiles of each row's mixture, by one walk through all sorted values: `rows` says whose each is."""
    n = chain.shape[0]
    found = np.empty((n, m))
    for x in range(n):
        reached, i, level = 0.0, 0, 0.5 / m - 1e-12
        weight = chain[x] / m
        for k in range(rows.size):
            reached += weight[rows[k]]
            if reached >= level:
                while i < m and reached >= (i + 0.5) / m - 1e-12:
                    found[x, i] = values[k]
                    i += 1
                if i == m:
                    break
                level = (i + 0.5) / m - 1e-12
        while i < m:
            found[x, i] = values[-1]
            i += 1
    return found
