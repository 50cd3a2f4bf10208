"""Unregularised equilibria: pi >= 0, sum pi = 1, M pi <= 0 for the skew-symmetric M = P - 1/2.

The linear programme of a symmetric game is its own dual, so that primal and dual are one vector pi with one slack
s = -M pi, and complementary: pi_i s_i = 0. An interior-point step factorises one n x n matrix, diag(s / pi) - M, whose
symmetric part is positive definite, where a general programme needs a system of 2 n unknowns.

Source of the method: Mehrotra 1992 (predictor-corrector), Ye 1992 (finite termination on the support), both for general
linear programmes; the self-dual form is that of Gale, Kuhn and Tucker 1950 (symmetric games).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas, lapack

from nlhf.tabular.policy import Floats

Indices = NDArray[np.intp]

TIE = 1e-10
"""Payoffs that differ by less, relative to the largest |M|, are taken for equal: the data hold no more digits."""

SMALL = 48
"""Up to here the simplex method guesses the support before an interior-point iteration is done."""

MANY = 4000
"""With more tied responses than this, other equilibria are known to exist but not looked for."""


@dataclass(frozen=True)
class Lottery:
    """An equilibrium and what is known of the others."""

    probs: Floats
    unique: bool
    support: Indices
    """The responses that some equilibrium plays: those of `probs`, if it is unique. Not all, if there are MANY."""
    iterations: int
    products: int = 0


def generate_columns(product: Callable[[Floats], Floats], block: Callable[[Indices], Floats], n: int) -> Lottery:
    """Solve among the responses worth playing, let in those that beat the solution, until none does.

    Args:
        product: q -> M q.
        block: rows -> M[rows, rows].
        n: number of responses.
    """
    working = np.sort(np.argsort(-product(np.full(n, 1 / n)), kind="stable")[:16])
    iterations, products = 0, 1
    while True:
        restricted = block(working)
        found = solve(restricted)
        iterations += found.iterations
        probs = np.zeros(n)
        probs[working] = found.probs
        payoff = product(probs)
        products += 1
        payoff[working] = np.minimum(payoff[working], 0.0)
        scale = float(max(np.abs(restricted).max(), np.abs(payoff).max()))
        better = np.flatnonzero(payoff > 1e-13 * scale)
        if better.size == 0:
            break
        best = better[np.argsort(-payoff[better], kind="stable")[: working.size]]
        working = np.union1d(working, best)
        if working.size > 0.35 * n and n <= 20_000:
            working = np.arange(n)
    if working.size == n:
        return Lottery(probs, found.unique, found.support, iterations, products)
    # Another equilibrium can only play what does as well against this one as the equilibrium itself.
    tied = np.flatnonzero(payoff >= -TIE * scale)
    if tied.size > MANY:
        return Lottery(probs, False, working[found.support], iterations, products)
    everyone = found if tied.size == found.support.size and found.unique else solve(block(tied))
    if everyone is found:
        return Lottery(probs, True, tied, iterations, products)
    return Lottery(probs, everyone.unique, tied[everyone.support], iterations, products)


def solve(skew: Floats) -> Lottery:
    """An equilibrium of the game with this M (n, n), from the interior; `probs` is the analytic centre of several."""
    n = skew.shape[0]
    scale = float(np.abs(skew).max())
    if scale == 0:
        uniform = np.full(n, 1 / n)
        return Lottery(uniform, n == 1, np.arange(n), 0)
    skew = skew / scale
    if n <= SMALL:
        support = _guess(0.5 * skew)
        if (answer := _on_support(skew, support)) is not None:
            return Lottery(answer, True, support, 0)
    probs = np.full(n, 1 / n)
    value = 2 * float(np.abs(_times(skew, probs)).max()) + 1e-3
    slack = value - _times(skew, probs)
    guess = np.zeros(n, dtype=bool)
    centre = np.inf
    for iteration in range(100):
        centre, last = float(probs @ slack) / n, centre
        guess, before = probs > slack, guess
        if (guess == before).all() and (answer := _on_support(skew, np.flatnonzero(guess))) is not None:
            return Lottery(answer, True, np.flatnonzero(guess), iteration)
        if centre < 1e-17 or 0.9 * last < centre < 1e-12:
            break
        system = np.negative(skew)
        system.flat[:: n + 1] += slack / probs
        # C order is the transpose: nothing is copied
        lu, pivots, singular = lapack.dgetrf(system.T, overwrite_a=1)
        if singular:
            break
        step, rise = _direction(lu, pivots, -slack)
        fall = rise - _times(skew, step)
        length = min(1.0, _reach(probs, step), _reach(slack, fall))
        predicted = float((probs + length * step) @ (slack + length * fall)) / n
        target = (predicted / centre) ** 3 * centre
        step, rise = _direction(lu, pivots, (target - step * fall) / probs - slack)
        fall = rise - _times(skew, step)
        length = min(1.0, 0.9995 * min(_reach(probs, step), _reach(slack, fall)))
        probs = probs + length * step
        value += length * rise
        probs /= probs.sum()
        slack = np.maximum(value - _times(skew, probs), 1e-20)
    support = np.flatnonzero(probs > slack)
    if (answer := _on_support(skew, support)) is not None:
        return Lottery(answer, True, support, iteration)
    probs = _nearest(skew, support, probs)
    return Lottery(probs, False, support, iteration)


def _times(skew: Floats, x: Floats) -> Floats:
    """M x by SciPy's BLAS, which factorises too: NumPy's has threads of its own, and the two pools fight for cores."""
    return blas.dgemv(1.0, skew.T, x, trans=1)


def _guess(skew: Floats) -> Indices:
    """Who an optimal basis plays: the simplex method on max sum x, (1 + M) x <= 1, x >= 0 for |M| <= 1/2.

    Its answer is a guess: it gives up where ties make it circle. Source: Dantzig 1951.
    """
    n = len(skew)
    table = np.ones((n + 1, n + 1))
    table[:n, :n] += skew
    table[n] = -1.0
    table[n, n] = 0.0
    basis, others = np.arange(n, 2 * n), np.arange(n)
    for _ in range(4 * n):
        j = int(np.argmin(table[n, :n]))
        if table[n, j] >= 0:
            break
        column = table[:n, j]
        with np.errstate(divide="ignore", invalid="ignore"):
            i = int(np.argmin(np.where(column > TIE, table[:n, n] / column, np.inf)))
        pivot, column, row = table[i, j], table[:, j].copy(), table[i] / table[i, j]
        table -= np.outer(column, row)
        table[i], table[:, j], table[i, j] = row, -column / pivot, 1 / pivot
        basis[i], others[j] = others[j], basis[i]
    return np.sort(basis[(basis < n) & (table[:n, n] > 0)])


def _direction(lu: Floats, pivots: Floats, rhs: Floats) -> tuple[Floats, float]:
    """(d pi, d value) with (diag(s / pi) - M) d pi + d value = rhs and sum d pi = 0."""
    both, _ = lapack.dgetrs(lu, pivots, np.stack([rhs, np.ones_like(rhs)], axis=1), trans=1)
    rise = both[:, 0].sum() / both[:, 1].sum()
    return both[:, 0] - rise * both[:, 1], float(rise)


def _reach(x: Floats, step: Floats) -> float:
    """The largest t with x + t step >= 0."""
    down = step < 0
    return float(np.min(-x[down] / step[down])) if down.any() else np.inf


def _on_support(skew: Floats, support: Indices) -> Floats | None:
    """The one equilibrium that plays all of `support`, exactly: M pi = 0 there. None if there is none, or many.

    With pi > 0 on the support, s > 0 off it and a regular system it is the only equilibrium of the game.
    """
    k = support.size
    if k % 2 == 0:  # a skew matrix of even size that has a kernel has one of dimension two
        return None
    system = np.ones((k + 1, k + 1))
    system[:k, :k] = skew[np.ix_(support, support)]
    system[k] = -1.0
    system[k, k] = 0.0
    rhs = np.zeros(k + 1)
    rhs[k] = -1.0
    lu, pivots, _ = lapack.dgetrf(system)
    if lapack.dgecon(lu, np.abs(system).sum(axis=0).max())[0] < 100 * k * np.finfo(np.float64).eps:
        return None
    answer, _ = lapack.dgetrs(lu, pivots, rhs)
    answer = answer + lapack.dgetrs(lu, pivots, rhs - system @ answer)[0]
    probs = np.zeros(skew.shape[0])
    probs[support] = answer[:k]
    if not (probs[support] > TIE / k).all():
        return None
    payoff = _times(skew, probs)
    payoff[support] = -np.inf
    return probs / probs.sum() if (payoff < -TIE).all() else None


def _nearest(skew: Floats, support: Indices, probs: Floats) -> Floats:
    """The closest point to `probs` that is an equilibrium on a support where many are."""
    k = support.size
    system = np.concatenate([skew[np.ix_(support, support)], np.ones((1, k))])
    error = -system @ probs[support]
    error[k] += 1.0
    correction = np.linalg.lstsq(system, error, rcond=TIE)[0]
    closest = np.zeros_like(probs)
    closest[support] = probs[support] + correction
    no_worse = _times(skew, closest).max() <= max(_times(skew, probs).max(), 1e-15)
    return closest if (closest >= 0).all() and no_worse else probs


def nearest_to(columns: Floats, support: Indices, log_probs: Floats, tau: float) -> Floats:
    """Of several equilibria the one with the least KL(pi, mu), from the regularised one at a small tau.

    By Lagrange pi ∝ mu exp(M lambda) on the support, with lambda >= 0 for those off it who just do not gain. That is
    the form of the regularised equilibrium, lambda = pi_tau / tau: Newton on M pi = 0 from there keeps it.

    Args:
        columns: (n, k) M[:, support].
        support: (k,) who plays in some equilibrium.
        log_probs: (n,) of the regularised equilibrium at tau.
        tau: small.
    """
    held = log_probs > np.log(1e-6 * tau)
    held[support] = True
    rows, z, before = columns[held], log_probs[support], np.inf
    while True:
        pi = np.exp(z - z.max())
        pi /= pi.sum()
        gain = rows @ pi
        error = float(np.abs(gain).max())
        if error <= 1e-16 or error > 0.5 * before:
            break
        centred, before = rows - gain[:, None], error
        z = z - np.linalg.lstsq((centred * pi) @ centred.T, gain, rcond=1e-13)[0] @ rows
    found = np.zeros_like(log_probs)
    found[support] = pi
    return found
