"""Step sizes: a number, or a function of the iteration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeAlias

Schedule: TypeAlias = Callable[[int], float]
"""Step size as a function of the iteration t = 0, 1, 2, ..."""


@dataclass(frozen=True)
class Harmonic:
    """eta_t = 2 / (tau (t + 2)), t >= 0: the schedule under which Nash-MD converges to the equilibrium.

    eta_0 tau = 1, so the first step forgets the initial policy and starts from the reference.

    Raises ValueError unless tau > 0.

    Source: Munos et al. 2024, arXiv:2312.00886, Theorem 1.

    >>> [Harmonic(tau=0.5)(t) for t in range(3)]
    [2.0, 1.3333333333333333, 1.0]
    """

    tau: float

    def __post_init__(self) -> None:
        check_tau(self.tau, positive=True)

    def __call__(self, t: int) -> float:
        return 2.0 / (self.tau * (t + 2))


@dataclass(frozen=True)
class PowerDecay:
    """eta_t = eta / (1 + t)**power, t >= 0.

    Raises ValueError unless eta > 0 and power >= 0.

    >>> PowerDecay(eta=1.0, power=0.5)(3)
    0.5
    """

    eta: float
    power: float

    def __post_init__(self) -> None:
        if not (is_number(self.eta) and self.eta > 0):
            raise ValueError(f"eta must be a finite number > 0, got {self.eta!r}")
        if not (is_number(self.power) and self.power >= 0):
            raise ValueError(f"power must be a finite number >= 0, got {self.power!r}")

    def __call__(self, t: int) -> float:
        return self.eta / (1 + t) ** self.power


def at(eta: float | Schedule, t: int) -> float:
    """The step size of iteration t."""
    return check_eta(eta(t)) if callable(eta) else eta


def mixing(eta: float, tau: float) -> float:
    """eta * tau, the weight of the reference in a mixture that must stay a mixture: eta * tau <= 1.

    Raises ValueError otherwise. A product within rounding of 1 is 1.
    """
    weight = eta * tau
    if weight > 1 + 1e-12:
        raise ValueError(f"eta * tau must be <= 1, got eta = {eta!r}, tau = {tau!r}, eta * tau = {weight!r}")
    return min(weight, 1.0)


def is_number(value: Any) -> bool:
    """Whether value is a finite real number (a truth value is none)."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_tau(tau: Any, positive: bool = False) -> float:
    """tau itself, if it is a finite number >= 0 (> 0 where `positive`); ValueError otherwise."""
    if not is_number(tau) or tau < 0 or (positive and tau == 0):
        raise ValueError(f"tau must be a finite number {'> 0' if positive else '>= 0'}, got {tau!r}")
    return tau


def check_eta(eta: Any) -> Any:
    """eta itself, if it is a schedule or a finite number > 0; ValueError otherwise."""
    if callable(eta):
        return eta
    if not is_number(eta) or eta <= 0:
        raise ValueError(f"eta must be a finite number > 0 or a schedule t -> eta_t, got {eta!r}")
    return eta


def check_count(name: str, value: Any, least: int) -> None:
    """ValueError unless value is an integer >= least."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
