"""What estimated transitions do to return laws: perturbation, the stochastic CDF equation, and samples that suffice.

F (S A, m - 1) are the CDFs at the categorical fixed point eta, L is the length of the grid and s its stride. P is the
chain of the pairs of a state and an action, and T_x F(y) + b_x the CDF of the projected law of R_x + gamma Z_y.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import hypothesis.strategies as st
import numpy as np

from nlhf import metrics
from nlhf.claims.categorical import DCFP, NO_CONSTANT, ROUNDED, chain, fixed, length, pushed, rough, table
from nlhf.claims.claim import Claim
from nlhf.claims.instances import Floats, Instance, Process, processes
from nlhf.tabular import MDP, Categorical, SampledBackupSolver

WITH_ETA = "; eta the categorical fixed point on a grid of length L"
WITH_SIG = (
    "; sig(x) is the mean squared Cramér distance between the law eta(x), eta the categorical fixed point on a grid of "
    "length L, and its backup T_x F(X') + b_x from one next pair X' ~ P(x, .)"
)
DELTA = 1e-6
"""How likely a bound that holds with high probability is to be violated, were instances not the same every time."""


def elsewhere(i: Process) -> Process:
    """The process with a share of each transition led to another state."""
    states = np.eye(len(i.target))[i.rng.integers(0, len(i.target), i.target.shape)]
    share = 1e-3 + 0.999 * i.lam
    return replace(i, transitions=(1 - share) * i.transitions + share * states)


def moved(i: Process) -> float:
    """The largest TV of the transitions of the two."""
    return float(0.5 * np.abs(elsewhere(i).transitions - i.transitions).sum(axis=-1).max())


def apart(i: Process, other: Process) -> Floats:
    """(2,) the largest W1 of the fixed points, and by how much a difference of values exceeds it: it must not."""
    w1 = metrics.wasserstein(fixed(other), fixed(i))
    return np.array([w1.max(), (np.abs(other.mdp.values(i.target) - i.mdp.values(i.target)) - w1).max()])


def sig(i: Process) -> Floats:
    """(S A,) sig(x) = E s |T_x F(X') + b_x - F(x)|^2: how far one sampled next pair X' is off."""
    cdf = table(fixed(i).probs)
    sampled = np.stack([i.operator.shift(np.broadcast_to(law, cdf.shape)) for law in cdf], axis=1)
    off = np.square(sampled - i.operator(cdf)[:, None]).sum(axis=2)
    return np.asarray(i.operator.stride * np.sum(chain(i) * off, axis=1))


def value_variance(i: Process) -> Floats:
    """(S A,) Var(gamma V(X')) / L, which sig cannot be below, as squared means differ by at most L times it."""
    v, p = i.mdp.values(i.target).ravel(), chain(i)
    return np.asarray(i.gamma**2 * np.sum(p * (v - (p @ v)[:, None]) ** 2, axis=1) / length(i))


def floored(i: Process, lhs: Any, variation: Floats) -> Floats:
    """With what sig lacks to its lower bound as last entry, which must not be above 0."""
    return np.append(lhs, (value_variance(i) - variation).max())


def local_variation(i: Process) -> Floats:
    """(2,) the largest sig / (gamma L)."""
    variation = sig(i)
    return floored(i, variation.max() / (i.gamma * length(i)), variation)


def inequality(i: Process, times: float = 1.0, power: float = 1.0) -> Floats:
    """(S A + 1,) sig + gamma P gini."""
    variation = sig(i)
    return floored(i, times * variation + i.gamma**power * chain(i) @ gini(i), variation)


def summed_variation(i: Process) -> Floats:
    """(S A + 1,) (I - gamma P)^-1 sig / L."""
    variation = sig(i)
    return floored(i, summed(i, variation, i.gamma) / length(i), variation)


def summed_roots(i: Process) -> Floats:
    """(S A + 1,) (I - sqrt(gamma) P)^-1 sqrt(sig), in units of (1 + sqrt(gamma)) sqrt(L / (1 - gamma))."""
    variation, root = sig(i), np.sqrt(i.gamma)
    unit = (1 + root) * np.sqrt(length(i) / (1 - i.gamma))
    return floored(i, summed(i, np.sqrt(variation), root) / unit, variation)


def below(i: Process, constant: float) -> Floats:
    """(S A + 1,) a constant, and 0."""
    return np.append(np.full(i.target.size, constant), 0.0)


def gini(i: Process) -> Floats:
    """(S A,) gini(x) = s sum_k F(x, k) (1 - F(x, k)): half of the mean difference of two returns."""
    cdf = table(fixed(i).probs)
    return np.asarray(i.operator.stride * np.sum(cdf * (1 - cdf), axis=1))


def summed(i: Process, amounts: Floats, discount: float) -> Floats:
    """(S A,) (I - discount P)^-1 amounts, by the library."""
    mdp = MDP(i.transitions, np.zeros(i.target.shape), discount)
    return mdp.accumulate(i.target, amounts.reshape(i.target.shape)).ravel()


def amounts(i: Process) -> Floats:
    """(S A,) v >= 0: of sizes decades apart, and zeros."""
    return np.asarray(10 ** i.rng.uniform(-8, 0, i.target.size) * i.rng.integers(0, 2, i.target.size))


def roots(i: Process) -> Floats:
    """(3, S A) (I - sqrt(gamma) P)^-1 v, the square of that of sqrt(v) times 1 - sqrt(gamma), and v less the first."""
    root, v = np.sqrt(i.gamma), amounts(i)
    slow = summed(i, v, root)
    return np.stack([slow, (1 - root) * summed(i, np.sqrt(v), root) ** 2, v - slow])


def roots_bound(i: Process, power: float = 1.0) -> Floats:
    """(3, S A) (1 + sqrt(gamma)) max (I - gamma P)^-1 v, (I - sqrt(gamma) P)^-1 v, and 0."""
    root, v = np.sqrt(i.gamma), amounts(i)
    above = np.full(v.size, (1 + root) ** power * summed(i, v, i.gamma).max())
    return np.stack([above, summed(i, v, root) * (1 - root) ** (1 - power), np.zeros(v.size)])


def enumerated(i: Process) -> Floats:
    """(S,) E s |T_N F + b - F|^2 over all N <= 3 next states, the same for all states, for the T_N of their shares."""
    n, samples, cdf = len(i.target), 1 + i.seed % 3, table(fixed(i).probs)
    expected = np.zeros(n)
    for seen in product(range(n), repeat=samples):
        shares = np.bincount(seen, minlength=n) / samples
        sampled = replace(i, transitions=np.broadcast_to(shares, i.transitions.shape)).operator(cdf)
        off = i.operator.stride * np.square(sampled - i.operator(cdf)).sum(axis=1)
        expected += np.prod(chain(i)[:, seen], axis=1) * off
    return expected


def squared_distance(i: Process, samples: int) -> Floats:
    """(S,) E l_2(law of R + gamma Z(X'), eta)^2 / N, both projected, atom by atom."""
    probs = fixed(i).probs.reshape(i.target.size, -1)
    mean = Categorical(pushed(i, chain(i) @ probs), i.grid)
    each = [Categorical(pushed(i, np.broadcast_to(law, probs.shape)), i.grid) for law in probs]
    return np.asarray(np.sum(chain(i).T * [metrics.cramer(law, mean) ** 2 for law in each], axis=0) / samples)


def sample_size(i: Process) -> int:
    """10 ... 1000 samples."""
    return int(10 ** (1 + 2 * i.lam))


def estimated(i: Process) -> Process:
    """The process with the frequencies of N sampled next states."""
    drawn = SampledBackupSolver(i.mdp, i.grid, samples=sample_size(i)).sample(i.target, i.rng).states[:, 1]
    n = len(i.target)
    counts = np.stack([np.bincount(row, minlength=n) for row in drawn.reshape(i.target.size, -1)])
    return replace(i, transitions=(counts / sample_size(i)).reshape(i.transitions.shape))


def enough(i: Process, power: float = 0.5) -> Floats:
    """(2,) gamma L / (1 - gamma) (1/2 + sqrt(log(S A / delta) / 2)) / sqrt(N), and 0."""
    band = (0.5 + np.sqrt(np.log(i.target.size / DELTA) / 2)) / sample_size(i) ** power
    return np.array([i.gamma * length(i) / (1 - i.gamma) * band, 0.0])


STEPS, COPIES = 30, 100


def random_cdfs(i: Process) -> Floats:
    """(S A, K, m - 1) T_{X_0} (T_{X_1} ... F_0 + b_{X_1}) + b_{X_0} along trajectories from each pair, F_0 random."""
    solver = SampledBackupSolver(i.mdp, i.grid, samples=COPIES, length=STEPS)
    states, actions, _ = solver.sample(i.target, i.rng)
    pairs, (n, cells) = states * i.target.shape[1] + actions, i.operator.shape
    moves = np.stack([i.operator.shift(np.tile(unit, (n, 1))) for unit in np.eye(cells)], axis=1)
    cdf = np.sort(i.rng.uniform(size=(n, cells)), axis=1)[pairs[:, -1]]
    for now in pairs[:, -2::-1].T:
        for x in range(n):
            cdf[now == x] = cdf[now == x] @ moves[x] + i.operator.constant[x]
    return cdf.reshape(n, COPIES, cells)


def off_mean(i: Process) -> Floats:
    """(2,) the largest |average - F|, and how far the random CDFs are from CDFs."""
    drawn = random_cdfs(i)
    falls = np.diff(drawn, axis=2, prepend=0.0, append=1.0).min()
    return np.array([np.abs(drawn.mean(axis=1) - table(fixed(i).probs)).max(), -falls])


def hoeffding(i: Process, factor: float = 1.0) -> Floats:
    """(2,) sqrt(log(2 S A (m - 1) / delta) / (2 K)) + (m - 1) gamma^k, and 0."""
    cells = i.target.size * (i.atoms - 1)
    return np.array([factor * np.sqrt(np.log(2 * cells / DELTA) / (2 * COPIES)) + (i.atoms - 1) * i.gamma**STEPS, 0.0])


@dataclass(frozen=True, repr=False)
class Lottery(Instance):
    """One state that pays 0, 1 / (k - 1), ... or 1 alike; with gamma = 1 / k its return is uniform on [0, k / (k - 1)].

    Args:
        k: rewards, at least 2.
        size: samples.
        seed: of the samples.
    """

    k: int
    size: int
    seed: int

    def moved(self, rng: np.random.Generator, scale: float) -> Lottery:
        """Other samples."""
        return replace(self, seed=int(rng.integers(2**32)))

    @property
    def returns(self) -> Floats:
        """(size,) sorted discounted sums, up to what is less than rounding."""
        mdp = MDP([[[1.0]]], [[np.arange(self.k) / (self.k - 1)]], 1 / self.k, np.full((1, 1, self.k), 1 / self.k))
        steps = int(np.ceil(40 / np.log(self.k)))
        solver = SampledBackupSolver(mdp, samples=self.size, length=steps)
        paid = solver.sample(mdp.uniform, np.random.default_rng(self.seed)).rewards
        return np.sort(paid @ (1 / self.k) ** np.arange(steps))


LOTTERIES = st.builds(Lottery, st.integers(2, 6), st.integers(1, 1000), st.integers(0, 2**32 - 1))


def off_uniform(i: Lottery, top: float = 1.0) -> Any:
    """sqrt(N) sup |F_N - F|, F(z) = z (k - 1) / k."""
    cdf, n = np.clip(i.returns * (1 - 1 / i.k) / top, 0, 1), i.size
    return np.sqrt(n) * max((np.arange(1, n + 1) / n - cdf).max(), (cdf - np.arange(n) / n).max())


SINGLE = processes(actions=1, gamma_max=0.8)
"""What is left of a start after 30 steps is little."""

CLAIMS = (
    Claim(
        id="sampling/perturbation",
        statement="|V' - V| <= W1(eta', eta) <= gamma L / (1 - gamma) max TV(P', P), eta' and V' for transitions P'"
        + WITH_ETA,
        source="F' - F = (I - T')^-1 (T' - T) F: 1 / (1 - gamma) in l1, times gamma L TV, as CDFs differ by at most 1",
        tag="proved",
        instances=processes(),
        lhs=lambda i: apart(i, elsewhere(i)),
        rhs=lambda i: np.array([i.gamma * length(i) / (1 - i.gamma) * moved(i), 0]),
        mutants={
            "half of it": {"rhs": lambda i: np.array([i.gamma * length(i) / (1 - i.gamma) * moved(i) / 2, 0])},
            **NO_CONSTANT,
        },
        tol=lambda i: 1e-12 + 2 * rough(i),
    ),
    Claim(
        id="sampling/local-variation",
        statement="Var(gamma V(X')) / L <= sig(x) and sig(x) / (gamma L) <= 1/4" + WITH_SIG,
        source="a difference of means is at most sqrt(L) in l_2; the variance of a number in [0, 1] is at most 1/4",
        tag="proved",
        instances=processes(),
        lhs=local_variation,
        rhs=lambda i: np.array([1 / 4, 0]),
        mutants={"1/8": {"rhs": lambda i: np.array([1 / 8, 0])}, **NO_CONSTANT},
        tol=lambda i: 1e-12 + 3 * rough(i) / min(1, i.gamma * length(i)),
    ),
    Claim(
        id="sampling/bellman-inequality",
        statement="sig + gamma P gini <= gini, gini(x) the integral of F(x) (1 - F(x))" + WITH_SIG,
        source="the law of total variance at every atom, and u (1 - u) is concave under averages over cells",
        tag="proved",
        instances=processes(),
        lhs=inequality,
        rhs=lambda i: np.append(gini(i), 0),
        mutants={
            "sig twice": {"lhs": partial(inequality, times=2.0)},
            "without discount": {"lhs": partial(inequality, power=0.0)},
        },
        tol=lambda i: 1e-12 + 3 * rough(i),
    ),
    Claim(
        id="sampling/summed-variation",
        statement="(I - gamma P)^-1 sig / L <= 1/4" + WITH_SIG,
        source="bellman-inequality, and gini <= L / 4",
        tag="proved",
        instances=processes(),
        lhs=summed_variation,
        rhs=partial(below, constant=1 / 4),
        mutants={
            "1/24": {"rhs": partial(below, constant=1 / 24)},
            **NO_CONSTANT,
        },
        tol=lambda i: 1e-12 + 3 * rough(i) / (1 - i.gamma) / min(1, length(i)),
    ),
    Claim(
        id="sampling/summed-roots",
        statement="(I - sqrt(gamma) P)^-1 sqrt(sig) <= (1 + sqrt(gamma)) / 2 sqrt(L / (1 - gamma)), which is "
        "(1 + sqrt(gamma)) / (2 (1 - gamma)) for rewards that fill [0, 1]" + WITH_SIG,
        source="summed-variation and discounted-roots",
        tag="proved",
        instances=processes(),
        lhs=summed_roots,
        rhs=partial(below, constant=1 / 2),
        mutants={"1/8": {"rhs": partial(below, constant=1 / 8)}, **NO_CONSTANT},
        # the Cramér norm is solved to 1e-12 / (1 - sqrt(gamma)), and summed
        tol=lambda i: 1e-11 / (1 - np.sqrt(i.gamma)) ** 2 / min(1, np.sqrt(length(i))),
    ),
    Claim(
        id="sampling/discounted-roots",
        statement="max (I - sqrt(gamma) P)^-1 v <= (1 + sqrt(gamma)) max (I - gamma P)^-1 v and "
        "((I - sqrt(gamma) P)^-1 sqrt(v))^2 <= (I - sqrt(gamma) P)^-1 v / (1 - sqrt(gamma)) for v >= 0",
        source="I - gamma P = (I - sqrt(gamma) P) + (sqrt(gamma) - gamma) P; Jensen",
        tag="proved",
        instances=processes(),
        lhs=roots,
        rhs=roots_bound,
        mutants={"without the factors": {"rhs": partial(roots_bound, power=0.0)}},
        tol=lambda i: 1e-14 / (1 - np.sqrt(i.gamma)) ** 3,  # a size, a condition and a factor of 1 / (1 - root) each
    ),
    Claim(
        id="sampling/one-step-error",
        statement="E |(T_N - T) F|^2 = sig / N in squared Cramér distance, T_N for the frequencies of N next states"
        + WITH_SIG,
        source="the variance of an average; all samples of up to 3 are listed",
        tag="proved",
        instances=processes(actions=1),
        lhs=enumerated,
        identity=lambda i: squared_distance(i, 1 + i.seed % 3),
        mutants={
            "N^2": {"identity": lambda i: squared_distance(i, (1 + i.seed % 3) ** 2)},
            **ROUNDED,
        },
        where=lambda i: len(i.target) <= 3,
    ),
    Claim(
        id="sampling/sample-complexity",
        statement="|V_N - V| <= W1(eta_N, eta) <= gamma L / (1 - gamma) (1/2 + sqrt(log(S A / delta) / 2)) / sqrt(N) "
        "with probability 1 - delta, eta_N and V_N for transitions from N samples a pair, delta = 1e-6" + WITH_ETA,
        source="perturbation in l_2, whose mean is at most sqrt(gamma L / (4 N)); McDiarmid, and a union over pairs",
        tag="proved",
        instances=processes(),
        lhs=lambda i: apart(i, estimated(i)),
        rhs=enough,
        mutants={"1 / N": {"rhs": partial(enough, power=1.0)}, **NO_CONSTANT},
        tol=lambda i: 1e-12 + 2 * rough(i),
    ),
    Claim(
        id="sampling/stochastic-equation",
        statement="the solutions of Phi(x) = T_x Phi(X') + b_x in law, a backup from one sampled next pair X', are "
        "random CDFs whose mean F is that of the categorical fixed point on m atoms: |mean of K - F| <= "
        "sqrt(log(2 S A (m - 1) / delta) / (2 K)) + (m - 1) gamma^k after k steps, with probability 1 - delta, "
        "delta = 1e-6",
        source=f"{DCFP}, the stochastic categorical CDF Bellman equation; Hoeffding, and column sums gamma of T_x",
        tag="proved",
        instances=SINGLE,
        lhs=off_mean,
        rhs=hoeffding,
        mutants={"a tenth of it": {"rhs": partial(hoeffding, factor=0.1)}, **NO_CONSTANT},
        tol=1e-11,  # of the solution, and sums of at most 30 entries in each step
    ),
    Claim(
        id="sampling/dkw",
        statement="sqrt(N) sup |F_N - F| <= sqrt(log(2 / delta) / 2) with probability 1 - delta, delta = 1e-6, F_N the "
        "CDF of N simulated returns, uniform for rewards uniform on k points and gamma = 1 / k",
        source="Dvoretzky, Kiefer and Wolfowitz 1956; Massart 1990 for the constant",
        tag="proved",
        instances=LOTTERIES,
        lhs=off_uniform,
        rhs=lambda i: np.sqrt(np.log(2 / DELTA) / 2),
        mutants={
            "a fifth of it": {"rhs": lambda i: np.sqrt(np.log(2 / DELTA) / 2) / 5},
            "twice the range": {"lhs": partial(off_uniform, top=2.0)},
        },
    ),
)
