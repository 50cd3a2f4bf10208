"""Whether a claim holds by construction: does it fail if a function of the library is replaced by a constant?"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cached_property
from types import CodeType, FunctionType
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings

from nlhf.claims import Claim
from nlhf.claims.claim import same_instances
from nlhf.tabular import Categorical, Tabular

Kind: TypeAlias = Callable[[Any], Any]
Place: TypeAlias = tuple[Any, str, Kind]
Library: TypeAlias = dict[CodeType, tuple[FunctionType, list[Place]]]

OURS = ("nlhf.claims", "nlhf.llm.claims", "nlhf.verify")


class NoConstant(Exception):
    """There is no other value of this kind."""


def constant(value: Any, c: float) -> Any:
    """A value of the same kind and shape that says c, whatever the function was asked."""
    if isinstance(value, (float, np.floating)):
        return c
    if isinstance(value, np.ndarray) and value.dtype == np.float64:
        return np.full_like(value, c)
    if isinstance(value, Tabular):
        certain = np.eye(value.probs.shape[-1])[0]
        with np.errstate(divide="ignore"):
            return Tabular(np.log(np.broadcast_to(certain if c else 1 / certain.size, value.probs.shape)))
    if isinstance(value, Categorical):
        return Categorical(np.broadcast_to(np.eye(value.probs.shape[-1])[-int(c)], value.probs.shape), value.atoms)
    if hasattr(value, "is_floating_point") and value.is_floating_point():
        return value.new_full(value.shape, c)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*parts(value, c))
    if isinstance(value, (tuple, list)):
        return type(value)(parts(value, c))
    raise NoConstant


def parts(values: Any, c: float) -> list[Any]:
    """Those that have a constant are replaced by it; raises NoConstant if none has."""
    found: list[Any] = []
    for value in values:
        try:
            found.append(constant(value, c))
        except NoConstant:
            found.append(value)
    if all(new is old for new, old in zip(found, values, strict=True)):
        raise NoConstant
    return found


def library() -> Library:
    """The library's functions, and where each is to be replaced: in modules and classes, by what kind of attribute."""
    found: Library = {}
    modules = [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "nlhf"]
    owners: list[Any] = list(modules)
    for module in modules:
        owners += [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    for owner in dict.fromkeys(owners):
        for name, value in list(vars(owner).items()):
            kind: Kind = _itself
            if isinstance(value, (classmethod, staticmethod)):
                value, kind = value.__func__, type(value)
            elif isinstance(value, property):
                value, kind = value.fget, property
            elif isinstance(value, cached_property):  # which holds what it found
                value, kind = value.func, property
            if (
                isinstance(value, FunctionType)
                and value.__module__.startswith("nlhf")
                and not value.__module__.startswith(OURS)
            ):
                found.setdefault(value.__code__, (value, []))[1].append((owner, name, kind))
    return found


def _itself(function: Any) -> Any:
    return function


def called(claim: Claim, instances: list[Any], library: Library) -> list[CodeType]:
    """Those that say what a constant can say when the claim is measured, first those that it calls itself."""
    seen: dict[CodeType, bool] = {}

    def note(frame: Any, event: str, value: Any) -> None:
        if event == "return" and frame.f_code in library:
            itself = str(frame.f_back.f_globals.get("__name__")).startswith(OURS)
            with suppress(NoConstant):
                if itself > seen.get(frame.f_code, -1):
                    constant(value, 0.0)
                    seen[frame.f_code] = itself

    for instance in instances:
        sys.setprofile(note)
        try:
            claim.measure(replace(instance))
        finally:
            sys.setprofile(None)
    return sorted(seen, key=lambda code: not seen[code])


def drawn(claim: Claim, count: int) -> list[Any]:
    """Random instances."""
    found: list[Any] = []

    @settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @seed(0)
    @given(claim.instances)
    def collect(instance: Any) -> None:
        if claim.where(instance):
            found.append(instance)

    with same_instances():
        collect()
    return found


def fails(claim: Claim, instances: list[Any], function: FunctionType, places: list[Place], c: float) -> bool:
    """Whether an instance violates the claim once the function says c."""
    replaced = []

    def wrong(*args: Any, **kwargs: Any) -> Any:
        value = function(*args, **kwargs)
        try:
            value = constant(value, c)
            replaced.append(True)
        except NoConstant:
            pass
        return value

    with ExitStack() as stack:
        for owner, name, kind in places:
            stack.enter_context(mock.patch.object(owner, name, kind(wrong)))
        for instance in instances:
            try:
                if claim.measure(replace(instance)).excess > 0:
                    return True
            except Exception:  # code that raises fails, too; but not code that nothing was done to
                return bool(replaced)
    return False


def blind(claim: Claim, count: int = 60) -> list[str]:
    """For either of the constants 0 and 1, functions that it calls if none of them is missed; it should be empty."""
    instances, known = drawn(claim, count), library()
    codes = called(claim, instances[:5], known)
    for c in (0.0, 1.0):
        tries = (
            some
            for some in (instances[:3], instances[:15], instances)
            for code in codes
            if fails(claim, some, *known[code], c)
        )
        if next(tries, None) is None:
            return [f"{known[code][0].__name__} = {c:g}" for code in codes]
    return []
