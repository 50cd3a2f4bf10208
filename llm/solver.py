"""Approximate solvers of `Prox` for torch policies: what to minimise, and over which responses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import LBFGS, Adam, Optimizer

from nlhf.core import Game, Info, Mixture, Prox
from nlhf.llm.losses import Batch, Loss, ipo, policy_gradient, variance
from nlhf.llm.policy import TokenMixture, TokenPolicy

P = TypeVar("P", bound=TokenPolicy)
MakeOptimizer: TypeAlias = Callable[[list[Tensor]], Optimizer]


@dataclass(frozen=True)
class Enumerate:
    """Expectations as sums over all responses: exact, where they can be listed."""

    def batch(self, prox: Prox, game: Any, generator: torch.Generator | None) -> Batch:
        """All responses, weighted by the average of the policies in the anchor."""
        laws = [policy.log_prob(..., ...) for policy, weight in prox.anchor.parts if weight]
        log_law = torch.stack(laws).logsumexp(0) - np.log(len(laws))
        matrix = self.pairs(game, ..., ...).to(log_law)
        win = sum(
            weight * (matrix @ opponent.log_prob(..., ...).softmax(-1)[..., None]).squeeze(-1)
            for opponent, weight in prox.opponents
        )
        anchor = torch.as_tensor(prox.anchor.log_prob(..., ...))
        return Batch(..., ..., log_law, log_law.exp(), anchor, torch.as_tensor(win), prox.eta)

    def residual(self, policy: TokenPolicy, prox: Prox, game: Any, generator: torch.Generator | None) -> float:
        """Standard deviation of log pi - log answer under the law of `batch`, in nats, averaged over prompts."""
        batch = self.batch(prox, game, generator)
        d = policy.log_prob(..., ...) - batch.log_anchor - batch.eta * batch.win
        spread = (batch.weight * (d - (batch.weight * d).sum(-1, keepdim=True)) ** 2).sum(-1)
        return float((spread @ _prompt_weights(game).to(spread)) ** 0.5)

    def calls(self, prox: Prox, game: Any) -> int:
        """Win probabilities that one batch looks up."""
        return len(prox.opponents) * int(game.matrix.size)

    @staticmethod
    def pairs(game: Game, y: Any, z: Any) -> Tensor:
        """(X, n, m) P(y > z) for all prompts."""
        return torch.from_numpy(np.array(game.win_prob(..., y, z)))


@dataclass(frozen=True)
class Sample:
    """Expectations as averages over samples.

    Responses are drawn in equal parts from the policies that the anchor mixes (for Nash-MD the current policy and the
    reference), so that no response that either of them knows is starved. An opponent that is a geometric mixture
    is decoded token by token, `TokenMixture`, which is another law.

    Args:
        n: responses per prompt, at least 2.
        opponents: responses of the opponent per prompt; n by default.
        correct: weigh the samples of a mixture by `TokenMixture.log_weight`, self-normalised, so that they stand for
            the mixture of whole responses. Right for short responses; for long ones a few weights take all.
    """

    n: int
    opponents: int | None = None
    correct: bool = True

    def __post_init__(self) -> None:
        for name, value in (("n", self.n), ("opponents", self.opponents)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 2):
                raise ValueError(f"{name} must be an integer >= 2, got {value!r}")

    @property
    def m(self) -> int:
        """Responses of the opponent per prompt."""
        return self.n if self.opponents is None else self.opponents

    @torch.no_grad()
    def batch(self, prox: Prox, game: Any, generator: torch.Generator) -> Batch:
        """Responses from the parts of the anchor, judged against responses of the opponent."""
        y = self.responses(prox, game, generator)
        laws = [policy.log_prob(game.prompts, y) for policy, weight in prox.anchor.parts if weight]
        log_law = torch.stack(laws).logsumexp(0) - np.log(len(laws))
        (win,) = self.win(prox, game, y, generator)
        anchor = torch.as_tensor(prox.anchor.log_prob(game.prompts, y))
        weight = torch.full_like(log_law, 1 / self.n)
        return Batch(game.prompts, y, log_law, weight, anchor, win.to(log_law), prox.eta)

    def responses(self, prox: Prox, game: Any, generator: torch.Generator) -> Any:
        """(B, n) responses, in equal parts from the policies that the anchor mixes."""
        parts = [policy for policy, weight in prox.anchor.parts if weight]
        share = [self.n // len(parts) + (i < self.n % len(parts)) for i in range(len(parts))]
        drawn = [p.sample(game.prompts, k, generator)[0] for p, k in zip(parts, share, strict=True) if k]
        return torch.cat(drawn, 1)

    def draw(self, policy: Any, x: Any, n: int, generator: torch.Generator) -> tuple[Any, Tensor]:
        """n responses (B, n) of a policy or a mixture and their weights (B, n), rows summing to one."""
        mixture = TokenMixture.of(policy)
        z, log_prob = mixture.sample(x, n, generator)
        if self.correct and len(mixture.parts) > 1:
            return z, mixture.log_weight(x, z).softmax(-1)
        return z, torch.full_like(log_prob, 1 / n)

    def win(self, prox: Prox, game: Any, y: Any, generator: torch.Generator, estimates: int = 1) -> list[Tensor]:
        """Estimates, (B, n) each, of P(y > opponent), from separate opponents: m of them shared out evenly."""
        totals = [torch.zeros(())] * estimates
        for policy, weight in prox.opponents:
            for i in range(estimates):
                z, share = self.draw(policy, game.prompts, max(1, self.m // estimates), generator)
                win = torch.as_tensor(game.win_prob(game.prompts, y, z)).to(share)
                totals[i] = totals[i] + weight * (win @ share[..., None]).squeeze(-1)
        return totals

    @torch.no_grad()
    def residual(self, policy: TokenPolicy, prox: Prox, game: Any, generator: torch.Generator) -> float:
        """Standard deviation of log pi - log answer on a quarter as many fresh responses, in nats.

        The covariance of the errors against two separate halves of the opponents: the noise of judging cancels
        in expectation, so that a perfect solve measures zero and not the noise.
        """
        held_out = replace(self, n=max(4, self.n // 4), opponents=max(4, self.m // 4))
        y = held_out.responses(prox, game, generator)
        error = policy.log_prob(game.prompts, y) - torch.as_tensor(prox.anchor.log_prob(game.prompts, y))
        one, two = (error - prox.eta * win for win in held_out.win(prox, game, y, generator, estimates=2))
        covariance = ((one - one.mean(-1, keepdim=True)) * (two - two.mean(-1, keepdim=True))).sum(-1)
        spread = covariance / (held_out.n - 1)
        return float((spread @ _prompt_weights(game).to(spread)).clamp(min=0.0) ** 0.5)

    def calls(self, prox: Prox, game: Any) -> int:
        """Win probabilities that one batch and its held-out check look up."""
        held_out = max(4, self.n // 4) * (max(4, self.m // 4) // 2 * 2)
        return len(game.prompts) * len(prox.opponents) * (self.n * self.m + held_out)


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
        batch = self.expectation.batch(prox, self.game, generator)  # type: ignore[arg-type]
        prompts = _prompt_weights(self.game)

        def loss(policy: P) -> Tensor:
            losses = self.loss(policy.log_prob(batch.x, batch.y), batch)
            return losses @ prompts.to(losses)

        policy = _fit(start, loss, self.steps, self.optimizer)
        return policy, _info(self, policy, prox, generator, batches=1)


@dataclass(frozen=True)
class ContrastiveSolver:
    """Fit log pi on pairs of the opponent's own responses, labelled by who beats whom: IPO on any `Prox`.

    Args:
        game, expectation, steps, optimizer: as in `RegressionSolver`.

    Raises ValueError for an opponent that is not a policy but a signed list of them.

    Source: `losses.ipo`.
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
            assert generator is not None
            x = game.prompts
            with torch.no_grad():
                y, weight = self.expectation.draw(prox.opponent, x, self.expectation.n, generator)
            win = torch.as_tensor(game.win_prob(x, y, y)).to(weight)
        else:
            x = y = ...
            weight = prox.opponent.log_prob(..., ...).softmax(-1)
            win = Enumerate.pairs(game, ..., ...).to(weight)
        anchor, prompts = torch.as_tensor(prox.anchor.log_prob(x, y)), _prompt_weights(game)

        def loss(policy: P) -> Tensor:
            losses = ipo(policy.log_prob(x, y) - anchor, win, weight, prox.eta)
            return losses @ prompts.to(losses)

        policy = _fit(start, loss, self.steps, self.optimizer)
        return policy, _info(self, policy, prox, generator, batches=1)


@dataclass(frozen=True)
class PolicyGradientSolver:
    """Ascend E[P(y > opponent)] - KL(pi, anchor) / eta itself, y ~ pi.

    With `Enumerate()` the objective is summed exactly; with `Sample(n)` every step draws n fresh responses of the policy
    as it is then, and their opponents, and takes the unbiased gradient of `losses.policy_gradient`.
    One step of it on `NashMD` is Nash-MD-PG.

    Args:
        game, expectation, steps: as in `RegressionSolver`.
        optimizer: L-BFGS with a line search by default where the objective is exact, Adam with step 1e-2 where it is
            sampled.
    """

    game: Any
    expectation: Enumerate | Sample = Enumerate()
    steps: int = 20
    optimizer: MakeOptimizer | None = None

    def __call__(self, prox: Prox, start: P, seed: int | None = None) -> tuple[P, Info]:
        generator, game, expectation = _generator(self.expectation, seed), self.game, self.expectation
        prompts = _prompt_weights(game)
        if isinstance(expectation, Sample):
            assert generator is not None

            def loss(policy: P) -> Tensor:
                with torch.no_grad():
                    y, _ = policy.sample(game.prompts, expectation.n, generator)
                    (win,) = expectation.win(prox, game, y, generator)
                    anchor = torch.as_tensor(prox.anchor.log_prob(game.prompts, y))
                losses = policy_gradient(policy.log_prob(game.prompts, y), anchor, win.to(anchor), prox.eta)
                return losses @ prompts.to(losses)

            policy = _fit(start, loss, self.steps, self.optimizer or _adam)
        else:
            batch = expectation.batch(prox, game, None)

            def loss(policy: P) -> Tensor:
                log_prob = policy.log_prob(..., ...)
                gains = log_prob.exp() * (batch.win - (log_prob - batch.log_anchor) / prox.eta)
                return -(gains.sum(-1) @ prompts.to(gains))

            policy = _fit(start, loss, self.steps, self.optimizer)
        return policy, _info(self, policy, prox, generator, batches=self.steps)


def _fit(start: P, loss: Callable[[P], Tensor], steps: int, optimizer: MakeOptimizer | None) -> P:
    """The policy that `steps` of the optimiser make of `start`, which is left as it is."""
    params = {name: p.detach().clone().requires_grad_() for name, p in start.params.items()}
    policy = start.with_params(params)
    make = optimizer or _lbfgs(steps)
    searcher = make(list(params.values()))

    def closure() -> Tensor:
        searcher.zero_grad()
        value = loss(policy)
        if not torch.isfinite(value):
            raise FloatingPointError(f"the loss became {float(value)}: take a smaller step")
        value.backward()  # type: ignore[no-untyped-call]
        return value

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
        raise ValueError("a solver that samples needs a seed: call it through nlhf.run, or nlhf.run.seeded")
    return torch.Generator().manual_seed(seed)


def _prompt_weights(game: Any) -> Tensor:
    return torch.from_numpy(np.ravel(game.prompt_weights))


def _info(solver: Any, policy: TokenPolicy, prox: Prox, generator: torch.Generator | None, batches: int) -> Info:
    with torch.no_grad():
        residual = solver.expectation.residual(policy, prox, solver.game, generator)
    return Info(residual, solver.expectation.calls(prox, solver.game))
