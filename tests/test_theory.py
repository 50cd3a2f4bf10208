"""Identities and bounds of the regularised game, on random instances.

The tolerance is 1e-9 unless a test says why not: quantities are of order one and computed in about a hundred
float64 operations; the equilibrium itself is exact to about 1e-13.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from scipy.optimize import root
from scipy.special import log_softmax, logsumexp, softmax

from nlhf import MagneticMD, MirrorProx, NashMD, SelfPlay, metrics
from nlhf.tabular import ExactSolver, MatrixGame, Tabular, regularized_nash
from tests.checks import assert_close
from tests.strategies import Instance, instances

TOL = 1e-9


def regularised(pi: Tabular, other: Tabular, game: MatrixGame, tau: float) -> float:
    """P_tau(pi > other), from its definition."""
    win = float(pi.probs @ game.matrix @ other.probs)
    return win - tau * metrics.kl(pi, game.reference) + tau * metrics.kl(other, game.reference)


@given(instances(tau_min=0.3))
def test_equilibrium_agrees_with_scipy_root(instance: Instance) -> None:
    game, tau, _ = instance
    log_mu = game.reference.log_probs

    def residual(w: np.ndarray) -> np.ndarray:
        return np.asarray(w - game.matrix @ softmax(log_mu + w) / tau)

    answer: Any = root(residual, np.zeros(game.n), tol=1e-13)
    assert np.abs(answer.fun).max() < 1e-11  # `success` may be false where rounding stops it
    assert_close(regularized_nash(game, tau).policy.probs, softmax(log_mu + answer.x), atol=1e-9)


@given(instances())
def test_gap_against_the_log_sum_exp_formula(instance: Instance) -> None:
    game, tau, pi = instance
    direct = (
        tau * logsumexp(game.reference.log_probs + game.matrix @ pi.probs / tau)
        + tau * metrics.kl(pi, game.reference)
        - 0.5
    )
    assert metrics.duality_gap(pi, game, tau) == pytest.approx(direct, abs=TOL)


@given(instances())
def test_gap_is_what_the_best_of_many_opponents_gains(instance: Instance) -> None:
    game, tau, pi = instance
    rng = np.random.default_rng(0)
    gap = metrics.duality_gap(pi, game, tau)
    reply = Tabular(metrics.best_response(pi, game, tau))
    assert regularised(reply, pi, game, tau) - 0.5 == pytest.approx(gap, abs=TOL)
    for _ in range(5):
        other = Tabular.from_logits(reply.log_probs + 0.1 * rng.standard_normal(game.n))
        assert regularised(other, pi, game, tau) - 0.5 <= gap + TOL


def test_declared_rates_are_the_theorems() -> None:
    assert NashMD(2.0, 0.1).rate(0.3, 5) == pytest.approx(0.8 * 0.3 + 4 / 24)
    assert NashMD.default(0.1).rate(7.0, 0) == pytest.approx(10**2 / 24)  # eta_0 = 10 forgets where it started
    assert MagneticMD(0.4, 0.1).rate(1.04, 0) == pytest.approx(1.0)
    assert MagneticMD(0.5, 0.1).rate(1.0, 0) == np.inf
    assert SelfPlay.default(0.1).rate(1.04, 0) == pytest.approx(1.0)
    assert SelfPlay(1.0, 0.1).rate(1.0, 0) == pytest.approx(0.9 + 0.5)
    assert MirrorProx(2, 0.1).rate(1.2, 0) == pytest.approx(1.0)
    assert MirrorProx(3, 0.1).rate(1.0, 0) == np.inf


@given(instances(tau_min=0.1))
def test_exact_step_maximises_the_prox_objective(instance: Instance) -> None:
    """No policy near the answer does better on E[P(y > z)] - KL(pi, anchor) / eta."""
    game, tau, pi = instance
    algorithm = MagneticMD(eta=1.0, tau=tau)
    posed = []

    def solve(prox, start):  # type: ignore[no-untyped-def]
        posed.append(prox)
        return ExactSolver(game)(prox, start)

    state, _ = algorithm.step(algorithm.init(game.reference)._replace(policy=pi), solve)
    (prox,) = posed

    def objective(log_probs: np.ndarray) -> float:
        p = np.exp(log_probs)
        return float(p @ game.matrix @ pi.probs - p @ (log_probs - prox.anchor.log_prob(..., ...)) / prox.eta)

    best = objective(state.policy.log_probs)
    rng = np.random.default_rng(0)
    for _ in range(10):
        assert objective(log_softmax(state.policy.log_probs + 0.1 * rng.standard_normal(game.n))) <= best + 1e-12
