"""Distances of laws on the line: what they are, how they compare and scale, and what certifies a return law.

F is the CDF of a law, W1 = int |F - F'|, Cramér's distance l_2 = (int (F - F')^2)^(1/2), Kolmogorov's sup |F - F'|.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Annotated, Any
from unittest import mock

import hypothesis.strategies as st
import numpy as np

from nlhf import metrics
from nlhf.claims.claim import Claim
from nlhf.claims.instances import Floats, Instance, Process, _gamma, _rows, _share, _units, processes
from nlhf.metrics import cramer, kolmogorov, wasserstein, wasserstein_inf
from nlhf.tabular import MDP, Categorical, Quantile, categorical_fixed_point, certificate, return_distribution

PAPER = "Bellemare, Dabney and Rowland 2023, Distributional Reinforcement Learning, chapter 4"


@dataclass(frozen=True, repr=False)
class Laws(Instance):
    """Two laws on the line, each on its own grid, and two of equally likely values.

    Args:
        one, two: (m,) and (k,) probabilities.
        ends: (2, 2) where the grids begin, and 0.1 less than how long they are.
        shared: whether both are on the first grid; then m = k.
        values: (2, n) in [0, 1].
        count: of quantiles, or whatever else a claim counts.
        reward, gamma: of a backup r + gamma z.
        seed: of whatever else a claim draws.
    """

    one: Annotated[Floats, _rows]
    two: Annotated[Floats, _rows]
    ends: Annotated[Floats, _units]
    shared: bool
    values: Annotated[Floats, _units]
    count: int
    reward: Annotated[float, _share]
    gamma: Annotated[float, _gamma]
    seed: int

    def atoms(self, which: int) -> Floats:
        """The grid of a law."""
        low, length = self.ends[0 if self.shared else which]
        m = (self.one, self.two)[which].size
        return np.asarray(low + (0.1 + length) * (np.arange(m) / (m - 1)))

    @property
    def pair(self) -> tuple[Categorical, Categorical]:
        """Both laws."""
        return Categorical(self.one, self.atoms(0)), Categorical(self.two, self.atoms(1))

    @property
    def signed(self) -> tuple[Categorical, Categorical]:
        """Two signed measures of mass 1."""
        return tuple(Categorical(law.probs + 3 * (law.probs - law.probs[::-1]), law.atoms) for law in self.pair)  # type: ignore[return-value]

    @property
    def equal(self) -> tuple[Quantile, Quantile]:
        """Both laws of equally likely values."""
        return Quantile(self.values[0]), Quantile(self.values[1])

    @property
    def length(self) -> float:
        """L, of an interval that holds both laws."""
        return float(np.ptp(np.concatenate([self.atoms(0), self.atoms(1)])))


@st.composite
def pairs_of_laws(draw: st.DrawFn) -> Laws:
    """Spread out, concentrated, certain, or with masses in quarters, so that CDFs agree and quantile levels are met."""
    shared, n, count = draw(st.booleans()), draw(st.integers(1, 5)), draw(st.integers(1, 12))
    m = draw(st.integers(2, 12) | st.just(60))
    k = m if shared else draw(st.integers(2, 12))
    kinds = [draw(st.sampled_from(["flat", "peaked", "certain", "quarters"])) for _ in range(2)]
    gamma, seed = draw(st.floats(0.05, 0.97)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    peak = {"flat": 1.0, "peaked": 0.05, "certain": 1.0, "quarters": 1.0}
    laws = [rng.dirichlet(np.full(size, peak[kind])) for size, kind in zip((m, k), kinds, strict=True)]
    times = {"certain": 1, "quarters": 4}
    laws = [
        rng.multinomial(times[kind], law) / times[kind] if kind in times else law
        for law, kind in zip(laws, kinds, strict=True)
    ]
    return Laws(
        laws[0], laws[1], rng.uniform(size=(2, 2)), shared, rng.uniform(size=(2, n)), count, rng.uniform(), gamma, seed
    )


def jumps(one: Any, two: Any) -> tuple[Floats, Floats]:
    """All atoms of both measures in order, and by how much F - F' jumps there."""
    places, at = np.unique(np.concatenate([one.atoms, two.atoms]), return_inverse=True)
    rise = np.bincount(at, np.concatenate([one.probs, -two.probs]))
    return np.asarray(places), rise.astype(np.float64)


def by_integral(one: Any, two: Any) -> Floats:
    """(3,) int |F - F'|, (int (F - F')^2)^(1/2) and sup |F - F'|, from the jumps."""
    places, rise = jumps(one, two)
    apart, gaps = np.abs(np.cumsum(rise)[:-1]), np.diff(places)
    return np.array([apart @ gaps, np.sqrt(apart**2 @ gaps), apart.max()])


def measured(one: Any, two: Any) -> Floats:
    """(3,) W1, Cramér's and Kolmogorov's distance."""
    return np.array([wasserstein(one, two), cramer(one, two), kolmogorov(one, two)])


def between(i: Laws) -> Floats:
    """(4,) W1, sup |F - F'|, and what they lack to |E Z - E Z'| and W1 / L."""
    one, two = i.pair
    near, apart = wasserstein(one, two), kolmogorov(one, two)
    return np.array([near, apart, np.abs(one.mean - two.mean) - near, near / i.length - apart])


def coupled(one: Any, two: Any) -> tuple[Floats, Floats]:
    """The intervals of levels on which neither quantile function jumps: their lengths, and |F^-1 - F'^-1| there."""
    steps = [np.append(np.minimum(np.cumsum(law.probs)[:-1], 1.0), 1.0) for law in (one, two)]
    levels = np.sort(np.concatenate([[0.0], *steps]))
    middle = 0.5 * (levels[1:] + levels[:-1])
    at = [law.atoms[np.searchsorted(step, middle)] for law, step in zip((one, two), steps, strict=True)]
    return np.diff(levels), np.abs(at[0] - at[1])


def matched(i: Laws) -> Floats:
    """(2,) the least that the mean and that the largest distance can be, over all matchings of the values."""
    n = i.values.shape[1]
    apart = np.abs(i.values[0] - i.values[1][np.array(list(permutations(range(n))))])
    return np.array([apart.mean(axis=1).min(), apart.max(axis=1).min()])


def moved(i: Laws, laws: tuple[Categorical, Categorical]) -> list[Categorical]:
    """The laws of r + gamma Z."""
    return [Categorical(law.probs, i.reward + i.gamma * law.atoms) for law in laws]


def expected_excess(i: Laws, one: Categorical, two: Categorical) -> Any:
    """E[CRPS(F, Z) - CRPS(F', Z)] for Z from F', where CRPS(F, z) = l_2^2(F, delta_z)."""
    points = Quantile(two.atoms[:, None])
    return two.probs @ (cramer(one, points) ** 2 - cramer(two, points) ** 2)


def energy(i: Laws, within: float = 1.0) -> Any:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, the last two times `within`."""
    (one, x), (two, y) = ((law.probs, law.atoms) for law in i.signed)
    inside = one @ np.abs(x[:, None] - x) @ one + two @ np.abs(y[:, None] - y) @ two
    return 2 * one @ np.abs(x[:, None] - y) @ two - within * inside


def span(i: Process) -> float:
    """By how much returns can differ."""
    return float(np.ptp(i.grid))


def rounding(i: Process) -> float:
    """Of W1, a sum of eps-sized errors of values up to max |z|, which (I - gamma P)^-1 adds up."""
    return 1e-12 * max(1.0, float(np.abs(i.grid).max())) / (1 - i.gamma)


def tables(i: Process) -> list[Categorical]:
    """Laws that are not those of pi: those of mu, the lowest and the highest return, and random ones."""
    shape = *i.target.shape, i.atoms
    ends = [np.broadcast_to(np.eye(i.atoms)[at], shape) for at in (0, -1)]
    random = i.rng.dirichlet(np.full(i.atoms, 0.2), size=shape[:2])
    others = [Categorical(probs, i.grid) for probs in (*ends, random)]
    return [categorical_fixed_point(i.mdp, i.behaviour, i.atoms).returns, *others]


def fine(i: Process) -> Categorical:
    """The laws of pi on a grid 8 times as fine, up to their certificate."""
    return categorical_fixed_point(i.mdp, i.target, 8 * (i.atoms - 1) + 1, 1e-10).returns


def errors(i: Process) -> Floats:
    """(4, S, A) W1 of the tables from the fine laws."""
    truth = fine(i)
    return np.stack([wasserstein(law, truth) for law in tables(i)])


def certified(i: Process) -> Floats:
    """(4, S, A) the certificates of the tables."""
    return np.stack([certificate(i.mdp, i.target, law) for law in tables(i)])


def accuracy(i: Process) -> float:
    """What to ask for: 65 to about 500 atoms give it."""
    return (0.001 + 0.005 * i.lam) * span(i) / (1 - i.gamma)


def answered(i: Process, asked: float) -> Any:
    """The error that the answer promises, and that of its certificate."""
    found = return_distribution(i.mdp, i.target, asked)
    return np.maximum(found.w1_bound, certificate(i.mdp, i.target, found.returns))


def one_grid(one: Any, other: Any) -> Floats:
    """A bug: CDFs are compared at the atoms of the first law alone."""
    return np.asarray(one.atoms)


CLAIMS = (
    Claim(
        id="distances/integral",
        statement="wasserstein, cramer, kolmogorov = int |F - F'|, (int (F - F')^2)^(1/2), sup |F - F'|, signed or not",
        source=f"{PAPER}, definitions",
        tag="proved",
        instances=pairs_of_laws(),
        lhs=lambda i: [measured(*i.pair), measured(*i.signed)],
        identity=lambda i: [by_integral(*i.pair), by_integral(*i.signed)],
        mutants={
            "one grid only": lambda: mock.patch.object(metrics, "_merged", one_grid),
            "no root": {"lhs": lambda i: [measured(*laws) ** [1, 2, 1] for laws in (i.pair, i.signed)]},
        },
    ),
    Claim(
        id="distances/transport",
        statement="int |F - F'| dz = int_0^1 |F^-1 - F'^-1| du",
        source="Vallender 1974: both are the area between the graphs; on the right is the best coupling",
        tag="proved",
        instances=pairs_of_laws(),
        lhs=lambda i: wasserstein(*i.pair),
        identity=lambda i: np.dot(*coupled(*i.pair)),
        mutants={
            "Cramér": {"lhs": lambda i: cramer(*i.pair)},
            "independent": {"identity": lambda i: i.one @ np.abs(i.atoms(0)[:, None] - i.atoms(1)) @ i.two},
        },
    ),
    Claim(
        id="distances/matching",
        statement="equal masses: W1 = min_s mean_k |x_k - y_s(k)|, W_inf = min_s max_k |x_k - y_s(k)|, s bijective",
        source="Birkhoff: the extreme couplings are matchings, and sorting is the best of them on the line",
        tag="proved",
        instances=pairs_of_laws(),
        lhs=lambda i: [wasserstein(*i.equal), wasserstein_inf(*i.equal)],
        identity=matched,
        mutants={
            "as they come": {
                "identity": lambda i: [reduce(np.abs(i.values[0] - i.values[1])) for reduce in (np.mean, np.max)]
            },
            "W1 as l_2": {"lhs": lambda i: [cramer(*i.equal), wasserstein_inf(*i.equal)]},
        },
    ),
    Claim(
        id="distances/mean",
        statement="E[Z] = z_m - int F dz on the grid, of signed measures, too",
        source="integration by parts",
        tag="proved",
        instances=pairs_of_laws(),
        lhs=lambda i: [law.mean for law in (*i.pair, *i.signed)],
        identity=lambda i: [law.atoms[-1] - law.stride * law.cdf.sum() for law in (*i.pair, *i.signed)],
        mutants={
            "z_1 + int F": {
                "identity": lambda i: [law.atoms[0] + law.stride * law.cdf.sum() for law in (*i.pair, *i.signed)]
            }
        },
    ),
    Claim(
        id="distances/means-apart",
        statement="|E[X] - E[Y]| <= W1",
        source="the identity is 1-Lipschitz (Kantorovich and Rubinstein)",
        tag="proved",
        instances=pairs_of_laws(),
        lhs=lambda i: abs(i.pair[0].mean - i.pair[1].mean),
        rhs=lambda i: wasserstein(*i.pair),
        mutants={
            "three quarters": {"rhs": lambda i: 0.75 * wasserstein(*i.pair)},
            "one grid only": lambda: mock.patch.object(metrics, "_merged", one_grid),
        },
    ),
    Claim(
        id="distances/cramer-above",
        statement="W1 <= sqrt(L) l_2 on an interval of length L",
        source="Cauchy and Schwarz",
        tag="proved",
        instances=pairs_of_laws(),
        lhs=lambda i: wasserstein(*i.pair),
        rhs=lambda i: np.sqrt(i.length) * cramer(*i.pair),
        mutants={
            "sqrt(L / 2)": {"rhs": lambda i: np.sqrt(i.length / 2) * cramer(*i.pair)},
            "l_2^2": {"rhs": lambda i: np.sqrt(i.length) * cramer(*i.pair) ** 2},
        },
    ),
    Claim(
        id="distances/cramer-below",
        statement="l_2^2 <= W1 for probability laws",
        source="|F - F'| <= 1",
        tag="proved",
        instances=pairs_of_laws(),
        lhs=lambda i: cramer(*i.pair) ** 2,
        rhs=lambda i: wasserstein(*i.pair),
        mutants={
            "half": {"rhs": lambda i: 0.5 * wasserstein(*i.pair)},
            "signed measures": {
                "lhs": lambda i: cramer(*i.signed) ** 2,
                "rhs": lambda i: wasserstein(*i.signed),
            },
        },
    ),
    Claim(
        id="distances/kolmogorov",
        statement="W1 <= L sup |F - F'| on an interval of length L",
        source="the integral of at most the largest value",
        tag="proved",
        instances=pairs_of_laws(),
        lhs=lambda i: wasserstein(*i.pair),
        rhs=lambda i: i.length * kolmogorov(*i.pair),
        mutants={
            "half": {"rhs": lambda i: 0.5 * i.length * kolmogorov(*i.pair)},
            "without L": {"rhs": lambda i: kolmogorov(*i.pair)},
        },
    ),
    Claim(
        id="distances/total-variation",
        statement="|E Z - E Z'| <= W1 <= L TV on an interval of length L, and W1 / L <= sup |F - F'| <= TV",
        source="moving the mass that differs, at most L far; F is the mass of a half-line, and W1 integrates F - F'",
        tag="proved",
        instances=pairs_of_laws(),
        lhs=between,
        rhs=lambda i: 0.5 * np.abs(jumps(*i.pair)[1]).sum() * np.array([i.length, 1.0, 0.0, 0.0]),
        mutants={
            "half": {"rhs": lambda i: 0.25 * np.abs(jumps(*i.pair)[1]).sum() * np.array([i.length, 1.0, 0.0, 0.0])}
        },
    ),
    Claim(
        id="distances/scaling",
        statement="laws of r + gamma Z: W1, l_2 and sup |F - F'| change by gamma, sqrt(gamma) and 1, signed or not",
        source=f"{PAPER}; z -> r + gamma z in the integrals",
        tag="proved",
        instances=pairs_of_laws(),
        lhs=lambda i: [measured(*moved(i, laws)) for laws in (i.pair, i.signed)],
        identity=lambda i: [by_integral(*laws) * i.gamma ** np.array([1, 0.5, 0]) for laws in (i.pair, i.signed)],
        mutants={
            "gamma each": {"identity": lambda i: [by_integral(*laws) * i.gamma for laws in (i.pair, i.signed)]},
            "gamma for l_2": {
                "identity": lambda i: [
                    by_integral(*laws) * i.gamma ** np.array([1, 1, 0]) for laws in (i.pair, i.signed)
                ]
            },
        },
    ),
    Claim(
        id="distances/scaling-of-values",
        statement="laws of r + gamma Z of equally likely values: W1 and W_inf change by gamma",
        source=PAPER,
        tag="proved",
        instances=pairs_of_laws(),
        lhs=lambda i: [
            d(*(Quantile(i.reward + i.gamma * row) for row in i.values)) for d in (wasserstein, wasserstein_inf)
        ],
        identity=lambda i: i.gamma * matched(i),
        mutants={"sqrt(gamma)": {"identity": lambda i: i.gamma**0.5 * matched(i)}},
    ),
    Claim(
        id="distances/energy",
        statement="2 l_2^2 = 2 E|X - Y| - E|X - X'| - E|Y - Y'|, of signed measures of mass 1, too",
        source="Székely 2003: |x - y| = int 1{x <= z < y} + 1{y <= z < x} dz",
        tag="proved",
        instances=pairs_of_laws(),
        lhs=lambda i: 2 * cramer(*i.signed) ** 2,
        identity=energy,
        mutants={
            "within, halved": {"identity": lambda i: energy(i, 0.5)},
            "l_2^2 once": {"lhs": lambda i: cramer(*i.signed) ** 2},
        },
    ),
    Claim(
        id="distances/proper-score",
        statement="E[CRPS(F, Z) - CRPS(F', Z)] = l_2^2(F, F') for Z ~ F', CRPS(F, z) = int (F(u) - 1{z <= u})^2 du",
        source="Gneiting and Raftery 2007; E[(F - 1)^2 - (F' - 1)^2] = (F - F')^2 under the integral",
        tag="proved",
        instances=pairs_of_laws(),
        lhs=lambda i: [expected_excess(i, *i.pair), cramer(*i.pair) ** 2],
        identity=lambda i: by_integral(*i.pair)[1] ** 2,
        mutants={
            "Z ~ F": {"lhs": lambda i: [-expected_excess(i, *i.pair[::-1]), cramer(*i.pair) ** 2]},
            "one grid only": lambda: mock.patch.object(metrics, "_merged", one_grid),
        },
    ),
    Claim(
        id="distances/certificate",
        statement="W1(eta, eta^pi) <= (I - gamma P^pi)^-1 W1(eta, T^pi eta) for every table eta of laws",
        source="W1(eta, eta^pi) <= W1(eta, T eta) + W1(T eta, T eta^pi), the last <= gamma P W1(eta, eta^pi); iterate",
        tag="proved",
        instances=processes(),
        lhs=lambda i: errors(i) - certificate(i.mdp, i.target, fine(i)),
        rhs=certified,
        mutants={
            "three quarters": {"rhs": lambda i: 0.75 * certified(i)},
            "one step only": lambda: mock.patch.object(MDP, "accumulate", lambda self, policy, amounts: amounts),
        },
        tol=rounding,
    ),
    Claim(
        id="distances/certificate-is-efficient",
        statement="max (I - gamma P^pi)^-1 W1(eta, T^pi eta) <= (1 + gamma) / (1 - gamma) max W1(eta, eta^pi)",
        source="W1(eta, T eta) <= W1(eta, eta^pi) + W1(T eta^pi, T eta) <= (1 + gamma) max W1(eta, eta^pi)",
        tag="proved",
        instances=processes(),
        lhs=lambda i: certified(i).max(axis=(1, 2)),
        rhs=lambda i: (
            (1 + i.gamma) / (1 - i.gamma) * (errors(i) + certificate(i.mdp, i.target, fine(i))).max(axis=(1, 2))
        ),
        mutants={
            "max W1(eta, eta^pi)": {
                "rhs": lambda i: (errors(i) + certificate(i.mdp, i.target, fine(i))).max(axis=(1, 2))
            }
        },
        tol=rounding,
    ),
    Claim(
        id="distances/certificate-of-a-projection",
        statement="(I - gamma P^pi)^-1 W1(eta, T^pi eta) <= stride / (2 (1 - gamma)) where eta = Pi T^pi eta",
        source="W1(Pi nu, nu) <= stride / 2",
        tag="proved",
        instances=processes(),
        lhs=lambda i: certificate(i.mdp, i.target, categorical_fixed_point(i.mdp, i.target, i.atoms).returns),
        rhs=lambda i: span(i) / (i.atoms - 1) / (2 * (1 - i.gamma)),
        mutants={"half": {"rhs": lambda i: span(i) / (i.atoms - 1) / (4 * (1 - i.gamma))}},
        tol=rounding,
    ),
    Claim(
        id="distances/as-accurate-as-asked",
        statement="return_distribution: its w1_bound and the certificate of its laws are at most what is asked for",
        source="the certificate",
        tag="proved",
        instances=processes(actions=2, gamma_max=0.9),
        lhs=lambda i: answered(i, accuracy(i)),
        rhs=accuracy,
        mutants={
            "twice": {"rhs": lambda i: 0.5 * accuracy(i)},
            "asked for less": {"lhs": lambda i: answered(i, 4 * accuracy(i))},
        },
        where=lambda i: i.gamma <= 0.9,
    ),
)
