"""Estimators are unbiased: shown by listing every outcome, in float64, not by a large average."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from nlhf.core import Geometric
from nlhf.llm import ContrastiveSolver, LogitTable, RegressionSolver, Sample, TinyTransformer, TokenMixture, losses
from nlhf.llm.losses import Batch
from nlhf.tabular import MatrixGame
from tests.checks import assert_close
from tests.tiny import generator, random_prox, small

ONE = torch.ones(1, dtype=torch.float64)


def gradient(loss: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(params.values()))])


def trainable(policy: TinyTransformer) -> tuple[TinyTransformer, dict[str, torch.Tensor]]:
    params = {name: p.clone().requires_grad_() for name, p in policy.params.items()}
    return policy.with_params(params), params


@pytest.mark.parametrize("opponent", ["one policy", "token-level mixture"])
def test_sampled_policy_gradient_is_unbiased(opponent: str) -> None:
    """All 8 * 8 * 8 outcomes of two responses and an opponent, on a transformer that spells three tokens."""
    game = MatrixGame.random(8, seed=0)
    policy, params = trainable(small(8))
    anchor, other = small(8, seed=1), small(8, seed=2)
    mixture = TokenMixture(((anchor, 0.5), (other, 0.5))) if opponent != "one policy" else TokenMixture(((other, 1.0),))
    eta, everything = 0.7, torch.arange(8)[None]
    p, q = policy.log_prob([0], everything)[0], mixture.log_prob([0], everything)[0].exp()
    log_anchor, matrix = anchor.log_prob([0], everything)[0], torch.tensor(game.matrix)

    exact = gradient(-(p.exp() @ (matrix @ q - (p - log_anchor) / eta)), params)
    y = torch.tensor(list(itertools.product(range(8), range(8))))
    chance_y, p = p[y].sum(-1).detach().exp(), policy.log_prob([0], everything)[0]
    mean = torch.zeros(())
    for j in range(8):
        mean = mean + q[j] * (chance_y @ losses.policy_gradient(p[y], log_anchor[y], matrix[y, j], eta))
    estimate = gradient(mean, params)
    assert exact.abs().max() > 1e-2
    assert_close(estimate, exact, atol=1e-8)


def test_sampled_regression_is_unbiased_and_stands_still_at_the_answer() -> None:
    """All outcomes of two responses from the anchor and one opponent: the mean gradient is half that of the listed
    variance, (n - 1) / n with n = 2, and zero at the exact answer although no target is exact."""
    game = MatrixGame.random(8, seed=0)
    anchor, other = small(8, seed=1), small(8, seed=2)
    eta, matrix = 0.7, torch.tensor(game.matrix)
    law, q = anchor.log_prob(..., ...)[0], other.log_prob(..., ...)[0].exp()
    y = torch.tensor(list(itertools.product(range(8), range(8))))
    chance_y = law[y].sum(-1).exp()

    def expected_gradient(log_prob: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        half = torch.full(y.shape, 0.5, dtype=torch.float64)
        for j in range(8):
            batch = Batch([0], y, law[y], half, law[y], matrix[y, j], eta, 0, ONE)
            total = total + q[j] * (chance_y @ losses.variance(log_prob[y], batch))
        return torch.autograd.grad(total, log_prob, retain_graph=True)[0]

    def listed_gradient(log_prob: torch.Tensor) -> torch.Tensor:
        batch = Batch(..., ..., law[None], law.exp()[None], law[None], (matrix @ q)[None], eta, 0, ONE)
        return torch.autograd.grad(losses.variance(log_prob[None], batch).sum(), log_prob, retain_graph=True)[0]

    policy = small(8, seed=3)
    log_prob = policy.log_prob(..., ...)[0].clone().requires_grad_()
    assert listed_gradient(log_prob).abs().max() > 1e-2
    assert_close(expected_gradient(log_prob), listed_gradient(log_prob) / 2, atol=1e-12)
    answer = (law + eta * matrix @ q).log_softmax(-1).clone().requires_grad_()
    assert_close(expected_gradient(answer), 0.0, atol=1e-12)


def test_cross_entropy_corrects_for_the_law_of_its_samples() -> None:
    """Samples that occur exactly as often as their law says stand for all responses."""
    game = MatrixGame.random(4, seed=0)
    matrix, q = torch.tensor(game.matrix), small(4, seed=2).log_prob(..., ...)[0].exp()
    anchor = small(4, seed=1).log_prob(..., ...)[0]
    law = torch.tensor([1, 2, 1, 4], dtype=torch.float64) / 8
    y = torch.tensor([[0, 1, 1, 2, 3, 3, 3, 3]])
    win = matrix @ q
    batch = Batch([0], y, law.log()[y], torch.full((1, 8), 1 / 8, dtype=torch.float64), anchor[y], win[y], 0.7, 0, ONE)
    answer = (anchor + 0.7 * win).log_softmax(-1).clone().requires_grad_()
    (slope,) = torch.autograd.grad(losses.cross_entropy(answer.log_softmax(-1)[y], batch).sum(), answer)
    assert_close(slope, 0.0, atol=1e-15)


def test_sampled_pairs_are_unbiased() -> None:
    """All ordered pairs of two responses of the opponent: the gradient of IPO at the exact answer is zero."""
    game = MatrixGame.random(8, seed=0)
    anchor, other = small(8, seed=1).log_prob(..., ...)[0], small(8, seed=2).log_prob(..., ...)[0]
    eta, matrix = 0.7, torch.tensor(game.matrix)
    answer = (anchor + eta * matrix @ other.exp()).log_softmax(-1).clone().requires_grad_()
    y = torch.tensor(list(itertools.product(range(8), range(8))))
    half = torch.full(y.shape, 0.5, dtype=torch.float64)
    loss = other[y].sum(-1).exp() @ losses.ipo((answer - anchor)[y], matrix[y[:, :, None], y[:, None, :]], half, eta)
    assert_close(torch.autograd.grad(loss, answer)[0], 0.0, atol=1e-12)


def test_held_out_residual_does_not_count_the_noise_of_judging() -> None:
    """All outcomes of two responses and two groups of one opponent: the mean is the variance listed exactly."""
    game = MatrixGame.random(8, seed=0)
    anchor, other, policy = (small(8, seed=s).log_prob(..., ...)[0] for s in (1, 2, 3))
    eta, matrix, q = 0.7, torch.tensor(game.matrix), other.exp()
    y = torch.tensor(list(itertools.product(range(8), range(8))))
    half = torch.full(y.shape, 0.5, dtype=torch.float64)
    judged = [Batch([0], y, anchor[y], half, anchor[y], matrix[y, j], eta, 0, ONE) for j in range(8)]
    for log_prob in (policy, (anchor + eta * matrix @ q).log_softmax(-1)):
        listed = Batch(..., ..., anchor[None], anchor.exp()[None], anchor[None], (matrix @ q)[None], eta, 0, ONE)
        exact = float(losses.squared_residual(log_prob[None], listed, listed))
        mean = sum(
            float(
                q[i]
                * q[j]
                * (anchor[y].sum(-1).exp() @ losses.squared_residual(log_prob[y], judged[i], judged[j]._replace()))
            )
            for i in range(8)
            for j in range(8)
        )
        assert mean == pytest.approx(exact, abs=1e-12)


def test_sample_takes_equal_parts_and_reports_what_it_looked_up() -> None:
    game = MatrixGame.random(8, seed=0, prompts=3)
    start = LogitTable(game.reference)
    batch, held_out = Sample(9, opponents=16).batches(random_prox(start), game, generator())
    assert held_out is not None
    one, two = held_out
    assert batch.y.shape == (3, 9)
    assert one.y.shape == (3, 4)
    assert one.y is two.y
    assert (batch.calls, one.calls, two.calls) == (3 * 9 * 16, 3 * 4 * 2, 3 * 4 * 2)
    with pytest.raises(ValueError, match="needs a seed"):
        RegressionSolver(game, Sample(8))(random_prox(start), start)
    for bad in (0, True, 2.5):
        with pytest.raises(ValueError, match=f"n must be an integer >= 1, got {bad!r}"):
            Sample(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="opponents must be at least 2"):
        Sample(1)
    for solver in (RegressionSolver, ContrastiveSolver):
        with pytest.raises(ValueError, match="n must be an integer >= 2, got 1"):
            solver(game, Sample(1, correct=False))


def test_one_response_against_one_opponent_is_unbiased() -> None:
    """All 8 * 8 outcomes, as TRL draws them."""
    game = MatrixGame.random(8, seed=0)
    policy, params = trainable(small(8))
    anchor, other = small(8, seed=1), small(8, seed=2)
    eta, everything, matrix = 0.7, torch.arange(8)[None], torch.tensor(game.matrix)
    p, log_anchor = policy.log_prob([0], everything)[0], anchor.log_prob([0], everything)[0]
    q = other.log_prob([0], everything)[0].exp()
    exact = gradient(-(p.exp() @ (matrix @ q - (p - log_anchor) / eta)), params)
    p = policy.log_prob([0], everything)[0]
    y, chance = everything.T, p.detach().exp()
    mean = sum(q[j] * (chance @ losses.policy_gradient(p[y], log_anchor[y], matrix[y, j], eta)) for j in range(8))
    assert exact.abs().max() > 1e-2
    assert_close(gradient(torch.as_tensor(mean), params), exact, atol=1e-8)


def test_importance_weights_make_the_token_mixture_stand_for_the_sequence_mixture() -> None:
    game = MatrixGame.random(8, seed=0)
    geometric: Any = Geometric(((small(8, 1, scale=2), 0.5), (small(8, 2, scale=2), 0.5)))
    exact = torch.as_tensor(geometric.log_prob(..., ...)).softmax(-1)[0]
    token = TokenMixture(geometric.parts).log_prob(..., torch.arange(8)[None]).exp()[0]
    n = 20_000
    means = {}
    for correct in (True, False):
        (((z, weight),),) = Sample(2, correct=correct).draw([(geometric, [n])], game.prompts, generator())
        means[correct] = torch.zeros(8, dtype=torch.float64).scatter_add(0, z[0], weight[0].double())
    spread = 6 * float((exact.max() / n) ** 0.5)
    assert (means[True] - exact).abs().max() < spread < (token - exact).abs().max()
    assert (means[False] - token).abs().max() < spread
