"""Approximate solvers of `Prox` for torch policies: what to minimise, and over which responses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import LBFGS, Adam, Optimizer

from nlhf.core import Info, Mixture, Prox
from nlhf.llm.losses import Batch, Loss, ipo, policy_gradient, squared_residual, variance
from nlhf.llm.policy import TokenMixture, TokenPolicy
from nlhf.schedules import check_count

P = TypeVar("P", bound=TokenPolicy)
MakeOptimizer: TypeAlias = Callable[[list[Tensor]], Optimizer]
HeldOut: TypeAlias = tuple[Batch, Batch]
"""Responses that are not fitted, judged twice, against separate opponents."""


@dataclass(frozen=True)
class Enumerate:
    """Expectations as sums over all responses: exact, where they can be listed."""

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
        batch = Batch(..., ..., log_law, log_law.exp(), anchor, win, prox.eta, calls)
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
    is decoded token by token, `TokenMixture`, which is another law. A quarter as many responses again are held
    out to measure `prox_residual`.

    Args:
        n: responses per prompt, at least 2.
        opponents: responses of the opponent per prompt, at least 2; n by default.
        correct: weigh the samples of a mixture by `TokenMixture.log_weight`, self-normalised, so that they stand for
            the mixture of whole responses. Right for short responses; for long ones a few weights take all.

    Raises ValueError for fewer than two.
    """

    n: int
    opponents: int | None = None
    correct: bool = True

    def __post_init__(self) -> None:
        check_count("n", self.n, 2)
        if self.opponents is not None:
            check_count("opponents", self.opponents, 2)

    @property
    def m(self) -> int:
        """Responses of the opponent per prompt."""
        return self.n if self.opponents is None else self.opponents

    def batches(self, prox: Prox, game: Any, generator: torch.Generator) -> tuple[Batch, HeldOut]:
        """Responses to fit and responses held out, decoded together."""
        (batch,), (one, two) = self._blocks(prox, game, generator, [(self.n, [self.m]), self._held])
        return batch, (one, two)

    def held_out(self, prox: Prox, game: Any, generator: torch.Generator) -> HeldOut:
        """A quarter as many responses, judged against two groups of an eighth as many opponents."""
        ((one, two),) = self._blocks(prox, game, generator, [self._held])
        return one, two

    @property
    def _held(self) -> tuple[int, list[int]]:
        return max(4, self.n // 4), [max(2, self.m // 8)] * 2

    @torch.no_grad()
    def _blocks(
        self, prox: Prox, game: Any, generator: torch.Generator, sizes: list[tuple[int, list[int]]]
    ) -> list[list[Batch]]:
        """For every (n, groups) n fresh responses, and a batch of them against each group of fresh opponents."""
        x = game.prompts
        parts = [policy for policy, weight in prox.anchor.parts if weight]
        shares = [[n // len(parts) + (i < n % len(parts)) for n, _ in sizes] for i in range(len(parts))]
        drawn = [part.sample(x, sum(s), generator)[0].split(s, 1) for part, s in zip(parts, shares, strict=True)]
        wanted = [m for _, groups in sizes for m in groups]
        against = [(self.draw(policy, x, wanted, generator), weight) for policy, weight in prox.opponents]
        blocks, k = [], 0
        for (n, groups), *pieces in zip(sizes, *drawn, strict=True):
            y = torch.cat(pieces, 1)
            log_law, anchor = _law_and_anchor(prox, x, y, [piece.shape[1] / n for piece in pieces])
            block = []
            for m in groups:
                win = torch.zeros_like(anchor)
                for opponents, weight in against:
                    z, share = opponents[k]
                    judged = torch.as_tensor(game.win_prob(x, y, z)).to(anchor)
                    win += weight * (judged @ share.to(anchor)[..., None]).squeeze(-1)
                calls = len(x) * len(against) * n * m
                block.append(Batch(x, y, log_law, torch.full_like(anchor, 1 / n), anchor, win, prox.eta, calls))
                k += 1
            blocks.append(block)
        return blocks

    @torch.no_grad()
    def draw(self, policy: Any, x: Any, groups: list[int], generator: torch.Generator) -> list[tuple[Any, Tensor]]:
        """Groups of responses (B, m) of a policy or mixture, decoded together, and weights whose rows sum to one."""
        mixture = TokenMixture.of(policy)
        z, log_prob = mixture.sample(x, sum(groups), generator)
        corrected = self.correct and len(mixture.parts) > 1
        log_weight = mixture.log_weight(x, z) if corrected else torch.zeros_like(log_prob)
        return [(y, w.softmax(-1)) for y, w in zip(z.split(groups, 1), log_weight.split(groups, 1), strict=True)]


@dataclass(frozen=True)
class RegressionSolver:
    """Fit log pi to log anchor + eta P(. > opponent), modulo a constant, on one batch of responses.

    Args:
        game: the game that the algorithm plays.
        expectation: `Enumerate()` or `Sample(n)`.
        loss: `losses.variance`, `losses.logistic` or `losses.cross_entropy`.
        steps: optimiser steps per sub-problem, all on the same batch.
        optimizer: makes the optimiser from a list of tensors; L-BFGS with a line search by default.

    >>> from nlhf import MirrorProx, run
    >>> from nlhf.llm import Enumerate, LogitTable
    >>> from nlhf.tabular import MatrixGame
    >>> game = MatrixGame.rock_paper_scissors(reference=[0.5, 0.3, 0.2])
    >>> solver = RegressionSolver(game, Enumerate())
    >>> trace = run(MirrorProx(eta=2, tau=0.1), solver, steps=100, policy=LogitTable(game.reference))
    >>> trace.policy.log_prob(..., ...).exp().numpy().round(6)
    array([[0.375327, 0.277433, 0.34724 ]])

    Source: see `nlhf.llm.losses`.
    """

    game: Any
    expectation: Enumerate | Sample = Enumerate()
    loss: Loss = variance
    steps: int = 10
    optimizer: MakeOptimizer | None = None

    def __call__(self, prox: Prox, start: P, seed: int | None = None) -> tuple[P, Info]:
        generator = _generator(self.expectation, seed)
        batch, held_out = self.expectation.batches(prox, self.game, generator)  # type: ignore[arg-type]

        def loss(policy: P) -> Tensor:
            return _over_prompts(self.loss(policy.log_prob(batch.x, batch.y), batch), self.game)

        policy = _fit(start, loss, self.steps, self.optimizer)
        return policy, _info(policy, held_out, self.game, batch.calls)


@dataclass(frozen=True)
class ContrastiveSolver:
    """Fit log pi on pairs of the opponent's own responses, labelled by who beats whom: IPO on any `Prox`.

    Args:
        game, expectation, steps, optimizer: as in `RegressionSolver`.

    Raises ValueError for an opponent that is a signed list of policies, from which no pair can be drawn.

    Source: `nlhf.llm.losses.ipo`.
    """

    game: Any
    expectation: Enumerate | Sample = Enumerate()
    steps: int = 10
    optimizer: MakeOptimizer | None = None

    def __call__(self, prox: Prox, start: P, seed: int | None = None) -> tuple[P, Info]:
        if isinstance(prox.opponent, Mixture):
            raise ValueError("pairs cannot be drawn from a signed list of opponents: use RegressionSolver")
        generator, game = _generator(self.expectation, seed), self.game
        if isinstance(self.expectation, Sample):
            x = game.prompts
            ((y, weight),) = self.expectation.draw(prox.opponent, x, [self.expectation.n], generator)  # type: ignore[arg-type]
        else:
            x = y = ...
            weight = prox.opponent.log_prob(..., ...).softmax(-1)
        win = torch.tensor(game.win_prob(x, y, y)).to(weight)
        with torch.no_grad():
            anchor = torch.as_tensor(prox.anchor.log_prob(x, y))

        def loss(policy: P) -> Tensor:
            return _over_prompts(ipo(policy.log_prob(x, y) - anchor, win, weight, prox.eta), game)

        policy = _fit(start, loss, self.steps, self.optimizer)
        held_out = self.expectation.held_out(prox, game, generator)  # type: ignore[arg-type]
        return policy, _info(policy, held_out, game, win.numel())


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
    optimizer: MakeOptimizer | None = None

    def __call__(self, prox: Prox, start: P, seed: int | None = None) -> tuple[P, Info]:
        generator, game, expectation = _generator(self.expectation, seed), self.game, self.expectation
        if isinstance(expectation, Sample):
            held_out = expectation.held_out(prox, game, generator)  # type: ignore[arg-type]
            policy = _fit(start, self._sampled(prox, generator), self.steps, self.optimizer or _adam)  # type: ignore[arg-type]
            calls = self.steps * len(game.prompts) * len(prox.opponents) * expectation.n * expectation.m
        else:
            batch, held_out = expectation.batches(prox, game, None)
            calls = batch.calls

            def loss(policy: P) -> Tensor:
                log_prob = policy.log_prob(..., ...)
                gain = batch.win - (log_prob - batch.log_anchor) / prox.eta
                return -_over_prompts((log_prob.exp() * gain).sum(-1), game)

            policy = _fit(start, loss, self.steps, self.optimizer)
        return policy, _info(policy, held_out, game, calls)

    def _sampled(self, prox: Prox, generator: torch.Generator) -> Callable[[P], Tensor]:
        game, expectation = self.game, self.expectation
        assert isinstance(expectation, Sample)

        def loss(policy: P) -> Tensor:
            x = game.prompts
            with torch.no_grad():
                y, _ = policy.sample(x, expectation.n, generator)
                anchor = torch.as_tensor(prox.anchor.log_prob(x, y))
                win = torch.zeros_like(anchor)
                for opponent, weight in prox.opponents:
                    ((z, share),) = expectation.draw(opponent, x, [expectation.m], generator)
                    judged = torch.as_tensor(game.win_prob(x, y, z)).to(anchor)
                    win += weight * (judged @ share.to(anchor)[..., None]).squeeze(-1)
            return _over_prompts(policy_gradient(policy.log_prob(x, y), anchor, win, prox.eta), game)

        return loss


def _fit(start: P, loss: Callable[[P], Tensor], steps: int, optimizer: MakeOptimizer | None) -> P:
    """The policy that `steps` of the optimiser make of `start`, which is left as it is."""
    params = {name: p.detach().clone().requires_grad_() for name, p in start.params.items()}
    policy = start.with_params(params)
    check_count("steps", steps, 1)
    searcher = (optimizer or _lbfgs(steps))(list(params.values()))
    scale = 1.0 if optimizer else 0.0

    def closure() -> Tensor:
        nonlocal scale
        searcher.zero_grad()
        value = loss(policy)
        if not torch.isfinite(value):
            raise FloatingPointError(f"the loss became {value.item()}: take a smaller step")
        value.backward()
        if not scale:
            # torch's L-BFGS forgets curvature below an absolute 1e-10; close to equilibrium that is all there is.
            steepest = max(float(p.grad.abs().max()) for p in params.values() if p.grad is not None)
            scale = 1 / steepest if steepest else 1.0
        for p in params.values():
            if p.grad is not None:
                p.grad *= scale
        return value.detach() * scale

    for _ in range(1 if optimizer is None else steps):
        searcher.step(closure)  # type: ignore[arg-type]
    return start.with_params({name: p.detach() for name, p in params.items()})


def _lbfgs(steps: int) -> MakeOptimizer:
    def make(params: Iterable[Tensor]) -> Optimizer:
        return LBFGS(
            params,
            max_iter=steps,
            max_eval=10 * steps,
            history_size=steps,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-15,
            tolerance_change=0.0,
        )

    return make


def _adam(params: Iterable[Tensor]) -> Optimizer:
    return Adam(params, lr=1e-2)


def _generator(expectation: Enumerate | Sample, seed: int | None) -> torch.Generator | None:
    if isinstance(expectation, Enumerate):
        return None
    if seed is None:
        raise ValueError("a solver that samples needs a seed: call it through nlhf.run or nlhf.seeded")
    return torch.Generator().manual_seed(seed)


def _law_and_anchor(prox: Prox, x: Any, y: Any, shares: list[float] | None = None) -> tuple[Tensor, Tensor]:
    """(B, n) log-probabilities of the anchor's parts mixed by shares (evenly), and of the anchor itself."""
    scored = [(torch.as_tensor(policy.log_prob(x, y)), weight) for policy, weight in prox.anchor.parts if weight]
    with np.errstate(divide="ignore"):  # a part may have no share of two or three responses
        logs = np.log(shares or [1 / len(scored)] * len(scored))
    law = torch.stack([log_prob + log for (log_prob, _), log in zip(scored, logs, strict=True)]).logsumexp(0)
    return law, torch.stack([weight * log_prob for log_prob, weight in scored]).sum(0)


def _over_prompts(values: Tensor, game: Any) -> Tensor:
    return values @ torch.from_numpy(np.ravel(game.prompt_weights)).to(values)


@torch.no_grad()
def _info(policy: TokenPolicy, held_out: HeldOut, game: Any, calls: int) -> Info:
    one, two = held_out
    spread = _over_prompts(squared_residual(policy.log_prob(one.x, one.y), one, two), game)
    return Info(float(spread.clamp(min=0.0)) ** 0.5, calls + one.calls + two.calls)
