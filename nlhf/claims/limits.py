"""Where an algorithm goes: its runs on a handful of small games, and the name of what its steps leave fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import numpy as np
from scipy.optimize import root
from scipy.special import log_softmax, softmax

from nlhf import metrics
from nlhf.core import Info, Prox
from nlhf.metrics import Floats, table
from nlhf.tabular import ExactSolver, MatrixGame, Tabular, nash, regularized_nash

STEPS = 2000
"""Iterations of a run."""
LATE = 10**7
"""Where a schedule is frozen to ask what its steps leave fixed: late enough for its own bias to be invisible."""

Law: TypeAlias = Callable[[MatrixGame], Tabular]
"""A solution concept: the policy that it singles out in a game."""


@lru_cache(maxsize=4)
def games(seed: int) -> dict[str, MatrixGame]:
    """Every game has a skewed reference: with a uniform one, different equilibria may coincide."""
    rng = np.random.default_rng(seed)

    def mu(n: int) -> Floats:
        return np.asarray(softmax(0.7 * rng.standard_normal(n)))

    return {
        "random 1": MatrixGame.random(10, rng, reference=mu(10)),
        "random 2": MatrixGame.random(10, rng, reference=mu(10)),
        "random 3": MatrixGame.random(9, rng, reference=mu(9)),
        "low rank": MatrixGame.low_rank(10, 4, rng, reference=mu(10)),
        "transitive": MatrixGame.bradley_terry(rng.standard_normal(6), reference=mu(6)),
        "tournament": MatrixGame.cyclic(5, 0.9, reference=mu(5)),
        "rock-paper-scissors": MatrixGame.rock_paper_scissors(reference=[0.5, 0.3, 0.2]),
        "dice": MatrixGame.cyclic(3, 5 / 9, reference=[0.6, 0.3, 0.1]),
    }


def elsewhere(game: MatrixGame, seed: int) -> Tabular:
    """A policy far from the reference."""
    return Tabular.from_logits(np.random.default_rng((seed, game.n)).standard_normal(game.reference.log_probs.shape))


class Watched:
    """The exact solver, and what it was asked."""

    def __init__(self, game: MatrixGame) -> None:
        self.solver, self.posed = ExactSolver(game), list[tuple[Prox, Tabular]]()

    def __call__(self, prox: Prox, start: Any = None) -> tuple[Tabular, Info]:
        answer, info = self.solver(prox, start)
        self.posed.append((prox, answer))
        return answer, info


@dataclass(frozen=True)
class Play:
    """Iterates on a game."""

    name: str
    game: MatrixGame
    log_probs: Floats
    """(T + 1, n)"""
    steps: int
    """T, unless it came to rest or failed before."""
    error: Exception | None

    @cached_property
    def probs(self) -> Floats:
        """(T + 1, n)"""
        return np.exp(self.log_probs)

    @cached_property
    def averages(self) -> Floats:
        """(T + 1, n) arithmetic averages of the iterates so far; of a run that came to rest, as if it had gone on."""
        rest = np.broadcast_to(self.probs[-1], (max(0, self.steps + 1 - len(self.probs)), self.game.n))
        return np.cumsum(np.concatenate([self.probs, rest]), axis=0) / np.arange(1, self.steps + 2)[:, None]

    @cached_property
    def extents(self) -> tuple[float, float]:
        """How far it was from where it ended, in [T/4, T/2] at T/2 and in [T/2, T] at T; 0 once it is at rest."""
        steps = len(self.probs) - 1
        if steps < self.steps:
            return 0.0, 0.0
        early, late = self.probs[steps // 4 : steps // 2], self.probs[steps // 2 :]
        before, now = (float(np.abs(part - part[-1]).sum(-1).max()) for part in (early, late))
        return before, now

    @cached_property
    def fate(self) -> str:
        """converges, cycles, is undecided or fails: by how far and how long it travels in its second half.

        A sequence that converges like t^-p keeps 2^-p of its extent from [T/4, T/2] to [T/2, T]; one that cycles keeps
        all of it and travels much farther than its extent; one that is merely slow does not turn around.
        """
        if self.error is not None:
            return "fails"
        before, now = self.extents
        if now < 1e-9 or now < 0.75 * before:
            return "converges"
        travelled = float(np.abs(np.diff(self.probs[self.steps // 2 :], axis=0)).sum())
        return "cycles" if travelled > 2.5 * now else "is undecided"

    def misses(self, target: Tabular) -> bool:
        """Whether it cannot come to a target: what is left is at most 3 times its last extent, which falls by 3/4."""
        return bool(np.abs(self.probs[-1] - target.probs).sum() > 5 * self.extents[1] + 1e-6)


def play(algorithm: Any, name: str, game: MatrixGame, start: Tabular, steps: int) -> Play:
    """At most `steps` iterations: a run is at rest once five of them changed nothing but by rounding."""
    found, solver, at_rest, error = [table(start)], ExactSolver(game), 0, None
    try:
        state = algorithm.init(start, game.reference)
        for _ in range(steps):
            state, _ = algorithm.step(state, solver)
            found.append(table(state.policy))
            change, scale = np.abs(found[-1] - found[-2]).max(), max(1.0, -found[-1].min())
            at_rest = at_rest + 1 if change <= 1e-13 * scale else 0
            if at_rest == 5:
                break
        if np.isnan(found[-1]).any():
            raise FloatingPointError("a log-probability is not a number")
    except Exception as raised:
        error = raised
    return Play(name, game, np.array(found), steps, error)


def stepped(algorithm: Any, game: MatrixGame, law: Tabular) -> tuple[Floats, Watched]:
    """The policy after one step from a law, and what the step asked; of a schedule, a late step."""
    state, solver = algorithm.init(law, game.reference), Watched(game)
    if callable(getattr(algorithm, "eta", None)) and hasattr(state, "t") and hasattr(state, "_replace"):
        state = state._replace(t=LATE)
    state, _ = algorithm.step(state, solver)
    return table(state.policy), solver


def drift(algorithm: Any, game: MatrixGame, law: Tabular) -> float:
    """How far one step moves a law, largest change of a log-ratio within its support, in nats."""
    inside = law.probs > 1e-12
    change = stepped(algorithm, game, law)[0][inside] - law.log_probs[inside]
    return float(np.ptp(change)) if np.isfinite(change).all() else np.inf


def _solved(algorithm: Any, game: MatrixGame, guess: Tabular) -> Tabular | None:
    """A fixed point of the step near a guess, stable or not; None if Newton's method does not find one."""
    log_mu = game.reference.log_probs

    def law(w: Floats) -> Tabular:
        return Tabular.from_logits(log_mu + np.append(w, 0.0))

    def residual(w: Floats, scale: float = 1.0) -> Floats:
        change = (stepped(algorithm, game, law(w))[0] - law(w).log_probs) / scale
        return np.asarray(change[:-1] - change[-1])

    ratio = np.clip(guess.log_probs - log_mu, -30, 30)
    start = ratio[:-1] - ratio[-1]
    try:
        # a late step of a schedule is small, and so is what it leaves at a point that it does not leave fixed
        found = root(residual, start, args=(float(np.abs(residual(np.cos(start + 1))).max()),), tol=1e-14)
    except (ValueError, ArithmeticError):
        return None
    small = np.abs(found.fun).max() < 1e-7 and np.abs(found.x).max() < 1e3
    return law(found.x) if small else None


# --- what a fixed point is


@dataclass(frozen=True)
class Concept:
    """A solution concept and what it is called."""

    words: str
    law: Law
    tau: float | None = None
    """Of an equilibrium: what its duality gap is measured with."""

    def gaps(self, game: MatrixGame, probs: Floats) -> Floats:
        """(K,) duality gaps of policies (K, n); of what is no equilibrium, the total variation from it."""
        if self.tau is None:
            return np.asarray(np.abs(probs - self.law(game).probs).sum(-1) / 2)
        against = game.versus(probs)
        if self.tau == 0:
            return np.asarray(against.max(-1) - 0.5)
        log_probs = np.log(probs)
        return self.tau * metrics.kl_rows(log_probs, log_softmax(table(game.reference) + against / self.tau, axis=-1))


@lru_cache(maxsize=4096)
def equilibrium(game: MatrixGame, tau: float) -> Tabular:
    """pi* of a KL strength, 0 included, kept for the next time."""
    return nash(game).policy if tau == 0 else regularized_nash(game, tau).policy


@lru_cache(maxsize=256)
def _reversed(game: MatrixGame) -> MatrixGame:
    return MatrixGame(game.matrix.T, game.reference)


@lru_cache(maxsize=256)
def _other_reference(game: MatrixGame, power: float) -> MatrixGame:
    return game.with_reference(Tabular.from_logits(power * game.reference.log_probs))


def regularised(tau: float) -> Concept:
    """The equilibrium of a KL strength, 0 included."""
    name = f"regularised equilibrium of tau = {tau:.4g}" if tau else "equilibrium of tau = 0, the maximal lottery"
    return Concept(f"the {name}", lambda game: equilibrium(game, tau), tau)


def _reply(tau: float, opponent: Law, words: str) -> Concept:
    return Concept(words, lambda game: Tabular(metrics.best_response(opponent(game), game, tau)))


def _wrong_way(tau: float) -> Concept:
    words = f"the equilibrium of the reversed game (tau = {tau:.4g}): the preference has the wrong sign"
    return Concept(words, lambda game: equilibrium(_reversed(game), tau))


def digits(value: float, tau: float | None) -> str:
    """As many as it takes to tell it from tau."""
    return next((s for d in range(4, 12) if (s := f"{value:.{d}g}") != f"{tau or 0.0:.{d}g}"), f"{value:.4g}")


def _slope(policy: Floats, opponent: Floats, game: MatrixGame) -> tuple[float, float]:
    """(s, share) of the fit log(pi / mu) = s P q + const; share: what it leaves unexplained, of the variance."""
    y, x = (v - v.mean() for v in (policy - game.reference.log_probs, game.versus(opponent)))
    s = float(x @ y / (x @ x))
    return s, float(((y - s * x) ** 2).sum() / max((y**2).sum(), 1e-300))


def _suspects(points: dict[str, tuple[Tabular, Floats]], games: dict[str, MatrixGame], tau: Any) -> Iterator[Concept]:
    """What a fixed point may be: by name first, then as read off the fixed points of the larger games.

    A fixed point with the opponent q is mu exp(P q / tau') / Z for some tau', so 1 / tau' is the slope of a straight
    line; and so is that of the game whose equilibrium q is.
    """
    if tau is not None:
        yield regularised(tau)
    if tau:
        yield _reply(tau, _reference, f"the best response to the reference (tau = {tau:.4g})")
        yield _wrong_way(tau)
    large = [(games[name], *point) for name, point in points.items() if games[name].n > 8]
    if large:
        slope, unexplained = slopes([(game, pi.log_probs, q) for game, pi, q in large])
        if unexplained < 1e-8 and slope < -1e-6:
            yield _wrong_way(-1 / slope)
        elif unexplained < 1e-8 and slope > 1e-6:
            own = 1 / slope
            yield Concept(f"the equilibrium of tau = {digits(own, tau)}", lambda game: equilibrium(game, own), own)
            yield _reply(own, _reference, f"the best response to the reference (tau = {digits(own, tau)})")
            slope, unexplained = slopes([(game, np.log(q), q) for game, _, q in large])
            if unexplained < 1e-8 and slope > 1e-6:
                other = 1 / slope
                of = "" if tau and abs(own / tau - 1) < 1e-6 else f" (tau = {digits(own, tau)})"
                words = f"the best response{of} to the equilibrium of tau = {digits(other, tau)}"
                yield _reply(own, lambda game: equilibrium(game, other), words)
        power, pull = np.median([_with_reference(pi, q, game) for game, pi, q in large], axis=0).tolist()
        if pull > 0:
            name = "a uniform reference" if abs(power) < 1e-6 else f"the reference to the power {power:.4g}"
            words = f"the equilibrium of tau = {pull:.4g} with {name}"
            yield Concept(words, lambda game: equilibrium(_other_reference(game, power), pull))
    if tau != 0:
        yield regularised(0.0)


def _reference(game: MatrixGame) -> Tabular:
    return game.reference


def slopes(points: list[tuple[MatrixGame, Floats, Floats]]) -> tuple[float, float]:
    """Median slope and largest unexplained share over games; inf where there is no such line."""
    fits = np.array([_slope(log_probs, q, game) for game, log_probs, q in points])
    return (float(np.median(fits[:, 0])), float(fits[:, 1].max())) if np.isfinite(fits).all() else (0.0, np.inf)


def _with_reference(policy: Tabular, opponent: Floats, game: MatrixGame) -> tuple[float, float]:
    """(a, tau) of the fit log pi = a log mu + P q / tau + const."""
    design = np.stack([game.reference.log_probs, game.versus(opponent), np.ones(game.n)], axis=1)
    a, s, _ = np.linalg.lstsq(design, policy.log_probs)[0]
    return float(a), float(1 / s) if s else np.inf


class Subject:
    """An algorithm and what was found out about it so far; every property is worked out once."""

    def __init__(self, algorithm: Any, seed: int, names: tuple[str, ...] = (), steps: int = STEPS) -> None:
        self.algorithm, self.seed, self.steps = algorithm, seed, steps
        self.games = {name: game for name, game in games(seed).items() if not names or name in names}

    @property
    def tau(self) -> float | None:
        """The KL strength that the algorithm declares."""
        return getattr(self.algorithm, "tau", None)

    @property
    def scheduled(self) -> bool:
        """Whether the step size depends on t."""
        return callable(getattr(self.algorithm, "eta", None))

    @cached_property
    def runs(self) -> list[Play]:
        """From the reference and from elsewhere, on every game."""
        return [
            play(self.algorithm, name, game, start, self.steps)
            for name, game in self.games.items()
            for start in (game.reference, elsewhere(game, self.seed))
        ]

    @cached_property
    def still(self) -> bool:
        """Whether it never moves."""
        return all(run.error is None and np.ptp(run.log_probs - run.log_probs[0]) == 0 for run in self.runs)

    @cached_property
    def points(self) -> dict[str, tuple[Tabular, Floats]]:
        """By game: a fixed point of the step, and the opponent that is played there."""
        found = {}
        for run in (run for run in self.runs[1::2] if run.error is None):
            guess = Tabular.from_logits(run.log_probs[-1])
            point = _solved(self.algorithm, run.game, guess)
            if point is None:
                point = _solved(self.algorithm, run.game, Tabular.from_logits(np.log(run.averages[-1] + 1e-300)))
            if point is not None:
                _, solver = stepped(self.algorithm, run.game, point)
                if solver.posed:
                    found[run.name] = point, law_of(solver.posed[-1][0])
        return found

    @cached_property
    def limit(self) -> Concept | None:
        """What the step leaves fixed in every game: the first suspect that it does; None if it is none of them."""
        if self.still:
            return None
        tolerance = 1e-5 if self.scheduled else 1e-7
        moves = {name: drift(self.algorithm, g, elsewhere(g, self.seed)) for name, g in self.games.items()}
        for concept in _suspects(self.points, self.games, self.tau):
            try:
                laws = {name: concept.law(game) for name, game in self.games.items()}
            except (ValueError, ArithmeticError):
                continue
            if all(
                drift(self.algorithm, self.games[name], law) <= tolerance * moves[name] for name, law in laws.items()
            ):
                return concept
        return None

    @property
    def aim(self) -> Concept | None:
        """What it should find: the equilibrium of the tau that it declares."""
        return None if self.tau is None else regularised(self.tau)

    @property
    def unbiased(self) -> bool:
        """Whether its fixed point is the equilibrium of the tau that it declares."""
        return self.limit is not None and self.aim is not None and self.limit.words == self.aim.words

    @cached_property
    def bias(self) -> tuple[float, float]:
        """Median and largest KL(pi*, fixed point) over games, of the points solved for where they have no name."""
        assert self.aim is not None
        laws = {name: self.limit.law(game) for name, game in self.games.items()} if self.limit else {}
        laws = laws or {name: point for name, (point, _) in self.points.items()}
        found = [metrics.kl(self.aim.law(self.games[name]), law) for name, law in laws.items()]
        return (float(np.median(found)), float(np.max(found))) if found else (np.nan, np.nan)


def law_of(prox: Prox) -> Floats:
    """(n,) what the sub-problem plays against, signed opponents summed."""
    return np.sum([w * softmax(policy.log_prob(..., ...), axis=-1) for policy, w in prox.opponents], axis=0)
