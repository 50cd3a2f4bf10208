"""Direct solutions of distributional Bellman equations, each with a bound on its error.

(I - T) F = b for the affine operator of `nlhf.tabular.bellman`, by the cheapest of

- aggregation: solve exactly for what all states have in common, one application of T for the rest. It contracts at the
  second eigenvalue of the chain, whatever gamma and the number of atoms are;
- a block-banded factorisation: with the unknowns of one atom next to each other I - T has few diagonals, the fewer the
  nearer gamma is to 1, because r + gamma z then moves an atom little. For few states, however slowly they mix;
- plain iteration, for the others.

Sources: Rowland et al. 2024, arXiv:2402.07598 (the direct categorical fixed point); Bertsekas and Castañon 1989
(aggregation as an accelerator).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil, log, sqrt
from typing import NamedTuple

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike
from scipy.linalg import lapack, solve_banded

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
    cdf, method, iterations = solve(operator, operator.constant, tol, method)
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


def solve(operator: Linear, rhs: Floats, tol: float, method: str = "auto") -> Solved:
    """F (S A, m - 1) with F = T F + rhs, to a residual of `tol` in Cramér's norm.

    Raises ValueError for an unknown method or a tol that is no number > 0; ArithmeticError if tol is out of reach.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not is_number(tol) or tol <= 0:
        raise ValueError(f"tol must be a number > 0, got {tol!r}")
    if method == "auto":
        method = _cheapest(operator, tol)
    if method == "banded":
        return Solved(_banded(operator, rhs), method, 1)
    coarse = (
        _Common(operator) if method == "aggregation" or _shared_cost(operator) < 100 * _sweep_cost(operator) else None
    )
    cdf = rhs.copy()
    if coarse is not None:
        cdf += coarse.correction(rhs)  # what a solution shared by all rows would be, after one backup
        if method == "iteration" and rhs is operator.constant:
            cdf = _moved_to_the_mean(operator, cdf)
    if method == "iteration" and _compiles(operator):
        return _swept(operator, rhs, cdf, tol)
    coarse = coarse if method == "aggregation" else None
    best, stuck, enough = np.inf, 0, 1000 + ceil(40 / max(1e-12, 1 - operator.shift.mdp.gamma))
    for iteration in range(1, enough + 1):
        change = operator(cdf)
        change += rhs
        change -= cdf
        size = operator.cramer(change)
        cdf += change
        if size <= tol:
            return Solved(cdf, method, iteration)
        best, stuck = (size, 0) if size < 0.9 * best else (best, stuck + 1)
        if coarse is not None:
            if stuck >= 20 or size > 1e3 * best:  # the chain has more to it than its average
                coarse = None
                continue
            cdf += coarse.correction(change)
    raise ArithmeticError(f"tol = {tol!r} is out of reach: the residual is {best:.1e} after {enough} iterations")


def _compiles(operator: Linear) -> bool:
    """Whether compiled sweeps are to be had and worth their preparation."""
    large = operator.shape[0] * operator.shape[1] > 50_000
    return large and scipy.sparse.issparse(operator.shift.mdp.transitions) and find_spec("numba") is not None


def _swept(operator: Linear, rhs: Floats, cdf: Floats, tol: float) -> Solved:
    """Plain iteration, compiled."""
    from nlhf.tabular import fast

    sweeps = fast.Sweeps(operator.shift.mdp.transitions, operator.weights, operator.shift.matrix, rhs)
    enough = 1000 + ceil(40 / max(1e-12, 1 - operator.shift.mdp.gamma))
    with ThreadPoolExecutor(sweeps.workers) as pool:
        for iteration in range(1, enough + 1):
            cdf, squares = sweeps(cdf, pool)
            if (size := sqrt(operator.stride * squares)) <= tol:
                return Solved(cdf, "iteration", iteration)
    raise ArithmeticError(f"tol = {tol!r} is out of reach: the residual is {size:.1e} after {enough} iterations")


def _moved_to_the_mean(operator: Linear, cdf: Floats) -> Floats:
    """One law for all rows, each moved to where its mean must be: backups keep means, so that only shapes are left."""
    atoms, shape = operator.shift.atoms, np.mean(cdf, axis=0)
    mean = atoms[-1] - operator.stride * shape.sum()
    apart = operator.shift.mdp.values(operator.weights).ravel() - mean
    return np.stack([np.interp(atoms[:-1] - move, atoms[:-1], shape, left=0.0, right=1.0) for move in apart])


def _cheapest(operator: Linear, tol: float) -> str:
    """By counting: what the iterations, the mixing of the chain and the width of the band will cost."""
    (n, cells), gamma = operator.shape, operator.shift.mdp.gamma
    product = _sweep_cost(operator)
    digits = log(1 / max(tol, 1e-16))
    mixing = _mixing(operator)
    band = _bandwidth(operator)
    costs = {
        # means are right from the start, so that gamma^2 is what is left to wait for
        "iteration": product * digits / max(1 - gamma**2, 1e-12),
        "aggregation": product * digits / max(-log(max(min(mixing, 1 - 1e-9), 1e-3)), 1e-9) * 2.0
        + _shared_cost(operator),
        # LAPACK runs a wide band several times faster than a product streams its matrix; memory is another limit
        "banded": 2.0 * n * cells * (2 * n * band) ** 2 / 8 if (6 * n * band) * n * cells < 5e8 else np.inf,
    }
    return min(costs, key=lambda name: costs[name])


def _sweep_cost(operator: Linear) -> float:
    """Of one application, about: multiplications by P, and what moving the atoms takes."""
    n, cells = operator.shape
    return operator.shift.mdp.transitions.size * cells * 2.0 + 30.0 * n * cells


def _shared_cost(operator: Linear) -> float:
    """Of factorising the band of what all rows share, about."""
    return 2.0 * operator.shape[1] * _bandwidth(operator) ** 2


def _mixing(operator: Linear) -> float:
    """About the second largest modulus of an eigenvalue of the chain of pairs, by power steps."""
    mdp, weights = operator.shift.mdp, operator.weights
    if mdp.n_states * mdp.n_actions == 1:
        return 0.0
    x = np.random.default_rng(0).standard_normal((mdp.n_states, mdp.n_actions))
    stationary = operator.visits
    rate, size = 1.0, np.inf
    for _ in range(15):
        before, size = size, 1.0
        for _ in range(20):
            x = mdp.expect(np.sum(weights * x, axis=1))
            x -= np.sum(stationary * x.ravel()) / stationary.sum()
        size = float(np.linalg.norm(x))
        if size <= 1e-12:
            return 1e-3
        x /= size
        rate, last = size ** (1 / 20), rate
        if abs(log(rate) - log(last)) < 0.05 * abs(log(last)) or (before == np.inf and rate < 0.7):
            break
    return min(rate, 1.0)


class _Common:
    """The part of a solution that all rows share: solved exactly, by weights of how often each is visited."""

    def __init__(self, operator: Linear) -> None:
        self.operator, self.weights = operator, operator.visits
        cells = operator.shape[1]
        shift = operator.shift.matrix.tocoo()
        held = shift.data != 0
        row, i = np.divmod(shift.coords[0][held], cells)
        j = shift.coords[1][held] - row * cells
        value = shift.data[held] * (self.weights * operator.kept)[row]
        below, above = int(max((i - j).max(initial=0), 0)), int(max((j - i).max(initial=0), 0))
        height = 2 * below + above + 1
        flat = np.bincount(j * height + below + above + i - j, -value, height * cells)
        band = flat.reshape(height, cells, order="F")
        band[below + above] += 1.0
        self.below, self.above = below, above
        self.lu, self.pivots, _ = lapack.dgbtrf(band, below, above)

    def correction(self, change: Floats) -> Floats:
        """T (1 x E) with (I - C) E = the average change."""
        shared, _ = lapack.dgbtrs(self.lu, self.below, self.above, self.weights @ change, self.pivots)
        moved = self.operator.shift(np.broadcast_to(shared, change.shape))
        return moved if self.operator._certain else self.operator.kept[:, None] * moved


def _bandwidth(operator: Linear) -> int:
    """How many atoms r + gamma z moves a CDF value by, at most."""
    _, cells = operator.shape
    t, _ = operator.shift._landed
    where = np.floor(t[..., :-1]) - np.arange(cells)
    return int(np.abs(where).max()) + 2


def _banded(operator: Linear, rhs: Floats) -> Floats:
    """LU of I - T with the unknowns ordered by atom first: n cells unknowns, half-bandwidth about n times the shift."""
    n, cells = operator.shape
    explicit = operator.explicit().tocoo()
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
