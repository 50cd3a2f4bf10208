"""The torch world against the exact one, by listing every outcome.

Everything here is float64, so where two sums of the same terms are compared the tolerance is 1e-10 or less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import nlhf
from nlhf import MagneticMD, MirrorProx, NashMD, OptimisticMD, algorithms, metrics, run
from nlhf.core import Geometric, Mixture, Prox
from nlhf.llm import (
    ContrastiveSolver,
    Enumerate,
    LogitTable,
    PolicyGradientSolver,
    RegressionSolver,
    Sample,
    TinyTransformer,
    TokenMixture,
    losses,
)
from nlhf.llm.decode import inverse_cdf
from nlhf.llm.policy import TokenPolicy, alive
from nlhf.run import seeded
from nlhf.tabular import ExactSolver, MatrixGame, Tabular
from tests.checks import assert_close
from tests.strategies import Instance, instances
from tests.tiny import generator, in_numpy, perturbed, random_prox, small

# --- policies ----


@pytest.mark.parametrize("vocab", [2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 5, 8, 16, 58])
def test_transformer_starts_at_the_reference_and_stays_normalised(n: int, vocab: int) -> None:
    rng = np.random.default_rng(n)
    start = Tabular.from_logits(3 * rng.standard_normal((2, n)))
    policy = TinyTransformer(start, vocab=vocab, width=8, layers=1, heads=2)
    assert_close(policy.log_prob(..., ...), start.log_probs, atol=1e-13)
    assert_close(perturbed(policy).log_prob(..., ...).exp().sum(-1), 1.0, atol=1e-12)
    assert torch.equal(policy.read(policy.spell(...)), torch.arange(n).expand(1, -1))


def test_transformer_scores_chosen_responses_as_it_scores_all() -> None:
    policy = small(11, prompts=3, vocab=3)
    y = torch.tensor([[10, 0, 0], [3, 4, 5], [9, 10, 1]])
    listed = policy.log_prob(..., ...)
    assert_close(policy.log_prob([0, 1, 2], y), listed.gather(1, y), atol=1e-13)
    assert_close(policy.log_prob([2, 0, 1], y), listed[[2, 0, 1]].gather(1, y), atol=1e-13)
    many = torch.arange(11).repeat(3, 2)
    assert_close(policy.log_prob(..., many), listed.repeat(1, 2), atol=1e-13)


@pytest.mark.parametrize("n", [2, 5, 8])
def test_decoding_with_a_cache_follows_the_law_it_reports(n: int) -> None:
    policy = small(n, prompts=2)
    y, log_prob = policy.sample([1, 0], 4000, generator())
    assert_close(log_prob, policy.log_prob([1, 0], y), atol=1e-12)
    for row, x in zip(y, (1, 0), strict=True):
        share = torch.bincount(row, minlength=n) / 4000
        exact = policy.log_prob([x], ...).exp()[0]
        # five standard deviations of a share
        assert ((share - exact).abs() <= 5 * (exact * (1 - exact) / 4000).sqrt() + 1e-12).all()


def test_inverse_cdf_is_exact_and_never_draws_the_impossible() -> None:
    log_probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float32).log()
    for level, index in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.9, 3), (float(np.nextafter(1, 0)), 3)):
        assert inverse_cdf(log_probs, torch.tensor([level], dtype=torch.float64)).item() == index


def test_alive_keeps_the_first_end_and_nothing_after() -> None:
    tokens = torch.tensor([[5, 9, 9, 1], [9, 5, 5, 5], [1, 2, 3, 4]])
    assert alive(tokens, 9).tolist() == [[True, True, False, False], [True, False, False, False], [True] * 4]
    assert alive(tokens, None).all()


@given(instances(prompts=True))
def test_logit_table_is_the_table(instance: Instance) -> None:
    game, _, policy = instance
    table = LogitTable(policy)
    assert_close(table.log_prob(..., ...), policy.log_probs, atol=1e-13)
    y = np.tile(np.arange(game.n)[::-1], (len(game.prompts), 1))
    assert_close(table.log_prob(game.prompts, torch.tensor(y.copy())), policy.log_prob(game.prompts, y), atol=1e-13)
    assert_close(TokenPolicy.log_prob(table, ..., ...), policy.log_probs, atol=1e-13)
    half = table.lerp(LogitTable(game.reference), 0.25)
    assert_close(half.log_prob(..., ...), policy.lerp(game.reference, 0.25).log_probs, atol=1e-13)


@pytest.mark.parametrize("make", [lambda: small(8), lambda: LogitTable(MatrixGame.random(5, seed=0).reference)])
def test_parameters_survive_a_checkpoint(make: Callable[[], TokenPolicy]) -> None:
    policy = make()
    again = policy.replace({name: array.copy() for name, array in policy.arrays().items()})
    assert torch.equal(policy.log_prob(..., ...), again.log_prob(..., ...))


# --- token-level and sequence-level mixtures ----


def test_token_mixture_is_normalised_and_is_not_the_mixture_of_responses() -> None:
    one, two = small(8, seed=1), small(8, seed=2)
    parts = ((one, 0.75), (two, 0.25))
    mixture, geometric = TokenMixture(parts), Geometric(parts)
    token = mixture.log_prob([0], torch.arange(8)[None])
    assert_close(token.exp().sum(-1), 1.0, atol=1e-12)
    sequence = torch.as_tensor(geometric.log_prob(..., ...)).log_softmax(-1)
    assert (token.exp() - sequence.exp()).abs().sum() / 2 > 1e-3
    corrected = (token + mixture.log_weight([0], torch.arange(8)[None])).log_softmax(-1)
    assert_close(corrected, sequence, atol=1e-12)


def test_token_mixture_by_its_definition() -> None:
    """log token(y) = log geometric(y) - sum_t log Z(y_<t), with every Z(prefix) <= 1 summed by hand."""
    one, two = small(8, seed=1), small(8, seed=2)
    mixture = TokenMixture(((one, 0.6), (two, 0.4)))
    y = torch.arange(8)[None]
    z = (0.6 * one.next_log_probs([0], y) + 0.4 * two.next_log_probs([0], y)).exp().sum(-1)
    assert (z <= 1 + 1e-12).all()
    by_hand = 0.6 * one.log_prob([0], y) + 0.4 * two.log_prob([0], y) - z.log().sum(-1)
    assert_close(mixture.log_prob([0], y), by_hand, atol=1e-12)


def test_token_mixture_decodes_itself() -> None:
    one, two = small(8, seed=1, prompts=2), small(8, seed=2, prompts=2)
    mixture = TokenMixture(((one, 0.6), (two, 0.4)))
    y, log_prob = mixture.sample([0, 1], 3000, generator())
    assert_close(log_prob, mixture.log_prob([0, 1], y), atol=1e-12)
    exact = mixture.log_prob([0, 1], torch.arange(8).expand(2, -1)).exp()
    share = torch.stack([torch.bincount(row, minlength=8) for row in y]) / 3000
    assert ((share - exact).abs() <= 5 * (exact * (1 - exact) / 3000).sqrt()).all()


def test_the_two_mixtures_agree_on_one_token() -> None:
    rng = np.random.default_rng(0)
    one, two = (LogitTable(Tabular.from_logits(rng.standard_normal((1, 6)))) for _ in range(2))
    mixture = TokenMixture(((one, 0.6), (two, 0.4)))
    sequence = torch.as_tensor(Geometric(mixture.parts).log_prob(..., ...)).log_softmax(-1)
    assert_close(mixture.log_prob(..., ...), sequence, atol=1e-13)


# --- solvers that list every response ----


@settings(max_examples=15)
@given(instances(tau_min=0.1, prompts=True))
def test_regression_to_convergence_is_the_exact_solver(instance: Instance) -> None:
    game, tau, policy = instance
    for algorithm in (MirrorProx(eta=2, tau=tau), OptimisticMD.default(tau)):
        exact = run(algorithm, ExactSolver(game), 5, policy=policy, metrics=())
        fitted = run(
            algorithm,
            RegressionSolver(game, steps=100),
            5,
            policy=LogitTable(policy),
            reference=LogitTable(game.reference),
            metrics=(),
        )
        assert_close(fitted.policy.log_prob(..., ...).exp(), exact.policy.probs, atol=1e-10)


SOLVERS: dict[str, Callable[[MatrixGame], Any]] = {
    "variance": lambda game: RegressionSolver(game, steps=200),
    "logistic": lambda game: RegressionSolver(game, loss=losses.logistic, steps=200),
    "cross-entropy": lambda game: RegressionSolver(game, loss=losses.cross_entropy, steps=200),
    "pairs": lambda game: ContrastiveSolver(game, steps=200),
    "policy gradient": lambda game: PolicyGradientSolver(game, steps=200),
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("seed", range(3))
def test_every_loss_has_the_exact_answer_as_its_minimum(name: str, seed: int) -> None:
    game = MatrixGame.random(6, seed=seed, prompts=2)
    start = LogitTable(game.reference)
    prox = random_prox(start, seed)
    answer, _ = ExactSolver(game)(in_numpy(prox))
    found, info = SOLVERS[name](game)(prox, start)
    # losses are quadratic at the minimum: resolved to about 1e-8 where the loss itself is resolved to 1e-16
    assert_close(found.log_prob(..., ...).exp(), answer.probs, atol=1e-6)
    assert info.prox_residual < 1e-5
    assert info.oracle_calls == 2 * 36


def test_pairs_refuse_a_signed_opponent() -> None:
    game = MatrixGame.random(4, seed=0)
    start = LogitTable(game.reference)
    prox = Prox(Geometric(((start, 1.0),)), Mixture(((start, 2.0), (start, -1.0))), 1.0)
    with pytest.raises(ValueError, match="signed list"):
        ContrastiveSolver(game)(prox, start)


def test_residual_is_the_distance_to_the_answer() -> None:
    game = MatrixGame.random(6, seed=0)
    start = LogitTable(game.reference)
    prox = random_prox(start)
    _, info = RegressionSolver(game, steps=1, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))(prox, start)
    answer, _ = ExactSolver(game)(in_numpy(prox))
    law = 1 / 12 + np.mean([np.exp(metrics.table(p)[0]) for p, _ in prox.anchor.parts], axis=0) / 2
    error = metrics.table(start)[0] - answer.log_probs[0]
    spread = np.sqrt(law @ error**2 - (law @ error) ** 2)
    assert info.prox_residual == pytest.approx(spread, abs=1e-12)


@pytest.mark.parametrize("name", algorithms.__all__)
def test_every_algorithm_on_a_transformer_is_the_exact_one(name: str) -> None:
    game = MatrixGame.random(6, seed=0, prompts=2)
    algorithm = getattr(nlhf, name)(eta=0.5, tau=0.2)
    policy: Any = TinyTransformer(game.reference, vocab=3, width=16, layers=1, heads=2)
    if name == "NashEMA":  # it averages parameters, which are log-probabilities on a table only
        policy = LogitTable(game.reference)
    fitted = run(algorithm, RegressionSolver(game, steps=60), 3, policy=policy, metrics=()).policy
    exact = run(algorithm, ExactSolver(game), 3, metrics=()).policy
    # sixty L-BFGS steps leave residuals of about 1e-7 nats per sub-problem
    assert_close(fitted.log_prob(..., ...).exp(), exact.probs, atol=1e-6)


def test_a_solver_leaves_its_start_alone() -> None:
    game = MatrixGame.random(8, seed=0)
    start = TinyTransformer(game.reference, vocab=2, width=8, layers=1, heads=2)
    before = {name: p.clone() for name, p in start.params.items()}
    for expectation in (Enumerate(), Sample(8)):
        found, _ = RegressionSolver(game, expectation, steps=2)(random_prox(start), start, seed=0)
        assert all(torch.equal(before[name], p) and not p.requires_grad for name, p in start.params.items())
        assert any(not torch.equal(before[name], p) for name, p in found.params.items())


# --- same seed, same trajectory ----


@pytest.mark.parametrize("solver", [RegressionSolver, ContrastiveSolver, PolicyGradientSolver])
def test_same_seed_same_trajectory(solver: Any) -> None:
    game = MatrixGame.random(8, seed=0)

    def go(seed: int) -> np.ndarray:
        policy = TinyTransformer(game.reference, vocab=2, width=8, layers=1, heads=2)
        found = run(MagneticMD(eta=0.5, tau=0.1), solver(game, Sample(8), steps=2), 3, policy=policy, seed=seed).policy
        return metrics.table(found)

    np.testing.assert_array_equal(go(0), go(0))
    assert np.abs(go(0) - go(1)).max() > 1e-6


def test_seeded_draws_anew_at_every_call() -> None:
    drawn: list[int | None] = []

    def solver(prox: Any, start: Any, seed: int | None) -> Any:
        drawn.append(seed)
        return start, None

    for t in range(2):
        solve = seeded(solver, 7, t)
        solve(None, None)  # type: ignore[arg-type]
        solve(None, None)  # type: ignore[arg-type]
    assert len(set(drawn)) == 4


def test_nan_stops_a_fit() -> None:
    game = MatrixGame.random(4, seed=0)
    start = LogitTable(game.reference)
    bad = start.with_params({"logits": start.params["logits"] * torch.nan})
    with pytest.raises(FloatingPointError, match="the loss became nan"):
        RegressionSolver(game)(Prox(Geometric(((start, 1.0),)), start, 1.0), bad)


def test_nash_md_runs_on_a_transformer_with_prompts() -> None:
    game = MatrixGame.random(8, seed=0, prompts=2, prompt_weights=[0.25, 0.75])
    policy = TinyTransformer(game.reference, vocab=2, width=16, layers=1, heads=2)
    _, gap = run(NashMD.default(0.2), RegressionSolver(game), 20, policy=policy).values("duality_gap")
    assert gap[-1] < 0.02 * gap[0]
