"""The one interface: algorithms pose sub-problems, solvers solve them.

An algorithm is mathematics: from the current policy it poses a `Prox` and says what to do with the answer.
How exactly the answer can be found depends on the world (a table, a logit table, a language model) and is
the business of a solver. Nothing here or in `nlhf.algorithms` imports an array library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from nlhf.schedules import Schedule, check_eta, check_tau

Array: TypeAlias = Any
"""A NumPy array or a torch tensor, whichever the policy at hand speaks."""


@runtime_checkable
class Policy(Protocol):
    """A distribution over whole responses for every prompt. Policies are values: nothing mutates one.

    `x` selects B prompts and `y` selects n responses of each; `...` selects all of them where they can be
    listed. What an `x` or a `y` is (an index, a string, a row of tokens) is between the policy and the game.
    """

    def log_prob(self, x: Any, y: Any) -> Array:
        """(B, n) log pi(y | x) of whole responses, in nats."""
        ...

    def freeze(self) -> Policy:
        """The same distribution, never to be trained: itself if it is immutable."""
        ...

    def lerp(self, other: Any, weight: float) -> Policy:
        """Parameters (1 - weight) * self + weight * other; for a table the parameters are log-probabilities."""
        ...

    def arrays(self) -> dict[str, Array]:
        """The parameters as NumPy arrays, for a checkpoint."""
        ...

    def replace(self, arrays: dict[str, Array]) -> Policy:
        """The same kind of policy with these parameters."""
        ...


class Game(Protocol):
    """Pairwise preferences. They may be intransitive; they are never a difference of rewards by assumption."""

    def win_prob(self, x: Any, y: Any, z: Any) -> Array:
        """(B, n, m) P(y > z | x) in [0, 1], with P(y > z | x) + P(z > y | x) = 1."""
        ...


@dataclass(frozen=True)
class Geometric:
    """Unnormalised geometric mixture, log q = sum_i w_i log pi_i (`Prox` ignores constants in y).

    This is the mixture of *whole responses*. A token-by-token mixture, which is what can be decoded, is another
    policy: `nlhf.llm.TokenMixture`.
    """

    parts: tuple[tuple[Any, float], ...]

    def log_prob(self, x: Any, y: Any) -> Array:
        """(B, n) unnormalised log q(y | x), in nats."""
        # A part of weight 0 is left out rather than multiplied: 0 * -inf is not 0.
        return sum(weight * policy.log_prob(x, y) for policy, weight in self.parts if weight)


@dataclass(frozen=True)
class Mixture:
    """Arithmetic mixture sum_i w_i pi_i. As an opponent it may be signed, as optimistic methods need."""

    parts: tuple[tuple[Any, float], ...]


class Prox(NamedTuple):
    """argmax over pi of  E[P(y > z)] - KL(pi, anchor) / eta,  y ~ pi, z ~ opponent.

    On a table the answer is pi ∝ anchor * exp(eta * P opponent).
    """

    anchor: Geometric
    opponent: Policy | Geometric | Mixture
    eta: float

    @property
    def opponents(self) -> tuple[tuple[Any, float], ...]:
        """The opponent as a list of (policy, weight), weights summing to one."""
        return self.opponent.parts if isinstance(self.opponent, Mixture) else ((self.opponent, 1.0),)


@dataclass(frozen=True)
class Info:
    """What a solve cost and how far it stayed from the answer. `+` joins the solves of one iteration."""

    prox_residual: float | None = 0.0
    """Standard deviation over held-out responses of log pi(y) - log answer(y), in nats. Estimated where responses are
    sampled: 0 there means too small for the sample to tell from the noise of judging. None: not measured."""
    oracle_calls: int = 0
    """Win probabilities P(y > z | x) looked up."""

    def __add__(self, other: Info) -> Info:
        residuals = self.prox_residual, other.prox_residual
        largest = None if None in residuals else max(residuals)  # type: ignore[type-var]
        return Info(largest, self.oracle_calls + other.oracle_calls)


class State(NamedTuple):
    """What the next iteration needs."""

    policy: Any
    reference: Any
    t: int = 0


Solve: TypeAlias = Callable[[Prox, Any], tuple[Any, Info]]
"""`solve(prox, start)` returns the projection of the answer on the policies like `start`, and what it cost."""


@dataclass(frozen=True)
class Regularized:
    """What the algorithms share: a step size, the KL strength, and the initial policy as the reference.

    Args:
        eta: step size > 0, or a schedule t -> eta_t.
        tau: KL strength >= 0.

    Raises ValueError where a value is out of range.
    """

    eta: float | Schedule
    tau: float

    def __post_init__(self) -> None:
        check_eta(self.eta)
        check_tau(self.tau)

    @classmethod
    def default(cls, tau: float) -> Any:
        """The algorithm with the step size that theory recommends."""
        raise NotImplementedError

    def init(self, policy: Any, reference: Any = None) -> Any:
        """The state at t = 0; the reference is the frozen initial policy if none is given."""
        return State(policy, reference or policy.freeze())

    def step(self, state: Any, solve: Solve) -> tuple[Any, Info]:
        """One iteration, as a function: the state that comes in is left as it is."""
        raise NotImplementedError

    def rate(self, kl: float, t: int) -> float:
        """What a theorem says of KL(pi*, pi_{t+1}) if KL(pi*, pi_t) = kl: an upper bound; inf where none is known."""
        return inf


class Algorithm(Protocol):
    """An initial state, and a step to the next one. `nlhf.run` needs no more than this.

    If there is a `tau`, the strength of a KL regularisation, the duality gap is measured with it.
    """

    def init(self, policy: Any, reference: Any = None) -> Any:
        """The state at t = 0; the reference is the frozen initial policy if none is given."""
        ...

    def step(self, state: Any, solve: Solve) -> tuple[Any, Info]:
        """One iteration, as a function: the state that comes in is left as it is."""
        ...
