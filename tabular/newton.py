"""Newton's method on the dual of the regularised game, along a path of falling tau where it needs one.

The equilibrium is pi = softmax(log mu + y) with y = M pi / tau, M = P - 1/2 skew-symmetric. Newton on the residual
r(y) = M pi / tau - y solves (I - M C / tau) dy = r, C = diag(pi) - pi pi^T. With h = C dy = sqrt(pi) v that is

    (I - S) v = sqrt(pi) (r - <pi, r>),   S = sqrt(pi) M sqrt(pi) / tau,   v off sqrt(pi),   dy = r + M h / tau

and S is skew: the system is never singular, whatever tau, mu and y are, and a short recurrence solves it.

Sources: Munos et al. 2024, arXiv:2312.00886 (the game); Ling, Fang and Kolter 2018, arXiv:1805.02777 (Newton on a
quantal response equilibrium); Concus and Golub 1976, Widlund 1978 (the recurrence).
"""

from __future__ import annotations

from collections.abc import Callable
from math import log, sqrt
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nlhf.metrics import kl_rows

Floats: TypeAlias = NDArray[np.float64]
Product: TypeAlias = Callable[[Floats], Floats]
Block: TypeAlias = Callable[[NDArray[np.intp]], Floats]

EPS = float(np.finfo(np.float64).eps)

MANY = 10_000
"""More rows of an operator than this are not asked for one by one."""


class Point(NamedTuple):
    """A policy on the way, and how far it is from the equilibrium of tau."""

    tau: float
    dual: Floats
    """Coordinates of log pi - log mu: y itself, or its coefficients in a low-rank game."""
    residual: Floats
    """In the same coordinates."""
    gap: float
    """tau KL(pi, BR(pi)): how far off the responses are that weigh something."""
    drift: float
    """How far off any log pi(y) can be, to first order: those that weigh nothing must not be forgotten on the way."""
    slope: Floats
    """What `solve` needs: log pi, or the covariance of the features."""


class Dual(Protocol):
    """The equations of one game."""

    products: int
    """Products with the game so far."""

    @property
    def size(self) -> int:
        """Number of coordinates."""
        ...

    def at(self, dual: Floats, tau: float) -> Point:
        """The policy at these coordinates. One product."""
        ...

    def solve(self, point: Point, rhs: Floats, accuracy: float = 1e-2) -> Floats:
        """(I - M C / tau)^-1 rhs, perhaps with an error of `accuracy` times the right-hand side."""
        ...

    def log_probs(self, point: Point) -> Floats:
        """(n,) log pi."""
        ...


def follow(game: Dual, tau: float, tol: float, start: Point | None = None) -> tuple[Point, int]:
    """The equilibrium at tau and the number of Newton steps, from a nearby one if there is a `start`.

    Newton is tried at tau itself. If it does not get there, tau falls from where Newton is easy in steps that grow as
    long as it keeps up and shrink where it does not, each predicted by the tangent of the path,
    dy / d log tau = (I - M C / tau)^-1 (-y).
    """
    point, taken = _correct(game, game.at(_predict(game, start, tau), tau), goal(tau, tol), 4)
    if point.gap <= goal(tau, tol).floor:
        return point, taken
    if start is None:
        start, steps = _correct(game, game.at(np.zeros(game.size), max(tau, 1.0)), _on_the_way(1.0), 50)
        taken += steps
    factor = 0.25
    while start.tau != tau:
        tangent = game.solve(start, -start.dual)
        while True:
            level = max(tau, factor * start.tau)
            wanted = goal(tau, tol) if level == tau else _on_the_way(level)
            point, steps = _correct(game, game.at(start.dual + log(level / start.tau) * tangent, level), wanted, 8)
            taken += steps
            if point.gap <= wanted.floor and (level == tau or point.drift <= 1):  # else the tangent leads astray
                break
            factor = sqrt(factor)
            if factor > 1 - 1e-6:
                raise ArithmeticError(f"Newton is stuck at tau = {level:.3g} with a duality gap of {point.gap:.1e}")
        start = point
        factor = max(0.1, factor**1.5) if steps <= 3 else factor
    return start, taken


def _predict(game: Dual, start: Point | None, tau: float) -> Floats:
    if start is None:
        return np.zeros(game.size)
    return start.dual + log(tau / start.tau) * game.solve(start, -start.dual)


class Goal(NamedTuple):
    """When a point is good enough."""

    gap: float
    drift: float
    floor: float
    """The gap to be content with where rounding stops Newton: a hundredfold residual."""


def goal(tau: float, tol: float) -> Goal:
    """A gap of `tol`; for 0 that of a residual of a few rounding errors, which are 1 / tau large."""
    rounding = EPS * (1 + 0.5 / tau)
    least = tau * (2 * rounding) ** 2
    return Goal(max(tol, least), 0.1 if tol > least else 64 * rounding, max(tol, 1e4 * least))


def _on_the_way(tau: float) -> Goal:
    return Goal(1e-4 * tau, 0.1, 1e-4 * tau)


def _correct(game: Dual, point: Point, wanted: Goal, patience: int) -> tuple[Point, int]:
    """Newton at one tau, until the goal, or no progress, or `patience` steps that were not worth two digits each."""
    taken = 0
    while not (point.gap <= wanted.gap and point.drift <= wanted.drift) and patience:
        taken += 1
        # Newton squares the error anyway, and digits beyond the goal are not worth a product.
        enough = max(sqrt(point.gap / point.tau), 0.1 * sqrt(wanted.gap / max(point.gap, wanted.gap)))
        new = _step(game, point, wanted, min(1e-2, point.tau, enough)) or _step(game, point, wanted, 1e-9)
        if new is None:
            break
        if point.gap <= wanted.gap and new.drift > 0.1 * point.drift:
            break
        patience -= new.gap > 0.01 * point.gap
        point = new
    return point, taken


def _step(game: Dual, point: Point, wanted: Goal, accuracy: float) -> Point | None:
    """A Newton step, halved until it lowers the gap; None if it does not."""
    direction = game.solve(point, point.residual, accuracy)
    for t in (1.0, 0.5, 0.25):
        new = game.at(point.dual + t * direction, point.tau)
        if new.gap <= max(wanted.gap, (1 - 0.1 * t) * point.gap):
            return new
    return None


class FullDual:
    """One coordinate per response: y = M pi / tau.

    Args:
        product: q -> M q, exact to rounding.
        log_mu: (n,) the reference.
        block: rows -> M[rows, rows], for direct solves where the recurrence would take longer.
        matrix: (n, n) P, if there is one.
    """

    def __init__(self, product: Product, log_mu: Floats, block: Block, matrix: Floats | None = None) -> None:
        self.product, self.log_mu, self.block, self.matrix = product, log_mu, block, matrix
        self.products = 0
        # What a factorisation costs, in products; below 64 responses it is the cheaper from the start.
        self.patience = (
            min(log_mu.size, 2000) if matrix is None else 0 if log_mu.size <= 64 else min(log_mu.size // 5, 300)
        )

    @property
    def size(self) -> int:
        return int(self.log_mu.size)

    def at(self, dual: Floats, tau: float) -> Point:
        log_probs = log_normalised(self.log_mu + dual)
        reply = self.product(np.exp(log_probs)) / tau
        self.products += 1
        gap = tau * float(kl_rows(log_probs, log_normalised(self.log_mu + reply)))
        residual = reply - dual
        return Point(tau, dual, residual, gap, float(np.ptp(residual)), log_probs)

    def solve(self, point: Point, rhs: Floats, accuracy: float = 1e-2) -> Floats:
        root = np.exp(0.5 * point.slope)
        b = root * (rhs - root @ (root * rhs))
        if self.patience:
            found = self._recurrence(root, b, point.tau, accuracy)
            if found is not None:
                return rhs + found
            self.patience = 0
        return rhs + self._factorised(root, b, point.tau)

    def log_probs(self, point: Point) -> Floats:
        return point.slope

    def _recurrence(self, root: Floats, b: Floats, tau: float, accuracy: float) -> Floats | None:
        """M h / tau, by Concus, Golub and Widlund's recurrence; None when out of patience.

        One product per step, no basis to store, error ((sqrt(1 + |S|^2) - 1) / |S|)^k.
        """
        v, before, image, r = np.zeros_like(b), np.zeros_like(b), np.zeros_like(b), b
        size = last = float(r @ r)
        omega = 1.0
        target = size * accuracy**2
        for k in range(self.patience):
            if size <= target:
                return image
            omega = omega if k == 0 else 1 / (1 + size / (last * omega))
            v, before = before + omega * (r + v - before), v
            image = self._rough_product(root * v) / tau
            self.products += 1
            pushed = root * image
            r = b - v + pushed - root * float(root @ pushed)
            last, size = size, float(r @ r)
        return None

    def _rough_product(self, h: Floats) -> Floats:
        """M h, by a matrix in single precision as it is: enough for a direction, and h sums to zero."""
        if self.matrix is None or self.matrix.dtype == np.float64:
            return self.product(h)
        return (self.matrix @ h.astype(np.float32)).astype(np.float64)

    def _factorised(self, root: Floats, b: Floats, tau: float) -> Floats:
        """M h / tau, by LU on the responses that weigh anything.

        Single precision is enough for a direction: Newton loses a digit of its last step and half of the time is saved.
        """
        active = np.flatnonzero(root > 1e-10 * root.max())
        if self.matrix is None and active.size > MANY:
            raise ArithmeticError(
                f"{active.size} responses weigh something at tau = {tau:.3g}, too many for a direct solve"
            )
        weight = root[active].astype(np.float32)
        system = self.block(active).astype(np.float32)
        system *= weight[:, None] * np.float32(-1 / tau)
        system *= weight
        system.flat[:: active.size + 1] += 1
        both = np.linalg.solve(system, np.stack([b[active].astype(np.float32), weight], axis=1)).astype(np.float64)
        v = both[:, 0] - both[:, 1] * float(weight @ both[:, 0]) / float(weight @ both[:, 1])
        h = np.zeros_like(root)
        h[active] = root[active] * v
        self.products += 1
        return self.product(h) / tau


class FactoredDual:
    """One coordinate per feature: M = W J W^T, y = W c, c = J W^T pi / tau, for any number of responses.

    Newton in these d numbers is Newton in all n: (I - J Cov(w) / tau) dc = r, w the rows of W under pi. One pass over W
    finds the softmax, the mean and the covariance.

    Args:
        features: (n, d) W.
        symplectic: (d, d) J, skew-symmetric.
        log_mu: (n,) the reference.
    """

    def __init__(self, features: Floats, symplectic: Floats, log_mu: Floats) -> None:
        self.features, self.symplectic, self.log_mu = features, symplectic, log_mu
        self.products = 0
        self.longest = sqrt(float(np.einsum("ij,ij->i", features, features).max()))

    @property
    def size(self) -> int:
        return int(self.features.shape[1])

    def at(self, dual: Floats, tau: float) -> Point:
        mean, covariance = self._moments(dual)
        residual = self.symplectic @ mean / tau - dual
        drift = 2 * self.longest * float(np.linalg.norm(residual))
        if drift > 0.1:
            log_probs = log_normalised(self.log_mu + self.features @ dual)
            kl = float(kl_rows(log_probs, log_normalised(log_probs + self.features @ residual)))
            self.products += 2
        else:  # a bound: the second cumulant, under a policy that differs by no more than the factor e^drift
            kl = 0.5 * np.exp(drift) * max(0.0, float(residual @ covariance @ residual))
        return Point(tau, dual, residual, tau * kl, drift, covariance)

    def solve(self, point: Point, rhs: Floats, accuracy: float = 1e-2) -> Floats:
        return np.asarray(np.linalg.solve(np.eye(self.size) - self.symplectic @ point.slope / point.tau, rhs))

    def log_probs(self, point: Point) -> Floats:
        return log_normalised(self.log_mu + self.features @ point.dual)

    def _moments(self, dual: Floats) -> tuple[Floats, Floats]:
        """Mean and covariance of the features under softmax(log mu + W c), in blocks that stay in the cache."""
        self.products += 1
        d, rows = self.size, max(1, 65_536 // self.size)
        top, total, first, second = -np.inf, 0.0, np.zeros(d), np.zeros((d, d))
        for at in range(0, self.log_mu.size, rows):
            block = self.features[at : at + rows]
            z = self.log_mu[at : at + rows] + block @ dual
            higher = max(top, float(z.max()))
            kept, top = np.exp(top - higher), higher
            weight = np.exp(z - top)
            weighted = block * weight[:, None]
            total = kept * total + float(weight.sum())
            first = kept * first + weight @ block
            second = kept * second + block.T @ weighted
        mean = first / total
        return mean, second / total - np.outer(mean, mean)


def log_normalised(z: Floats) -> Floats:
    """log softmax of a vector."""
    shifted = z - z.max()
    return shifted - log(np.exp(shifted).sum())
