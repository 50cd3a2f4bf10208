"""A conformance suite for anybody's algorithm: a table of what it does, not a verdict of pass or fail.

Nothing is assumed but `init` and `step`. An algorithm is run exactly on a handful of small games, its sub-problems are
read as it poses them, and what it converges to is identified by what a fixed point of mirror descent must be, the best
response of some strength to some opponent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.special import log_softmax, softmax

from nlhf import metrics
from nlhf.claims.limits import (
    LATE,
    STEPS,
    Concept,
    Play,
    Subject,
    Watched,
    digits,
    drift,
    elsewhere,
    equilibrium,
    regularised,
    slopes,
)
from nlhf.core import Algorithm, Geometric, Mixture, Prox
from nlhf.metrics import Floats, table
from nlhf.schedules import check_count
from nlhf.tabular import ExactSolver, MatrixGame, Tabular, regularized_nash

if TYPE_CHECKING:
    import pandas as pd


class Found(NamedTuple):
    """What is said of a property."""

    verdict: str
    """In words."""
    measured: float = np.nan
    """The number behind the verdict; `detail` says which. NaN where there is none."""
    detail: str = ""


class Row(NamedTuple):
    """A `Found`, and of what."""

    property: str
    verdict: str
    measured: float
    detail: str


@dataclass(frozen=True)
class Conformance:
    """What `check` has found out about an algorithm."""

    algorithm: str
    rows: tuple[Row, ...]

    @property
    def frame(self) -> pd.DataFrame:
        """Tidy table: property, verdict, measured, detail."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=list(Row._fields))

    def __getitem__(self, name: str) -> Row:
        """The row of a property; KeyError names the properties there are."""
        rows = {row.property: row for row in self.rows}
        if name not in rows:
            raise KeyError(f"no property {name!r}, there are {list(rows)}")
        return rows[name]

    def __str__(self) -> str:
        width = max(len(row.property) for row in self.rows)
        lines = [self.algorithm]
        for row in self.rows:
            number = "" if np.isnan(row.measured) else f"{row.measured:.4g}"
            lines.append(f"  {row.property:<{width}}  {row.verdict}")
            if behind := ": ".join(filter(None, (number, row.detail))):
                lines.append(f"  {'':<{width}}    {behind}")
        return "\n".join(lines)


def check(algorithm: Algorithm, *, seed: int = 0) -> Conformance:
    """What an algorithm does: its sub-problems, limit and rate, its symmetries, and its agreement across the ladder.

    Args:
        algorithm: anything with `init` and `step` as in `nlhf.core.Algorithm`. What needs its `eta`, `tau` or `rate` is
            reported as not checked where it has none.
        seed: of the random games and starts. Everything else is deterministic.

    >>> from nlhf import NashMD
    >>> print(check(NashMD(eta=2.0, tau=0.1))["diagnosis"].verdict)  # doctest: +ELLIPSIS
    the last iterate converges, but to the best response to the equilibrium of tau = 0.125, not to the regularised ...
    """
    check_count("seed", seed, 0)
    subject = Subject(algorithm, seed)
    parts: dict[str, Callable[[Subject], Found]] = {
        "diagnosis": _diagnosis,
        "sub-problems": _sub_problems,
        "last iterate": _last_iterate,
        "average iterate": _average_iterate,
        "fixed point": _fixed_point,
        "rate": _rate,
        "declared rate": _declared_rate,
        "repeatable": _repeatable,
        "relabelling": _relabelling,
        "prompts": _prompts,
        "clones": _clones,
        "estimator": _estimator,
        "rungs": _rungs,
        "tau = 0": partial(_with_tau, tau=0.0),
        "eta = 1 / tau": _largest_eta,
        "eta x 100": partial(_with_eta, factor=100.0),
        "eta / 1000": partial(_with_eta, factor=1e-3),
    }
    return Conformance(repr(algorithm), tuple(Row(name, *_guarded(part, subject)) for name, part in parts.items()))


def _guarded(part: Callable[[Subject], Found], subject: Subject) -> Found:
    """An algorithm that raises is a finding, too."""
    try:
        with np.errstate(all="ignore"):
            return part(subject)
    except Exception as error:
        return Found(f"fails with {_said(error)}")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


EXTREMES = "random 1", "transitive", "rock-paper-scissors"
"""The games on which extreme parameters are tried."""


def _grouped(runs: list[Play]) -> dict[str, list[str]]:
    """Fates, and on which games."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        names = groups.setdefault(run.fate, [])
        if run.name not in names:
            names.append(run.name)
    return groups


def _missed(subject: Subject) -> str:
    """The games on which a run converges, but not to the fixed point that was identified."""
    if (limit := subject.limit) is None:
        return ""
    missed = [run for run in subject.runs if run.misses(limit.law(run.game))]
    return ", ".join(dict.fromkeys(run.name for run in missed))


def _last_iterate(subject: Subject) -> Found:
    runs, groups = subject.runs, _grouped(subject.runs)
    share = sum(run.fate == "converges" for run in runs) / len(runs)
    detail = f"share of {len(runs)} runs of {subject.steps} steps on {len(subject.games)} games that converge"
    if subject.still:
        return Found("never moves", share, detail)
    if share == 1:
        limit = subject.limit
        if limit is not None:
            verdict = f"converges, from every start, to {limit.words}"
            if missed := _missed(subject):
                verdict = f"converges, but on {missed} not to its fixed point {limit.words}"
            return Found(verdict, share, detail)
        pairs = zip(runs[::2], runs[1::2], strict=True)
        apart = max(float(np.abs(one.probs[-1] - two.probs[-1]).sum()) for one, two in pairs)
        verdict = "converges" if apart < 1e-3 else "converges, but to a limit that depends on the start"
        return Found(verdict, share, detail)
    words = [f"{fate} on {', '.join(names)}" for fate, names in groups.items() if fate != "fails"]
    if failed := [run for run in runs if run.error is not None]:
        words.append(f"fails on {failed[0].name} with {_said(failed[0].error)}")  # type: ignore[arg-type]
    return Found(("does not converge: " if "cycles" in groups else "") + "; ".join(words), share, detail)


def _average_limit(subject: Subject) -> tuple[Concept | None, float]:
    """What the averages of all runs converge to, the fixed point or the maximal lottery; and the largest gap left.

    An equilibrium that no step leaves fixed is not asked for: a small bias falls for a long time before it stays.
    """
    runs = [run for run in subject.runs if run.error is None]
    t = np.unique(np.geomspace(subject.steps / 50, subject.steps, 60).astype(int))
    for concept in (subject.limit or subject.aim, regularised(0.0)):
        if concept is not None and runs:
            gaps = [concept.gaps(run.game, run.averages[t]) for run in runs]
            # discrete multiplicative weights leave t^-1/2, continuous ones t^-1
            falls = [gap[-1] < 1e-9 or _exponent(t, gap) < -0.3 for gap in gaps]
            left = max(float(gap[-1]) for gap in gaps)
            if all(falls) and left < 0.05:
                return concept, left
    return None, np.nan


def _exponent(t: Any, values: Floats) -> float:
    """p of the fit values ~ t^p."""
    return float(np.polyfit(np.log(t), np.log(np.maximum(values, 1e-300)), 1)[0])


def _average_iterate(subject: Subject) -> Found:
    if subject.still:
        return Found("never moves")
    concept, left = _average_limit(subject)
    if concept is None:
        return Found("converges to no equilibrium that is known on every game")
    return Found(
        f"converges to {concept.words}", left, f"largest gap left after {subject.steps} steps, arithmetic average"
    )


def _fixed_point(subject: Subject) -> Found:
    if subject.still:
        return Found("every policy: it never moves")
    limit, frozen = subject.limit, f"; schedule frozen at t = {LATE:.0e}" if subject.scheduled else ""
    if subject.unbiased:
        moved = max(drift(subject.algorithm, g, limit.law(g)) for g in subject.games.values())  # type: ignore[union-attr]
        return Found(limit.words, moved, f"nats by which a step moves it{frozen}")  # type: ignore[union-attr]
    if limit is None:
        found = f"solved for on {len(subject.points)} of {len(subject.games)} games{frozen}"
        if subject.aim is None or not subject.points:
            return Found("none that was identified", np.nan, found)
        verdict = f"not {subject.aim.words}, and no equilibrium or best response that is known"
        return Found(verdict, subject.bias[0], f"KL(pi*, fixed point), median over games; {found}")
    if subject.aim is None:
        return Found(f"{limit.words}; the algorithm declares no tau", np.nan, frozen.strip("; "))
    detail = f"KL(pi*, fixed point), median over games, at most {subject.bias[1]:.3g}{frozen}"
    against = _opponent_limit(subject)
    return Found(f"{limit.words}, not {subject.aim.words}", subject.bias[0], detail + against)


def _opponent_limit(subject: Subject) -> str:
    """What it plays against at its fixed point, where that is not the fixed point itself."""
    large = [(subject.games[name], *point) for name, point in subject.points.items() if subject.games[name].n > 8]
    if not large or max(float(np.abs(pi.probs - q).max()) for _, pi, q in large) < 1e-6:
        return ""
    if max(float(np.abs(q - game.reference.probs).max()) for game, _, q in large) < 1e-9:
        return "; it plays against the reference"
    slope, unexplained = slopes([(game, np.log(q), q) for game, _, q in large])
    if unexplained > 1e-8 or slope <= 0:
        return ""
    return f"; it plays against the equilibrium of tau = {digits(1 / slope, subject.tau)}"


def _diagnosis(subject: Subject) -> Found:
    """The last iterate, its limit and the average in one sentence."""
    groups, limit, aim = _grouped(subject.runs), subject.limit, subject.aim
    if subject.still:
        return Found("it never moves")
    if "fails" in groups:
        return Found(_last_iterate(subject).verdict)
    if "cycles" in groups:
        names = ", ".join(groups["cycles"])
        concept, _ = _average_limit(subject)
        average = "and its average does not converge to an equilibrium either"
        if concept is not None:
            missed = f", not to {aim.words}" if aim is not None and concept.words != aim.words else ""
            average = f"only its average converges, to {concept.words}{missed}"
        return Found(f"the last iterate does not converge: it cycles on {names}; {average}")
    if "is undecided" in groups:
        where = ", ".join(groups["is undecided"])
        fixed = "of an unknown kind" if limit is None else limit.words
        return Found(f"too slow to tell after {subject.steps} steps (on {where}); its fixed point is {fixed}")
    if missed := _missed(subject):
        return Found(f"the last iterate converges, but on {missed} not to its fixed point {limit.words}")  # type: ignore[union-attr]
    if limit is None:
        return Found(f"the last iterate converges, but not to {aim.words if aim else 'a known equilibrium'}")
    if subject.unbiased or aim is None:
        return Found(f"the last iterate converges to {limit.words}")
    bias = f"(bias KL {subject.bias[0]:.2g})"
    return Found(f"the last iterate converges, but to {limit.words}, not to {aim.words} {bias}", subject.bias[0])


# --- rates


def _fitted(distance: Floats) -> tuple[str, float] | None:
    """linear and the factor per step, or sublinear and the exponent of t, of a curve; "finite" and steps; None."""
    low = np.flatnonzero(distance < 1e-22)
    end = int(low[0]) if low.size else len(distance)
    if end < 12:
        return "finite", float(end)
    t = np.arange(end // 4, end)
    y, ones = np.log(distance[t]), np.ones(len(t))
    fits = []
    for x in (t, np.log(t)):
        coefficients, *_ = np.linalg.lstsq(np.stack([x, ones], axis=1), y)
        fits.append((float(np.sum((y - coefficients[0] * x - coefficients[1]) ** 2)), float(coefficients[0])))
    (linear, slope), (sublinear, exponent) = fits
    if slope >= 0:
        return None
    return ("linear", float(np.exp(slope))) if low.size or linear < sublinear else ("sublinear", exponent)


def _rate(subject: Subject) -> Found:
    fits = []
    for run in subject.runs[1::2]:
        if run.fate == "converges":
            last = Tabular.from_logits(run.log_probs[-1])
            target = last if subject.limit is None else subject.limit.law(run.game)
            fits.append(_fitted(metrics.kl_rows(target.log_probs, run.log_probs)))
    found = [fit for fit in fits if fit is not None]
    if not found:
        return Found("none: the last iterate does not converge")
    kinds = [kind for kind, _ in found]
    kind = max(set(kinds), key=lambda k: (kinds.count(k), k))
    values = np.array([value for k, value in found if k == kind])
    # games are the units: within a run successive distances are not independent, and games differ in their rates
    draws = np.random.default_rng(subject.seed).choice(values, (2000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.05, 0.95])
    median, over = float(np.median(values)), f"median over {len(values)} games, 90% bootstrap over games"
    if kind == "finite":
        return Found(f"arrives within {int(values.max())} steps", median, f"steps, {over[: over.index(',')]}")
    there = [run.name for run in subject.runs[1::2] if run.fate == "converges"]
    where = "" if len(there) == len(subject.games) else f", on {', '.join(there)} alone"
    interval = f"[{low:.4g}, {high:.4g}]"
    if kind == "linear":
        return Found(f"linear: KL falls by the factor {median:.4g} {interval} per step{where}", median, over)
    return Found(f"sublinear: KL falls like t^{median:.3g} {interval}{where}", median, over)


def _declared_rate(subject: Subject) -> Found:
    """The bound of `algorithm.rate` on KL(pi*, next) is tried at random states and along runs from the reference."""
    algorithm, tau = subject.algorithm, subject.tau
    if not hasattr(algorithm, "rate") or not tau:
        return Found("not checked: the algorithm declares " + ("no rate" if tau else "no tau > 0"))
    rng, ratios, at_random = np.random.default_rng(subject.seed), list[float](), 0
    for i in range(120):
        n = int(rng.integers(2, 13))
        game = MatrixGame.random(n, rng, reference=Tabular.from_logits(rng.standard_normal(n)))
        star = regularized_nash(game, tau).policy
        # near and far, spread out and nearly certain
        law = Tabular.from_logits(star.log_probs + 10.0 ** rng.uniform(-3, 1) * rng.standard_normal(n))
        state = algorithm.init(game.reference if i % 10 == 0 else law, game.reference)
        if hasattr(state, "_replace") and hasattr(state, "t"):
            state = state._replace(t=int(rng.integers(0, 50)))
        ratios += _over_declared(algorithm, state, game, star, 1)
    at_random = len(ratios)
    for run in subject.runs[::2]:
        state = algorithm.init(run.game.reference, run.game.reference)
        ratios += _over_declared(algorithm, state, run.game, equilibrium(run.game, tau), 40)
    known = [r for r in ratios if not np.isnan(r)]
    if not known:
        return Found("none: its bound is infinite everywhere")
    worst, detail = max(known), "largest KL(pi*, next) over the bound"
    if worst <= 1 + 1e-9:
        return Found(f"holds at {len(known)} states", worst, detail)
    broken, along = (sum(r > 1 + 1e-9 for r in part) for part in (ratios[:at_random], ratios[at_random:]))
    where = (
        f"{broken} of {at_random} random states and {along} of {len(ratios) - at_random} on the way from the reference"
    )
    return Found(f"violated at {where}", worst, detail)


def _over_declared(algorithm: Any, state: Any, game: MatrixGame, star: Tabular, steps: int) -> list[float]:
    """KL(pi*, pi_{t+1}) over its bound for so many steps; NaN where there is no bound, 0 where all is rounding."""
    found = []
    for _ in range(steps):
        before, t = metrics.kl(star, state.policy), int(getattr(state, "t", 0))
        state, _ = algorithm.step(state, ExactSolver(game))
        after, bound = metrics.kl(star, state.policy), float(algorithm.rate(before, t))
        found.append(np.nan if np.isinf(bound) else 0.0 if after < 1e-20 else after / max(bound, 1e-300))
    return found


# --- sub-problems and symmetries


def _policies(state: Any) -> dict[str, Any]:
    """The policies that a state holds, by field."""
    items = state._asdict() if hasattr(state, "_asdict") else getattr(state, "__dict__", {})
    return {name: value for name, value in items.items() if hasattr(value, "log_prob")}


def _recipe(policy: Any, known: dict[str, Floats]) -> dict[str, float] | None:
    """A policy as a geometric mixture of known ones, exponents by name; None if it is none."""
    if isinstance(policy, Geometric):
        total: dict[str, float] = {}
        for part, weight in policy.parts:
            inner = _recipe(part, known) if weight else {}
            if inner is None:
                return None
            for name, power in inner.items():
                total[name] = total.get(name, 0.0) + weight * power
        return total
    log_probs = table(policy)
    for name, other in known.items():
        if np.ptp(log_probs - other) < 1e-12:
            return {name: 1.0}
    design = np.stack([*known.values(), np.ones_like(log_probs)], axis=1)
    powers = np.linalg.lstsq(design, log_probs)[0]
    if np.abs(design @ powers - log_probs).max() > 1e-9:
        return None
    return {name: float(power) for name, power in zip(known, powers, strict=False) if abs(power) > 1e-9}


def _spelled(recipe: dict[str, float] | None) -> str:
    if recipe is None:
        return "a policy of its own"
    return " ".join(name if power == 1 else f"{name}^{power:.4g}" for name, power in recipe.items()) or "uniform"


def _sub_problems(subject: Subject) -> Found:
    """What a step asks, read off its sub-problems at a state where all policies differ."""
    game, solver = subject.games["random 1"], ExactSolver(subject.games["random 1"])
    state = subject.algorithm.init(elsewhere(game, subject.seed), game.reference)
    for _ in range(2):
        state, _ = subject.algorithm.step(state, solver)
    watched = Watched(game)
    subject.algorithm.step(state, watched)
    if not watched.posed:
        return Found("none: the step solves nothing", 0, "solves per step")
    known = {name: table(policy) for name, policy in _policies(state).items()}
    # in this order, so that a policy that is in several fields is called the policy
    known = {name: known[name] for name in sorted(known, key=lambda k: (k != "policy", k != "reference"))}
    wrong, lines, anchors = list[str](), list[str](), list[dict[str, float] | None]()
    for k, (prox, answer) in enumerate(watched.posed, 1):
        anchor, against = _recipe(prox.anchor, known), [(_recipe(p, known), w) for p, w in prox.opponents]
        spelled = " + ".join(("" if w == 1 else f"{w:.4g} ") + _spelled(r) for r, w in against)
        lines.append(f"from {_spelled(anchor)} against {spelled}, step {prox.eta:.4g}")
        total, weight = sum(w for _, w in against), sum(w for _, w in prox.anchor.parts)
        if prox.eta * total < 0:
            wrong.append("the preference has the wrong sign")
        elif abs(total - 1) > 1e-9:
            wrong.append(f"the opponent's weights sum to {total:.4g}, not 1")
        if abs(weight - 1) > 1e-9:
            wrong.append(f"the anchor's weights sum to {weight:.4g}, not 1")
        moved = any(name.startswith("answer") for r, _ in against for name in r or {})
        if moved and anchor is not None and anchor not in anchors:
            wrong.append("the opponent moves after the update: it is made of a policy that this step has just found")
        pull = (anchor or {}).get("reference", 0.0) / prox.eta
        if subject.tau and anchor is not None and abs(pull - subject.tau) > 1e-6 * subject.tau:
            wrong.append(f"the pull to the reference is {pull:.4g}, not tau = {subject.tau:.4g}")
        anchors.append(anchor)
        known[f"answer {k}"] = table(answer)
    return Found("; ".join([*dict.fromkeys(wrong), ", then ".join(lines)]), len(lines), "solves per step")


def _after(algorithm: Any, game: MatrixGame, start: Tabular, steps: int = 3) -> Floats:
    state, solver = algorithm.init(start, game.reference), ExactSolver(game)
    for _ in range(steps):
        state, _ = algorithm.step(state, solver)
    return table(state.policy)


def _compared(name: str, difference: Any, good: str, bad: str) -> Found:
    """Differences of log-probabilities in nats, of which 1e-10 is rounding."""
    worst = float(np.max(np.abs(difference)))
    return Found(good if worst < 1e-10 else bad, worst, "nats between two log-probabilities that should agree")


def _repeatable(subject: Subject) -> Found:
    game, algorithm = subject.games["random 1"], subject.algorithm
    start = elsewhere(game, subject.seed)
    state, before = algorithm.init(start, game.reference), start.log_probs.copy()
    one, two = (table(algorithm.step(state, ExactSolver(game))[0].policy) for _ in range(2))
    again = _after(algorithm, game, start) - _after(algorithm, game, start)
    changed = np.concatenate([np.ravel(d) for d in (one - two, table(state.policy) - before, again)])
    return _compared(
        "repeatable",
        changed,
        "yes: a step is a function of its state, which it leaves as it is",
        "no: a step from the same state gives another policy, or changes the state that it is given",
    )


def _relabelling(subject: Subject) -> Found:
    game = subject.games["random 1"]
    order, start = np.roll(np.arange(game.n), 3), elsewhere(game, subject.seed)
    shuffled = MatrixGame(game.matrix[np.ix_(order, order)], Tabular(game.reference.log_probs[order]))
    there = _after(subject.algorithm, shuffled, Tabular(start.log_probs[order]))
    return _compared(
        "relabelling",
        there - _after(subject.algorithm, game, start)[order],
        "equivariant: the order of the responses does not matter",
        "not equivariant: the policy depends on the order in which the responses are listed",
    )


def _prompts(subject: Subject) -> Found:
    rng = np.random.default_rng(subject.seed)
    game = MatrixGame.random(5, rng, 3, reference=softmax(rng.standard_normal((3, 5)), axis=-1))
    start = Tabular.from_logits(rng.standard_normal((3, 5)))
    together = _after(subject.algorithm, game, start)
    alone = [
        _after(subject.algorithm, MatrixGame(game.matrix[x], Tabular(game.reference.log_probs[x])), Tabular(row))
        for x, row in enumerate(start.log_probs)
    ]
    return _compared(
        "prompts",
        together - np.array(alone),
        "independent: a batch of prompts gives what each gives alone",
        "mixed: the policy of a prompt depends on the others in its batch",
    )


def _clones(subject: Subject) -> Found:
    """Response 2 is split in two that tie, with 0.3 and 0.7 of its mass."""
    game, start = subject.games["random 1"], elsewhere(subject.games["random 1"], subject.seed)
    index = np.insert(np.arange(game.n), 3, 2)
    share = np.zeros(game.n + 1)
    share[2:4] = np.log([0.3, 0.7])
    twice = MatrixGame(game.matrix[np.ix_(index, index)], Tabular(game.reference.log_probs[index] + share))
    there = _after(subject.algorithm, twice, Tabular(start.log_probs[index] + share)) - share
    return _compared(
        "clones",
        there - _after(subject.algorithm, game, start)[index],
        "invariant: two copies of a response share what it had, in the ratio of their reference",
        "not invariant: a copy of a response changes how much its kind is played",
    )


# --- estimators and rungs


def _estimator(subject: Subject) -> Found:
    """The sampled policy gradient of every sub-problem, summed over all outcomes of its samples, against the exact one.

    All outcomes are the prompts of one game, each with its chance as its weight: one backward pass sums them up.
    """
    try:
        from nlhf.llm import Enumerate, LogitTable, PolicyGradientSolver, Sample
    except ImportError:
        return Found("not checked: torch is not installed")
    from itertools import product

    import torch
    from torch.optim import SGD

    def repeat(policy: Any, times: int) -> Floats:
        return np.broadcast_to(table(policy), (times, n))

    def spread(policy: Any, times: int) -> Any:
        """A logit table for each of so many prompts, all the same."""
        if isinstance(policy, Geometric):
            return Geometric(tuple((spread(part, times), weight) for part, weight in policy.parts))
        return LogitTable(Tabular(repeat(policy, times)))

    n, draws = 3, 2
    game = MatrixGame.random(n, subject.seed, reference=[0.5, 0.3, 0.2])
    state = subject.algorithm.init(Tabular(np.log([0.2, 0.35, 0.45])), game.reference)
    state, _ = subject.algorithm.step(state, ExactSolver(game))
    watched, policy = Watched(game), Tabular(np.log([0.3, 0.1, 0.6]))  # as in the middle of a solve
    subject.algorithm.step(state, watched)
    if not watched.posed:
        return Found("not checked: the step solves nothing")
    worst, size, outcomes = 0.0, 0.0, 0
    for prox, _ in watched.posed[:4]:
        # two responses of the policy and two of every opponent
        laws = [table(policy), *(log_softmax(other.log_prob(..., ...), axis=-1) for other, _ in prox.opponents)]
        drawn = np.array(list(product(range(n), repeat=draws * len(laws)))).reshape(-1, len(laws), draws)
        chance = np.exp(sum(law[drawn[:, i]].sum(-1) for i, law in enumerate(laws)))
        K, outcomes = len(drawn), outcomes + len(drawn)
        repeated = MatrixGame(np.broadcast_to(game.matrix, (K, n, n)), Tabular(repeat(game.reference, K)), chance)

        @dataclass(frozen=True)
        class Outcomes(Sample):
            """Prompt k meets outcome k."""

            outcomes: Any = None

            def draw(self, wanted: Any, x: Any, generator: Any) -> Any:
                even = torch.full((len(x), draws), 1 / draws, dtype=torch.float64)
                return [[(torch.tensor(self.outcomes[:, i]), even)] for i in range(len(wanted))]

        start, gradients = spread(policy, K), []
        opponents = tuple((spread(other, K), weight) for other, weight in prox.opponents)
        posed = Prox(spread(prox.anchor, K), Mixture(opponents), prox.eta)
        for expectation in (Outcomes(draws, draws, held=0, outcomes=drawn), Enumerate()):
            solver = PolicyGradientSolver(repeated, expectation, steps=1, optimizer=partial(SGD, lr=1.0))
            found, _ = solver(posed, start, 0)
            gradients.append((found.params["logits"] - start.params["logits"]).sum(0).numpy())
        worst = max(worst, float(np.abs(gradients[0] - gradients[1]).max()))
        size = max(size, float(np.abs(gradients[1]).max()))
    verdict = "unbiased" if worst < 1e-12 * max(1.0, size) else "biased"
    detail = (
        f"largest entry of the bias of the policy gradient, of a gradient of {size:.3g}; {outcomes} outcomes listed"
    )
    return Found(verdict, worst, detail)


def _rungs(subject: Subject) -> Found:
    try:
        from nlhf.llm import Enumerate, LogitTable, RegressionSolver, TinyTransformer
    except ImportError:
        return Found("not checked: torch is not installed")
    import torch

    game, algorithm, steps = MatrixGame.random(8, subject.seed), subject.algorithm, 3
    exact = np.exp(_after(algorithm, game, game.reference, steps))
    solver, threads = RegressionSolver(game, Enumerate(), steps=40), torch.get_num_threads()
    torch.set_num_threads(1)
    away, words = dict[str, float](), list[str]()
    try:
        for name, start in (
            ("logit table", LogitTable(game.reference)),
            ("transformer", TinyTransformer(game.reference, width=16, layers=1, heads=2, seed=subject.seed)),
        ):
            try:
                state = algorithm.init(start, start)
                for _ in range(steps):
                    state, _ = algorithm.step(state, solver)
                away[name] = float(np.abs(np.exp(table(state.policy)[0]) - exact).sum() / 2)
            except Exception as error:
                words.append(f"the {name} fails with {_said(error)}")
    finally:
        torch.set_num_threads(threads)
    # what L-BFGS leaves: a convex problem is solved, a network fits its answer to some 1e-4
    apart = [name for name, bound in (("logit table", 1e-6), ("transformer", 1e-3)) if away.get(name, 0.0) > bound]
    words += [f"the {name} takes another path than the table" for name in apart]
    detail = "; ".join(f"{name} {value:.2g}" for name, value in away.items())
    return Found(
        "; ".join(words) or "agree: table, logit table and transformer take the same path",
        max(away.values(), default=np.nan),
        f"total variation from the exact table after {steps} steps: {detail}",
    )


# --- extremes


@dataclass(frozen=True)
class _Scaled:
    """A schedule times a factor."""

    schedule: Callable[[int], float]
    factor: float

    def __call__(self, t: int) -> float:
        return self.factor * self.schedule(t)


def _with_tau(subject: Subject, tau: float) -> Found:
    if subject.tau is None:
        return Found("not checked: the algorithm has no tau")
    return _changed(subject, tau=tau)


def _with_eta(subject: Subject, factor: float) -> Found:
    if (eta := getattr(subject.algorithm, "eta", None)) is None:
        return Found("not checked: the algorithm has no eta")
    return _changed(subject, eta=_Scaled(eta, factor) if callable(eta) else factor * eta)


def _largest_eta(subject: Subject) -> Found:
    """The largest step that a mixture with the reference allows."""
    if not subject.tau or not hasattr(subject.algorithm, "eta"):
        return Found("not checked: the algorithm has no eta, or no tau > 0")
    return _changed(subject, eta=1 / subject.tau)


def _changed(subject: Subject, **changed: Any) -> Found:
    """Refused, or what it does on three games: converge, cycle, or break down."""
    try:
        other = Subject(dataclasses.replace(subject.algorithm, **changed), subject.seed, EXTREMES, STEPS // 2)
    except ValueError as error:
        return _refused(error)
    except TypeError:
        return Found("not checked: the algorithm is no dataclass whose eta and tau can be changed")
    for run in other.runs:
        if isinstance(run.error, ValueError) and len(run.log_probs) == 1 and "NaN" not in str(run.error):
            return _refused(run.error)
        if run.error is not None:
            return Found(f"breaks down on {run.name} after {len(run.log_probs) - 1} steps with {_said(run.error)}")
    found = _diagnosis(other)
    return found._replace(detail=f"finite on {', '.join(EXTREMES)}")


def _refused(error: ValueError) -> Found:
    clear = any(name in str(error) for name in ("eta", "tau"))
    return Found(f"refused{'' if clear else ', but without naming eta or tau'}: {error}")


__all__ = ["Conformance", "Row", "check"]
