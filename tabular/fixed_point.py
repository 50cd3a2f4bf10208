"""Direct solutions of distributional Bellman equations, each with a bound on its error.

(I - T) F = b for the affine operator of `nlhf.tabular.bellman`, by the cheapest of

- aggregation: solve exactly for what all states have in common, one application of T for the rest. It contracts at the
  second eigenvalue of the chain, whatever gamma and the number of atoms are;
- a block-banded factorisation: with the unknowns of one atom next to each other I - T has few diagonals, the fewer the
  nearer gamma is to 1, because r + gamma z then moves an atom little. For few states, however slowly they mix;
- iteration, for the others, from the right means, which leaves gamma^2; Gauss-Seidel where it is compiled.

By default aggregation is tried first and given up when its own residuals say that it will take too long.

Sources: Rowland et al. 2024, arXiv:2402.07598 (the direct categorical fixed point); Bertsekas and Castañon 1989
(aggregation as an accelerator).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf, log, sqrt
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import lapack, solve_banded
from scipy.sparse import issparse

from nlhf.schedules import is_number
from nlhf.tabular.bellman import Linear, Shift, grid, return_range
from nlhf.tabular.mdp import MDP
from nlhf.tabular.policy import Floats
from nlhf.tabular.returns import Categorical

METHODS = ("auto", "aggregation", "banded", "iteration")


@dataclass(frozen=True)
class FixedPoint:
    """Return laws, and how far they are from what they stand for."""

    returns: Categorical
    method: str
    iterations: int
    residual: float
    """The largest Cramér norm of T F - F over states and actions."""
    bound: float
    """Cramér's distance to the exact solution of the projected equation is at most residual / (1 - sqrt(gamma))."""
    clipped: float
    """The largest mass that one backup pushes beyond the ends of the grid; 0 unless the grid was to clip."""

    @property
    def probs(self) -> Floats:
        """(S, A, m) the masses."""
        return self.returns.probs


def categorical_fixed_point(
    mdp: MDP,
    policy: ArrayLike,
    atoms: int | ArrayLike = 51,
    tol: float = 1e-12,
    method: str = "auto",
    clip: bool = False,
) -> FixedPoint:
    """The return laws eta = Pi T^pi eta of a policy on a grid: the direct categorical fixed point (DCFP).

        F = T F + b in CDF coordinates, probs = differences of F

    Its mean is exact for every number of atoms, E[G] = (I - gamma P)^-1 r; W1 to the true return law is at most
    stride / (2 (1 - gamma)).

    Args:
        mdp: the decision process.
        policy: (S, A).
        atoms: how many, from the smallest to the largest return, or the atoms themselves.
        tol: stop when the residual is at most this; the banded solution needs no such thing.
        method: "auto", "aggregation", "banded" or "iteration".
        clip: let a grid that is too narrow keep the mass that leaves it at its ends; `clipped` says how much.

    Raises ValueError naming the argument and the value that is wrong; ArithmeticError if tol is out of reach.

    >>> mdp = MDP([[[1.0]]], [[[0.0, 1.0]]], gamma=0.5, reward_probs=[[[0.5, 0.5]]])  # the return is uniform on [0, 2]
    >>> categorical_fixed_point(mdp, [[1.0]], atoms=5).probs[0, 0].round(12)
    array([0.125, 0.25 , 0.25 , 0.25 , 0.125])

    Source: Rowland et al. 2024, arXiv:2402.07598.
    """
    pi, z = mdp.check_policy(policy), grid(mdp, atoms, clip)
    operator = Linear(Shift(mdp, z), pi)
    cdf, method, iterations = solve(operator, None, tol, method)
    # The solution is a law; what the tolerance and rounding leave of that is set right, and then measured.
    cdf = np.maximum.accumulate(np.clip(cdf, 0.0, 1.0), axis=1)
    residual = operator.cramer(operator(cdf) + operator.constant - cdf)
    returns = Categorical.from_cdf(cdf.reshape(mdp.n_states, mdp.n_actions, -1), z)
    bound = residual / (1 - sqrt(mdp.gamma))
    return FixedPoint(returns, method, iterations, residual, bound, _clipped(mdp, pi, returns) if clip else 0.0)


@dataclass(frozen=True)
class ReturnDistribution:
    """Return laws with a proof of how close they are to the truth."""

    returns: Categorical
    w1_bound: Floats
    """(S, A) W1 to the true return law is at most this."""
    method: str
    iterations: int


def return_distribution(mdp: MDP, policy: ArrayLike, accuracy: float, most: int = 20_000) -> ReturnDistribution:
    """The return laws of a policy, certified: W1 to the truth is at most `accuracy`, in units of the rewards.

    Doubles the number of atoms until `certificate` is content; the method is chosen as in `categorical_fixed_point`.

    Args:
        mdp: the decision process.
        policy: (S, A).
        accuracy: the largest W1 error allowed, > 0.
        most: atoms, at most.

    Raises ValueError for an accuracy that is no number > 0; ArithmeticError, which says what was reached, if it takes
    more atoms.

    >>> mdp = MDP.two_state(gamma=0.9)
    >>> found = return_distribution(mdp, mdp.uniform, accuracy=0.01)
    >>> bool(found.w1_bound.max() <= 0.01)
    True
    """
    if not is_number(accuracy) or accuracy <= 0:
        raise ValueError(f"accuracy must be a number > 0, got {accuracy!r}")
    low, high = return_range(mdp)
    tol = 0.05 * accuracy * (1 - mdp.gamma) / sqrt(max(high - low, 1e-12))
    reached, m = np.inf, 65
    while m <= most:
        found = categorical_fixed_point(mdp, policy, m, max(tol, 1e-13 * max(1.0, abs(low), abs(high))))
        bound = certificate(mdp, policy, found.returns)
        if (reached := float(bound.max())) <= accuracy:
            return ReturnDistribution(found.returns, bound, found.method, found.iterations)
        m = 2 * m - 1
    raise ArithmeticError(
        f"accuracy = {accuracy!r} takes more than {most} atoms: W1 is proved to be at most {reached:.3g}"
    )


def certificate(mdp: MDP, policy: ArrayLike, returns: Categorical) -> Floats:
    """(S, A) an upper bound on W1(eta, eta^pi), for any table of probability laws, computed from the table alone.

        (I - gamma P^pi)^{-1} W1(eta, T^pi eta)

    because W1(eta, eta^pi) <= W1(eta, T eta) + W1(T eta, T eta^pi), and T scales W1 by gamma on average over the next
    pair. T is the true operator: the bound covers projection, discretisation and an iteration that stopped early.
    """
    pi, z = mdp.check_policy(policy), returns.atoms
    following = mdp.expect(np.sum(pi[..., None] * returns.probs, axis=1))
    landed = (mdp.rewards[..., None] + mdp.gamma * z).reshape(*pi.shape, -1)
    masses = (mdp.reward_probs[..., None] * following[:, :, None]).reshape(landed.shape)
    places = np.concatenate([landed, np.broadcast_to(z, returns.probs.shape)], axis=-1)
    order = np.argsort(places, axis=-1)
    rise = np.take_along_axis(np.concatenate([masses, -returns.probs], axis=-1), order, axis=-1)
    gaps = np.diff(np.take_along_axis(places, order, axis=-1), axis=-1)
    apart = np.sum(np.abs(np.cumsum(rise, axis=-1)[..., :-1]) * gaps, axis=-1)
    return mdp.accumulate(pi, apart)


class Solved(NamedTuple):
    """A solution of F = T F + rhs."""

    cdf: Floats
    method: str
    iterations: int


def solve(operator: Linear, rhs: Floats | None, tol: float, method: str = "auto") -> Solved:
    """F (S A, m - 1) with F = T F + rhs, by default the operator's constant, to a residual of `tol` in Cramér's norm.

    It works on the laws of states, M = w F, and backs up once more for those of pairs.

    Raises ValueError for an unknown method or a tol that is no number > 0; ArithmeticError if tol is out of reach.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not is_number(tol) or tol <= 0:
        raise ValueError(f"tol must be a number > 0, got {tol!r}")
    sweep, direct, plain = _sweep_cost(operator), _banded_cost(operator), _plain_sweeps(operator, tol, rhs is None)
    if method == "banded" or (method == "auto" and direct < 10 * sweep):
        return Solved(_banded(operator, rhs), "banded", 1)
    taken = 0
    if method == "aggregation" or (method == "auto" and _shared_cost(operator) < 100 * sweep):
        budget = min(direct / sweep, plain) if method == "auto" else inf
        laws, taken, solved = _aggregated(operator, rhs, tol, budget)
        if solved:
            return Solved(_tables(operator, rhs, laws), "aggregation", taken)
    if method == "auto" and direct < plain * sweep:
        return Solved(_banded(operator, rhs), "banded", 1)
    laws, more = _iterated(operator, rhs, tol)
    return Solved(_tables(operator, rhs, laws), "iteration", taken + more)


def _aggregated(operator: Linear, rhs: Floats | None, tol: float, budget: float) -> tuple[Floats, int, bool]:
    """Backups, and after each the exact solution for what all states have in common: the laws of states, the number
    of backups, and whether that is all. It gives up if at the rate of the last ten more than `budget` / 3 are to come:
    on a chain that mixes slowly the rate gets worse as it goes.
    """
    common, sweeps = _Common(operator), _sweeps(operator, rhs, operator.visits)
    laws, sizes = operator.mixed(operator.constant if rhs is None else rhs).copy(), [inf]
    left = operator.visits @ laws
    while sizes[-1] > tol:
        laws, square, left = sweeps(laws, left, common.solve(left))
        sizes.append(sqrt(operator.stride * square))
        if len(sizes) % 20 == 0:
            rate = (sizes[-1] / sizes[-11]) ** 0.1
            if not rate < 1 or 3 * log(tol / sizes[-1]) / log(rate) > budget:
                return laws, len(sizes) - 1, False
    return laws, len(sizes) - 1, True


def _iterated(operator: Linear, rhs: Floats | None, tol: float) -> tuple[Floats, int]:
    """Backups alone. A policy's start at certain returns with the right means, which they keep: shapes are left."""
    sweeps, nothing = _sweeps(operator, rhs, None), np.empty(0)
    laws = np.zeros((len(operator.weights), operator.shape[1]))
    if rhs is None:
        means = np.sum(operator.weights * operator.shift.mdp.values(operator.weights), axis=1)
        laws = np.clip((operator.shift.atoms[1:] - means[:, None]) / operator.stride, 0.0, 1.0)
    enough, best = 1000 + ceil(40 / max(1e-12, 1 - operator.shift.mdp.gamma)), inf
    for k in range(1, enough + 1):
        laws, square, _ = sweeps(laws, nothing, nothing)
        best = min(best, size := sqrt(operator.stride * square))
        if size <= tol:
            return laws, k
    raise ArithmeticError(f"tol = {tol!r} is out of reach: the residual is {best:.1e} after {enough} iterations")


def _tables(operator: Linear, rhs: Floats | None, laws: Floats) -> Floats:
    """The tables of pairs from the laws of states."""
    cdf = operator.after(laws)
    cdf += operator.constant if rhs is None else rhs
    return cdf


class _Sweeps(Protocol):
    """A backup of the laws of states (S, m - 1): those laws, the largest squared change of a row, and, if visits are
    watched, the average (m - 1,) of the change. Where an average of the last change was `left`, with the solution
    `shared` of the equation that all states share, it is corrected for before.
    """

    def __call__(self, laws: Floats, left: Floats, shared: Floats) -> tuple[Floats, float, Floats]: ...


def _sweeps(operator: Linear, rhs: Floats | None, visits: Floats | None) -> _Sweeps:
    """Backups, compiled or as products."""
    if operator.shift.compiles:
        from nlhf.tabular.sweeps import Sweeps

        return Sweeps(operator, rhs, visits)
    known = operator.mixed(operator.constant if rhs is None else rhs)

    def sweep(laws: Floats, left: Floats, shared: Floats) -> tuple[Floats, float, Floats]:
        if visits is not None:
            laws = laws + operator.mixed(operator.shift(np.broadcast_to(shared, operator.shape)))
        new = operator.mixed(operator.after(laws)) + known
        change = new - laws
        return new, float(np.square(change).sum(axis=1).max()), left if visits is None else visits @ change

    return sweep


def _sweep_cost(operator: Linear) -> float:
    """Of one backup, about: multiplications by P, and what moving the atoms takes."""
    n, cells = operator.shape
    return operator.shift.mdp.transitions.size * cells * 2.0 + 30.0 * n * cells


def _plain_sweeps(operator: Linear, tol: float, means: bool) -> float:
    """How many backups it takes alone: they contract by gamma, where means are right by gamma^2, and Gauss-Seidel takes
    half of them.
    """
    gamma = operator.shift.mdp.gamma ** (2 if means else 1)
    half = 0.5 if operator.shift.compiles and issparse(operator.shift.mdp.transitions) else 1.0
    return half * log(1 / max(tol, 1e-16)) / max(1 - gamma, 1e-12)


def _shared_cost(operator: Linear) -> float:
    """Of factorising the band of what all rows share, about."""
    return 2.0 * operator.shape[1] * sum(operator.shift.band) ** 2


def _banded_cost(operator: Linear) -> float:
    """Of factorising it all. LAPACK runs a wide band several times faster than a product streams its matrix."""
    (n, cells), band = operator.shape, max(operator.shift.band)
    return 2.0 * n * cells * (2 * n * band) ** 2 / 8 if (6 * n * band) * n * cells < 5e8 else inf


class _Common:
    """The part of the laws that all states share: (I - C) E = b, C the average of w D over the visits."""

    def __init__(self, operator: Linear) -> None:
        cells, shares = operator.shape[1], (operator.visits[:, None] * operator.weights).ravel()
        self.below, self.above = operator.shift.band
        width, cell = self.below + self.above + 1, np.arange(cells)
        band = np.zeros((2 * self.below + self.above + 1, cells), order="F")
        for k in range(width):  # one comb of cells after the other: no two of its teeth meet in a row of C
            row = operator.shift.average(shares, (cell % width == k).astype(np.float64))
            column = cell - self.below + (k - cell + self.below) % width
            held = (column >= 0) & (column < cells)
            band[self.below + self.above + (cell - column)[held], column[held]] = -row[held]
        band[self.below + self.above] += 1.0
        self.lu, self.pivots, _ = lapack.dgbtrf(band, self.below, self.above)

    def solve(self, b: Floats) -> Floats:
        """(m - 1,) E."""
        return np.asarray(lapack.dgbtrs(self.lu, self.below, self.above, b, self.pivots)[0])


def _banded(operator: Linear, rhs: Floats | None) -> Floats:
    """LU of I - T with the unknowns ordered by atom first: n cells unknowns, half-bandwidth about n times the shift."""
    n, cells = operator.shape
    explicit = operator.explicit().tocoo()
    rhs = operator.constant if rhs is None else rhs
    (row, i), (column, j) = np.divmod(explicit.coords[0], cells), np.divmod(explicit.coords[1], cells)
    at, to = i * n + row, j * n + column
    below, above = int(max((at - to).max(initial=0), 0)), int(max((to - at).max(initial=0), 0))
    band = np.zeros((below + above + 1, n * cells))
    np.add.at(band, (above + at - to, to), -explicit.data)
    band[above] += 1.0
    solution = solve_banded((below, above), band, rhs.T.ravel(), overwrite_ab=True, check_finite=False)
    return np.ascontiguousarray(solution.reshape(cells, n).T)


def _clipped(mdp: MDP, policy: Floats, returns: Categorical) -> float:
    """The largest mass that one backup of these laws pushes beyond the ends of the grid."""
    following = mdp.expect(np.sum(policy[..., None] * returns.probs, axis=1))
    z = mdp.rewards[..., None] + mdp.gamma * returns.atoms
    slack = 1e-9 * returns.stride
    outside = (z < returns.atoms[0] - slack) | (z > returns.atoms[-1] + slack)
    return float(np.max(np.sum(mdp.reward_probs[..., None] * outside * following[:, :, None], axis=(2, 3))))
