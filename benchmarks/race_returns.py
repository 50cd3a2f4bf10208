"""The race of the exact return-distribution solvers against the standard ways, to one certificate for all.

    python benchmarks/race_returns.py --out runs/race-returns

The certificate is the residual, the largest Cramér norm of T F - F over states and actions; all are asked for 1e-8. Ours
is timed from the decision process to the laws, peers once they hold D, P and c. Each row is printed as soon as it is
known. A ratio that ends in "x" is peer / ours, any other ours / unit; ">=" marks a peer that was stopped short of the
residual, "?" one that was then short of the target too. --quick runs every row on small sizes, which proves nothing
about speed. With --out the table is also written, as table.csv and table.md. It takes about two minutes and 2 GB.
"""

from __future__ import annotations

import math
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias
from unittest.mock import patch

import numpy as np
import pandas as pd
import scipy.sparse
import scipy.sparse.linalg
import tyro
from numpy.typing import NDArray
from race_games import best, machine, name, short, time

from nlhf.ladder import check_folder
from nlhf.run import write_atomically
from nlhf.tabular import MDP, categorical_fixed_point, quantile_dp
from nlhf.tabular.bellman import Linear, Shift, grid

Floats: TypeAlias = NDArray[np.float64]
Solve: TypeAlias = Callable[[], tuple[Floats, int]]
"""() -> (CDFs (S A, m - 1), applications of the operator): what is timed."""

TOL = 1e-8
WIDTHS = {"work": 43, "ours": 7, "peer": 32, "peer's": 7, "ratio": 13, "target": 8, "met": 3}
WIDTHS |= {"residual": 8, "peer's residual": 15, "applications": 12, "method": 11}
sparse: Any = scipy.sparse  # whose stubs know fewer arguments than it takes
FAST = find_spec("numba") is not None


class Outcome(NamedTuple):
    """What a solver took and reached; NaN where that is unknown or means nothing."""

    seconds: float = math.nan
    residual: float = math.nan
    applications: int | None = None
    note: str = ""

    @property
    def unfinished(self) -> bool:
        return self.residual > TOL


class Table:
    """Rows as they come. `judge`: whether the sizes are those that the targets are for."""

    def __init__(self, judge: bool) -> None:
        self.judge, self.numbers, self.texts = judge, list[dict[str, Any]](), list[list[str]]()
        self._print(list(WIDTHS))

    def add(
        self, work: str, us: Outcome, peer: str, them: Outcome, target: float, unit: str = "x", value: float = 0
    ) -> None:
        """The ratio in "x" is them / us and should be at least the target; otherwise us / them, or `value`, at most."""
        faster = unit == "x"
        value = value or (them.seconds / us.seconds if faster else us.seconds / them.seconds)
        met = "yes" if (value >= target) == faster else "?" if them.unfinished else "no"
        met, ratio = ("" if math.isnan(value) or not self.judge else met), f"{short(value)}{' ' * (not faster)}{unit}"
        ratio = (them.note or "–") if math.isnan(value) else ">= " * them.unfinished + ratio
        residuals = ["–" if math.isnan(one.residual) else f"{one.residual:.1e}" for one in (us, them)]
        applied = " / ".join("–" if one.applications is None else f"{one.applications}" for one in (us, them))
        wanted = f"{'>=' if faster else '<='} {target:g}"
        cells = [work, time(us.seconds), peer, time(them.seconds), ratio, wanted, met, *residuals, applied, us.note]
        self._print(cells)
        row = {"work": work, "ours_s": us.seconds, "peer": peer, "peer_s": them.seconds, "ratio": value, "unit": unit}
        row |= {"lower_bound": them.unfinished, "target": target, "met": met, "residual": us.residual}
        row |= {"peer_residual": them.residual, "applications": us.applications, "method": us.note}
        self.numbers.append(row | {"peer_applications": them.applications, "note": them.note})

    def _print(self, cells: list[str]) -> None:
        self.texts.append(cells)
        padded = (cell.ljust(width) for cell, width in zip(cells, WIDTHS.values(), strict=True))
        print("  ".join(padded).rstrip(), flush=True)

    def write(self, out: Path, about: str) -> None:
        out.mkdir(parents=True, exist_ok=True)
        head, *body = ("| " + " | ".join(cells) + " |" for cells in self.texts)
        text = "\n".join([about, "", head, "|---" * len(WIDTHS) + "|", *body, ""])
        for path, content in (("table.csv", pd.DataFrame(self.numbers).to_csv(index=False)), ("table.md", text)):
            write_atomically(out / path, content.encode())
            print(f"wrote {out / path}")


def operator_of(mdp: MDP, atoms: int) -> Linear:
    return Linear(Shift(mdp, grid(mdp, atoms)), mdp.uniform)


def residual(operator: Linear, cdf: Floats) -> float:
    """The certificate."""
    return operator.cramer(operator(cdf) + operator.constant - cdf)


def ours(mdp: MDP, atoms: int, method: str = "auto", runs: int = 3) -> Outcome:
    solve, operator = partial(categorical_fixed_point, mdp, mdp.uniform, atoms, TOL, method), operator_of(mdp, atoms)
    if runs > 1:
        solve()
    seconds, found = best(solve, runs)
    reached = residual(operator, found.returns.cdf.reshape(operator.shape))
    return Outcome(seconds, reached, found.iterations, found.method)


def race(operator: Linear, peer: Solve | None) -> Outcome:
    if peer is None:
        return Outcome(note="needs nlhf[fast]")
    seconds, (cdf, applications) = best(peer)
    return Outcome(seconds, residual(operator, cdf), applications)


def middle(operator: Linear) -> Floats:
    """Where peers start: the return is the middle of the grid."""
    return np.broadcast_to(np.arange(operator.shape[1]) >= operator.shape[1] // 2, operator.shape).astype(np.float64)


def iterated(step: Callable[[Floats], Floats], operator: Linear, budget: float, every: int = 5) -> tuple[Floats, int]:
    """Plain iteration that looks at the change now and then, until it is small enough or the budget is spent."""
    end, cdf = perf_counter() + budget, middle(operator)
    for k in count(1):
        new = step(cdf)
        if k % every == 0 and (operator.cramer(new - cdf) <= TOL or perf_counter() > end):
            return new, k
        cdf = new
    raise AssertionError


def products(operator: Linear, budget: float) -> Solve:
    """Categorical dynamic programming with matrix products, for one action."""
    chain, shift, c = operator.shift.mdp.transitions, operator.shift.matrix, operator.constant
    return lambda: iterated(lambda F: (shift @ (chain @ F).ravel()).reshape(F.shape) + c, operator, budget)


def looped(operator: Linear, budget: float) -> Solve:
    """Categorical dynamic programming as it is usually written: mix, push and project the atoms state by state."""
    mdp, z, stride = operator.shift.mdp, operator.shift.atoms, operator.stride
    chain, r, m = mdp.transitions, mdp.rewards.ravel(), operator.shift.atoms.size

    def step(cdf: Floats) -> Floats:
        probs = np.diff(cdf, axis=1, prepend=0.0, append=1.0)
        new = np.empty_like(probs)
        for x in range(len(r)):
            q = chain[x] @ probs
            b = np.clip(r[x] + mdp.gamma * z - z[0], 0, z[-1] - z[0]) / stride
            low = np.minimum(np.floor(b).astype(np.int64), m - 2)
            new[x] = np.bincount(low, q * (low + 1 - b), m) + np.bincount(low + 1, q * (b - low), m)
        return np.cumsum(new[:, :-1], axis=1)

    return lambda: iterated(step, operator, budget)


def gmres(operator: Linear, budget: float) -> Solve:
    """Matrix-free, restarted with a smaller relative tolerance until the certificate agrees."""
    shape, size = operator.shape, math.prod(operator.shape)

    def solve() -> tuple[Floats, int]:
        applied = 0

        def system(v: Floats) -> Floats:
            nonlocal applied
            applied += 1
            return v - operator(v.reshape(shape)).ravel()

        end, x, rtol, matrix = perf_counter() + budget, middle(operator), 1e-3, (size, size)
        linear = scipy.sparse.linalg.LinearOperator(matrix, matvec=system, dtype=np.float64)
        while (reached := residual(operator, x)) > TOL and perf_counter() < end:
            rtol = max(rtol * min(0.1, TOL / reached), 1e-15)
            b, start = operator.constant.ravel(), x.ravel()
            x = scipy.sparse.linalg.gmres(linear, b, start, rtol=rtol, restart=60, maxiter=4)[0].reshape(shape)
        return x, applied

    return solve


def sparse_lu(operator: Linear) -> Solve:
    system = sparse.csc_array(sparse.eye_array(math.prod(operator.shape)) - operator.explicit())
    c = operator.constant
    return lambda: (scipy.sparse.linalg.splu(system).solve(c.ravel()).reshape(c.shape), 0)


def fused(operator: Linear, budget: float) -> Solve | None:
    """Plain iteration, compiled: mixing, shift, constant and change in one pass, on every core."""
    if not FAST:
        return None
    nb, mdp, shift, shape = import_module("numba"), operator.shift.mdp, operator.shift.matrix, operator.shape
    P, w, c = mdp.transitions, operator.weights, operator.constant
    (states, actions), cells, row = w.shape, shape[1], np.repeat(np.arange(c.size), np.diff(shift.indptr))
    shift.sort_indices()
    first = np.zeros(c.size, np.int32)  # where the entries of a row of D begin
    kept = np.diff(shift.indptr) > 0
    first[kept] = shift.indices[shift.indptr[:-1][kept]] % cells
    place = shift.indices % cells - first[row]
    width = int(place.max()) + 1
    taps = np.zeros((*shape, width))
    taps.reshape(-1, width)[row, place] = shift.data
    first = first.reshape(shape)

    @nb.njit(parallel=True, fastmath=True)
    def sweep(ptr, idx, val, w, first, taps, c, F, mixed, new, sums):  # type: ignore[no-untyped-def]
        if actions > 1:
            for s in nb.prange(states):
                for i in range(cells):
                    mixed[s, i] = 0.0
                for a in range(actions):
                    for i in range(cells):
                        mixed[s, i] += w[s, a] * F[s * actions + a, i]
        parts = nb.get_num_threads()
        for t in nb.prange(parts):
            g = np.zeros(cells + width)
            for x in range(t * sums.size // parts, (t + 1) * sums.size // parts):
                for i in range(cells):
                    g[i] = 0.0
                for e in range(ptr[x], ptr[x + 1]):
                    p, y = val[e], idx[e]
                    for i in range(cells):
                        g[i] += p * mixed[y, i]
                total = 0.0
                for i in range(cells):
                    value = c[x, i]
                    for k in range(width):
                        value += taps[x, i, k] * g[first[x, i] + k]
                    total += (value - F[x, i]) ** 2
                    new[x, i] = value
                sums[x] = total

    def solve(limit: float = budget) -> tuple[Floats, int]:
        F, end = middle(operator), perf_counter() + limit
        new, mixed, sums = np.empty(shape), np.empty((states, cells)), np.empty(shape[0])
        for k in count(1):
            sweep(P.indptr, P.indices, P.data, w, first, taps, c, F, F if actions == 1 else mixed, new, sums)
            if math.sqrt(operator.stride * sums.max()) <= TOL or perf_counter() > end:
                return new, k
            F, new = new, F
        raise AssertionError

    solve(0.0)  # compile
    return solve


def sorted_by_state(chain: Any, theta: Floats, gamma: float, r: Floats) -> Floats:
    """A sweep of quantile dynamic programming as it is usually written: sort the successors' values state by state."""
    m, new = theta.shape[1], np.empty_like(theta)
    for x in range(len(theta)):
        order = np.argsort(values := theta.ravel(), kind="stable")
        reached = np.cumsum(np.repeat(chain[x] / m, m)[order])
        place = np.minimum(np.searchsorted(reached, (np.arange(m) + 0.5) / m - 1e-12), values.size - 1)
        new[x] = r[x] + gamma * values[order[place]]
    return new


def stream(matrix: Any) -> float:
    """Seconds to read what a matrix holds once."""
    held = [matrix.data, matrix.indices] if sparse.issparse(matrix) else [matrix]
    words = [x.ravel().view(np.uint8)[: x.nbytes // 8 * 8].view(np.int64) for x in held]
    return best(lambda: [x.sum() for x in words], least=5)[0]


class Sizes(NamedTuple):
    large: int = 1000
    atoms: int = 200
    small: int = 100
    chain: int = 20
    side: int = 32
    huge: int = 10_000
    limit: float = 60.0
    """Seconds for a peer."""


def evaluations(table: Table, sizes: Sizes, seed: int) -> None:
    """Chains that forget where they began."""
    m, limit = sizes.atoms, sizes.limit
    mdp = MDP.dirichlet(sizes.small, 1.0, 0.99, seed)
    us, operator, work = ours(mdp, m), operator_of(mdp, m), f"{sizes.small} states, dense, {m} atoms"
    table.add(work, us, "loop over states, project", race(operator, looped(operator, limit)), 300)
    table.add(work, us, f"{name('scipy')} splu", race(operator, sparse_lu(operator)), 50)
    mdp = MDP.garnet(sizes.large, 5, 0.99, seed)
    us, operator, work = ours(mdp, m), operator_of(mdp, m), f"{sizes.large} states, 5 successors, {m} atoms"
    table.add(work, us, "fused iteration, numba", race(operator, fused(operator, limit)), 8)
    mdp = MDP.dirichlet(sizes.large, 1.0, 0.99, seed)
    us, operator, work = ours(mdp, m), operator_of(mdp, m), f"{sizes.large} states, dense, {m} atoms"
    table.add(work, us, f"{name('scipy')} gmres", race(operator, gmres(operator, limit)), 20)
    table.add(work, us, "iteration, matrix products", race(operator, products(operator, limit)), 100)


def hard_ones(table: Table, sizes: Sizes, seed: int) -> None:
    """gamma near 1, and walks that mix slowly."""
    for gamma in (0.99, 0.999):
        us = ours(MDP.chain(sizes.chain, gamma), 101, "banded")
        work = f"chain of {sizes.chain}, gamma={gamma:g}, 101 atoms"
        table.add(work, us, "the residual", Outcome(), 1e-14, "reached", us.residual)
    side, rng = sizes.side, np.random.default_rng(seed)
    windy = MDP.windy_grid(side, 0.99)
    walk = sparse.kron(sparse.eye_array(side**2), np.full((1, 4), 0.25)) @ windy.transitions
    merged = MDP(walk, windy.rewards[:, 0, 0], 0.99)
    near = np.clip([[-1, 0], [1, 0], [0, -1], [0, 1]] + np.argwhere(np.ones((side, side)))[:, None], 0, side - 1)
    where = np.repeat(np.arange(side**2), 4), (near @ [side, 1]).ravel()
    share = rng.dirichlet(np.ones(4), size=side**2).ravel()
    random = MDP(sparse.csr_array((share, where), shape=(side**2, side**2)), rng.uniform(size=side**2), 0.99)
    for kind, mdp in ((", 4 actions", windy), (", their mean", merged), (", random walk", random)):
        us, operator = ours(mdp, sizes.atoms), operator_of(mdp, sizes.atoms)
        work = f"{side} x {side} grid{kind}, {sizes.atoms} atoms"
        table.add(work, us, "fused iteration, numba", race(operator, fused(operator, sizes.limit)), 1)


def sweeps(table: Table, sizes: Sizes, seed: int) -> None:
    """One sweep of quantile dynamic programming, after thirty of them; as residual, the difference to the peer's."""
    mdp, work = (
        MDP.dirichlet(sizes.small, 1.0, 0.99, seed),
        f"one quantile sweep, {sizes.small} states, m={sizes.atoms}",
    )
    chain, r = mdp.transitions, mdp.rewards[:, 0]
    theta = np.full((sizes.small, sizes.atoms), 50.0)
    for _ in range(30):
        theta = quantile_dp._backup(chain, theta, mdp.gamma, r, np.ones_like(r))
    seconds, wanted = best(lambda: sorted_by_state(chain, theta, mdp.gamma, r))
    for kind, found in (("numba", FAST), ("numpy", False)):
        with patch.object(quantile_dp, "find_spec", lambda _, found=found: found or None):
            sweep = partial(quantile_dp._backup, chain, theta, mdp.gamma, r, np.ones_like(r))
            taken, new = best(sweep, least=3)
        us = Outcome(taken, float(np.abs(new - wanted).max()), note=kind)
        if found or kind == "numpy":
            table.add(work, us, "sort for each state", Outcome(seconds), 20)
        else:
            table.add(work, Outcome(), "sort for each state", Outcome(note="needs nlhf[fast]"), 20)


def applications(table: Table, sizes: Sizes, seed: int) -> None:
    """One application of T, against reading P and D once; where P is dense the product with it is what takes long."""
    n, m = sizes.large, sizes.atoms
    for kind, mdp in (("5 successors", MDP.garnet(n, 5, 0.99, seed)), ("dense", MDP.dirichlet(n, 1.0, 0.99, seed))):
        operator, chain = operator_of(mdp, m), mdp.transitions
        cdf, read = middle(operator), stream(chain) + stream(operator.shift.matrix)
        us, work = Outcome(best(lambda: operator(cdf), least=5)[0]), f"apply T, {n} states, {kind}, {m} atoms"  # noqa: B023
        table.add(work, us, "read P and D", Outcome(read), 1.5, "reads")
        product = best(lambda: chain @ cdf, least=5)[0]  # noqa: B023
        table.add(work, us, "P @ F, read D", Outcome(product + stream(operator.shift.matrix)), 1.5, "times")


def huge(table: Table, sizes: Sizes, seed: int) -> None:
    mdp = MDP.garnet(sizes.huge, 5, 0.99, seed)
    us, work = ours(mdp, 100, runs=1), f"{sizes.huge:,} states, 5 successors, 100 atoms"
    tracemalloc.start()
    categorical_fixed_point(mdp, mdp.uniform, 100, TOL)
    memory = tracemalloc.get_traced_memory()[1] / 2**30
    tracemalloc.stop()
    table.add(work, us, "a minute", Outcome(), 60, "s", us.seconds)
    table.add(work, us, "peak memory", Outcome(), 4, "GiB", memory)


def main(quick: bool = False, out: Path | None = None, seed: int = 0) -> None:
    """Race the exact return-distribution solvers against the standard ways.

    Args:
        quick: small sizes, to see that everything runs; no target is judged.
        out: folder to write the table in; by default it is only printed.
        seed: of the decision processes, >= 0.
    """
    if out is not None:
        check_folder(out)
    sizes = Sizes(50, 30, 10, 5, 6, 200, 5.0) if quick else Sizes()
    about = f"{machine()}\nResidual asked for: {TOL:g}. gamma = 0.99 where nothing is said, seed {seed}."
    print(about, end="\n\n")
    table = Table(judge=not quick)
    for rows in (sweeps, applications, evaluations, hard_ones, huge):
        rows(table, sizes, seed)
    if out is not None:
        table.write(out, about)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError) as error:
        sys.exit(f"race_returns: {error}")
