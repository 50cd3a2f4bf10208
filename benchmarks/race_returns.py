"""The race of the exact return-distribution solvers against the standard ways, to one certificate for all.

    python benchmarks/race_returns.py --out runs/race-returns

The gap is the largest Cramér norm of T F - F, 1e-8 is asked for; gamma is 0.99 where nothing else is said, m the number
of atoms. Ours is timed from the decision process to the laws, peers from D, P and c. Ratios, --quick and --out are
those of `race_games`. It takes about two minutes and 1 GB.
"""

from __future__ import annotations

import math
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias
from unittest.mock import patch

import numpy as np
import scipy.sparse
import tyro
from numpy.typing import NDArray
from race_games import Outcome, Table, best, machine, name
from scipy.sparse import linalg

from nlhf.run import check_folder
from nlhf.tabular import MDP, categorical_fixed_point, quantile_dp
from nlhf.tabular.bellman import Linear, Shift, grid

Floats: TypeAlias = NDArray[np.float64]
Solve: TypeAlias = Callable[[], tuple[Floats, int | None]]
"""() -> (CDFs (S A, m - 1), products with P or None where there are none): what is timed."""
Peer: TypeAlias = Callable[[Linear], Solve]

TOL, LIMIT = 1e-8, 60.0  # the gap asked for, and the seconds that a peer has for it
MISSING = Outcome(note="needs nlhf[fast]")
FUSED = f"fused iteration, {name('numba')}"
sparse: Any = scipy.sparse  # whose stubs know fewer arguments than it takes


def gap(operator: Linear, cdf: Floats) -> float:
    return operator.cramer(operator(cdf) + operator.constant - cdf)


def ours(mdp: MDP, atoms: int, method: str = "auto") -> tuple[str, Outcome, Linear]:
    """The method, what it took, and the operator for the peers."""
    seconds, found = best(partial(categorical_fixed_point, mdp, mdp.uniform, atoms, TOL, method), least=3)
    operator = Linear(Shift(mdp, grid(mdp, atoms)), mdp.uniform)
    reached = gap(operator, found.returns.cdf.reshape(operator.shape))
    return found.method, Outcome(seconds, reached, found.iterations), operator


def race(operator: Linear, peer: Peer) -> Outcome:
    try:
        seconds, (cdf, taken) = best(peer(operator))
    except ImportError:
        return MISSING
    return Outcome(seconds, reached := gap(operator, cdf), taken, not reached <= TOL)


def middle(operator: Linear) -> Floats:
    """Where peers start: the return is the middle of the grid."""
    return np.tile(np.arange(operator.shape[1]) >= operator.shape[1] // 2, (operator.shape[0], 1)).astype(np.float64)


def iterated(step: Callable[[Floats], Floats], operator: Linear) -> tuple[Floats, int]:
    """Plain iteration; now and then it looks whether the change is small enough, or time is up."""
    end, cdf, k = perf_counter() + LIMIT, middle(operator), 0
    while True:
        new, k = step(cdf), k + 1
        if k % 5 == 0 and (operator.cramer(new - cdf) <= TOL or perf_counter() > end):
            return new, k
        cdf = new


def products(operator: Linear) -> Solve:
    """Categorical dynamic programming by products with P and D, for one action."""
    P, D, c = operator.shift.mdp.transitions, operator.shift.matrix, operator.constant
    return lambda: iterated(lambda F: (D @ (P @ F).ravel()).reshape(F.shape) + c, operator)


def looped(operator: Linear) -> Solve:
    """Categorical dynamic programming as it is usually written: mix, move and project the atoms state by state."""
    mdp, z, m = operator.shift.mdp, operator.shift.atoms, operator.shift.atoms.size

    def step(cdf: Floats) -> Floats:
        new = np.empty_like(probs := np.diff(cdf, axis=1, prepend=0.0, append=1.0))
        for x, r in enumerate(mdp.rewards.ravel()):
            q = mdp.transitions[x] @ probs
            t = np.clip((r + mdp.gamma * z - z[0]) / operator.stride, 0, m - 1)
            low = np.minimum(t.astype(np.int64), m - 2)
            new[x] = np.bincount(low, q * (low + 1 - t), m) + np.bincount(low + 1, q * (t - low), m)
        return np.cumsum(new[:, :-1], axis=1)

    return lambda: iterated(step, operator)


def gmres(operator: Linear) -> Solve:
    """Matrix-free, to the tolerance in the Euclidean norm that proves the gap."""
    c, shape, atol = operator.constant.ravel(), operator.shape, TOL / math.sqrt(operator.stride)
    system = linalg.LinearOperator((c.size, c.size), lambda v: v - operator(v.reshape(shape)).ravel(), dtype=np.float64)
    solve = partial(linalg.gmres, system, c, middle(operator).ravel(), rtol=0.0, atol=atol, restart=60, maxiter=20)
    return lambda: (solve()[0].reshape(shape), None)


def sparse_lu(operator: Linear) -> Solve:
    c, system = operator.constant, sparse.csc_array(sparse.eye_array(operator.constant.size) - operator.explicit())
    return lambda: (linalg.splu(system).solve(c.ravel()).reshape(c.shape), None)


def fused(operator: Linear) -> Solve:
    """Plain iteration, compiled: mixing, D, c and the change in one pass, row by row in the cache, on all cores."""
    nb, P, w = import_module("numba"), operator.shift.mdp.transitions, operator.weights
    D = operator.shift.matrix.tocsr()
    D.eliminate_zeros()
    D = D.tocoo()
    (states, actions), (n, cells), c = w.shape, operator.shape, operator.constant
    (x, _), (i, j) = np.divmod(D.coords, cells)
    first = np.full((n, cells), cells, np.int32)  # where the entries of a row of D begin
    np.minimum.at(first, (x, i), j)
    taps = np.zeros((n, cells, width := 1 + int((j - first[x, i]).max())))
    taps[x, i, j - first[x, i]] = D.data

    @nb.njit(parallel=True, fastmath=True)
    def sweep(ptr, idx, val, w, first, taps, c, F, mixed, new, sums):  # type: ignore[no-untyped-def]
        if actions > 1:
            for s in nb.prange(states):
                for i in range(cells):
                    mixed[s, i] = 0.0
                    for a in range(actions):
                        mixed[s, i] += w[s, a] * F[s * actions + a, i]
        for x in nb.prange(n):
            g, total = np.zeros(cells + width), 0.0
            for e in range(ptr[x], ptr[x + 1]):
                p, y = val[e], idx[e]
                for i in range(cells):
                    g[i] += p * mixed[y, i]
            for i in range(cells):
                value = c[x, i]
                for k in range(width):
                    value += taps[x, i, k] * g[first[x, i] + k]
                total += (value - F[x, i]) ** 2
                new[x, i] = value
            sums[x] = total

    def solve(limit: float = LIMIT) -> tuple[Floats, int]:
        F, new, mixed, sums = middle(operator), np.empty((n, cells)), np.empty((states, cells)), np.full(n, np.inf)
        k, end = 0, perf_counter() + limit
        while math.sqrt(operator.stride * sums.max()) > TOL and (k == 0 or perf_counter() < end):
            sweep(P.indptr, P.indices, P.data, w, first, taps, c, F, mixed if actions > 1 else F, new, sums)
            F, new, k = new, F, k + 1
        return F, k

    solve(0.0)  # compiles
    return solve


def sorted_by_state(chain: Floats, theta: Floats, gamma: float, r: Floats) -> Floats:
    """A sweep of quantile dynamic programming as it is usually written: sort the successors' values state by state."""
    new, m = np.empty_like(theta), theta.shape[1]
    for x in range(len(theta)):
        order = np.argsort(values := r[x] + gamma * theta.ravel(), kind="stable")
        reached = np.cumsum(np.repeat(chain[x] / m, m)[order])
        new[x] = values[order[np.searchsorted(reached, (np.arange(m) + 0.5) / m - 1e-12)]]
    return new


def reading(matrix: Any) -> float:
    """Seconds to read once what a matrix holds."""
    held = [matrix.data, matrix.indices] if sparse.issparse(matrix) else [matrix]
    words = [x.ravel().view(np.uint8)[: x.nbytes // 8 * 8].view(np.int64) for x in held]  # integers are summed fastest
    return best(lambda: [x.sum() for x in words], least=5)[0]


def sweeps(table: Table, n: int, m: int, seed: int) -> None:
    """One sweep of quantile dynamic programming, with the difference to the peer's as gap."""
    mdp = MDP.dirichlet(n, 1.0, 0.99, seed)
    chain, r = mdp.transitions, mdp.rewards[:, 0]
    sweep = partial(quantile_dp._backup, chain, gamma=mdp.gamma, r=r, q=np.ones_like(r))
    theta = quantile_dp.quantile_fixed_point(mdp, mdp.uniform, m, tol=10.0).returns.values[:, 0]  # on the way to it
    seconds, wanted = best(lambda: sorted_by_state(chain, theta, mdp.gamma, r[:, 0]))
    for kind, spec in (("numba", find_spec("numba")), ("numpy", None)):
        with patch.object(quantile_dp, "find_spec", lambda _, spec=spec: spec):
            taken, new = best(partial(sweep, theta=theta), least=3)
        us = Outcome(taken, float(np.abs(new - wanted).max()))
        them = MISSING if (kind, spec) == ("numba", None) else Outcome(seconds)
        table.add(f"n={n} dense m={m} quantile sweep, {kind}", us, "sort for each state", them, 20)


def application(table: Table, kind: str, mdp: MDP, m: int) -> None:
    operator, work = Linear(Shift(mdp, grid(mdp, m)), mdp.uniform), f"n={mdp.n_states} {kind} m={m}, T F"
    cdf, read, P = middle(operator), reading(operator.shift.matrix), mdp.transitions
    us, product = (Outcome(best(partial(f, cdf), least=5)[0]) for f in (operator, P.__matmul__))
    if sparse.issparse(P):  # of a dense P the non-zeros of T would take 5 GB
        table.add(work, us, "read T's non-zeros", Outcome(reading(operator.explicit())), 1.5, "times")
    table.add(work, us, "P @ F, read D", Outcome(product.seconds + read), None, "times")
    table.add(work, us, "read P and D", Outcome(reading(P) + read), None, "times")


def evaluation(table: Table, kind: str, mdp: MDP, m: int, *peers: tuple[str, Peer, float]) -> None:
    method, us, operator = ours(mdp, m)
    for label, peer, target in peers:
        table.add(f"n={mdp.n_states} {kind} m={m}, {method}", us, label, race(operator, peer), target)


def random_walk(side: int, gamma: float, seed: int) -> MDP:
    """Random steps on a square grid."""
    n, rng = side**2, np.random.default_rng(seed)
    near = np.argwhere(np.ones((side, side)))[:, None] + [[-1, 0], [1, 0], [0, -1], [0, 1]]
    to, share = np.clip(near, 0, side - 1) @ [side, 1], rng.dirichlet(np.ones(4), size=n)
    chain = sparse.csr_array((share.ravel(), (np.repeat(np.arange(n), 4), to.ravel())), shape=(n, n))
    return MDP(chain, rng.uniform(size=n), gamma)


def huge(table: Table, mdp: MDP, m: int) -> None:
    method, us, _ = ours(mdp, m)
    tracemalloc.start()
    categorical_fixed_point(mdp, mdp.uniform, m, TOL)
    memory, work = tracemalloc.get_traced_memory()[1] / 1e9, f"n={mdp.n_states:,} 5 successors m={m}, {method}"
    tracemalloc.stop()
    table.add(work, us, "one second", Outcome(1.0), 60, "times")
    table.add(work, us, "peak memory", Outcome(), 4, "GB", memory)


def main(quick: bool = False, out: Path | None = None, seed: int = 0) -> None:
    """Race the exact return-distribution solvers against the standard ways.

    Args:
        quick: small sizes, to see that everything runs; no target is judged.
        out: folder to write the table in; by default it is only printed.
        seed: of the decision processes, >= 0.
    """
    if out is not None:
        check_folder(out)
    small, large, largest, m, chain, side = (10, 50, 200, 30, 5, 6) if quick else (100, 1000, 10_000, 200, 20, 32)
    print(about := f"{machine()}\nGap asked for: {TOL:g}. Decision processes are random with seed {seed}.\n")
    table = Table(judge=not quick)
    sweeps(table, small, m, seed)
    few, many = (MDP.dirichlet(n, 1.0, 0.99, seed) for n in (small, large))
    garnet = partial(MDP.garnet, branches=5, gamma=0.99, seed=seed)
    application(table, "5 successors", garnet(large), m)
    application(table, "dense", many, m)
    evaluation(table, "dense", few, m, ("loop over states", looped, 300), (f"{name('scipy')} splu", sparse_lu, 50))
    evaluation(table, "5 successors", garnet(large), m, (FUSED, fused, 8))
    evaluation(table, "dense", many, m, (f"{name('scipy')} gmres", gmres, 20), ("P @ F, then D", products, 100))
    for gamma in (0.99, 0.999):
        _, us, _ = ours(MDP.chain(chain, gamma), 101, "banded")
        table.add(f"chain n={chain} gamma={gamma:g} m=101, banded", us, "its gap", Outcome(), 1e-14, "", us.gap)
    evaluation(table, "windy, 4 actions", MDP.windy_grid(side, 0.99), m, (FUSED, fused, 1))
    evaluation(table, "random walk", random_walk(side, 0.99, seed), m, (FUSED, fused, 1))
    huge(table, garnet(largest), m // 2)
    if out is not None:
        table.write(out, about)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError) as error:
        sys.exit(f"race_returns: {error}")
