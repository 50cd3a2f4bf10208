"""The conformance suite: what theory says of the algorithms here, and what is wrong with those that were broken."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
from torch import Tensor

from nlhf import BestResponse, MagneticMD, MirrorProx, NashEMA, NashMD, OptimisticMD, SelfPlay
from nlhf.claims import conformance
from nlhf.claims.conformance import Conformance, check
from nlhf.claims.limits import Subject
from nlhf.core import Geometric, Info, Mixture, Prox, Regularized, Solve, State
from nlhf.llm import losses
from nlhf.tabular import Tabular

TAU = 0.1
EQUILIBRIUM = "the regularised equilibrium of tau = 0.1"
LOTTERY = "the equilibrium of tau = 0, the maximal lottery"
REFUSED = "refused: eta * tau must be <= 1"
SOUND = {
    "repeatable": "yes",
    "relabelling": "equivariant",
    "prompts": "independent",
    "clones": "invariant",
    "estimator": "unbiased",
    "rungs": "agree",
}


def assert_verdicts(found: Conformance, verdicts: dict[str, str]) -> None:
    """Each begins as it should."""
    for name, verdict in verdicts.items():
        assert found[name].verdict.startswith(verdict), found[name]


# --- the algorithms of the library


@pytest.mark.parametrize("cls", [SelfPlay, MagneticMD, MirrorProx, OptimisticMD, NashEMA], ids=lambda c: c.__name__)
def test_last_iterate_at_a_linear_rate(cls: Any) -> None:
    found = check(cls.default(TAU))
    proved = cls not in (OptimisticMD, NashEMA)
    implicit = cls in (MagneticMD, MirrorProx)
    looks_ahead = cls in (MirrorProx, OptimisticMD)
    cycles, converges = "the last iterate does not converge: it cycles", "the last iterate converges to"
    assert_verdicts(
        found,
        {
            "diagnosis": f"the last iterate converges to {EQUILIBRIUM}",
            "sub-problems": "from policy^",
            "last iterate": f"converges, from every start, to {EQUILIBRIUM}",
            "average iterate": f"converges to {EQUILIBRIUM}",
            "fixed point": EQUILIBRIUM,
            "rate": "linear: KL falls by the factor",
            "declared rate": "holds" if proved else "none",
            "tau = 0": f"{converges} {LOTTERY}" if looks_ahead else cycles,
            "eta = 1 / tau": cycles,
            "eta x 100": cycles if implicit else REFUSED,
            "eta / 1000": "too slow to tell",
            **SOUND,
        },
    )
    if not looks_ahead:
        assert found["tau = 0"].verdict.endswith(f"only its average converges, to {LOTTERY}")
    if proved:
        b = cls.default(TAU).eta * TAU
        bound = 1 - b if cls is SelfPlay else 1 / (1 + b)
        assert 0.5 * bound < found["rate"].measured < bound


def test_nash_md_schedule() -> None:
    found = check(NashMD.default(TAU))
    assert_verdicts(
        found,
        {
            "diagnosis": f"the last iterate converges to {EQUILIBRIUM}",
            "fixed point": EQUILIBRIUM,
            "rate": "sublinear: KL falls like t^-2",
            "declared rate": "holds",
            "eta = 1 / tau": "the last iterate converges, but to the best response to the reference (tau = 0.1)",
            "eta x 100": REFUSED,
            **SOUND,
        },
    )
    # it follows the equilibrium of tau / (1 - eta_t tau), about 2 tau / t away, and KL is quadratic
    assert found["rate"].measured == pytest.approx(-2, abs=0.05)
    assert "frozen" in found["fixed point"].detail


def test_best_response() -> None:
    found = check(BestResponse.default(TAU))
    reply = "the best response to the reference (tau = 0.1)"
    assert_verdicts(
        found,
        {
            "diagnosis": f"the last iterate converges, but to {reply}, not to {EQUILIBRIUM} (bias KL",
            "sub-problems": "from reference against reference, step 10",
            "fixed point": f"{reply}, not {EQUILIBRIUM}",
            "rate": "arrives within 1 steps",
            "declared rate": "none",
            "tau = 0": "the last iterate converges, but not to",
            **SOUND,
        },
    )
    again = check(BestResponse.default(TAU))
    assert again == found or str(again) == str(found)  # NaN differs from itself
    assert list(found.frame.columns) == ["property", "verdict", "measured", "detail"]
    assert len(found.frame) == len(found.rows) == 17
    assert all(row.verdict in str(found) for row in found.rows)
    with pytest.raises(KeyError, match="no property 'speed', there are"):
        found["speed"]
    with pytest.raises(ValueError, match="seed must be an integer >= 0, got -1"):
        check(BestResponse.default(TAU), seed=-1)


def test_a_step_that_is_too_large_keeps_the_fixed_point_and_loses_the_last_iterate() -> None:
    found = check(SelfPlay(1 / TAU, TAU))
    assert_verdicts(
        found, {"diagnosis": "the last iterate does not converge: it cycles on", "fixed point": EQUILIBRIUM}
    )
    assert found["diagnosis"].verdict.endswith("its average does not converge to an equilibrium either")


# --- algorithms that were broken


def stepped(state: State, solve: Solve, anchor: Any, opponent: Any, eta: float) -> tuple[State, Info]:
    policy, info = solve(Prox(anchor, opponent, eta), state.policy)
    return State(policy, state.reference, state.t + 1), info


def mixed(self: Any, state: State, policy: Any = None) -> Geometric:
    b = self.eta * self.tau
    return Geometric(((policy or state.policy, 1 - b), (state.reference, b)))


@dataclass(frozen=True)
class PlainSelfPlay(Regularized):
    """Sold as last-iterate convergent to the regularised equilibrium."""

    def step(self, state: Any, solve: Solve) -> tuple[Any, Info]:
        return stepped(state, solve, Geometric(((state.policy, 1.0),)), state.policy, self.eta)  # type: ignore[arg-type]

    def rate(self, kl: float, t: int) -> float:
        return (1 - self.eta * self.tau) * kl  # type: ignore[operator]


@dataclass(frozen=True)
class UnbiasedNashMD(NashMD):
    """Sold as unbiased at a constant step."""

    def rate(self, kl: float, t: int) -> float:
        return (1 - self.eta * self.tau) * kl  # type: ignore[operator]


@dataclass(frozen=True)
class OpponentAfterUpdate(Regularized):
    """A second update against the policy that the first has just made."""

    def step(self, state: Any, solve: Solve) -> tuple[Any, Info]:
        policy, _ = solve(Prox(mixed(self, state), state.policy, self.eta), state.policy)  # type: ignore[arg-type]
        return stepped(state, solve, mixed(self, state, policy), policy, self.eta)  # type: ignore[arg-type]


@dataclass(frozen=True)
class WrongSign(Regularized):
    """Prefers what loses."""

    def step(self, state: Any, solve: Solve) -> tuple[Any, Info]:
        return stepped(state, solve, mixed(self, state), Mixture(((state.policy, -1.0),)), self.eta)  # type: ignore[arg-type]


@dataclass(frozen=True)
class FavoursTheFirst(Regularized):
    """Its anchor knows the place of a response in the list."""

    def step(self, state: Any, solve: Solve) -> tuple[Any, Info]:
        ramp = Tabular.from_logits(-0.5 * np.arange(state.policy.log_probs.shape[-1]))
        b = self.eta * self.tau  # type: ignore[operator]
        anchor = Geometric(((state.policy, 1 - b), (state.reference, b / 2), (ramp, b / 2)))
        return stepped(state, solve, anchor, state.policy, self.eta)  # type: ignore[arg-type]


@dataclass(frozen=True)
class MixesPrompts(Regularized):
    """Plays against the average over the batch."""

    def step(self, state: Any, solve: Solve) -> tuple[Any, Info]:
        rows = state.policy.log_probs
        average = Tabular.from_logits(np.broadcast_to(np.atleast_2d(rows).mean(0), rows.shape))
        return stepped(state, solve, mixed(self, state), average, self.eta)  # type: ignore[arg-type]


@dataclass(frozen=True)
class EntropyInstead(Regularized):
    """Regularises with the entropy: the reference is forgotten for the uniform policy."""

    def step(self, state: Any, solve: Solve) -> tuple[Any, Info]:
        anchor = Geometric(((state.policy, 1 - self.eta * self.tau),))  # type: ignore[operator]
        return stepped(state, solve, anchor, state.policy, self.eta)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TauTwice(Regularized):
    """The pull to the reference is tau^2."""

    def step(self, state: Any, solve: Solve) -> tuple[Any, Info]:
        b = self.eta * self.tau**2  # type: ignore[operator]
        anchor = Geometric(((state.policy, 1 - b), (state.reference, b)))
        return stepped(state, solve, anchor, state.policy, self.eta)  # type: ignore[arg-type]


class Bare:
    """Self-play that declares neither eta nor tau, and counts its steps where nobody sees them."""

    def __init__(self) -> None:
        self.steps = 0

    def init(self, policy: Any, reference: Any = None) -> State:
        return State(policy, reference or policy)

    def step(self, state: State, solve: Solve) -> tuple[State, Info]:
        self.steps += 1
        anchor = Geometric(((state.policy, 0.95), (state.reference, 0.05)))
        return stepped(state, solve, anchor, state.policy, 0.25 + 1e-6 * (self.steps % 2))


@dataclass(frozen=True)
class Idle(Regularized):
    """Does nothing, for ever."""

    def step(self, state: Any, solve: Solve) -> tuple[Any, Info]:
        return state._replace(t=state.t + 1), Info()


@dataclass(frozen=True)
class Explodes(Regularized):
    """Its step doubles until it is no number."""

    def step(self, state: Any, solve: Solve) -> tuple[Any, Info]:
        return stepped(state, solve, mixed(self, state), state.policy, float(np.float64(1e60) ** state.t))


ETA = 4 * TAU / (1 + 4 * TAU**2)
"""The step of `SelfPlay.default`."""
BROKEN: dict[Any, dict[str, str]] = {
    PlainSelfPlay(ETA, TAU): {
        "diagnosis": "the last iterate does not converge: it cycles on random 1, random 2, random 3, low rank, "
        "tournament, rock-paper-scissors, dice; only its average converges, to "
        f"{LOTTERY}, not to {EQUILIBRIUM}",
        "sub-problems": "the pull to the reference is 0, not tau = 0.1; from policy against policy",
        "average iterate": f"converges to {LOTTERY}",
        "fixed point": f"{LOTTERY}, not {EQUILIBRIUM}",
        "declared rate": "violated at",
        **SOUND,
    },
    UnbiasedNashMD(2.0, TAU): {
        "diagnosis": f"the last iterate converges, but to the best response to the equilibrium of tau = 0.125, not to "
        f"{EQUILIBRIUM} (bias KL 0.00",
        "fixed point": f"the best response to the equilibrium of tau = 0.125, not {EQUILIBRIUM}",
        "rate": "linear",
        "declared rate": "violated at",
        **SOUND,
    },
    OpponentAfterUpdate(ETA, TAU): {
        "diagnosis": f"the last iterate converges to {EQUILIBRIUM}",
        "sub-problems": "the opponent moves after the update",
        **SOUND,
    },
    WrongSign(ETA, TAU): {
        "diagnosis": "the last iterate converges, but to the equilibrium of the reversed game (tau = 0.1): the "
        f"preference has the wrong sign, not to {EQUILIBRIUM}",
        "sub-problems": "the preference has the wrong sign",
        "fixed point": "the equilibrium of the reversed game (tau = 0.1)",
    },
    FavoursTheFirst(ETA, TAU): {
        "diagnosis": f"the last iterate converges, but not to {EQUILIBRIUM}",
        "relabelling": "not equivariant",
        "fixed point": f"not {EQUILIBRIUM}, and no equilibrium or best response that is known",
        "prompts": "independent",
    },
    MixesPrompts(ETA, TAU): {
        "diagnosis": f"the last iterate converges to {EQUILIBRIUM}",
        "prompts": "mixed",
        "relabelling": "equivariant",
        "rungs": "the logit table fails with AttributeError",
    },
    EntropyInstead(ETA, TAU): {
        "fixed point": "the equilibrium of tau = 0.1 with a uniform reference",
        "sub-problems": "the anchor's weights sum to 0.9615, not 1; the pull to the reference is 0, not tau = 0.1",
        "clones": "not invariant",
        "relabelling": "equivariant",
    },
    TauTwice(0.35, 0.35): {
        "diagnosis": "the last iterate converges, but to the equilibrium of tau = 0.1225, not to the regularised "
        "equilibrium of tau = 0.35",
        "sub-problems": "the pull to the reference is 0.1225, not tau = 0.35",
        **SOUND,
    },
    Bare(): {
        "repeatable": "no",
        "declared rate": "not checked: the algorithm declares no tau",
        "tau = 0": "not checked: the algorithm has no tau",
        "eta = 1 / tau": "not checked",
        "eta x 100": "not checked: the algorithm has no eta",
        "prompts": "mixed",
    },
    Idle(ETA, TAU): {
        "diagnosis": "it never moves",
        "last iterate": "never moves",
        "sub-problems": "none: the step solves nothing",
        "fixed point": "every policy: it never moves",
        "estimator": "not checked: the step solves nothing",
    },
    Explodes(ETA, TAU): {"diagnosis": "fails on random 1 with ValueError: logits must be numbers", "rate": "none"},
}


@pytest.mark.parametrize("algorithm", BROKEN, ids=lambda a: type(a).__name__)
def test_broken(algorithm: Any) -> None:
    assert_verdicts(check(algorithm), BROKEN[algorithm])


# --- the rows that read torch


@pytest.mark.parametrize("cls", [SelfPlay, NashMD, OptimisticMD], ids=lambda c: c.__name__)
def test_a_biased_estimator_is_seen(cls: Any) -> None:
    right = losses.policy_gradient

    def no_kl(log_prob: Tensor, log_anchor: Tensor, win: Tensor, eta: float) -> Tensor:
        return right(log_prob, log_prob.detach(), win, eta)

    def standardised(log_prob: Tensor, log_anchor: Tensor, win: Tensor, eta: float) -> Tensor:
        reward = win - (log_prob.detach() - log_anchor) / eta
        advantage = (reward - reward.mean(-1, keepdim=True)) / (reward.std(-1, keepdim=True) + 1e-4)
        return -(advantage * log_prob).mean(-1)

    def own_baseline(log_prob: Tensor, log_anchor: Tensor, win: Tensor, eta: float) -> Tensor:
        return right(log_prob, log_anchor, win, eta) / 2  # the mean of two includes one's own reward

    subject = Subject(cls(0.5, TAU), 0)
    assert conformance._estimator(subject).verdict == "unbiased"
    for wrong in (no_kl, standardised, own_baseline):
        with mock.patch("nlhf.llm.solver.policy_gradient", wrong):
            assert conformance._estimator(subject).verdict == "biased"


@dataclass(frozen=True)
class AveragesParameters(Regularized):
    """Steps from the average of parameters, which on a network is not that of log-probabilities."""

    def step(self, state: Any, solve: Solve) -> tuple[Any, Info]:
        average = state.policy.lerp(state.reference, self.eta * self.tau)  # type: ignore[operator]
        return stepped(state, solve, Geometric(((average, 1.0),)), state.policy, self.eta)  # type: ignore[arg-type]


def test_a_path_that_depends_on_the_parameters_is_seen() -> None:
    found = conformance._rungs(Subject(AveragesParameters(10.0, 0.05), 0))
    assert found.verdict == "the transformer takes another path than the table"
    assert "logit table" in found.detail


def test_without_torch_the_rest_is_checked() -> None:
    subject = Subject(SelfPlay.default(TAU), 0)
    with mock.patch.dict(sys.modules, {"nlhf.llm": None}):
        for part in (conformance._estimator, conformance._rungs):
            assert part(subject).verdict == "not checked: torch is not installed"
