"""Many small games at once, compiled: Newton for one game after the other in the first-level cache, on every core.

Needs the extra `nlhf[fast]` (numba). What it does not solve, `nlhf.tabular.newton` does.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numba as nb
import numpy as np
from numpy.typing import NDArray

from nlhf.tabular.newton import Goal
from nlhf.tabular.policy import Floats

LARGEST = 64
"""Beyond this many responses a game leaves the cache and elimination without BLAS is no longer the fastest."""

REORDER = {"reassoc", "contract", "nsz"}  # sums in any order, for SIMD; inf and NaN mean what they do elsewhere


@nb.njit(cache=True, fastmath=REORDER)
def _evaluate(skew, log_mu, y, tau, pi, reply):  # type: ignore[no-untyped-def]
    """pi = softmax(log mu + y), reply = M pi / tau; returns the duality gap at pi and the span of reply - y."""
    n = y.size
    top = -np.inf
    for i in range(n):
        top = max(top, log_mu[i] + y[i])
    total = 0.0
    for i in range(n):
        pi[i] = np.exp(log_mu[i] + y[i] - top)
        total += pi[i]
    low, high = np.inf, -np.inf
    for i in range(n):
        pi[i] /= total
    for i in range(n):
        s = 0.0
        for j in range(n):
            s += skew[i, j] * pi[j]
        reply[i] = s / tau
        low, high = min(low, reply[i] - y[i]), max(high, reply[i] - y[i])
    best = -np.inf
    for i in range(n):
        best = max(best, log_mu[i] + reply[i])
    normal = 0.0
    for i in range(n):
        normal += np.exp(log_mu[i] + reply[i] - best)
    shift = best + np.log(normal) - top - np.log(total)
    kl = 0.0
    for i in range(n):
        d = reply[i] - y[i] - shift
        if abs(d) < 0.02:
            kl += pi[i] * d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720 + d / 5040)))))
        elif d <= 1:
            kl += pi[i] * (np.exp(d) - 1 - d)
        else:
            kl += np.exp(log_mu[i] + reply[i] - best) / normal - pi[i] * (1 + d)
    return tau * kl, high - low


@nb.njit(cache=True, fastmath={"contract"})
def _solve(skew, root, b, tau, system, h):  # type: ignore[no-untyped-def]
    """h with (I - S) h / root = b projected off root: elimination, which needs no pivots for I minus a skew matrix."""
    n = root.size
    for i in range(n):
        scale = -root[i] / tau
        for j in range(n):
            system[i, j] = scale * skew[i, j] * root[j]
        system[i, i] = 1.0
        system[i, n] = b[i]
        system[i, n + 1] = root[i]
    for k in range(0, n - 1, 2):  # two pivots at a time: half the traffic
        one, two = system[k], system[k + 1]
        factor = two[k] / one[k]
        for j in range(k + 1, n + 2):
            two[j] -= factor * one[j]
        for i in range(k + 2, n):
            row = system[i]
            first = row[k] / one[k]
            second = (row[k + 1] - first * one[k + 1]) / two[k + 1]
            for j in range(k + 2, n + 2):
                row[j] -= first * one[j] + second * two[j]
    above, below = 0.0, 0.0
    for k in range(n - 1, -1, -1):
        u, v = system[k, n] / system[k, k], system[k, n + 1] / system[k, k]
        for i in range(k):
            system[i, n] -= u * system[i, k]
            system[i, n + 1] -= v * system[i, k]
        system[k, n], system[k, n + 1] = u, v
        above += root[k] * u
        below += root[k] * v
    for i in range(n):
        h[i] = root[i] * (system[i, n] - above / below * system[i, n + 1])


@nb.njit(cache=True)
def _newton(skew, log_mu, y, tau, goal, loose, work, system):  # type: ignore[no-untyped-def]
    """Newton at one tau from y, which it moves; steps that do not lower the gap are halved. Returns gap and steps."""
    n = y.size
    trial, pi, reply, root, b, h = work
    gap, drift = _evaluate(skew, log_mu, y, tau, pi, reply)
    for step in range(30):
        if gap <= goal and drift <= loose:
            return gap, step
        mean = 0.0
        for i in range(n):
            root[i] = np.sqrt(pi[i])
            mean += pi[i] * (reply[i] - y[i])
        for i in range(n):
            b[i] = root[i] * (reply[i] - y[i] - mean)
        _solve(skew, root, b, tau, system, h)
        for i in range(n):
            s = 0.0
            for j in range(n):
                s += skew[i, j] * h[j]
            b[i] = reply[i] - y[i] + s / tau  # the direction
        t, new, before = 1.0, np.inf, drift
        while t > 0.2:
            for i in range(n):
                trial[i] = y[i] + t * b[i]
            new, drift = _evaluate(skew, log_mu, trial, tau, pi, reply)
            if new <= max(goal, (1 - 0.1 * t) * gap):
                break
            t /= 2
        if t <= 0.2 or (gap <= goal and drift > 0.1 * before):
            return gap, step + 1
        gap = new
        y[:] = trial
    return gap, 30


@nb.njit(cache=True, nogil=True)
def _each(matrices, log_mu, tau, goal, loose, floor, log_pi, steps, solved):  # type: ignore[no-untyped-def]
    """One game after the other: from tau = 0.1 down, three levels to a decade, each from the payoffs of the last."""
    n = log_mu.shape[1]
    skew, system, work, y = np.empty((n, n)), np.empty((n, n + 2)), np.empty((6, n)), np.empty(n)
    for game in range(len(matrices)):
        skew[:] = matrices[game]
        skew -= 0.5
        y[:] = 0.0
        level = max(tau, 0.1)
        while True:
            wanted = goal if level == tau else 1e-3 * level
            near = loose if level == tau else 0.1
            gap, taken = _newton(skew, log_mu[game], y, level, wanted, near, work, system)
            steps[game] += taken
            if level == tau or gap > wanted:
                break
            following = max(tau, 0.46 * level)
            y *= level / following
            level = following
        solved[game] = level == tau and gap <= floor
        log_pi[game] = log_mu[game] + y


def newton(
    matrices: Floats, log_mu: Floats, tau: float, goal: Goal
) -> tuple[Floats, NDArray[np.int64], NDArray[np.bool_]]:
    """Solve B games (B, n, n) with references (B, n) on all cores.

    Returns log mu + y (B, n), the Newton steps (B,), and whether each game is solved (B,): its gap is at most
    that of the goal, or of its floor where rounding stopped it.
    """
    B, n = log_mu.shape
    log_pi, steps, solved = np.empty((B, n)), np.zeros(B, np.int64), np.zeros(B, np.bool_)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = [slice(B * w // workers, B * (w + 1) // workers) for w in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        for done in [
            pool.submit(_each, matrices[p], log_mu[p], tau, *goal, log_pi[p], steps[p], solved[p]) for p in parts
        ]:
            done.result()
    return log_pi, steps, solved
