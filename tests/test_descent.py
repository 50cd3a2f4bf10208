"""Optimisers that go on from one sub-problem to the next, micro-batches, drawn prompts, responses decoded together."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import SGD, AdamW

from nlhf import MirrorProx, NashMD, run
from nlhf.llm import (
    ContrastiveSolver,
    Descent,
    Enumerate,
    PolicyGradientSolver,
    RegressionSolver,
    Sample,
    TinyTransformer,
    TokenMixture,
)
from nlhf.llm.decode import sample
from nlhf.tabular import MatrixGame
from tests.checks import assert_close
from tests.tiny import generator, random_prox, small

SOLVERS = [RegressionSolver, ContrastiveSolver, PolicyGradientSolver]
GAME = MatrixGame.random(8, seed=0, prompts=3)
START = TinyTransformer(GAME.reference, vocab=2, width=8, layers=1, heads=2)
ADAM = partial(AdamW, lr=1e-2, weight_decay=0.01)


def difference(one: Any, two: Any) -> float:
    return max(float((one.params[name] - two.params[name]).detach().abs().max()) for name in one.params)


@pytest.mark.parametrize("make", [ADAM, partial(SGD, lr=0.1, momentum=0.9), Descent(ADAM, lambda k: 1 / (k + 1), 0.1)])
def test_one_step_twice_is_two_steps(make: Any) -> None:
    """The state of the optimiser travels with the policy, to the last bit."""
    prox = random_prox(START)
    once = RegressionSolver(GAME, Enumerate(), steps=1, optimizer=make)
    halfway, _ = once(prox, START)
    twice, _ = once(prox, halfway)
    together, _ = RegressionSolver(GAME, Enumerate(), steps=2, optimizer=make)(prox, START)
    assert difference(twice, together) == 0
    forgetful, _ = once(prox, halfway.with_params(halfway.params))
    assert difference(forgetful, together) > 1e-4


def test_schedule_and_norm_against_a_loop() -> None:
    prox, solver = random_prox(START), RegressionSolver(GAME, Enumerate(), steps=3)
    rate, limit = [1.0, 0.0, 0.5], 1e-3
    descent = Descent(partial(SGD, lr=0.3), lambda k: rate[k], limit)
    found, _ = RegressionSolver(GAME, Enumerate(), steps=3, optimizer=descent)(prox, START)
    params = {name: p.clone().requires_grad_() for name, p in START.params.items()}
    batch, _ = Enumerate().batches(prox, GAME, None)
    for k in range(3):
        loss = solver.loss(START.with_params(params).log_prob(..., ...), batch) @ batch.share
        slopes = torch.autograd.grad(loss, list(params.values()))
        norm = float(sum((g**2).sum() for g in slopes)) ** 0.5
        assert norm > limit
        with torch.no_grad():
            for p, g in zip(params.values(), slopes, strict=True):
                p -= 0.3 * rate[k] * g * limit / norm
    assert difference(found, START.with_params(params)) < 1e-8  # torch adds 1e-6 to the norm that it divides by


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_do_not_change_the_update(solver: Any, micro: int) -> None:
    """Sums of the same gradients in another order, in float64."""
    prox = random_prox(START)
    options = {"steps": 2, "optimizer": partial(SGD, lr=0.1)}
    whole, _ = solver(GAME, Sample(6), **options)(prox, START, seed=1)
    parts, _ = solver(GAME, Sample(6, micro=micro), **options)(prox, START, seed=1)
    assert difference(whole, parts) < 1e-13
    assert difference(whole, START) > 1e-3


def test_drawn_prompts_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """All orders of three prompts of unequal weights: the loss of the first two is right on average."""
    game = MatrixGame(GAME.matrix, prompt_weights=np.array([0.5, 0.3, 0.2]))
    loss, total = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64), 0.0
    for order in itertools.permutations(range(3)):
        monkeypatch.setattr(torch, "randperm", lambda n, generator, order=order: torch.tensor(order))
        x, share = Sample(2, prompts=2).choose(game, generator())
        assert list(x) == list(order[:2])
        total += float(loss[list(order[:2])] @ share) / 6
    assert total == pytest.approx(0.5 + 3 + 20, abs=1e-12)
    with pytest.raises(ValueError, match="prompts must be at most the 3 that the game has, got 4"):
        Sample(2, prompts=4).choose(game, generator())


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_interrupted_run_ends_the_same(solver: Any, tmp_path: Path) -> None:
    """The optimiser, its schedule and the prompts drawn: after a stop at any step, to the last bit."""
    descent = Descent(ADAM, lambda k: 1 / (k + 1))
    inner = solver(GAME, Sample(4, prompts=2, held=0), steps=2, optimizer=descent)
    options: Any = {"policy": START, "seed": 3}
    algorithm: Any = MirrorProx(eta=1.0, tau=0.1) if solver is RegressionSolver else NashMD(eta=0.5, tau=0.1)
    whole = run(algorithm, inner, 4, **options)
    for stop in (1, 3):
        file = tmp_path / f"{stop}.npz"
        run(algorithm, inner, stop, **options, checkpoint=file)
        again = run(algorithm, inner, 4, **options, checkpoint=file)
        assert difference(again.policy, whole.policy) == 0
        assert again.records[-3:] == whole.records[-3:]
    assert "prox_residual" not in {name for _, name, _ in whole.records[-3:]}


def test_bfloat16_survives_a_checkpoint() -> None:
    """Parameters and the optimiser's memory, which NumPy has no type for."""
    policy = START.with_params({name: p.bfloat16() for name, p in START.params.items()})
    policy.base = policy.base.bfloat16()
    fitted, _ = RegressionSolver(GAME, Sample(4, held=0), steps=1, optimizer=ADAM)(random_prox(START), policy, seed=0)
    again = fitted.replace(fitted.arrays())
    for mine, read in ((fitted.params, again.params), (fitted.memory, again.memory)):
        assert mine.keys() == read.keys()
        assert all(torch.equal(mine[name], read[name]) and mine[name].dtype == read[name].dtype for name in mine)
    assert {p.dtype for p in fitted.memory.values()} == {torch.bfloat16, torch.float32, torch.int64}


def test_an_infinite_gradient_stops_a_fit() -> None:
    def steep(log_prob: torch.Tensor, batch: Any) -> torch.Tensor:
        return torch.sqrt(log_prob - log_prob.detach()).sum(-1)

    for norm in (None, 1.0):
        solver = RegressionSolver(GAME, Enumerate(), steep, 1, Descent(ADAM, max_norm=norm))
        with pytest.raises(FloatingPointError, match="the gradient's norm became"):
            solver(random_prox(START), START)


def test_bad_numbers_are_named() -> None:
    for bad in (0, -1.0, float("nan"), "1"):
        with pytest.raises(ValueError, match=f"max_norm must be a number > 0 or None, got {bad!r}"):
            Descent(ADAM, max_norm=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="held must be 0 or at least 2, whose spread can be measured, got 1"):
        Sample(4, held=1)
    for name in ("prompts", "micro"):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got 0"):
            Sample(4, **{name: 0})  # type: ignore[arg-type]


def test_groups_decoded_together_have_their_own_laws() -> None:
    """Three laws over two transformers, in one loop: shares of 4000 responses each, log-probabilities exactly."""
    one, two = small(8, 1, prompts=2, scale=2), small(8, 2, prompts=2, scale=2)
    laws = [[(one, 1.0)], [(one, 0.3), (two, 0.7)], [(two, 1.0)]]
    drawn = sample([(parts, 4000) for parts in laws], torch.arange(2), generator())
    for parts, (tokens, log_prob) in zip(laws, drawn, strict=True):
        law, y = TokenMixture(tuple(parts)), one.read(tokens)
        assert_close(law.log_prob(torch.arange(2), y), log_prob, atol=1e-12)
        exact = law.log_prob(torch.arange(2), torch.arange(8).expand(2, -1)).exp()
        share = torch.stack([torch.bincount(row, minlength=8) for row in y]) / 4000
        assert ((share - exact).abs() <= 5 * (exact * (1 - exact) / 4000).sqrt() + 1e-12).all()
