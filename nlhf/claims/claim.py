"""A theorem as data: random instances, two sides, and wrong versions of it that the same instances must refute.

Pytest, `nlhf verify` and its report read the same objects. A claim holds if no instance violates it and every mutant
is refuted by one: a claim that nothing could refute says nothing.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Literal, NamedTuple, TypeAlias
from unittest import mock

import numpy as np
from hypothesis import HealthCheck, Phase, assume, given, seed, settings, target
from hypothesis.strategies import SearchStrategy
from numpy.typing import NDArray

from nlhf.claims.instances import Instance

Side: TypeAlias = Callable[[Any], Any]
"""One side of a claim: an instance -> a number or an array."""

Mutant: TypeAlias = Mapping[str, Side] | Callable[[], AbstractContextManager[Any]]
"""Other sides, by field (a theorem that is wrong), or a context in which the code is wrong (a bug)."""


class Measured(NamedTuple):
    """Both sides of a claim on one instance."""

    lhs: NDArray[np.float64]
    rhs: NDArray[np.float64]
    excess: float
    """Largest amount by which it is violated beyond rounding; it holds if this is <= 0. NaN counts as inf."""
    ratio: float
    """Largest lhs / rhs of a bound; of an identity, the largest difference in units of its tolerance."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A bound lhs <= rhs, or an equation lhs == identity, entry by entry, for every instance.

    Args:
        id: PAPER/NAME, what `nlhf verify` is asked for.
        statement: the formula, in words that need no other text.
        source: authors, year, arXiv id, and where; or how it is derived.
        tag: proved (here or in the source), checked (numerically, without a proof), or published (as printed).
        instances: random instances, degenerate corners included.
        lhs: a number or an array. It must call the code that is under test.
        rhs: an upper bound of it, or
        identity: what it equals.
        mutants: by name, at least one: sides that make the claim false, or a context in which the code is wrong.
        tol: rounding allowed, in units of max(1, |rhs|): a number, or a function of the instance.
        where: what an instance must fulfil for the claim to speak of it.
        axis: if the sides are curves, what they run over; the report then draws them.

    Raises ValueError if there is no mutant, or not exactly one of rhs and identity.
    """

    id: str
    statement: str
    source: str
    tag: Literal["proved", "checked", "published"]
    instances: SearchStrategy[Any]
    lhs: Side
    rhs: Side | None = None
    identity: Side | None = None
    mutants: Mapping[str, Mutant]
    tol: float | Side = 1e-9
    where: Callable[[Any], bool] = lambda instance: True
    axis: str | None = None

    def __post_init__(self) -> None:
        if (self.rhs is None) == (self.identity is None):
            raise ValueError(f"{self.id}: a claim has exactly one of rhs and identity")
        if not self.mutants:
            raise ValueError(f"{self.id}: a claim without a mutant could not fail, give at least one")

    @property
    def paper(self) -> str:
        """The first part of the id."""
        return self.id.split("/")[0]

    def measure(self, instance: Any) -> Measured:
        """Both sides, and how far they are from a violation."""
        other = self.rhs or self.identity
        assert other is not None
        left, right = np.broadcast_arrays(*(np.asarray(side(instance), dtype=np.float64) for side in (self.lhs, other)))
        tol = float(self.tol(instance) if callable(self.tol) else self.tol)
        allowed = tol * np.maximum(1.0, np.abs(right))
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.identity is not None:
                excess = np.where(left == right, 0.0, np.abs(left - right)) - allowed
                ratio = (excess + allowed) / allowed
            else:
                excess = np.where(left == right, 0.0, left - right) - allowed
                # a right-hand side that is no larger than its rounding says nothing about how sharp the bound is
                ratio = np.where(right > 1000 * allowed, left / right, -np.inf)
        worst = float(np.max(excess, initial=-np.inf))
        return Measured(left, right, np.inf if np.isnan(worst) else worst, float(np.max(ratio, initial=-np.inf)))

    def mutated(self, name: str) -> tuple[Claim, AbstractContextManager[Any]]:
        """The claim with a mutant's sides, and the context in which to measure it."""
        mutant = self.mutants[name]
        if callable(mutant):
            return self, mutant()
        sides = {"rhs": None, "identity": None, **mutant} if {"rhs", "identity"} & set(mutant) else dict(mutant)
        return replace(self, mutants={name: mutant}, **sides), nullcontext()


@dataclass(frozen=True)
class Verdict:
    """What trying to break a claim has shown."""

    claim: Claim
    tried: int
    ratio: float
    """The largest lhs / rhs found (of an identity: difference / tolerance); -inf where no right-hand side is large."""
    worst: Instance | None
    """The instance that attains it."""
    refuted: Mapping[str, Instance | None]
    """For every mutant the instance that refutes it; None if there is none."""
    counterexample: Instance | None
    """A violation, made as small as hypothesis could."""
    error: str
    seconds: float

    @property
    def holds(self) -> bool:
        """No violation, and no mutant that got away."""
        return self.counterexample is None and None not in self.refuted.values()


def verify(claim: Claim, examples: int = 50, search: int = 0, random_seed: int = 0) -> Verdict:
    """Try to break a claim, then to break its mutants, and look for the instance on which it is tightest.

    Args:
        claim: what to verify.
        examples: random instances.
        search: steps of a local search that moves the parameters of the tightest instances to make lhs / rhs larger.
        random_seed: of the instances and the search.

    >>> from nlhf.claims import LEDGER
    >>> verify(LEDGER["regularized_games/symmetric"], examples=10).holds
    True
    """
    began = perf_counter()
    tried: list[tuple[float, Any]] = []
    failed: list[Any] = []
    error = ""

    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.target, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @seed(random_seed)
    @given(claim.instances)
    def attempt(instance: Any) -> None:
        assume(claim.where(instance))
        try:
            measured = claim.measure(instance)
            assert measured.excess <= 0, _violation(claim, measured)
        except Exception:
            failed.append(instance)
            raise
        tried.append((measured.ratio, instance))
        if np.isfinite(measured.ratio):
            target(measured.ratio)

    try:
        with same_instances():
            attempt()
    except Exception as raised:  # whatever the code under test raises is a counterexample
        if not failed:
            raise
        return Verdict(
            claim, len(tried) + 1, np.inf, None, {}, failed[-1], f"{type(raised).__name__}: {raised}",
            perf_counter() - began,
        )  # fmt: skip
    tried.sort(key=lambda pair: -pair[0])
    rng = np.random.default_rng(random_seed)
    refuted = {name: refute(claim, name, [instance for _, instance in tried], rng) for name in claim.mutants}
    (ratio, worst), broken = tried[0], None
    if search and claim.rhs is not None:
        ratio, worst, broken = climb(claim, [instance for _, instance in tried[:8]], search, rng)
        error = "found by the search for the worst case" if broken is not None else ""
    return Verdict(claim, len(tried), ratio, worst, refuted, broken, error, perf_counter() - began)


def refute(claim: Claim, name: str, instances: list[Any], rng: np.random.Generator) -> Any | None:
    """The first instance that a mutant fails on; if there is none, what a local search from its tightest finds.

    Code that raises refutes nothing: a mutant that no longer fits the code must not look as if it were caught.
    """
    mutant, context = claim.mutated(name)
    tried = []
    with context, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where they are errors, a warning would raise
        # a copy has computed nothing yet: what the right code found must not hide what the wrong code does
        for instance in map(replace, instances) if callable(claim.mutants[name]) else instances:
            measured = _attempt(mutant, instance, -np.inf)
            if measured.excess > 0:
                return instance
            tried.append((measured.ratio, instance))
        tried.sort(key=lambda pair: -pair[0])
        starts, found = [instance for _, instance in tried[:8]], None
        for steps in (200, 2000):
            if found is None:
                found = climb(mutant, starts, steps, rng, -np.inf)[2]
        return found


def climb(
    claim: Claim, starts: list[Any], steps: int, rng: np.random.Generator, raised: float = np.inf
) -> tuple[float, Any, Any | None]:
    """Move the parameters of instances at random, keep what makes lhs / rhs larger, and halve the field as it goes on.

    `raised` is the excess of code that raises. Returns the largest ratio, its instance, and the first violation met.
    """
    field = [(_attempt(claim, start, raised).ratio, start, 0.1) for start in starts]
    rounds = len(field).bit_length()
    while field:
        for k, (best, here, scale) in enumerate(field):
            for _ in range(steps // (rounds * len(field))):
                there = here.moved(rng, scale)
                if not claim.where(there):
                    continue
                measured = _attempt(claim, there, raised)
                if measured.excess > 0:
                    return best, here, there
                # one step in five should succeed (Rechenberg 1973): then the scale stays as it is
                if measured.ratio > best:
                    best, here, scale = measured.ratio, there, min(scale * 1.5, 1.0)
                else:
                    scale = max(scale * 0.9, 1e-4)
            field[k] = best, here, scale
        field.sort(key=lambda entry: -entry[0])
        if len(field) == 1:
            return field[0][0], field[0][1], None
        field = field[: len(field) // 2]
    raise ValueError("climb needs an instance to start from")


@contextmanager
def same_instances() -> Iterator[None]:
    """Of one seed, in every process: hypothesis also draws numbers found in the source of whatever is imported."""
    providers: Any = sys.modules.get("hypothesis.internal.conjecture.providers")
    if not hasattr(providers, "_get_local_constants"):
        yield
        return
    nothing = type(providers._local_constants)()
    try:
        with mock.patch.object(providers, "_get_local_constants", return_value=nothing):
            providers.CONSTANTS_CACHE.cache.clear()
            yield
    finally:
        providers.CONSTANTS_CACHE.cache.clear()


def _attempt(claim: Claim, instance: Any, raised: float) -> Measured:
    """As `claim.measure`; where the code raises, this excess."""
    try:
        return claim.measure(instance)
    except Exception:
        return Measured(np.empty(0), np.empty(0), raised, -np.inf)


def _violation(claim: Claim, measured: Measured) -> str:
    gap = measured.lhs - measured.rhs
    at = int(np.argmax(np.where(np.isnan(gap), np.inf, gap if claim.identity is None else np.abs(gap))))
    sign = "<=" if claim.identity is None else "=="
    sides = f"{measured.lhs.flat[at]!r} {sign} {measured.rhs.flat[at]!r}"
    return f"{sides} is false, entry {at} of {measured.lhs.size}"
