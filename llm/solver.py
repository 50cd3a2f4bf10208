"""Approximate solvers of `Prox` for torch policies: what to minimise, and over which responses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import LBFGS, Adam, Optimizer

from nlhf.core import Info, Mixture, Prox
from nlhf.llm.decode import sample
from nlhf.llm.losses import Batch, Loss, ipo, policy_gradient, slices, squared_residual, variance
from nlhf.llm.policy import Params, TokenMixture, TokenPolicy
from nlhf.llm.processes import add_up, own, own_uniform, place
from nlhf.llm.shards import full, is_sharded
from nlhf.schedules import check_count, is_number

P = TypeVar("P", bound=TokenPolicy)
MakeOptimizer: TypeAlias = Callable[[list[Tensor]], Optimizer]
Losses: TypeAlias = Callable[[P, int], Iterator[Tensor]]
"""(policy, step) -> the loss in parts, each differentiated before the next is worked out."""
STEPS = "steps"
"""The name under which a policy remembers the steps of its optimiser."""
HeldOut: TypeAlias = tuple[Batch, Batch]
"""Responses that are not fitted, judged twice, against separate opponents."""


@dataclass(frozen=True)
class Enumerate:
    """Expectations as sums over all responses: exact, where they can be listed."""

    micro = None

    def batches(self, prox: Prox, game: Any, generator: torch.Generator | None) -> tuple[Batch, HeldOut]:
        """All responses, twice: nothing can be held out. Their law is half uniform, half the anchor's policies.

        Any law would do. The uniform half keeps the condition number of the fit below n + 1.
        """
        law, anchor = _law_and_anchor(prox, ..., ...)
        log_law = torch.logaddexp(law, torch.full_like(law, -np.log(law.shape[-1]))) - np.log(2)
        matrix = torch.tensor(game.win_prob(..., ..., ...)).to(anchor)
        win = torch.zeros_like(anchor)
        for opponent, weight in prox.opponents:
            win += weight * (matrix @ opponent.log_prob(..., ...).softmax(-1)[..., None]).squeeze(-1)
        calls = len(prox.opponents) * int(game.matrix.size)
        share = _shares(game).to(anchor)
        batch = Batch(..., ..., log_law, log_law.exp(), anchor, win, prox.eta, calls, share)
        again = batch._replace(calls=0)
        return batch, (again, again)

    def held_out(self, prox: Prox, game: Any, generator: torch.Generator | None) -> HeldOut:
        """All responses: nothing can be held out."""
        return self.batches(prox, game, generator)[1]


@dataclass(frozen=True)
class Sample:
    """Expectations as averages over samples.

    Responses are drawn in equal parts from the policies that the anchor mixes (for Nash-MD the current policy and the
    reference), so that no response that either of them knows is starved. An opponent that is a geometric mixture
    is decoded token by token, `TokenMixture`, which is another law. What is drawn at a time is decoded together.

    Args:
        n: responses per prompt; at least 2 where a solver compares them with each other, which policy gradients need
            not.
        opponents: responses of the opponent per prompt, at least 2 if they are corrected; n by default.
        correct: weigh the samples of a mixture by `TokenMixture.log_weight`, self-normalised, so that they stand for
            the mixture of whole responses. Right for short responses; for long ones a few weights take all.
        prompts: how many prompts are drawn for each batch, all by default.
        micro: how many of them are differentiated through at a time, all by default; the gradient is the same.
        held: responses per prompt that are held out, against an eighth of the opponents, to measure `prox_residual`; by
            default a quarter of n, at least 4. 0 does not measure it.

    Raises ValueError for numbers that are too small.
    """

    n: int
    opponents: int | None = None
    correct: bool = True
    prompts: int | None = None
    micro: int | None = None
    held: int | None = None

    def __post_init__(self) -> None:
        check_count("n", self.n, 1)
        for name, least in (("opponents", 1), ("prompts", 1), ("micro", 1), ("held", 0)):
            if (value := getattr(self, name)) is not None:
                check_count(name, value, least)
        if self.correct and self.m == 1:
            raise ValueError("opponents must be at least 2 to be weighed against each other, got 1: or correct=False")
        if self.held == 1:
            raise ValueError("held must be 0 or at least 2, whose spread can be measured, got 1")

    @property
    def m(self) -> int:
        """Responses of the opponent per prompt."""
        return self.n if self.opponents is None else self.opponents

    def batches(self, prox: Prox, game: Any, generator: torch.Generator) -> tuple[Batch, HeldOut | None]:
        """Responses to fit and responses held out, decoded together."""
        (batch,), *held = self._blocks(prox, game, generator, [(self.n, [self.m]), *self._held])
        return batch, (held[0][0], held[0][1]) if held else None

    def held_out(self, prox: Prox, game: Any, generator: torch.Generator) -> HeldOut | None:
        """Responses that are not fitted, judged against two groups of opponents."""
        blocks = self._blocks(prox, game, generator, self._held) if self._held else []
        return (blocks[0][0], blocks[0][1]) if blocks else None

    def choose(self, game: Any, generator: torch.Generator) -> tuple[Any, Tensor]:
        """Prompts and their weights in the loss: all, or some drawn without replacement, standing for all.

        Of several processes each gets an equal part of them.
        """
        weights = torch.from_numpy(np.ravel(game.prompt_weights))
        count = len(weights) if self.prompts is None else self.prompts
        if count > len(weights):
            raise ValueError(f"prompts must be at most the {len(weights)} that the game has, got {count}")
        chosen = torch.arange(count) if self.prompts is None else torch.randperm(len(weights), generator=generator)
        chosen = chosen[:count][own(count)]
        share = weights[chosen] * (len(weights) / count)
        if isinstance(game.prompts, np.ndarray):
            return game.prompts[chosen.numpy()], share
        return tuple(game.prompts[i] for i in chosen.tolist()), share

    @property
    def _held(self) -> list[tuple[int, list[int]]]:
        n = max(4, self.n // 4) if self.held is None else self.held
        return [(n, [max(2, self.m // 8)] * 2)] if n else []

    @torch.no_grad()
    def _blocks(
        self, prox: Prox, game: Any, generator: torch.Generator, sizes: list[tuple[int, list[int]]]
    ) -> list[list[Batch]]:
        """For every (n, groups) n fresh responses, and a batch of them against each group of fresh opponents."""
        x, prompt_share = self.choose(game, generator)
        parts = [policy for policy, weight in prox.anchor.parts if weight]
        shares = [[n // len(parts) + (i < n % len(parts)) for n, _ in sizes] for i in range(len(parts))]
        wanted = [m for _, groups in sizes for m in groups]
        asked = [*zip(parts, shares, strict=True), *((policy, wanted) for policy, _ in prox.opponents)]
        drawn = self.draw(asked, x, generator)
        own, against = drawn[: len(parts)], drawn[len(parts) :]
        blocks, k = [], 0
        for i, (n, groups) in enumerate(sizes):
            pieces = [responses[i][0] for responses in own]
            y = torch.cat(pieces, 1)
            log_law, anchor = _law_and_anchor(prox, x, y, [piece.shape[1] / n for piece in pieces])
            block = []
            for m in groups:
                win = self.judge(prox, game, x, y, [opponents[k] for opponents in against]).to(anchor)
                calls, weight = len(x) * len(against) * n * m, torch.full_like(anchor, 1 / n)
                block.append(Batch(x, y, log_law, weight, anchor, win, prox.eta, calls, prompt_share.to(anchor)))
                k += 1
            blocks.append(block)
        return blocks

    @torch.no_grad()
    def draw(
        self, wanted: list[tuple[Any, list[int]]], x: Any, generator: torch.Generator
    ) -> list[list[tuple[Any, Tensor]]]:
        """Of each policy or mixture groups of so many responses (B, m), and weights whose rows sum to one."""
        mixtures = [TokenMixture.of(policy) for policy, _ in wanted]
        together: dict[Any, list[int]] = {}  # those that spell with the same tokens
        for i, mixture in enumerate(mixtures):
            together.setdefault((type(first := mixture.parts[0][0]), first.length), []).append(i)
        found: dict[int, list[tuple[Any, Tensor]]] = {}
        for some in together.values():
            drawn = sample([(mixtures[i].parts, sum(wanted[i][1])) for i in some], x, generator, own_uniform)
            for i, (tokens, log_prob) in zip(some, drawn, strict=True):
                z, sizes = mixtures[i].parts[0][0].read(tokens), wanted[i][1]
                corrected = self.correct and len(mixtures[i].parts) > 1
                log_weight = mixtures[i].log_weight(x, z) if corrected else torch.zeros_like(log_prob)
                pairs = zip(z.split(sizes, 1), log_weight.split(sizes, 1), strict=True)
                found[i] = [(y, w.softmax(-1)) for y, w in pairs]
        return [found[i] for i in range(len(wanted))]

    def judge(self, prox: Prox, game: Any, x: Any, y: Any, against: list[tuple[Any, Tensor]]) -> Tensor:
        """(B, n) P(y > opponent), over the responses (z, weights) of every opponent."""
        terms = []
        for (z, share), (_, weight) in zip(against, prox.opponents, strict=True):
            judged = torch.as_tensor(game.win_prob(x, y, z)).to(share)
            terms.append(weight * (judged @ share[..., None]).squeeze(-1))
        return torch.stack(terms).sum(0)


@dataclass(frozen=True)
class Descent:
    """A torch optimiser, a schedule for its learning rate, and a limit for its gradients.

    Args:
        optimizer: makes the optimiser from a list of tensors, for instance `partial(AdamW, lr=1e-5)`.
        schedule: k -> the factor of the learning rate at step k = 0, 1, ...
        max_norm: the largest Euclidean norm that a gradient keeps, > 0; None for no limit.

    Raises ValueError for a max_norm that is no number > 0.
    """

    optimizer: MakeOptimizer
    schedule: Callable[[int], float] | None = None
    max_norm: float | None = None

    def __post_init__(self) -> None:
        if self.max_norm is not None and not (is_number(self.max_norm) and self.max_norm > 0):
            raise ValueError(f"max_norm must be a number > 0 or None, got {self.max_norm!r}")


@dataclass(frozen=True)
class RegressionSolver:
    """Fit log pi to log anchor + eta P(. > opponent), modulo a constant, on one batch of responses.

    Args:
        game: the game that the algorithm plays.
        expectation: `Enumerate()` or `Sample(n)`.
        loss: `losses.variance`, `losses.logistic` or `losses.cross_entropy`.
        steps: optimiser steps per sub-problem, all on the same batch.
        optimizer: makes the optimiser from a list of tensors, or a `Descent`; it goes on from one sub-problem to the
            next. By default L-BFGS with a line search, which begins anew.

    >>> from nlhf import MirrorProx, run
    >>> from nlhf.llm import Enumerate, LogitTable
    >>> from nlhf.tabular import MatrixGame
    >>> game = MatrixGame.rock_paper_scissors(reference=[0.5, 0.3, 0.2])
    >>> solver = RegressionSolver(game, Enumerate())
    >>> trace = run(MirrorProx(eta=2, tau=0.1), solver, steps=100, policy=LogitTable(game.reference))
    >>> trace.policy.log_prob(..., ...).exp().numpy().round(6)
    array([[0.375327, 0.277433, 0.34724 ]])

    Raises ValueError for `Sample(1)`: a single response has nothing to be compared with.

    Source: see `nlhf.llm.losses`.
    """

    game: Any
    expectation: Enumerate | Sample = Enumerate()
    loss: Loss = variance
    steps: int = 10
    optimizer: MakeOptimizer | Descent | None = None

    def __post_init__(self) -> None:
        _check_several(self.expectation)

    def __call__(self, prox: Prox, start: P, seed: int | None = None) -> tuple[P, Info]:
        _check_shards(start, self.optimizer)
        generator = _generator(self.expectation, seed)
        batch, held_out = self.expectation.batches(prox, self.game, generator)  # type: ignore[arg-type]

        def losses(policy: P, step: int) -> Iterator[Tensor]:
            for part in batch.parts(self.expectation.micro):
                yield self.loss(policy.log_prob(part.x, part.y), part) @ part.share

        policy = _fit(start, losses, self.steps, self.optimizer)
        return policy, _info(policy, held_out, batch.calls)


@dataclass(frozen=True)
class ContrastiveSolver:
    """Fit log pi on pairs of the opponent's own responses, labelled by who beats whom: IPO on any `Prox`.

    Args:
        game, expectation, steps, optimizer: as in `RegressionSolver`.

    Raises ValueError where no pair can be drawn: for `Sample(1)`, and for a signed list of policies as the opponent.

    Source: `nlhf.llm.losses.ipo`.
    """

    game: Any
    expectation: Enumerate | Sample = Enumerate()
    steps: int = 10
    optimizer: MakeOptimizer | Descent | None = None

    def __post_init__(self) -> None:
        _check_several(self.expectation)

    def __call__(self, prox: Prox, start: P, seed: int | None = None) -> tuple[P, Info]:
        _check_shards(start, self.optimizer)
        if isinstance(prox.opponent, Mixture):
            raise ValueError("pairs cannot be drawn from a signed list of opponents: use RegressionSolver")
        generator, game, expectation = _generator(self.expectation, seed), self.game, self.expectation
        if isinstance(expectation, Sample):
            x, share = expectation.choose(game, generator)  # type: ignore[arg-type]
            ((drawn,),) = expectation.draw([(prox.opponent, [expectation.n])], x, generator)  # type: ignore[arg-type]
            y, weight = drawn
        else:
            x = y = ...
            weight = prox.opponent.log_prob(..., ...).softmax(-1)
            share = _shares(game)
        win = torch.tensor(game.win_prob(x, y, y)).to(weight)
        with torch.no_grad():
            anchor = torch.as_tensor(prox.anchor.log_prob(x, y))
        batch = Batch(x, y, torch.zeros_like(anchor), weight, anchor, win, prox.eta, win.numel(), share.to(anchor))

        def losses(policy: P, step: int) -> Iterator[Tensor]:
            for part in batch.parts(expectation.micro):
                h = policy.log_prob(part.x, part.y) - part.log_anchor
                yield ipo(h, part.win, part.weight, part.eta) @ part.share

        policy = _fit(start, losses, self.steps, self.optimizer)
        held_out = expectation.held_out(prox, game, generator)  # type: ignore[arg-type]
        return policy, _info(policy, held_out, batch.calls)


@dataclass(frozen=True)
class PolicyGradientSolver:
    """Ascend E[P(y > opponent)] - KL(pi, anchor) / eta itself, y ~ pi.

    With `Enumerate()` the objective is summed exactly; with `Sample(n)` every step draws n fresh responses of the
    policy as it is then, and fresh opponents, and takes the unbiased gradient of `losses.policy_gradient`.
    One step of it on `NashMD` is Nash-MD-PG.

    Args:
        game, expectation, steps: as in `RegressionSolver`.
        optimizer: L-BFGS with a line search by default where the objective is exact, Adam with step size 1e-2 where it
            is sampled.
    """

    game: Any
    expectation: Enumerate | Sample = Enumerate()
    steps: int = 20
    optimizer: MakeOptimizer | Descent | None = None

    def __call__(self, prox: Prox, start: P, seed: int | None = None) -> tuple[P, Info]:
        generator, game, expectation = _generator(self.expectation, seed), self.game, self.expectation
        if isinstance(expectation, Sample):
            held_out = expectation.held_out(prox, game, generator)  # type: ignore[arg-type]
            losses = self._sampled(prox, start, generator)  # type: ignore[arg-type]
            policy = _fit(start, losses, self.steps, self.optimizer or _adam)
            asked = (expectation.prompts or len(game.prompts)) // place()[1]
            return policy, _info(
                policy, held_out, self.steps * asked * len(prox.opponents) * expectation.n * expectation.m
            )
        batch, held_out = expectation.batches(prox, game, None)

        def loss(policy: P, step: int) -> Iterator[Tensor]:
            log_prob = policy.log_prob(..., ...)
            gain = batch.win - (log_prob - batch.log_anchor) / prox.eta
            yield -(log_prob.exp() * gain).sum(-1) @ batch.share

        policy = _fit(start, loss, self.steps, self.optimizer)
        return policy, _info(policy, held_out, batch.calls)

    def _sampled(self, prox: Prox, start: P, generator: torch.Generator) -> Losses[P]:
        game, expectation = self.game, self.expectation
        assert isinstance(expectation, Sample)

        def losses(policy: P, step: int) -> Iterator[Tensor]:
            x, share = expectation.choose(game, generator)
            # the same law as `start` at first, which the opponent may be made of: then one batch decodes both
            current = policy if step else start
            wanted = [(current, [expectation.n]), *((opponent, [expectation.m]) for opponent, _ in prox.opponents)]
            ((y, _),), *against = expectation.draw(wanted, x, generator)
            win = expectation.judge(prox, game, x, y, [opponents[0] for opponents in against])
            for at in slices(len(x), expectation.micro):
                log_prob = policy.log_prob(x[at], y[at])
                anchor = torch.zeros_like(log_prob)
                for part, weight in prox.anchor.parts:
                    if weight:  # a policy is not read a second time
                        scored = log_prob.detach() if part is current else _scored(part, x[at], y[at])
                        anchor += weight * scored
                yield policy_gradient(log_prob, anchor, win[at].to(anchor), prox.eta) @ share[at].to(anchor)

        return losses


def _check_shards(start: TokenPolicy, optimizer: MakeOptimizer | Descent | None) -> None:
    if optimizer is None and any(map(is_sharded, start.params.values())):
        raise ValueError("optimizer must be given, such as partial(Adam, lr=1e-4), for a sharded policy: L-BFGS, the "
                         "default, needs all parameters whole")  # fmt: skip


def _fit(start: P, losses: Losses[P], steps: int, optimizer: MakeOptimizer | Descent | None) -> P:
    """The policy that `steps` of the optimiser make of `start`, which is left as it is.

    An optimiser goes on with what it remembers from `start`; L-BFGS, the default, begins anew.
    """
    check_count("steps", steps, 1)
    params = {name: p.detach().clone().requires_grad_() for name, p in start.params.items()}
    policy = start.with_params(params)
    if optimizer is None:
        _search(policy, losses, steps)
        return start.with_params({name: p.detach() for name, p in params.items()})
    descent = optimizer if isinstance(optimizer, Descent) else Descent(optimizer)
    searcher = descent.optimizer(list(params.values()))
    done = _recall(searcher, list(params), start.memory)
    rates = [group["lr"] for group in searcher.param_groups]
    for step in range(steps):
        searcher.zero_grad()
        _differentiate(policy, losses(policy, step))
        norm = full(torch.nn.utils.clip_grad_norm_(params.values(), descent.max_norm or inf))
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm became {norm.item()}: take a smaller step")
        for group, rate in zip(searcher.param_groups, rates, strict=True):
            group["lr"] = rate * (descent.schedule(done + step) if descent.schedule else 1.0)
        searcher.step()
    memory = {
        f"{name} {key}": value
        for name, p in params.items()
        for key, value in searcher.state.get(p, {}).items()
        if isinstance(value, Tensor)
    }
    return start.with_params(
        {name: p.detach() for name, p in params.items()}, {**memory, STEPS: torch.tensor(done + steps)}
    )


def _recall(searcher: Optimizer, names: list[str], memory: Params) -> int:
    """Give an optimiser back what it remembered; returns the steps it has done."""
    if memory:
        known: dict[int, dict[str, Tensor]] = {}
        for entry, value in memory.items():
            if entry != STEPS:
                name, key = entry.rsplit(" ", 1)
                known.setdefault(names.index(name), {})[key] = value.clone()
        searcher.load_state_dict({"state": known, "param_groups": searcher.state_dict()["param_groups"]})
    return int(memory.get(STEPS, torch.tensor(0)))


def _search(policy: P, losses: Losses[P], steps: int) -> None:
    """L-BFGS on the parameters of a policy, in place."""
    params = list(policy.params.values())
    searcher, scale = _lbfgs(params, steps), 0.0

    def closure() -> Tensor:
        nonlocal scale
        searcher.zero_grad()
        total = _differentiate(policy, losses(policy, 0))
        if not scale:
            # torch's L-BFGS forgets curvature below an absolute 1e-10; close to equilibrium that is all there is.
            steepest = max(float(p.grad.abs().max()) for p in params if p.grad is not None)
            scale = 1 / steepest if steepest else 1.0
        for p in params:
            if p.grad is not None:
                p.grad *= scale
        return total * scale

    searcher.step(closure)


def _differentiate(policy: TokenPolicy, losses: Iterator[Tensor]) -> Tensor:
    """Leave the gradient of the sum of all losses of all processes at the parameters; returns the sum."""
    total = torch.zeros((), dtype=torch.float64)
    for value in losses:
        value.backward()
        total += value.detach().cpu()
    # the gradients of shards are added up where they are worked out
    slopes = [p.grad for p in policy.params.values() if p.grad is not None and not is_sharded(p)]
    add_up([total, *slopes])  # before the check, so that no process waits for one that has stopped
    if not torch.isfinite(total):
        raise FloatingPointError(f"the loss became {total.item()}: take a smaller step")
    return total


@torch.no_grad()
def _scored(policy: TokenPolicy, x: Any, y: Any) -> Tensor:
    return policy.log_prob(x, y)


def _lbfgs(params: list[Tensor], steps: int) -> LBFGS:
    return LBFGS(
        params,
        max_iter=steps,
        max_eval=10 * steps,
        history_size=steps,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-15,
        tolerance_change=0.0,
    )


def _adam(params: Iterable[Tensor]) -> Optimizer:
    return Adam(params, lr=1e-2)


def _generator(expectation: Enumerate | Sample, seed: int | None) -> torch.Generator | None:
    if isinstance(expectation, Enumerate):
        return None
    if seed is None:
        raise ValueError("a solver that samples needs a seed: call it through nlhf.run or nlhf.seeded")
    return torch.Generator().manual_seed(seed)


def _check_several(expectation: Enumerate | Sample) -> None:
    if isinstance(expectation, Sample):
        check_count("n", expectation.n, 2)


def _shares(game: Any) -> Tensor:
    """(B,) the weights of all prompts, where every process works on all of them."""
    return torch.from_numpy(np.ravel(game.prompt_weights)) / place()[1]


def _law_and_anchor(prox: Prox, x: Any, y: Any, shares: list[float] | None = None) -> tuple[Tensor, Tensor]:
    """(B, n) log-probabilities of the anchor's parts mixed by shares (evenly), and of the anchor itself."""
    scored = [(torch.as_tensor(policy.log_prob(x, y)), weight) for policy, weight in prox.anchor.parts if weight]
    with np.errstate(divide="ignore"):  # a part may have no share of two or three responses
        logs = np.log(shares or [1 / len(scored)] * len(scored))
    law = torch.stack([log_prob + log for (log_prob, _), log in zip(scored, logs, strict=True)]).logsumexp(0)
    return law, torch.stack([weight * log_prob for log_prob, weight in scored]).sum(0)


@torch.no_grad()
def _info(policy: TokenPolicy, held_out: HeldOut | None, calls: int) -> Info:
    processes = place()[1]
    if held_out is None:
        return Info(None, processes * calls)
    one, two = held_out
    spread = squared_residual(policy.log_prob(one.x, one.y), one, two) @ one.share
    add_up([spread])
    return Info(float(spread.clamp(min=0.0)) ** 0.5, processes * (calls + one.calls + two.calls))
