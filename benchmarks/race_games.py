"""The race of the exact game solvers against their peers: time to a gap that one certificate measures for all.

    python benchmarks/race_games.py --out runs/race-games

Each row is printed as soon as it is known. A ratio that ends in "x" is peer / ours, any other ours / unit; ">=" marks a
peer that was stopped, or gave up, short of the gap, "?" one that was then short of the target too. Peers run in
processes of their own: they have imported, built their game and solved a small one before the clock starts. --quick
runs every row on small sizes, which proves nothing about speed. With --out the table is also written, as table.csv and
table.md. It takes about two minutes and 5 GB.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import sys
import tracemalloc
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import pandas as pd
import tyro
from numpy.typing import NDArray
from scipy.special import expit

from nlhf import NashMD
from nlhf.metrics import best_response, kl_rows
from nlhf.run import check_folder, write_atomically
from nlhf.tabular import ExactSolver, LowRankGame, MatrixGame, Tabular, nash, regularized_nash

T = TypeVar("T")
Floats: TypeAlias = NDArray[np.float64]
Solve: TypeAlias = Callable[[], tuple[Any, int | None]]
"""() -> (probabilities, products with the game or None where the peer does not tell): what is timed."""
Peer: TypeAlias = Callable[[MatrixGame, float], Solve]
"""(game, tau) -> Solve. Imports and the peer's own form of the game come before the clock."""

TOL = 1e-12
WIDTHS = {"work": 38, "ours": 7, "peer": 32, "peer's": 7, "ratio": 13, "target": 8, "met": 3}
WIDTHS |= {"our gap": 7, "peer's gap": 10, "products": 9}


class Outcome(NamedTuple):
    """What a solver took and reached; NaN where that is unknown or means nothing."""

    seconds: float = math.nan
    gap: float = math.nan
    products: int | None = None
    unfinished: bool = False
    note: str = ""


def gap(game: MatrixGame | LowRankGame, policy: Tabular, tau: float) -> float:
    """The certificate: 2 tau KL(pi, BR(pi)), for tau = 0 twice the exploitability; the largest of all prompts."""
    if tau == 0:
        return max(0.0, 2 * float(game.versus(policy.probs).max()) - 1)
    return 2 * tau * float(kl_rows(policy.log_probs, best_response(policy, game, tau)).max())


def policy_of(probs: Any) -> Tabular:
    """A peer's answer as a policy; some say -1e-20 for 0."""
    with np.errstate(divide="ignore"):
        return Tabular.from_logits(np.log(np.maximum(np.asarray(probs, dtype=np.float64), 0.0)))


def clock(work: Callable[[], T]) -> tuple[float, T]:
    start = perf_counter()
    found = work()
    return perf_counter() - start, found


def best(work: Callable[[], T], least: int = 1) -> tuple[float, T]:
    """The fastest of `least` runs, or of as many as fit in half a second."""
    end = perf_counter() + 0.5
    fastest, found = clock(work)
    while (least := least - 1) > 0 or perf_counter() < end:
        seconds, found = clock(work)
        fastest = min(fastest, seconds)
    return fastest, found


def ours(game: MatrixGame | LowRankGame, tau: float) -> Outcome:
    solve = partial(regularized_nash, game, tau, TOL) if tau else partial(nash, game)
    solve()
    seconds, found = best(solve, least=3)
    return Outcome(seconds, gap(game, found.policy, tau), found.products)


def softmax(z: Floats) -> Floats:
    """SciPy's has overhead that a peer should not be charged for."""
    e = np.exp(z - z.max())
    return e / e.sum()


def gambit(game: MatrixGame, tau: float) -> Solve:
    """The logit branch, followed to lambda = 1 / tau."""
    package, skew = import_module("pygambit"), game.matrix - 0.5
    table = package.Game.from_arrays(skew, -skew)
    strategies = list(next(iter(table.players)).strategies)

    def solve() -> tuple[Any, None]:
        profile = package.qre.logit_solve_lambda(table, 1 / tau)[-1].profile
        return [profile[strategy] for strategy in strategies], None

    return solve


def clarabel(game: MatrixGame, tau: float) -> Solve:
    """min tau log sum_y mu(y) exp(M pi(y) / tau) + tau KL(pi, mu): half the gap, on the exponential cone."""
    cp, skew, mu = import_module("cvxpy"), game.matrix - 0.5, game.reference.probs

    def solve() -> tuple[Any, None]:
        pi = cp.Variable(game.n)
        objective = cp.log_sum_exp(np.log(mu) + (skew / tau) @ pi) + cp.sum(cp.kl_div(pi, mu))
        problem = cp.Problem(cp.Minimize(tau * objective), [cp.sum(pi) == 1])
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13)
        return pi.value, None

    return solve


def open_spiel(game: MatrixGame, tau: float, budget: float) -> Solve:
    """Magnetic mirror descent with its own step size, until the gap is reached or the budget (seconds) is spent."""
    spiel, mmd = import_module("pyspiel"), import_module("open_spiel.python.algorithms.mmd_dilated")
    skew = game.matrix - 0.5
    table = spiel.create_matrix_game(skew.tolist(), (-skew).tolist())
    solver = mmd.MMDDilatedEnt(spiel.convert_to_turn_based(table), tau)
    start = solver.sequences

    def solve() -> tuple[Any, int]:
        end, solver.sequences = perf_counter() + budget, start
        for step in count():
            probs = solver.sequences[0][1:]  # the first is the empty sequence
            if step % 10 == 0 and (perf_counter() > end or gap(game, policy_of(probs), tau) <= TOL):
                break
            solver.update_sequences()
        return probs, 2 * step

    return solve


def krylov(game: MatrixGame, tau: float) -> Solve:
    """Newton-Krylov on y = M softmax(log mu + y) / tau, with the loosest tolerance that proves the gap."""
    scipy, skew, log_mu, products = import_module("scipy.optimize"), game.matrix - 0.5, game.reference.log_probs, 0

    def residual(y: Floats) -> Floats:
        nonlocal products
        products += 1
        return skew @ softmax(log_mu + y) / tau - y

    def solve() -> tuple[Any, int]:
        nonlocal products
        products = 0
        return softmax(log_mu + scipy.newton_krylov(residual, np.zeros(game.n), f_tol=math.sqrt(TOL / tau))), products

    return solve


def omwu(game: MatrixGame, tau: float) -> Solve:
    """Optimistic multiplicative weights with the step size of Cen, Wei and Chi 2021; w is log pi / mu, unnormalised."""
    matrix, mu, eta = game.matrix, game.reference.probs, min(1 / (2 * tau + 1), 0.5)

    def solve() -> tuple[Any, int]:
        w, payoff = np.zeros(game.n), matrix @ mu
        for step in count(1):
            decayed = (1 - eta * tau) * w
            half = decayed + eta * payoff
            probs = mu * np.exp(half - half.max())
            probs /= probs.sum()
            payoff = matrix @ probs
            w = decayed + eta * payoff
            if step % 10 == 0:
                d = payoff / tau - half
                if tau * float(probs @ (d - probs @ d) ** 2) <= 0.9 * TOL:  # the gap up to third order
                    break
        return probs, step + 1

    return solve


def highs(game: MatrixGame, tau: float, method: str) -> Solve:
    """max v such that M^T pi >= v."""
    linprog, n, one = import_module("scipy.optimize").linprog, game.n, np.ones((game.n, 1))
    above, total = np.hstack([(0.5 - game.matrix).T, one]), np.vstack([one, [[0.0]]]).T
    bounds = [(0, None)] * n + [(None, None)]
    objective = np.r_[np.zeros(n), -1.0]
    return lambda: (linprog(objective, above, np.zeros(n), total, [1.0], bounds, method).x[:n], None)


def nashpy(game: MatrixGame, tau: float) -> Solve:
    table = import_module("nashpy").Game(game.matrix - 0.5)
    return lambda: (table.linear_program()[0], None)


def quantecon(game: MatrixGame, tau: float) -> Solve:
    minmax, skew = import_module("quantecon.optimize").minmax, game.matrix - 0.5
    return lambda: (minmax(skew)[1], None)


def _in_child(peer: Peer, games: Sequence[MatrixGame], tau: float, pipe: Connection) -> None:
    warnings.simplefilter("ignore")  # the certificate says how accurate an answer is
    try:
        peer(MatrixGame.rock_paper_scissors(), tau)()
        solves = [peer(game, tau) for game in games]
        pipe.send(None)
        runs = [best(solve) for solve in solves]
        reached = max(gap(game, policy_of(probs), tau) for game, (_, (probs, _)) in zip(games, runs, strict=True))
        seconds, (_, products) = min(runs, key=lambda run: run[0])
        pipe.send(Outcome(seconds, reached, products, tau > 0 and not reached <= TOL))
    except ImportError:
        pipe.send(Outcome(note="not installed (pip install nlhf[peers])"))
    except Exception as error:  # whatever a peer raises is its result
        pipe.send(Outcome(note=" ".join(f"{type(error).__name__}: {error}".split())[:100]))


def race(peer: Peer, games: Sequence[MatrixGame], tau: float, limit: float) -> Outcome:
    """The peer's fastest time on any of the games and its largest gap; it is killed after `limit` seconds."""
    context = multiprocessing.get_context("fork")  # the games are not copied
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(peer, games, tau, sender), daemon=True)
    child.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            return Outcome(note=f"not ready after {limit:g} s")
        if (refused := receiver.recv()) is not None:
            return refused
        if not receiver.poll(limit):
            return Outcome(limit / len(games), unfinished=True, note=f"stopped after {limit:g} s")
        return receiver.recv()
    except EOFError:
        return Outcome(note="crashed")
    finally:
        child.kill()
        child.join()


class Table:
    """Rows as they come. `judge`: whether the sizes are those that the targets are for."""

    def __init__(self, judge: bool) -> None:
        self.judge, self.numbers, self.texts = judge, list[dict[str, Any]](), [list(WIDTHS)]
        print(self._line(self.texts[0]))

    def add(
        self, work: str, us: Outcome, peer: str, them: Outcome, target: float | None, unit: str = "x", value: float = 0
    ) -> None:
        """The ratio in "x" is them / us and should be at least the target; otherwise us / them, or `value`, at most."""
        faster, target = unit == "x", target if self.judge else None
        value = value or (them.seconds / us.seconds if faster else us.seconds / them.seconds)
        if target is None or math.isnan(value):
            met = ""
        else:
            met = "yes" if (value >= target) == faster else "?" if them.unfinished else "no"
        ratio = f"{'>= ' * them.unfinished}{short(value)}{' ' * (not faster)}{unit}"
        ratio = (them.note or "–") if math.isnan(value) else ratio
        gaps = ["–" if math.isnan(one.gap) else f"{one.gap:.1e}" for one in (us, them)]
        products = " / ".join("–" if one.products is None else str(one.products) for one in (us, them))
        wanted = "" if target is None else f"{'>=' if faster else '<='} {target:g}"
        self.texts.append([work, time(us.seconds), peer, time(them.seconds), ratio, wanted, met, *gaps, products])
        row = {"work": work, "ours_s": us.seconds, "peer": peer, "peer_s": them.seconds, "ratio": value, "unit": unit}
        row |= {"lower_bound": them.unfinished, "target": target, "met": met, "our_gap": us.gap, "peer_gap": them.gap}
        self.numbers.append(row | {"our_products": us.products, "peer_products": them.products, "note": them.note})
        print(self._line(self.texts[-1]), flush=True)

    def _line(self, cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS.values(), strict=True)).rstrip()

    def write(self, out: Path, about: str) -> None:
        out.mkdir(parents=True, exist_ok=True)
        head, *body = ("| " + " | ".join(cells) + " |" for cells in self.texts)
        text = "\n".join([about, "", head, "|---" * len(WIDTHS) + "|", *body, ""])
        for path, content in (("table.csv", pd.DataFrame(self.numbers).to_csv(index=False)), ("table.md", text)):
            write_atomically(out / path, content.encode())
            print(f"wrote {out / path}")


def short(value: float) -> str:
    """Three digits and no exponent: 0.984, 12.3, 12,345."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def time(seconds: float) -> str:
    """12.3 ms; a dash for NaN."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{short(seconds / size)} {unit}"
    return "–"


def name(*packages: str) -> str:
    """cvxpy 1.9.3 + clarabel 0.11.1"""

    def one(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return package

    return " + ".join(map(one, packages))


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or cores
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    packages = ", ".join(map(name, ("nlhf", "numpy", "scipy", "numba")))
    return f"""Python {platform.python_version()}, {packages}, {blas["name"]} {blas["version"]}
{model}, {cores} cores, {threads} BLAS threads"""


class Sizes(NamedTuple):
    small: int = 100
    medium: int = 1000
    large: tuple[int, ...] = (5000, 10_000)
    batch: int = 10_000
    rows: int = 1_000_000
    limit: float = 60.0
    """Seconds for a peer; a third of them for the one that cannot be expected to finish."""


def peers(limit: float) -> list[tuple[str, Peer, float]]:
    """The packages that solve the regularised game, and the targets at n = 100."""
    return [
        (name("pygambit"), gambit, 500),
        (name("cvxpy", "clarabel"), clarabel, 100),
        (name("open-spiel") + " MMD", partial(open_spiel, budget=limit / 3), 5000),
    ]


def small_games(table: Table, sizes: Sizes, seed: int) -> None:
    game = MatrixGame.random(sizes.small, seed)
    for tau in (0.1, 0.01):
        us = ours(game, tau)
        for label, peer, target in peers(sizes.limit):
            table.add(f"n={game.n} tau={tau:g}", us, label, race(peer, [game], tau, sizes.limit), target)
    us = ours(game, 0.0)
    for label, peer in ((name("nashpy"), nashpy), (name("quantecon"), quantecon)):
        table.add(f"n={game.n} tau=0", us, label, race(peer, [game], 0.0, sizes.limit), None)


def medium_games(table: Table, sizes: Sizes, seed: int) -> None:
    game = MatrixGame.random(sizes.medium, seed)
    us = ours(game, 0.01)
    for label, peer, target in (("scipy newton_krylov", krylov, 2), ("numpy OMWU", omwu, 15)):
        table.add(f"n={game.n} tau=0.01", us, label, race(peer, [game], 0.01, sizes.limit), target)
    rng = np.random.default_rng(seed)
    scores, (u, v) = rng.normal(size=game.n), rng.normal(size=(2, game.n, 4))
    cyclic = (u @ v.T - v @ u.T) / 2
    transitive = MatrixGame(expit(scores[:, None] - scores + cyclic))
    for kind, one, targets in (("", game, (8, 20)), (", nearly transitive", transitive, (50, 50))):
        us = ours(one, 0.0)
        for method, target in zip(("highs-ipm", "highs-ds"), targets, strict=True):
            them = race(partial(highs, method=method), [one], 0.0, sizes.limit)
            table.add(f"n={one.n} tau=0{kind}", us, f"scipy {method}", them, target)


def large_game(table: Table, n: int, seed: int) -> None:
    game = MatrixGame.random(n, seed)
    q = game.reference.probs
    for tau in (0.1, 0.01):
        us, bare = ours(game, tau), Outcome(best(lambda: game.matrix @ q, least=5)[0])
        table.add(f"n={n} tau={tau:g}", us, "one matrix @ q", bare, 60, "products")
    algorithm, solver = NashMD(eta=1.0, tau=0.1), ExactSolver(game)
    state = algorithm.init(game.reference)
    taken = []
    for _ in range(41):  # by turns: both meet the same machine
        product, _q = clock(lambda: game.matrix @ q)
        step, (state, _info) = clock(partial(algorithm.step, state, solver))
        taken.append((step, product))
    step, product = map(median, zip(*taken, strict=True))
    table.add(f"n={n} one Nash-MD step", Outcome(step), "one matrix @ q", Outcome(product), 1.15, "products")


def many_games(table: Table, sizes: Sizes, seed: int) -> None:
    game = MatrixGame.random(32, seed, prompts=sizes.batch)
    matrix, q, work = game.matrix, game.reference.probs, f"{sizes.batch:,} games n=32 tau=0.1"
    first, _ = clock(partial(regularized_nash, game, 0.1, TOL))
    print(f"The first call on a batch takes {time(first)}: it compiles, or loads what was compiled before.")
    us = ours(game, 0.1)
    bare = min(best(product, least=5)[0] for product in (lambda: np.matvec(matrix, q), lambda: matrix @ q[..., None]))
    table.add(work, us, "one batched product", Outcome(bare), 40, "products")
    each, few = us._replace(seconds=us.seconds / sizes.batch), [MatrixGame(one) for one in matrix[:3]]
    for label, peer, _ in peers(sizes.limit):
        table.add(f"{work}, each", each, label, race(peer, few, 0.1, sizes.limit), 500)


class Counted(np.ndarray[Any, np.dtype[np.float64]]):
    """Factors that count how often they are read: in whole, or by blocks, which then stay in the cache."""

    passes = 0.0

    def __getitem__(self, key: Any) -> Any:
        block = _plain(self)[key]
        Counted.passes += block.size / self.size
        return block

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        Counted.passes += 1
        return getattr(ufunc, method)(*map(_plain, inputs), **kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        Counted.passes += 1
        return func(*map(_plain, args), **kwargs)


def _plain(x: Any) -> Any:
    return x.view(np.ndarray) if isinstance(x, Counted) else x


def low_rank_game(table: Table, kind: str, game: LowRankGame, tau: float = 0.05) -> None:
    us, factors, q, c = ours(game, tau), game.features, game.reference.probs, np.ones(game.rank)
    bare = min(best(product, least=5)[0] for product in (lambda: q @ factors, lambda: factors @ c))
    game.features, Counted.passes = factors.view(Counted), 0.0
    tracemalloc.start()
    regularized_nash(game, tau, TOL)
    memory = 1 + tracemalloc.get_traced_memory()[1] / factors.nbytes
    tracemalloc.stop()
    work = f"n={game.n:,} rank {game.rank} {kind}"
    table.add(work, us, "one pass over the factors", Outcome(bare), None, "times")
    table.add(work, us, "passes, with the certificate's", Outcome(), 20, "passes", Counted.passes)
    table.add(work, us, "peak memory, with the factors", Outcome(), 4, "factors", memory)


def main(quick: bool = False, out: Path | None = None, seed: int = 0) -> None:
    """Race the exact game solvers against their peers.

    Args:
        quick: small sizes, to see that everything runs; no target is judged.
        out: folder to write the table in; by default it is only printed.
        seed: of the games, >= 0.
    """
    if out is not None:
        check_folder(out)
    sizes = Sizes(20, 100, (300, 500), 4000, 10_000, 6.0) if quick else Sizes()
    about = f"{machine()}\nGap asked for where tau > 0: {TOL:g}. References are uniform, games random with seed {seed}."
    print(about, end="\n\n")
    table = Table(judge=not quick)
    small_games(table, sizes, seed)
    medium_games(table, sizes, seed)
    for n in sizes.large:
        large_game(table, n, seed)
    many_games(table, sizes, seed)
    low_rank_game(table, "tau=0.05", LowRankGame.random(sizes.rows, 16, seed))
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(sizes.rows, 16)) + rng.normal(size=16)
    features *= math.sqrt(0.5 / np.square(features).sum(axis=1).max())  # the longest row keeps P within [0, 1]
    low_rank_game(table, "tau=0.05, mean > 0", LowRankGame(features[:, :8], features[:, 8:]))
    if out is not None:
        table.write(out, about)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError) as error:
        sys.exit(f"race_games: {error}")
