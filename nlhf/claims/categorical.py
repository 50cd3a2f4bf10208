"""Return laws on a grid of atoms: the projection Pi, the Bellman operator of CDFs, and its fixed point eta.

Pi shares the mass at a value between the atoms next to it, which are s apart. The projected Bellman backup of return
laws is F -> T F + b, where F (S A, m - 1) holds the CDFs of all pairs of a state and an action at all atoms but the
last. P is the chain of the pairs under the policy, R the reward of a pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Annotated, Any
from unittest import mock

import hypothesis.strategies as st
import numpy as np

from nlhf import CategoricalDP, metrics
from nlhf.claims import instances
from nlhf.claims.claim import Claim, Mutant
from nlhf.claims.instances import Floats, Instance, Process, _rows, _units, processes
from nlhf.tabular import (
    MDP,
    BackupSolver,
    Categorical,
    Quantile,
    bellman,
    categorical_fixed_point,
    certificate,
    returns,
)
from nlhf.tabular.bellman import Shift
from nlhf.tabular.fixed_point import solve

C51 = "Bellemare, Dabney and Munos 2017, arXiv:1707.06887"
CRAMER = "Rowland et al. 2018, arXiv:1802.08163"
DCFP = "Rowland et al. 2024, arXiv:2402.07598"
POWERS = (1.0, 1.5, 2.0, 3.0)
WITH_PI = "; Pi shares mass between the nearest atoms z_k, s apart"
WITH_T = "; F -> T F + b the projected Bellman backup of CDFs at m - 1 of m atoms z_k, s apart, P the chain of pairs"
WITH_ETA = "; eta the categorical fixed point on m atoms z_k, s apart"
METHODS = ("aggregation", "banded", "iteration")


# --- laws on the line -------------------------------------------------------------------------------------------------


def _same_mass(value: Floats, rng: np.random.Generator, scale: float) -> Floats:
    there = rng.standard_normal(value.shape)
    return value + scale * (there - there.mean())


@dataclass(frozen=True, repr=False)
class Measures(Instance):
    """A law and a signed measure on K points of [0, 1], and a measure on a grid of m atoms over [0, 1].

    Args:
        ends: (2,) the lowest and the highest point, in [0, 1].
        masses: (K,) probabilities of the law.
        tilt: (K,) what makes it signed, in sum 0.
        onto: (m,) masses on the grid, in sum 1.
        share: in [0, 1].
    """

    ends: Annotated[Floats, _units]
    masses: Annotated[Floats, _rows]
    tilt: Annotated[Floats, _same_mass]
    onto: Annotated[Floats, _same_mass]
    share: float

    @property
    def stride(self) -> float:
        """The distance s of two atoms."""
        return 1 / (self.onto.size - 1)

    @cached_property
    def grid(self) -> Floats:
        """(m,) the atoms."""
        return np.arange(self.onto.size, dtype=np.float64) * self.stride

    @cached_property
    def points(self) -> Floats:
        """(K,) equally spaced, and not all the same."""
        low = min(float(self.ends.min()), 1 - 1e-3)
        high = max(float(self.ends.max()), low + 1e-3)
        return np.asarray(low + (high - low) * np.arange(self.masses.size) / (self.masses.size - 1), dtype=np.float64)

    @cached_property
    def nu(self) -> Categorical:
        """The law."""
        return Categorical(self.masses, self.points)

    @cached_property
    def signed(self) -> Categorical:
        """The signed measure."""
        return Categorical(self.masses + self.tilt, self.points)

    @cached_property
    def wide(self) -> Categorical:
        """The signed measure on twice the range, from -1/2 to 3/2."""
        return Categorical(self.signed.probs, 2 * self.points - 0.5)

    @cached_property
    def kappa(self) -> Categorical:
        """The measure on the grid."""
        return Categorical(self.onto, self.grid)

    def pi(self, law: Categorical) -> Categorical:
        """Pi, the projection on the grid."""
        return Categorical(returns.project(law.atoms, law.probs, self.grid), self.grid)


@st.composite
def measures(draw: st.DrawFn) -> Measures:
    """Laws that are spread out, nearly certain or certain; measures with masses of both signs, or not."""
    k, m = draw(st.integers(2, 12)), draw(st.integers(2, 20))
    spread, tilt = draw(st.sampled_from([1.0, 0.05, 0.0])), draw(st.sampled_from([0.0, 0.3, 3.0]))
    certain, share = draw(st.booleans()), draw(st.floats(0, 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    masses = rng.dirichlet(np.full(k, spread)) if spread else np.eye(k)[rng.integers(k)]
    onto = np.eye(m)[rng.integers(m)] if certain else rng.dirichlet(np.ones(m))
    ends, lean, onto = rng.uniform(size=2), _same_mass(np.zeros(k), rng, tilt), _same_mass(onto, rng, tilt)
    return Measures(ends, masses / masses.sum(), lean, onto, share)


def mixed(i: Measures) -> tuple[Floats, float]:
    """(m,) Pi (c kappa + (1 - c) nu), nu the signed measure on twice the range, and c in [-1, 2]."""
    c = 3 * i.share - 1
    values, masses = (i.grid, i.wide.atoms), (c * i.onto, (1 - c) * i.wide.probs)
    return returns.project(np.concatenate(values), np.concatenate(masses), i.grid), c


def distances(one: Categorical, two: Categorical) -> Floats:
    """(3,) W1, Cramér's and Kolmogorov's distance: the l1, l2 and largest difference of two CDFs."""
    return np.array([d(one, two) for d in (metrics.wasserstein, metrics.cramer, metrics.kolmogorov)])


def hats(i: Measures) -> Floats:
    """(K, m) h_k(z) = max(0, 1 - |z - z_k| / s), z the nearest value to a point of `wide` that is on the grid."""
    z = np.clip(i.wide.atoms, 0, 1)[:, None]
    return np.maximum(0, 1 - np.abs(z - i.grid) / i.stride)


def between(i: Measures) -> Any:
    """E[(Z - z_k) (z_{k+1} - Z)], z_k and z_{k+1} the atoms next to Z."""
    above = i.points % i.stride
    return i.masses @ (above * (i.stride - above))


def projecting(how: Any) -> Any:
    """The library with another projection."""
    return lambda: mock.patch.object(returns, "project", how)


def nearest(values: Floats, masses: Floats, atoms: Floats, project: Any = returns.project) -> Any:
    """All mass of a value to the nearest atom."""
    stride = atoms[1] - atoms[0]
    return project(atoms[0] + np.rint((values - atoms[0]) / stride) * stride, masses, atoms)


def crossed(values: Floats, masses: Floats, atoms: Floats, project: Any = returns.project) -> Any:
    """The shares of the two neighbours exchanged."""
    low, stride = atoms[0], atoms[1] - atoms[0]
    place = np.clip((values - low) / stride, 0, atoms.size - 1)
    cell = np.minimum(np.floor(place), atoms.size - 2)
    return project(low + (2 * cell + 1 - place) * stride, masses, atoms)


NEAREST: dict[str, Mutant] = {"all mass to the nearest atom": projecting(nearest)}
CROSSED: dict[str, Mutant] = {"the shares of the neighbours exchanged": projecting(crossed)}

PROJECTION = (
    Claim(
        id="categorical/shares",
        statement="Pi delta_z has the masses h_k(z) = max(0, 1 - |z - z_k| / s), z first clipped to the grid" + WITH_PI,
        source=f"{C51}, algorithm 1",
        tag="proved",
        instances=measures(),
        lhs=lambda i: returns.project(i.wide.atoms[:, None], np.ones((i.masses.size, 1)), i.grid),
        identity=hats,
        mutants=NEAREST | CROSSED,
    ),
    Claim(
        id="categorical/cell-averages",
        statement="the CDF of Pi nu at z_k is the average of that of nu over [z_k, z_{k+1}], nu signed, anywhere"
        + WITH_PI,
        source="the sum of h_1 ... h_k falls from 1 to 0 over that cell, linearly",
        tag="proved",
        instances=measures(),
        lhs=lambda i: i.pi(i.wide).cdf,
        identity=lambda i: np.clip((i.grid[1:, None] - i.wide.atoms) / i.stride, 0, 1) @ i.wide.probs,
        mutants={"its values": {"identity": lambda i: (i.wide.atoms <= i.grid[:-1, None]) @ i.wide.probs}, **NEAREST},
    ),
    Claim(
        id="categorical/linear",
        statement="Pi (c kappa + (1 - c) nu) = c kappa + (1 - c) Pi nu for kappa on the grid, any signed nu and c"
        + WITH_PI,
        source="Pi nu = sum_k E[h_k(Z)] delta_{z_k}, and h_k(z_j) = 1{j = k}",
        tag="proved",
        instances=measures(),
        lhs=lambda i: mixed(i)[0],
        identity=lambda i: mixed(i)[1] * i.onto + (1 - mixed(i)[1]) * i.pi(i.wide).probs,
        mutants=CROSSED | {"nu as it is": {"identity": lambda i: mixed(i)[1] * i.onto + i.pi(i.wide).probs}},
    ),
    Claim(
        id="categorical/projected-mean",
        statement="E[Pi nu] = E[nu] for any signed nu on the range of the grid" + WITH_PI,
        source="sum_k z_k h_k(z) = z",
        tag="proved",
        instances=measures(),
        lhs=lambda i: i.pi(i.signed).mean,
        identity=lambda i: i.signed.mean,
        mutants=NEAREST
        | {"values beyond the grid": {"lhs": lambda i: i.pi(i.wide).mean, "identity": lambda i: i.wide.mean}},
    ),
    Claim(
        id="categorical/spread",
        statement="Var(Pi nu) - Var(nu) = E[(Z - z_k) (z_{k+1} - Z)] for a law nu on [z_1, z_m], Z in [z_k, z_{k+1}]"
        + WITH_PI,
        source="the variance of the two atoms that the mass at Z is shared by",
        tag="proved",
        instances=measures(),
        lhs=lambda i: i.pi(i.nu).variance - i.nu.variance,
        identity=between,
        mutants={"half of it": {"identity": lambda i: between(i) / 2}, **NEAREST},
    ),
    Claim(
        id="categorical/spread-bound",
        statement="0 <= (Var(Pi nu) - Var(nu)) / s^2 <= 1/4 for a law nu on the range of the grid" + WITH_PI,
        source="spread, where t (1 - t) <= 1/4",
        tag="proved",
        instances=measures(),
        lhs=lambda i: np.array([1, -1]) * (i.pi(i.nu).variance - i.nu.variance) / i.stride**2,
        rhs=lambda i: np.array([1 / 4, 0]),
        mutants={"1/8": {"rhs": lambda i: np.array([1 / 8, 0])}, **NEAREST},
    ),
    Claim(
        id="categorical/no-farther",
        statement="l_p(Pi nu, kappa) <= l_p(nu, kappa), p = 1, 2, infinity, for signed nu and kappa on the grid"
        + WITH_PI,
        source=f"averages over cells are no larger in any l_p, Jensen; for p = 2 {CRAMER}",
        tag="proved",
        instances=measures(),
        lhs=lambda i: distances(i.pi(i.signed), i.kappa),
        rhs=lambda i: distances(i.signed, i.kappa),
        mutants={"9/10 of it": {"rhs": lambda i: 0.9 * distances(i.signed, i.kappa)}, **NEAREST, **CROSSED},
    ),
    Claim(
        id="categorical/pythagoras",
        statement="l_2(nu, kappa)^2 = l_2(nu, Pi nu)^2 + l_2(Pi nu, kappa)^2 for signed nu, and kappa on the grid"
        + WITH_PI,
        source=f"{CRAMER}: averaging over cells is the orthogonal projection",
        tag="proved",
        instances=measures(),
        lhs=lambda i: metrics.cramer(i.signed, i.kappa) ** 2,
        identity=lambda i: metrics.cramer(i.signed, i.pi(i.signed)) ** 2 + metrics.cramer(i.pi(i.signed), i.kappa) ** 2,
        mutants={
            "distances that are not squared": {
                "identity": lambda i: (
                    (metrics.cramer(i.signed, i.pi(i.signed)) + metrics.cramer(i.pi(i.signed), i.kappa)) ** 2
                )
            },
            **NEAREST,
        },
    ),
    Claim(
        id="categorical/projection-error",
        statement="W1(Pi nu, nu) / s <= 1/2 and l_2(Pi nu, nu)^2 / s <= 1/4 for a law nu on the range of the grid"
        + WITH_PI,
        source="F less its mean on a cell, where it rises by D: l1 norm <= s D / 2, squared l2 norm <= s D^2 / 4",
        tag="proved",
        instances=measures(),
        lhs=lambda i: distances(i.pi(i.nu), i.nu)[:2] ** (1, 2) / i.stride,
        rhs=lambda i: np.array([1 / 2, 1 / 4]),
        mutants={"1/3 and 1/5": {"rhs": lambda i: np.array([1 / 3, 1 / 5])}, **CROSSED},
    ),
)


# --- the operator -----------------------------------------------------------------------------------------------------


def chain(i: Process) -> Floats:
    """(S A, S A) P, from its definition."""
    return (i.transitions[..., None] * i.target).reshape(i.target.size, -1)


def pushed(i: Process, laws: Floats) -> Floats:
    """(S A, m) Pi law(R + gamma Z), Z of the pair's law (S A, m): atom by atom, without the operator."""
    r, q = (x.reshape(len(laws), -1, 1) for x in (i.mdp.rewards, i.mdp.reward_probs))
    values, masses = r + i.gamma * i.grid, q * laws[:, None]
    return returns.project(values.reshape(len(laws), -1), masses.reshape(len(laws), -1), i.grid)


def below(i: Process, z: float) -> Floats:
    """(S A, m - 1) E clip((z_{k+1} - R - gamma z) / s, 0, 1): what Pi leaves of R + gamma z up to atom k."""
    r, q = (x.reshape(i.target.size, -1, 1) for x in (i.mdp.rewards, i.mdp.reward_probs))
    return np.sum(q * np.clip((i.grid[1:] - r - i.gamma * z) / i.operator.stride, 0, 1), axis=1)


def placed(i: Process) -> float:
    """How well R + gamma z is placed among m atoms, in strides: z, s and their quotient are rounded."""
    return float(1e-12 + 1e-15 * i.atoms * np.abs(i.grid).max() / i.operator.stride)


def laws(i: Process) -> Floats:
    """(S A, m) random laws: spread out or nearly certain."""
    drawn = i.rng.dirichlet(np.full(i.atoms, i.lam + 0.05), size=i.target.size)
    return drawn / drawn.sum(axis=1, keepdims=True)


def table(probs: Floats) -> Floats:
    """(S A, m - 1) the CDFs of laws."""
    return np.cumsum(probs.reshape(-1, probs.shape[-1]), axis=1)[:, :-1]


def norms(x: Floats) -> Floats:
    """(5,) the largest l_p norm of a row, p = 1, 3/2, 2, 3, infinity."""
    return np.array([(np.abs(x) ** p).sum(axis=1).max() ** (1 / p) for p in POWERS] + [np.abs(x).max()])


def contracted(i: Process) -> Floats:
    """(11,) norms of T d, for d of both signs and for d = 1, and how far T 1 / gamma is from mass m - 1."""
    one, other = i.operator(np.ones(i.operator.shape)), i.operator(i.rng.standard_normal(i.operator.shape))
    return np.concatenate([norms(one), norms(other), [np.abs(one.sum(axis=1) / i.gamma - i.atoms + 1).max()]])


def contraction(i: Process, power: float = 1.0) -> Floats:
    """(11,) gamma^(1/p) times the norms of d, and 0."""
    factors = np.append(i.gamma ** (power / np.array(POWERS)), 1.0)
    drawn = norms(np.ones(i.operator.shape)), norms(i.rng.standard_normal(i.operator.shape))
    return np.concatenate([factors * drawn[0], factors * drawn[1], [0.0]])


def columns(i: Process) -> Floats:
    """(S A, S A, m - 1) sum_k T[(x, k), (y, j)]."""
    return np.asarray(i.operator.explicit().toarray()).reshape(*i.operator.shape, *i.operator.shape).sum(axis=1)


def entries(i: Process) -> Floats:
    """(3,) entries of D_x, which is T without P, that are not 0: most in a column, in a row; columns without any."""
    there = np.abs(i.operator.shift.matrix.toarray()) > 1e-12
    return np.array([there.sum(axis=0).max(), there.sum(axis=1).max(), np.sum(~there.any(axis=0))])


def summed(i: Process) -> tuple[Floats, Floats]:
    """(S A, m - 1) a right-hand side c >= 0, and F with F = T F + c."""
    c = i.rng.exponential(size=i.operator.shape) * (i.rng.uniform(size=i.operator.shape) < i.lam)
    return c, solve(i.operator, c, 1e-12).cdf


def narrow(mdp: MDP, atoms: int) -> Floats:
    """A grid over 4/5 of the returns that are possible, from the lowest."""
    low, high = (r / (1 - mdp.gamma) for r in mdp.reward_range)
    return low + 0.8 * max(high - low, 0.1) * np.arange(atoms) / (atoms - 1)


def landing(how: Any) -> Any:
    """The library with another place for r + gamma z, in strides."""
    return lambda: mock.patch.object(Shift, "_land", lambda self, z, land=Shift._land: how(self, z, land(self, z)))


def undiscounted(self: Shift, z: Floats, land: Floats) -> Floats:
    """R + z."""
    rewards = self.mdp.rewards.reshape(self.shape[0], -1, 1)
    return np.clip((rewards + z - self.atoms[0]) / (self.atoms[1] - self.atoms[0]), 0, self.atoms.size - 1)


ROUNDED: dict[str, Mutant] = {"all mass to the nearest atom": landing(lambda self, z, land: np.rint(land))}
UNDISCOUNTED: dict[str, Mutant] = {"R + z": landing(undiscounted)}
NARROW: dict[str, Mutant] = {"a grid that is too narrow": lambda: mock.patch.object(instances, "grid", narrow)}
NO_CONSTANT: dict[str, Mutant] = {
    "without b": lambda: mock.patch.object(Shift, "constant", property(lambda self: np.zeros(self.shape)))
}

SMALL = processes(actions=2).map(lambda i: replace(i, atoms=2 + i.atoms % 5))
"""At most 50 unknowns, whose eigenvalues are quickly found."""

OPERATOR = (
    Claim(
        id="categorical/operator",
        statement="T F + b are the CDFs of Pi (sum_y P(x, y) law(R_x + gamma Z_y)), F those of the laws of Z_y"
        + WITH_T,
        source=f"{DCFP}, by Abel summation; {C51} for the projected backup",
        tag="proved",
        instances=processes(),
        lhs=lambda i: i.operator(table(laws(i))) + i.operator.constant,
        identity=lambda i: table(pushed(i, chain(i) @ laws(i))),
        mutants={"the law of the pair itself": {"identity": lambda i: table(pushed(i, laws(i)))}, **NO_CONSTANT},
        tol=placed,
    ),
    Claim(
        id="categorical/rows",
        statement="T >= 0, and T 1 + b = E clip((z_{k+1} - R - gamma z_1) / s, 0, 1) <= 1" + WITH_T,
        source="the entries of a row telescope, D[k, j] = E G_k(R + gamma z_j) - E G_k(R + gamma z_{j+1}), G_k falls",
        tag="proved",
        instances=processes(),
        lhs=lambda i: np.append(
            i.operator(np.ones(i.operator.shape)) + i.operator.constant, min(0.0, i.operator.explicit().min())
        ),
        identity=lambda i: np.append(below(i, i.grid[0]), 0.0),
        mutants={"from the second atom": {"identity": lambda i: np.append(below(i, i.grid[1]), 0.0)}, **UNDISCOUNTED},
        tol=placed,
    ),
    Claim(
        id="categorical/columns",
        statement="sum_k T[(x, k), (y, j)] = gamma P(x, y) for all x, y, j, if the grid holds all returns" + WITH_T,
        source="sum_{k < m} clip((z_{k+1} - z) / s, 0, 1) = (z_m - z) / s on the grid",
        tag="proved",
        instances=processes(),
        lhs=columns,
        identity=lambda i: np.broadcast_to(i.gamma * chain(i)[:, :, None], columns(i).shape),
        mutants=NARROW | {"sqrt(gamma)": {"identity": lambda i: np.sqrt(i.gamma) * chain(i)[:, :, None]}},
        tol=placed,
    ),
    Claim(
        id="categorical/sparse",
        statement="of T without P, D_x, a column has 1 or 2 entries other than 0, a row at most ceil(1 / gamma) + 1, "
        "times the number of rewards" + WITH_T,
        source="an interval of length gamma s meets at most two cells; as many intervals in a row meet one cell",
        tag="proved",
        instances=processes(),
        lhs=entries,
        rhs=lambda i: np.array([2, np.ceil(1 / i.gamma) + 1, 0]) * i.rewards.shape[-1] ** np.array([1, 1, 0]),
        mutants={
            "1 and ceil(1 / gamma)": {"rhs": lambda i: np.array([1, np.ceil(1 / i.gamma), 0]) * i.rewards.shape[-1]}
        },
    ),
    Claim(
        id="categorical/radius",
        statement="the spectral radius of T is gamma" + WITH_T,
        source="T >= 0 and columns: with the stationary law w of P, w(x) for all k is a left eigenvector",
        tag="proved",
        instances=SMALL,
        lhs=lambda i: np.abs(np.linalg.eigvals(i.operator.explicit().toarray())).max(),
        identity=lambda i: i.gamma,
        mutants={"sqrt(gamma)": {"identity": lambda i: np.sqrt(i.gamma)}, **UNDISCOUNTED},
    ),
    Claim(
        id="categorical/contraction",
        statement="max_x |(T d)(x)|_p <= gamma^(1/p) max_x |d(x)|_p for all d and p >= 1, attained by d = 1 for p = 1, "
        "where sum_k (T 1)(x, k) = gamma (m - 1)" + WITH_T,
        source=f"rows, columns and Riesz-Thorin; for p = 2, Cramér's distance, {CRAMER}",
        tag="proved",
        instances=processes(),
        lhs=contracted,
        rhs=contraction,
        mutants={"gamma^(2/p)": {"rhs": partial(contraction, power=2.0)}, **UNDISCOUNTED},
        tol=lambda i: i.atoms * placed(i),
    ),
    Claim(
        id="categorical/inverse",
        statement="F = T F + c with c >= 0 has F >= 0, and sum_k F(x, k) = [(I - gamma P)^-1 sum_k c(., k)](x)"
        + WITH_T,
        source="columns, in every term of the Neumann series",
        tag="proved",
        instances=processes(),
        lhs=lambda i: np.append(summed(i)[1].sum(axis=1), min(0.0, summed(i)[1].min())),
        identity=lambda i: np.append(
            np.linalg.solve(np.eye(i.target.size) - i.gamma * chain(i), summed(i)[0].sum(axis=1)), 0.0
        ),
        mutants={
            "transposed": {
                "identity": lambda i: np.append(
                    np.linalg.solve(np.eye(i.target.size) - i.gamma * chain(i).T, summed(i)[0].sum(axis=1)), 0.0
                )
            },
            **ROUNDED,
        },
        # m - 1 errors of a row, whose Cramér norm is solved to 1e-12 before 1 - sqrt(gamma) divides it
        tol=lambda i: 1e-12 * (1 + np.sqrt((i.atoms - 1) / i.operator.stride)) / (1 - np.sqrt(i.gamma)),
    ),
)


# --- its fixed point --------------------------------------------------------------------------------------------------


def fixed(i: Process, atoms: Any = None, method: str = "auto") -> Categorical:
    """(S, A, m) the direct categorical fixed point, eta."""
    return categorical_fixed_point(i.mdp, i.target, i.grid if atoms is None else atoms, method=method).returns


def length(i: Process) -> float:
    """L of the grid."""
    return float(np.ptp(i.grid))


def rough(i: Process, power: int = 0) -> float:
    """How well W1 is solved, or a mean, of laws: 1e-12 in Cramér's norm, and rounding; times L for second moments."""
    solved = 1e-12 * np.sqrt(length(i)) + 1e-14 / (1 - i.gamma)
    return float(solved / (1 - np.sqrt(i.gamma)) * (2 / (1 - i.gamma)) ** power)


def settled(i: Process, of: Callable[[Process], Any]) -> Any:
    """What a function says of the process in which all that was most likely is certain, as is its return then."""
    likely = {name: getattr(i, name) for name in ("transitions", "reward_probs", "target")}
    return of(replace(i, **{name: np.eye(law.shape[-1])[law.argmax(axis=-1)] for name, law in likely.items()}))


def certain(i: Process) -> Quantile:
    """(S, A, 1) the law of a return that is certain."""
    return Quantile(i.mdp.values(i.target)[..., None])


def by_backups(i: Process, steps: int = 8) -> Floats:
    """(steps,) the largest W1(eta_k, eta), k = 1 ... steps, from the lowest atom, the highest, and random laws."""
    algorithm, solver, eta, found = CategoricalDP(i.target), BackupSolver(i.mdp, i.grid), fixed(i), []
    ends = (np.broadcast_to(np.eye(i.atoms)[k], laws(i).shape) for k in (0, -1))
    for start in (*ends, laws(i)):
        state = algorithm.init(Categorical(start.reshape(*i.target.shape, -1), i.grid))
        for _ in range(steps):
            state, _ = algorithm.step(state, solver)
            found.append(metrics.wasserstein(state.returns, eta).max())
    return np.reshape(found, (3, steps)).max(axis=0)


def excess(i: Process) -> Any:
    """(S, A) (Var(eta) - Var(G)) (1 - gamma^2) / s^2, G the return."""
    first, second = i.mdp.moments(i.target, 2)
    return (fixed(i).variance - second + first**2) * (1 - i.gamma**2) / i.operator.stride**2


def finer(i: Process) -> tuple[int, Categorical]:
    """How many cells of the grid make one of the coarser grid, and the fixed point there."""
    k = 2 + i.seed % 3
    return k, fixed(i, bellman.grid(i.mdp, k * (i.atoms - 1) + 1))


def mistaken(i: Process) -> Floats:
    """(3,) how far apart the laws of two policies are."""
    return apart(i, fixed(replace(i, target=i.behaviour)), finer(i)[1])


def apart(i: Process, one: Any, two: Any) -> Floats:
    """(3,) the largest W1 and squared Cramér distance, and how far the second mean is from the value, in strides."""
    w1, square = metrics.wasserstein(one, two).max(), np.square(metrics.cramer(one, two)).max()
    return np.array([w1, square, np.abs(two.mean - i.mdp.values(i.target)).max()]) / i.operator.stride


def martingale(i: Process, share: float = 1.0) -> Floats:
    """(3,) 1 / (2 sqrt(1 - gamma^2)), half of it, and 0."""
    return np.array([1 / 2, 1 / 4, 0]) * share / np.sqrt(1 - i.gamma**2)


def contractive(i: Process, share: float = 1.0) -> Floats:
    """(3,) 1 / (2 (1 - gamma)), half of it, and 0."""
    return np.array([1 / 2, 1 / 4, 0]) * share / (1 - i.gamma)


def arbitrary(i: Process) -> Categorical:
    """(S, A, m) random laws."""
    return Categorical(laws(i).reshape(*i.target.shape, -1), i.grid)


def shortfall(eta: Categorical, every: int = 1) -> Floats:
    """(S, A, m - 1) E max(t - Z, 0), the integral of F up to t, at every k-th atom t but the first."""
    return eta.stride * np.cumsum(eta.cdf, axis=-1)[..., every - 1 :: every]


def copied(i: Process) -> Process:
    """States in another order, and one of them twice: its copies share what leads to it."""
    n = len(i.target)
    order = i.rng.permutation(n)
    states = np.append(order, order[0])
    rows = i.transitions[states][:, :, states]
    rows[..., 0] *= i.lam
    rows[..., -1] *= 1 - i.lam
    rows /= rows.sum(axis=-1, keepdims=True)
    moved = {name: getattr(i, name)[states] for name in ("rewards", "reward_probs", "target", "behaviour")}
    return replace(i, transitions=rows, **moved)


def renamed(i: Process) -> Floats:
    """(S + 1, A, m) what the laws of `copied` should be: one backup of those of the process, in that order."""
    order = i.rng.permutation(len(i.target))
    eta = pushed(i, chain(i) @ fixed(i).probs.reshape(i.target.size, -1)).reshape(*i.target.shape, -1)
    return eta[np.append(order, order[0])]


def alone(c: float, gamma: float, z: Floats) -> Floats:
    """(m,) the law nu = Pi law(c + gamma Z), Z ~ nu: the stationary law of a chain of atoms."""
    moves = returns.project((c + gamma * z)[:, None], np.ones((z.size, 1)), z)
    return np.asarray(np.linalg.solve(np.eye(z.size) - moves.T + 1, np.ones(z.size)))


def constants(i: Process) -> tuple[Floats, Floats]:
    """(3, S, A, m) the laws where the reward is 0, lam or 1 everywhere, and what they should be, on one grid."""
    z, paid = np.arange(i.atoms) / (i.atoms - 1) / (1 - i.gamma), (0.0, i.lam, 1.0)
    games = (MDP(i.transitions, np.full(i.target.shape, c), i.gamma) for c in paid)
    found = np.array([categorical_fixed_point(game, i.target, z).probs for game in games])
    expected = [np.eye(i.atoms)[0], alone(i.lam, i.gamma, z), np.eye(i.atoms)[-1]]
    return found, np.broadcast_to(np.array(expected)[:, None, None], found.shape)


FIXED_POINT = (
    Claim(
        id="categorical/fixed-point",
        statement="by aggregation, banded factorisation and iteration alike eta is a law, eta >= 0 in sum 1, and "
        "eta(x) = Pi (sum_y P(x, y) law(R_x + gamma Z_y)), Z_y ~ eta(y)" + WITH_ETA,
        source=f"{DCFP}: T contracts, and maps CDFs to CDFs",
        tag="proved",
        instances=processes(gamma_max=0.9),
        lhs=lambda i: [fixed(i, method=name).probs for name in METHODS],
        identity=lambda i: [
            pushed(i, chain(i) @ fixed(i, method=name).probs.reshape(i.target.size, -1)).reshape(*i.target.shape, -1)
            for name in METHODS
        ],
        mutants=NO_CONSTANT | UNDISCOUNTED | ROUNDED,
        tol=lambda i: placed(i) + rough(i) / i.operator.stride,
    ),
    Claim(
        id="categorical/exact-mean",
        statement="E[eta] = (I - gamma P)^-1 E[R] for every number of atoms m >= 2, if the grid holds all returns"
        + WITH_ETA,
        source="columns, summed over all atoms",
        tag="proved",
        instances=processes(),
        lhs=lambda i: fixed(i).mean.ravel(),
        identity=lambda i: np.linalg.solve(np.eye(i.target.size) - i.gamma * chain(i), i.mdp.mean_rewards.ravel()),
        mutants=ROUNDED
        | {
            "a grid that is too narrow": {
                "lhs": lambda i: categorical_fixed_point(
                    i.mdp, i.target, narrow(i.mdp, i.atoms), clip=True
                ).returns.mean.ravel()
            }
        },
        tol=lambda i: 1e-12 + rough(i),
    ),
    Claim(
        id="categorical/backups",
        statement="W1(eta_k, eta) <= gamma^k L after k backups of any laws, L = z_m - z_1" + WITH_ETA,
        source=f"contraction for p = 1, and W1 <= L; {CRAMER} has sqrt(gamma)^k, in Cramér's distance",
        tag="proved",
        instances=processes(),
        lhs=by_backups,
        rhs=lambda i: i.gamma ** np.arange(1, 9) * length(i),
        mutants={"gamma^(k + 1)": {"rhs": lambda i: i.gamma ** np.arange(2, 10) * length(i)}, **UNDISCOUNTED},
        tol=lambda i: 1e-12 + rough(i),
        axis="backups k",
    ),
    Claim(
        id="categorical/variance",
        statement="0 <= (Var(eta) - Var(G)) (1 - gamma^2) / s^2 <= 1/4, G the return" + WITH_ETA,
        source="second moments: their difference e obeys e = gamma^2 P e + what Pi adds, between 0 and s^2 / 4",
        tag="proved",
        instances=processes(),
        lhs=lambda i: np.multiply.outer([1, -1], excess(i)),
        rhs=lambda i: np.reshape([1 / 4, 0], (2, 1, 1)),
        mutants={"1/6": {"rhs": lambda i: np.reshape([1 / 6, 0], (2, 1, 1))}, **NO_CONSTANT},
        # second moments, of size (1 - gamma)^-2, which a solve of condition 1 / (1 - gamma) finds, in units of s^2
        tol=lambda i: 1e-12 + (rough(i, 1) + 1e-15 / (1 - i.gamma) ** 3) / i.operator.stride**2,
    ),
    Claim(
        id="categorical/finer",
        statement="with every cell cut in k for eta', W1(eta, eta') / s <= 1 / (2 (1 - gamma)), l_2(eta, eta')^2 / s "
        "<= 1 / (4 (1 - gamma)) for the stride s before the cut, and eta' has the mean of the return" + WITH_ETA,
        source="Pi Pi' = Pi: W1(eta, eta') <= W1(Pi T eta, Pi T eta') + W1(Pi eta', eta') <= gamma W1 + s / 2, and by "
        "Pythagoras for l_2; the triangle inequality over the return itself has s + s' in place of s",
        tag="proved",
        instances=processes(),
        lhs=lambda i: apart(i, fixed(i), finer(i)[1]),
        rhs=contractive,
        mutants={"2/3 of it": {"rhs": partial(contractive, share=2 / 3)}, "another policy": {"lhs": mistaken}},
        tol=lambda i: 1e-12 + rough(i) * max(1, 1 / i.operator.stride),
    ),
    Claim(
        id="categorical/finer-sharp",
        statement="with every cell cut in k for eta', W1(eta, eta') / s <= 1 / (2 sqrt(1 - gamma^2)), "
        "l_2(eta, eta')^2 / s <= 1 / (4 sqrt(1 - gamma^2)) for the stride s before the cut" + WITH_ETA,
        source="sharper than by contraction: a martingale coupling (Strassen) of laws in convex order, "
        "E (Z - Z')^2 = Var(Z) - Var(Z') <= s^2 / (4 (1 - gamma^2)), W1 is at most its root; the energy "
        "distance 2 l_2^2 is by Jensen at most E |Z - Z'|",
        tag="proved",
        instances=processes(),
        lhs=lambda i: apart(i, fixed(i), finer(i)[1]),
        rhs=martingale,
        mutants={"2/3 of it": {"rhs": partial(martingale, share=2 / 3)}, "another policy": {"lhs": mistaken}},
        tol=lambda i: 1e-12 + rough(i) * max(1, 1 / i.operator.stride),
    ),
    Claim(
        id="categorical/convex-order",
        statement="with every cell cut in k for Z' ~ eta', E max(t - Z', 0) <= E max(t - Z, 0) for Z ~ eta and every "
        "atom t, with equality at the last, where it is t less the value: the coarser law is the riskier" + WITH_ETA,
        source="Pi spreads without moving means, and T keeps the convex order",
        tag="proved",
        instances=processes(),
        lhs=lambda i: np.concatenate(
            [shortfall(finer(i)[1], finer(i)[0]), i.grid[-1] - i.mdp.values(i.target)[..., None]], axis=-1
        ),
        rhs=lambda i: shortfall(fixed(i))[..., [*range(i.atoms - 1), -1]],
        mutants={
            "the finer law is the riskier": {
                "lhs": lambda i: shortfall(fixed(i)),
                "rhs": lambda i: shortfall(finer(i)[1], finer(i)[0]),
            },
            **NO_CONSTANT,
        },
        tol=lambda i: 1e-12 + rough(i),
    ),
    Claim(
        id="categorical/certain-returns",
        statement="for a certain return G W1(eta, G) / s <= 1 / (2 sqrt(1 - gamma^2)) <= 1 / (2 (1 - gamma)) and "
        "l_2(eta, G)^2 / s <= 1 / (4 sqrt(1 - gamma^2)) <= 1 / (4 (1 - gamma))" + WITH_ETA,
        source="the limit of finer grids; it holds for every return",
        tag="proved",
        instances=processes(),
        lhs=lambda i: settled(i, lambda j: apart(j, certain(j), fixed(j))),
        rhs=martingale,
        mutants={"2/3 of it": {"rhs": partial(martingale, share=2 / 3)}, **NO_CONSTANT},
        tol=lambda i: 1e-12 + rough(i) * max(1, 1 / settled(i, lambda j: j.operator.stride)),
    ),
    Claim(
        id="categorical/certificate",
        statement="(I - gamma P)^-1 W1(eta, law of R + gamma Z) <= s / (2 (1 - gamma)), Z ~ eta of the next pair"
        + WITH_ETA,
        source="W1(Pi nu, nu) <= s / 2 for nu the law of R + gamma Z, of which eta is the projection",
        tag="proved",
        instances=processes(),
        lhs=lambda i: certificate(i.mdp, i.target, fixed(i)),
        rhs=lambda i: i.operator.stride / (2 * (1 - i.gamma)),
        mutants={"s / (3 (1 - gamma))": {"rhs": lambda i: i.operator.stride / (3 * (1 - i.gamma))}, **NO_CONSTANT},
        tol=lambda i: 1e-12 + rough(i) / (1 - i.gamma),
    ),
    Claim(
        id="categorical/certified",
        statement="W1(nu, G) <= (I - gamma P)^-1 W1(nu, law of R + gamma Z), Z ~ nu of the next pair, for certain "
        "returns G and any laws nu",
        source="W1(nu, G) <= W1(nu, R + gamma Z) + gamma P W1(nu, G)",
        tag="proved",
        instances=processes(),
        lhs=lambda i: settled(i, lambda j: metrics.wasserstein(arbitrary(j), certain(j))),
        rhs=lambda i: settled(i, lambda j: certificate(j.mdp, j.target, arbitrary(j))),
        mutants={
            "the first error alone": {
                "rhs": lambda i: settled(i, lambda j: (1 - j.gamma) * certificate(j.mdp, j.target, arbitrary(j)))
            },
            "gamma^2": {
                "rhs": lambda i: settled(
                    i, lambda j: certificate(replace(j, gamma=j.gamma**2).mdp, j.target, arbitrary(j))
                )
            },
        },
        tol=lambda i: 1e-13 / (1 - i.gamma) ** 2,
    ),
    Claim(
        id="categorical/constant-rewards",
        statement="a reward c everywhere makes eta the law nu = Pi law(c + gamma Z), Z ~ nu, for any transitions: all "
        "mass on 0 for c = 0, on 1 / (1 - gamma) for c = 1, which are the ends of the grid" + WITH_ETA,
        source="nu solves the equation of every pair, and there is one solution",
        tag="proved",
        instances=processes(),
        lhs=lambda i: constants(i)[0],
        identity=lambda i: constants(i)[1],
        mutants={"1 - c": {"identity": lambda i: constants(i)[1][::-1]}, **NO_CONSTANT},
    ),
    Claim(
        id="categorical/names",
        statement="states in another order, one of them in two copies that share what leads to it, have the return "
        "laws that they had",
        source="they solve the equation of the new process, and there is one solution",
        tag="proved",
        instances=processes(),
        lhs=lambda i: fixed(copied(i)).probs,
        identity=renamed,
        mutants={"not in that order": {"identity": lambda i: renamed(i)[::-1]}, **NO_CONSTANT},
        tol=lambda i: placed(i) + rough(i) / i.operator.stride,
    ),
)

CLAIMS = (*PROJECTION, *OPERATOR, *FIXED_POINT)
