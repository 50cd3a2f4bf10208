"""The estimated gap, the bounds between measures, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from nlhf import MirrorProx, metrics, run
from nlhf.tabular import ExactSolver, MatrixGame, Tabular
from tests.checks import assert_close


@pytest.mark.parametrize("tau", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("steps", [0, 4, 200])
def test_estimated_gap_errs_low(tau: float, steps: int) -> None:
    """The mean of 400 estimates from 32 + 32 samples stays below the truth, up to three standard errors."""
    game = MatrixGame.random(64, seed=0)
    policy = run(MirrorProx(2, tau), ExactSolver(game), steps, metrics=()).policy
    rng = np.random.default_rng(0)
    p, mu = policy.probs, game.reference.probs
    ratio = policy.log_probs - game.reference.log_probs
    values = []
    for _ in range(400):
        y, z = rng.choice(64, 32, p=mu), rng.choice(64, 32, p=p)
        values.append(
            metrics.estimated_gap(game.matrix[None][:, y][:, :, z], ratio[None, z], tau, rng, resamples=1).value
        )
    error = np.std(values) / np.sqrt(len(values))
    assert np.mean(values) <= metrics.duality_gap(policy, game, tau) + 3 * error


def test_estimated_gap_converges_to_the_gap() -> None:
    game = MatrixGame.random(8, seed=0)
    policy = Tabular.from_logits(np.random.default_rng(1).standard_normal(8))
    rng = np.random.default_rng(0)
    y, z = rng.choice(8, 20_000, p=game.reference.probs), rng.choice(8, 2_000, p=policy.probs)
    ratio = (policy.log_probs - game.reference.log_probs)[None, z]
    found = metrics.estimated_gap(game.matrix[y][None][:, :, z], ratio, 0.5, rng, resamples=2)
    # 2000 samples of numbers that spread by about 0.5 and 1: five standard errors are 0.07
    assert found.value == pytest.approx(metrics.duality_gap(policy, game, 0.5), abs=0.07)


def test_estimated_gap_resamples_around_itself() -> None:
    rng = np.random.default_rng(0)
    found = metrics.estimated_gap(rng.uniform(size=(2, 40, 40)), rng.standard_normal((2, 40)), 0.5, rng)
    assert found.low < found.value < found.high
    for win, ratio in (
        (np.full((1, 4, 4), 0.5), np.zeros((1, 3))),
        (np.full((1, 4, 4), np.nan), np.zeros((1, 4))),
        (np.full((1, 0, 4), 0.5), np.zeros((1, 4))),
        (np.full((1, 4, 4), 0.5), np.full((1, 4), np.inf)),
    ):
        with pytest.raises(ValueError, match="win must"):
            metrics.estimated_gap(win, ratio, 0.1, rng)


def test_gap_at_extreme_log_probabilities() -> None:
    """Where exp(log BR - log pi) would overflow, and where pi has no mass at all."""
    game = MatrixGame.random(4, seed=0)
    far = Tabular.from_logits(np.array([0.0, -1000.0, -2000.0, -np.inf]))
    p = far.probs
    for tau in (1e-3, 0.1, 10.0):
        reply = metrics.best_response(far, game, tau)
        direct = tau * float(p[:1] @ (far.log_probs[:1] - reply[:1]))
        assert metrics.duality_gap(far, game, tau) == pytest.approx(direct, rel=1e-12)
    assert metrics.kl(far, far) == 0.0
    assert metrics.entropy(far) == 0.0
    assert metrics.kl(game.reference, far) == np.inf


@pytest.mark.parametrize("tau", [1e-6, 1e-3, 0.1, 10.0, 1e3, 2001.0, 1e4, 1e9])
def test_gap_from_kl_is_finite_and_no_less_than_tau(tau: float) -> None:
    assert max(tau, 1 / (4 * tau)) <= metrics.gap_from_kl(1.0, tau) <= 3 + tau * 1.01 + 1 / (4 * tau)


def test_prompts_must_fit() -> None:
    with pytest.raises(ValueError, match="policy must have 1 prompts as the game has, got 4"):
        metrics.duality_gap(Tabular.from_logits(np.zeros((4, 3))), MatrixGame.cyclic(3), 0.1)
    assert_close(metrics.duality_gap(Tabular.from_logits(np.zeros((1, 3))), MatrixGame.cyclic(3), 0.1), 0.0, atol=1e-16)
