"""Identities and bounds of the regularised game, on random instances.

The tolerance is 1e-9 unless a test says why not: quantities are of order one and computed in about a hundred
float64 operations; the equilibrium itself is exact to about 1e-13.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import root
from scipy.special import log_softmax, logsumexp, softmax

from nlhf import MagneticMD, MirrorProx, NashEMA, NashMD, OptimisticMD, SelfPlay, metrics
from nlhf.core import Geometric
from nlhf.schedules import Harmonic
from nlhf.tabular import ExactSolver, MatrixGame, Tabular, regularized_nash
from tests.checks import assert_close
from tests.strategies import Instance, instances

TOL = 1e-9


def regularised(pi: Tabular, other: Tabular, game: MatrixGame, tau: float) -> float:
    """P_tau(pi > other), from its definition."""
    win = float(pi.probs @ game.matrix @ other.probs)
    return win - tau * metrics.kl(pi, game.reference) + tau * metrics.kl(other, game.reference)


@given(instances())
def test_equilibrium_is_its_own_best_response(instance: Instance) -> None:
    game, tau, _ = instance
    found = regularized_nash(game, tau)
    reply = metrics.best_response(found.policy, game, tau)
    assert np.abs(np.exp(reply) - found.policy.probs).max() < 1e-11
    assert 0 <= found.duality_gap < 1e-20


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


@given(instances())
def test_gap_bounds_the_distance_to_the_equilibrium(instance: Instance) -> None:
    game, tau, pi = instance
    star = regularized_nash(game, tau).policy
    gap, kl = metrics.duality_gap(pi, game, tau), metrics.kl(pi, star)
    pinsker = np.abs(pi.probs - star.probs).sum() ** 2 / (8 * tau)
    assert tau * kl - TOL <= gap <= tau * kl + pinsker + TOL
    assert gap <= (tau + 1 / (4 * tau)) * kl + TOL


@given(instances())
def test_deviation_identity(instance: Instance) -> None:
    game, tau, pi = instance
    star = regularized_nash(game, tau).policy
    assert regularised(pi, star, game, tau) == pytest.approx(0.5 - tau * metrics.kl(pi, star), abs=TOL)


@given(instances())
def test_gap_from_kl_holds_for_policies_near_the_reference(instance: Instance) -> None:
    game, tau, pi = instance
    star = regularized_nash(game, tau).policy
    spread = pi.log_probs - pi.log_probs.mean()
    near = Tabular.from_logits(game.reference.log_probs + spread / np.ptp(spread) / tau)  # span exactly 1 / tau
    assert metrics.duality_gap(near, game, tau) <= metrics.gap_from_kl(metrics.kl(star, near), tau) * (1 + TOL) + 1e-14


@given(instances(), st.floats(0.0, 1.0))
def test_nash_md_contracts_by_its_declared_rate(instance: Instance, b: float) -> None:
    game, tau, pi = instance
    star = regularized_nash(game, tau).policy
    eta = max(b, 1e-3) / tau
    algorithm = NashMD(eta, tau)
    state = algorithm.init(game.reference)._replace(policy=pi)
    after, _ = algorithm.step(state, ExactSolver(game))
    before = metrics.kl(star, pi)
    bound = algorithm.rate(before, 0)
    assert metrics.kl(star, after.policy) <= bound + TOL
    assert bound <= (1 - eta * tau) * before + 2 * eta**2 + TOL  # the published constant


@given(instances(), st.floats(1e-3, 1.0))
def test_linear_rates(instance: Instance, share: float) -> None:
    """One step of each from an arbitrary policy, at a share of the largest step that has a proof."""
    game, tau, pi = instance
    star = regularized_nash(game, tau).policy
    before = metrics.kl(star, pi)
    for algorithm in (
        MagneticMD(share * 4 * tau, tau),
        SelfPlay(share * 4 * tau / (1 + 4 * tau**2), tau),
        MirrorProx(share * 2 * (tau + np.sqrt(1 + tau**2)), tau),
    ):
        state = algorithm.init(game.reference)._replace(policy=pi)
        after, _ = algorithm.step(state, ExactSolver(game))
        assert metrics.kl(star, after.policy) <= algorithm.rate(before, 0) * (1 + TOL) + 1e-13, algorithm
        assert algorithm.rate(1.0, 0) < 1


@given(instances(tau_min=0.05), st.integers(1, 30))
def test_self_play_with_any_step_from_the_reference(instance: Instance, steps: int) -> None:
    game, tau, _ = instance
    star = regularized_nash(game, tau).policy
    algorithm = SelfPlay(Harmonic(tau), tau)
    state, bound = algorithm.init(game.reference), metrics.kl(star, game.reference)
    for t in range(steps):
        state, _ = algorithm.step(state, ExactSolver(game))
        bound = algorithm.rate(bound, t)
        assert metrics.kl(star, state.policy) <= bound + TOL
        assert np.ptp(state.policy.log_probs - game.reference.log_probs) <= 1 / tau + TOL
    assert metrics.kl(star, state.policy) <= 2 / (tau**2 * (steps + 1)) + TOL


@given(instances(tau_min=0.05))
def test_nash_md_schedule_at_every_step(instance: Instance) -> None:
    """The published 8 / (tau^2 (T + 1)) and the sharper 1 / (6 tau^2 (T + 1)), from any initial policy."""
    game, tau, pi = instance
    star = regularized_nash(game, tau).policy
    algorithm = NashMD.default(tau)
    state = algorithm.init(game.reference)._replace(policy=pi)
    for t in range(1, 40):
        state, _ = algorithm.step(state, ExactSolver(game))
        assert metrics.kl(star, state.policy) <= 1 / (6 * tau**2 * (t + 1)) + TOL <= 8 / (tau**2 * (t + 1)) + TOL


@given(instances(), st.floats(0.01, 0.9))
def test_constant_step_nash_md_is_self_play_of_its_mixture(instance: Instance, b: float) -> None:
    """The mixtures q_t are self-play with eta (1 - eta tau) and tau / (1 - eta tau), so Nash-MD is biased."""
    game, tau, pi = instance
    eta = b / tau
    nash_md, self_play = NashMD(eta, tau), SelfPlay(eta * (1 - b), tau / (1 - b))
    solver = ExactSolver(game)
    state = nash_md.init(game.reference)._replace(policy=pi)

    def mixture(policy: Tabular) -> Tabular:
        return Tabular.from_logits(Geometric(((policy, 1 - b), (game.reference, b))).log_prob(..., ...))

    other = self_play.init(game.reference)._replace(policy=mixture(pi))
    for _ in range(5):
        state, _ = nash_md.step(state, solver)
        other, _ = self_play.step(other, solver)
        assert_close(mixture(state.policy).log_probs, other.policy.log_probs, atol=TOL)
    shifted = regularized_nash(game, tau / (1 - b)).policy
    fixed = Tabular(metrics.best_response(shifted, game, tau))
    after, _ = nash_md.step(state._replace(policy=fixed), solver)
    assert_close(after.policy.log_probs, fixed.log_probs, atol=TOL)


@given(instances(), st.floats(0.01, 0.95))
def test_self_play_is_magnetic_md_with_another_step(instance: Instance, b: float) -> None:
    game, tau, pi = instance
    eta = b / tau
    one, two = SelfPlay(eta, tau), MagneticMD(eta / (1 - b), tau)
    solver = ExactSolver(game)
    first, _ = one.step(one.init(game.reference)._replace(policy=pi), solver)
    second, _ = two.step(two.init(game.reference)._replace(policy=pi), solver)
    assert_close(first.policy.log_probs, second.policy.log_probs, atol=TOL)


@given(instances(tau_min=0.1))
def test_optimistic_md_is_the_two_sequence_form(instance: Instance) -> None:
    """Cen, Wei and Chi's Algorithm 2, written with its two sequences."""
    game, tau, _ = instance
    algorithm: Any = OptimisticMD.default(tau)
    eta, b = algorithm.eta, algorithm.eta * tau
    log_mu = game.reference.log_probs
    state = algorithm.init(game.reference)
    outer = half = log_mu
    for _ in range(6):
        half = log_softmax((1 - b) * outer + b * log_mu + eta * game.matrix @ np.exp(half))
        outer = log_softmax((1 - b) * outer + b * log_mu + eta * game.matrix @ np.exp(half))
        state, _ = algorithm.step(state, ExactSolver(game))
        assert_close(state.policy.log_probs, half, atol=TOL)


@given(instances(tau_min=0.1), st.floats(0.0, 0.95))
def test_nash_ema_by_its_recursion(instance: Instance, decay: float) -> None:
    game, tau, _ = instance
    algorithm = NashEMA(eta=0.3, tau=tau, decay=decay)
    state = algorithm.init(game.reference)
    log_mu = log_pi = average = game.reference.log_probs
    for _ in range(5):
        average = log_softmax(decay * average + (1 - decay) * log_pi)
        log_pi = log_softmax((1 - 0.3 * tau) * log_pi + 0.3 * tau * log_mu + 0.3 * game.matrix @ np.exp(average))
        state, _ = algorithm.step(state, ExactSolver(game))
        assert_close(state.policy.log_probs, log_pi, atol=TOL)


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
