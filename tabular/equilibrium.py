"""Equilibria of preference games, each with a certificate that is computed from the policy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax

from nlhf.metrics import kl_rows, reverse_kl_factor
from nlhf.schedules import check_count, check_tau, is_number
from nlhf.tabular import interior_point
from nlhf.tabular.games import MatrixGame, times
from nlhf.tabular.newton import Dual, FactoredDual, FullDual, follow, goal
from nlhf.tabular.operators import LowRankGame, TabularGame
from nlhf.tabular.policy import Floats, Tabular


@dataclass(frozen=True)
class Equilibrium:
    """A policy and the proof of how good it is. Arrays have one entry per prompt, and shape () for a single game."""

    policy: Tabular
    tau: float
    gap: Floats
    """Two-player duality gap of (pi, pi), 2 tau KL(pi, BR(pi)): twice `metrics.duality_gap`. For tau = 0 twice the
    exploitability max_y P(y > pi) - 1/2. No term of the sum is negative: it resolves 1e-30."""
    kl_bound: Floats
    """KL(pi*, pi) and KL(pi, pi*) are proved to be at most this, up to rounding in its own computation; inf for
    tau = 0, where pi* need not be unique."""
    unique: NDArray[np.bool_]
    """Whether there is no other equilibrium: always for tau > 0; for tau = 0 if that is proved, up to rounding."""
    prompt_weights: Floats
    iterations: int
    """Newton or interior-point steps, summed over prompts."""
    products: int
    """Products of a game with a vector, summed over prompts."""

    @property
    def duality_gap(self) -> float:
        """`metrics.duality_gap` of the policy, gap / 2, averaged over prompts: KL(pi, pi*) <= duality_gap / tau."""
        return float(np.ravel(self.prompt_weights) @ np.ravel(self.gap)) / 2


def regularized_nash(game: TabularGame, tau: float, tol: float = 0.0) -> Equilibrium:
    """The unique pi* = argmax_pi min_pi' P(pi > pi') - tau KL(pi, mu) + tau KL(pi', mu).

        pi* = BR(pi*) ∝ mu exp(P pi* / tau)

    Newton on the dual, y = P pi / tau, with continuation in tau where it is small: `nlhf.tabular.newton`. Each step
    solves one linear system: by LU for few responses or small tau, by a short recurrence on products otherwise, and in
    a `LowRankGame` for its features only.

    Args:
        game: one game or one per prompt, a matrix or an operator.
        tau: KL strength > 0; below 1e-8 or so rounding errors, 1e-16 / tau in log pi, leave less and less of it.
        tol: stop as soon as the gap is proved to be at most this; 0 goes on until rounding errors are all that is left.

    Raises ValueError if tau is not a positive number or tol a negative one; ArithmeticError if Newton is stuck.

    >>> game = MatrixGame.rock_paper_scissors(reference=[0.5, 0.3, 0.2])
    >>> found = regularized_nash(game, tau=0.1)
    >>> found.policy.probs.round(10), bool(found.gap < 1e-28)
    (array([0.37532696, 0.27743263, 0.34724041]), True)

    Source: the fixed point is that of Munos et al. 2024, arXiv:2312.00886, section 4; the method is in the module.
    """
    tau = float(check_tau(tau, positive=True))
    if not is_number(tol) or tol < 0:
        raise ValueError(f"tol must be a finite number >= 0, got {tol!r}")
    log_probs, steps, solved = _solved_together(game, tau, tol / 2)
    products = 2 * steps + int(solved.sum())
    for one in (_Prompt(game, int(x)) for x in np.flatnonzero(~solved)):
        dual = one.dual()
        point, taken = follow(dual, tau, tol / 2)
        log_probs[one.x] = dual.log_probs(point)
        steps, products = steps + taken, products + dual.products
    return _certified(game, tau, log_probs, steps, products)


def nash(game: TabularGame) -> Equilibrium:
    """An equilibrium without regularisation, pi* = argmax_pi min_pi' P(pi > pi'), the maximal lottery.

        max_y P(y > pi*) = 1/2

    By column generation, with a self-dual interior point for the responses worth playing, made exact on the support:
    `nlhf.tabular.interior_point`. Where several equilibria exist, `unique` is False and the answer is the one closest
    to the reference in KL: the limit of `regularized_nash` as tau falls to 0 and, for a uniform reference, the one of
    maximal entropy. (Proof: against any equilibrium pi, pi*_tau wins at most half, so KL(pi*_tau, mu) <= KL(pi, mu).)
    Only where more than 4,000 responses tie is it some equilibrium.

    Args:
        game: one game or one per prompt, a matrix or an operator.

    >>> game = MatrixGame.rock_paper_scissors()
    >>> found = nash(game)
    >>> found.policy.probs.round(12), bool(found.unique), float(found.gap)
    (array([0.33333333, 0.33333333, 0.33333333]), True, 0.0)

    Source: Kreweras 1965 and Fishburn 1984 (maximal lotteries); the method is in the module.
    """
    found = [interior_point.generate_columns(one.product, one.block, one.n) for one in _prompts(game)]
    probs = [
        lottery.probs if lottery.unique else _closest(one, lottery)
        for one, lottery in zip(_prompts(game), found, strict=True)
    ]
    with np.errstate(divide="ignore"):
        log_probs = np.log(probs)
    steps, products = sum(lottery.iterations for lottery in found), sum(lottery.products for lottery in found)
    return _certified(game, 0.0, log_probs, steps, products, [lottery.unique for lottery in found])


@dataclass(frozen=True)
class EquilibriumPath:
    """Equilibria from the reference (tau large) to the maximal lottery (tau = 0)."""

    equilibria: tuple[Equilibrium, ...]
    labels: tuple[str, ...] | None

    @property
    def taus(self) -> Floats:
        """(T,) falling."""
        return np.array([e.tau for e in self.equilibria])

    @property
    def probs(self) -> Floats:
        """(T, n) or (T, X, n)."""
        return np.stack([e.policy.probs for e in self.equilibria])

    def plot(self, ax: Any = None) -> Any:
        """Probability of each response against tau, of one game; tau = 0 at the left end. Returns the axes."""
        from nlhf.plotting import paths

        return paths(self.taus, self.probs, self.labels, ax)


def equilibrium_path(game: TabularGame, taus: Sequence[float]) -> EquilibriumPath:
    """The equilibrium at each tau, from the largest to the smallest, each started from the one before.

    Args:
        game: one game or one per prompt.
        taus: numbers >= 0, in any order; 0 is `nash`, to which the others converge.

    Raises ValueError if a tau is negative or there is none.

    >>> path = equilibrium_path(MatrixGame.rock_paper_scissors(reference=[0.5, 0.3, 0.2]), [0, 0.1, 10])
    >>> path.taus, path.probs.round(3)[:, 0]
    (array([10. ,  0.1,  0. ]), array([0.502, 0.375, 0.333]))
    """
    levels = sorted({float(check_tau(tau)) for tau in np.atleast_1d(taus).tolist()}, reverse=True)
    if not levels:
        raise ValueError("taus must hold at least one number, got none")
    found: list[list[tuple[Floats, int, int]]] = [[] for _ in levels]
    for one in _prompts(game):
        dual, point = one.dual(), None
        for level, of_prompts in zip(levels, found, strict=True):
            if level:
                before = dual.products
                point, taken = follow(dual, level, 0.0, point)
                of_prompts.append((dual.log_probs(point), taken, dual.products - before))
    equilibria = []
    for level, of_prompts in zip(levels, found, strict=True):
        if level == 0:
            equilibria.append(nash(game))
        else:
            log_probs, steps, products = zip(*of_prompts, strict=True)
            equilibria.append(_certified(game, level, log_probs, sum(steps), sum(products)))
    return EquilibriumPath(tuple(equilibria), getattr(game, "labels", None))


class Interval(NamedTuple):
    """How uncertain an equilibrium is, each array of the shape of its policy's probabilities."""

    low: Floats
    high: Floats
    std: Floats
    played: Floats
    """How often the response has a probability above 1e-6."""


def equilibrium_interval(
    game: MatrixGame, tau: float, draws: int = 1000, level: float = 0.9, seed: int = 0
) -> Interval:
    """Where the equilibrium may lie, given how much data the win probabilities were estimated from.

    The game is drawn again `draws` times from its evidence (the posterior of the counts for `from_comparisons`, a
    bootstrap of the questions for `from_scores`) and solved each time; the interval holds the central `level` of
    the answers, one response at a time.

    Args:
        game: made by `from_comparisons` or `from_scores`.
        tau: KL strength >= 0.
        draws: games to solve.
        level: coverage, in (0, 1).
        seed: of the draws.

    Raises ValueError for a game without evidence, or where an argument is out of range.

    >>> few, many = (MatrixGame.from_comparisons([("a", "b", "a", k), ("a", "b", "b", k)]) for k in (10, 1000))
    >>> [float((i.high - i.low)[0].round(2)) for i in (equilibrium_interval(game, 0.5) for game in (few, many))]
    [0.17, 0.02]
    """
    check_tau(tau)
    check_count("draws", draws, 2)
    if not (is_number(level) and 0 < level < 1):
        raise ValueError(f"level must be in (0, 1), got {level!r}")
    check_count("seed", seed, 0)
    evidence = getattr(game, "evidence", None)
    if evidence is None:
        raise ValueError(
            "game must be estimated from data, by from_comparisons or from_scores; this one has no evidence"
        )
    rng, shape, probs = np.random.default_rng(seed), game.matrix.shape, []
    at_once = max(1, 4_000_000 // game.matrix.size)
    for done in range(0, draws, at_once):
        matrices = evidence.draw(rng, min(at_once, draws - done))
        reference = np.broadcast_to(game.reference.log_probs, matrices.shape[:-1]).reshape(-1, game.n)
        drawn = MatrixGame(matrices.reshape(-1, game.n, game.n), Tabular(reference))
        found = regularized_nash(drawn, tau) if tau else nash(drawn)
        probs.append(found.policy.probs.reshape(-1, *shape[:-1]))
    answers = np.concatenate(probs)
    low, high = np.quantile(answers, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Interval(low, high, answers.std(axis=0, ddof=1), np.mean(answers > 1e-6, axis=0))


@dataclass(frozen=True)
class _Prompt:
    """The game of one prompt, M = P - 1/2."""

    game: TabularGame
    x: int

    @property
    def n(self) -> int:
        return self.game.n

    @property
    def matrix(self) -> Floats | None:
        """(n, n) P, if there is one."""
        if not isinstance(self.game, MatrixGame):
            return None
        return self.game.matrix[self.x] if self.game.matrix.ndim == 3 else self.game.matrix

    @property
    def log_mu(self) -> Floats:
        """(n,) the reference."""
        return np.atleast_2d(self.game.reference.log_probs)[self.x]

    def product(self, q: Floats) -> Floats:
        """M q, exact to rounding."""
        against = self.game.versus(q) if self.matrix is None else times(self.matrix, q)
        return against - 0.5 * q.sum()

    def block(self, rows: NDArray[np.intp]) -> Floats:
        """M[rows, rows]."""
        if (matrix := self.matrix) is not None:
            some = matrix if rows.size == self.n else matrix[np.ix_(rows, rows)]
            return 0.5 * some - 0.5 * some.T.astype(np.float64)  # skew to the last bit, which P - 1/2 need not be
        return self.game.win_prob([self.x], rows[None], rows[None])[0] - 0.5

    def columns(self, columns: NDArray[np.intp]) -> Floats:
        """M[:, columns]."""
        return self.game.win_prob([self.x], ..., columns[None])[0] - np.float64(0.5)

    def dual(self) -> Dual:
        """The equations of the regularised game."""
        if isinstance(self.game, LowRankGame):
            return FactoredDual(self.game.features, self.game.symplectic, self.log_mu)
        return FullDual(self.product, self.log_mu, self.block, self.matrix)


def _closest(one: _Prompt, lottery: interior_point.Lottery) -> Floats:
    """Of several equilibria the closest to the reference; the one at hand where looking for it does not succeed."""
    if lottery.support.size > interior_point.MANY:
        return lottery.probs
    dual, tau = one.dual(), 1e-5
    try:
        near, columns = dual.log_probs(follow(dual, tau, 0.0)[0]), one.columns(lottery.support)
        probs = interior_point.nearest_to(columns, lottery.support, near, tau)
    except (ArithmeticError, np.linalg.LinAlgError):
        return lottery.probs
    exploited = float((columns @ probs[lottery.support]).max())
    return probs if exploited <= max(1e-13, float(one.product(lottery.probs).max())) else lottery.probs


def _prompts(game: TabularGame) -> list[_Prompt]:
    return [_Prompt(game, x) for x in range(game.prompt_weights.size)]


def _certified(
    game: TabularGame, tau: float, log_probs: ArrayLike, steps: int, products: int, unique: ArrayLike = True
) -> Equilibrium:
    """The proof, from the policy and one more product with the game.

    KL(pi, pi*) <= KL(pi, BR(pi)), and w = log(pi / mu) is off by w* - w = M (pi* - pi) / tau + r, which spans at most
    s = span(r) + |pi* - pi|_1 / tau, so that log(pi* / pi) <= s and KL(pi*, pi) <= c(s) KL(pi, pi*).
    """
    shape = game.reference.log_probs.shape
    policy = Tabular.from_logits(np.reshape(log_probs, shape))
    against = game.versus(policy.probs)
    if tau == 0:
        gap = 2 * np.maximum(against.max(axis=-1) - 0.5, 0.0)
        bound = np.full(shape[:-1], np.inf)
    else:
        reply = log_softmax(game.reference.log_probs + against / tau, axis=-1)
        kl = kl_rows(policy.log_probs, reply)
        s = np.ptp(reply - policy.log_probs, axis=-1) + np.sqrt(2 * kl) / tau
        gap, bound = 2 * tau * kl, reverse_kl_factor(s) * kl
    proved = np.broadcast_to(np.reshape(unique, (-1,) if len(shape) == 2 else ()), shape[:-1])
    return Equilibrium(
        policy, tau, gap, bound, proved, game.prompt_weights, steps, products + policy.log_probs.size // game.n
    )


def _solved_together(game: TabularGame, tau: float, tol: float) -> tuple[Floats, int, NDArray[np.bool_]]:
    """log pi (X, n), Newton steps, and which prompts the compiled batch solver has done (X,): few are not its business.

    Compiling takes longer than it saves for hundreds of games.
    """
    count = game.prompt_weights.size
    if isinstance(game, MatrixGame) and count >= 4000 and game.matrix.dtype == np.float64 and find_spec("numba"):
        from nlhf.tabular import fast

        if game.n <= fast.LARGEST:
            mu = game.reference.log_probs
            log_probs, steps, solved = fast.newton(game.matrix, mu, float(tau), goal(float(tau), tol))
            return log_probs, int(steps.sum()), solved
    return np.empty((count, game.n)), 0, np.zeros(count, dtype=bool)
