"""Regularised equilibria against root finders and each other; certificates against what they promise."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from scipy import optimize
from scipy.sparse import csr_array
from scipy.special import log_softmax, softmax

from nlhf import metrics
from nlhf.tabular import (
    Equilibrium,
    LowRankGame,
    MatrixGame,
    OperatorGame,
    Tabular,
    equilibrium,
    equilibrium_path,
    nash,
    newton,
    regularized_nash,
)
from tests.checks import assert_close
from tests.strategies import KINDS, Instance, instances, matrix, tied

scipy: Any = optimize  # whose stubs know less than its documentation
EPS = float(np.finfo(np.float64).eps)


# --- regularised ------------------------------------------------------------------------------------------------------


@given(instances(tau_min=0.05))
def test_against_a_root_finder(instance: Instance) -> None:
    """SciPy's hybrid Powell method on w = P pi_w / tau, from a start that knows nothing of Newton's."""
    game, tau, policy = instance
    log_mu = game.reference.log_probs

    def residual(w: Any) -> Any:
        return w - (game.matrix - 0.5) @ softmax(log_mu + w) / tau

    answer = scipy.root(residual, policy.log_probs - log_mu, tol=1e-14)
    if np.abs(answer.fun).max() < 1e-11:  # else the root finder has not found it
        assert_close(regularized_nash(game, tau).policy.log_probs, log_softmax(log_mu + answer.x), atol=1e-9)


@given(instances(tau_min=1e-4, tau_max=10.0, prompts=True), st.sampled_from([0.0, 1e-12, 1e-6]))
def test_certificate(instance: Instance, tol: float) -> None:
    """The gap is twice the metric, from the policy alone; it is at most tol, and the KL bound holds both ways."""
    game, tau, _ = instance
    found, exact = regularized_nash(game, tau, tol), regularized_nash(game, tau)
    assert found.duality_gap == pytest.approx(metrics.duality_gap(found.policy, game, tau), rel=1e-12)
    # weighed by prompts, and by 2 for the two players; without tol, a hundredfold the residual that rounding leaves
    rounding = 2 * tau * (200 * EPS * (1 + 0.5 / tau)) ** 2
    assert (found.gap <= max(tol, rounding) * (1 + 1e-9)).all()
    assert found.unique.all()
    for p, q in ((exact, found), (found, exact)):
        apart = metrics.kl_rows(p.policy.log_probs, q.policy.log_probs)
        # the exact one is off, too, and sqrt(KL) is close to a distance
        assert (apart <= (np.sqrt(found.kl_bound) + 2 * np.sqrt(exact.kl_bound)) ** 2 * (1 + 1e-6) + 1e-25).all()


@given(instances(), st.floats(0.0, 3.0))
def test_the_kl_bound_holds_far_from_equilibrium(instance: Instance, away: float) -> None:
    """The bound that a certificate implies, for policies that are no equilibria at all."""
    game, tau, other = instance
    star = regularized_nash(game, tau).policy
    logits = star.log_probs + away * (other.log_probs - star.log_probs)
    claimed = equilibrium._certified(game, tau, log_softmax(logits), 0, 0)
    assert metrics.kl(star, claimed.policy) <= claimed.kl_bound * (1 + 1e-9) + 1e-25
    assert metrics.kl(claimed.policy, star) <= claimed.kl_bound * (1 + 1e-9) + 1e-25
    assert metrics.duality_gap(claimed.policy, game, tau) == pytest.approx(claimed.duality_gap, rel=1e-9, abs=1e-30)


@given(st.floats(1e-9, 40.0), st.floats(0.0, 1.0))
def test_reverse_kl_factor(s: float, share: float) -> None:
    """r log r - r + 1 <= c(s) (r - 1 - log r) for log r <= s, with equality at log r = s: the integrands."""
    c = float(metrics.reverse_kl_factor(np.array(s)))
    z = share * s if share * s > 1e-3 else 1e-3  # where float64 resolves the integrands
    if z <= s:
        forward, backward = z * np.exp(z) - np.expm1(z), np.expm1(z) - z
        assert forward <= c * backward * (1 + 1e-8)
    if s > 1e-2:
        assert c == pytest.approx((s * np.exp(s) - np.expm1(s)) / (np.expm1(s) - s), rel=1e-8)


@pytest.mark.parametrize("exponent", range(-18, 1))
def test_kl_resolves_far_below_one_rounding_error(exponent: int) -> None:
    """KL(p, p + delta) for p = (1/2, 1/2) is -log(1 - 4 delta^2) / 2, summed here by its series."""
    delta = 0.4 * 10.0**exponent
    p, q = np.log([0.5, 0.5]), np.array([np.log1p(2 * delta), np.log1p(-2 * delta)]) + np.log(0.5)
    d = q - p  # what float64 makes of it
    expected = 0.5 * sum(np.expm1(x) - x if abs(x) > 0.1 else sum_of_series(x) for x in d)
    assert metrics.kl_rows(p, q) == pytest.approx(expected, rel=1e-14)
    assert metrics.kl_rows(p, q) == pytest.approx(-0.5 * np.log1p(-4 * delta**2), rel=1e-14 + 1e-15 / delta)


def sum_of_series(x: float) -> float:
    term, total = x, 0.0
    for k in range(2, 30):
        term *= x / k
        total += term
    return total


@given(instances(tau_min=1e-3, tau_max=3.0), st.integers(0, 2**32 - 1))
def test_permutation_and_player_swap(instance: Instance, seed: int) -> None:
    game, tau, _ = instance
    p = np.random.default_rng(seed).permutation(game.n)
    shuffled = MatrixGame(game.matrix[np.ix_(p, p)], Tabular(game.reference.log_probs[p]))
    swapped = MatrixGame(1 - game.matrix.T, game.reference)
    found = regularized_nash(game, tau).policy
    # residuals are rounding errors of numbers as large as 1 / tau, and I - S has an inverse of norm at most 1 + .../tau
    tolerance = 1e-12 / tau**2
    assert_close(regularized_nash(shuffled, tau).policy.log_probs, found.log_probs[p], atol=tolerance)
    assert_close(regularized_nash(swapped, tau).policy.log_probs, found.log_probs, atol=tolerance)
    maximal = nash(game).policy.probs
    assert_close(nash(shuffled).policy.probs, maximal[p], atol=1e-7)
    assert_close(nash(swapped).policy.probs, maximal, atol=1e-7)


REFERENCES: dict[str, Callable[[int, np.random.Generator], Any]] = {
    "uniform": lambda n, rng: np.zeros(n),
    "wide": lambda n, rng: rng.uniform(-690, 0, n),
    "extreme": lambda n, rng: np.where(np.arange(n) == 0, 0.0, -690.0),
    "skewed": lambda n, rng: 5 * rng.standard_normal(n),
}


@pytest.mark.parametrize("spread", REFERENCES)
@pytest.mark.parametrize("kind", [*KINDS, "duplicates", "pure", "faint"])
def test_never_a_failure(kind: str, spread: str) -> None:
    """Ties, pure equilibria, duplicates, references from 1e-300 to 1, tau from 1e-4 to 10, 1 to 70 responses."""
    for n in (1, 2, 3, 8, 70):
        rng = np.random.default_rng(n)
        if kind == "duplicates":
            game = tied(n, n)
        elif kind == "pure":
            game = MatrixGame(0.5 + 0.5 * np.sign(np.subtract.outer(np.arange(n), np.arange(n))))
        elif kind == "faint":
            game = MatrixGame(0.5 + 1e-9 * (matrix(rng, n, "iid") - 0.5))
        else:
            game = MatrixGame(matrix(rng, n, kind))
        game = game.with_reference(Tabular.from_logits(REFERENCES[spread](n, rng)))
        for tau in (10.0, 0.1, 3e-3, 1e-4):
            found = regularized_nash(game, tau)
            # the residual of y = M pi / tau is a rounding error of numbers as large as 1 / tau; a hundredfold of it
            assert found.gap <= 2 * tau * (200 * EPS * (1 + 0.5 / tau)) ** 2
            assert np.isfinite(found.policy.log_probs).all()
            assert np.isfinite(found.kl_bound)


def test_cases_that_were_once_stuck() -> None:
    """A recurrence that was stopped too early, and tangents taken off the path."""
    skew = np.zeros((3, 3))
    skew[np.triu_indices(3, 1)] = 0.28784330429184324, -0.49758404546488644, 0.05495587142556757
    deep = MatrixGame(0.5 + skew - skew.T, Tabular.from_logits(np.log([9.4e-165, 1.0, 7.7e-229])))
    assert regularized_nash(deep, 3e-4).gap < 1e-24
    for seed in (0, 1, 3):
        assert regularized_nash(MatrixGame.low_rank(500, 8, seed), 1e-4).gap < 1e-24
    cycle = MatrixGame.cyclic(21).matrix - 0.5
    reference = Tabular.from_logits(np.random.default_rng(0).uniform(-600, 0, 21))
    assert regularized_nash(OperatorGame(cycle, reference), 1e-4).gap < 1e-24


def test_single_precision_with_prompts() -> None:
    games = MatrixGame.random(4, 1, prompts=2, dtype=np.float32)
    for found in (regularized_nash(games, 0.1), nash(games)):
        assert (found.gap < 1e-12).all()
    alone = regularized_nash(MatrixGame(games.matrix[1], dtype=np.float32), 0.1).policy.probs
    assert_close(regularized_nash(games, 0.1).policy.probs[1], alone, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["iid", "bradley_terry", "sign", "duplicates"])
def test_a_thousand_responses_at_a_small_tau(kind: str) -> None:
    game = tied(0, 1000) if kind == "duplicates" else MatrixGame(matrix(np.random.default_rng(0), 1000, kind))
    for tau in (1e-2, 1e-4):
        found = regularized_nash(game, tau)
        assert found.gap <= 2 * tau * (200 * EPS * (1 + 0.5 / tau)) ** 2


@pytest.mark.parametrize("tau", [3.0, 0.1, 0.01])
def test_every_engine_finds_the_same(tau: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """LU, the short recurrence, features, an operator, single precision; a game and its dense twin."""
    reference = Tabular.from_logits(np.random.default_rng(1).standard_normal(150))
    low = LowRankGame.random(150, 6, seed=0, reference=reference)
    dense = MatrixGame(low.win_prob([0], ..., ...)[0], reference)
    sparse = OperatorGame(csr_array(dense.matrix - 0.5), reference)
    single = MatrixGame(dense.matrix, reference, dtype=np.float32)
    expected = regularized_nash(dense, tau)
    direct = newton.FullDual(
        lambda q: dense.matrix @ q - 0.5 * q.sum(), reference.log_probs, lambda i: dense.matrix[np.ix_(i, i)] - 0.5
    )
    direct.patience = 0
    point, _ = newton.follow(direct, tau, 0.0)
    assert_close(direct.log_probs(point), expected.policy.log_probs, atol=1e-11 / tau)
    for game in (low, sparse):
        found = regularized_nash(game, tau)
        assert_close(found.policy.log_probs, expected.policy.log_probs, atol=1e-11 / tau)
        assert found.gap < 1e-26
        assert metrics.duality_gap(found.policy, game, tau) == pytest.approx(found.duality_gap, rel=1e-12)
    rounded = regularized_nash(single, tau)
    assert rounded.gap < 1e-26  # of the game that is stored, summed in float64 ...
    assert metrics.duality_gap(rounded.policy, single, tau) == pytest.approx(rounded.duality_gap, rel=1e-12)
    # ... whose entries are off by 2^-25: log pi by at most twice that over tau, and what the fixed point makes of it
    assert_close(rounded.policy.log_probs, expected.policy.log_probs, atol=20 * 2**-25 / tau)
    np.testing.assert_array_equal(single.matrix + single.matrix.T, np.float32(1))


def test_many_games_at_once_and_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled batch, the same without the compiler, and each game by itself."""
    pytest.importorskip("numba")
    rng = np.random.default_rng(0)
    for n, tau in ((5, 0.1), (4, 0.02)):
        games = MatrixGame(
            MatrixGame.random(n, rng, prompts=4000).matrix, Tabular.from_logits(3 * rng.standard_normal((4000, n)))
        )
        together = regularized_nash(games, tau)
        with monkeypatch.context() as patch:
            patch.setattr(equilibrium, "find_spec", lambda name: None)
            apart = regularized_nash(games, tau)
        assert_close(together.policy.log_probs, apart.policy.log_probs, atol=1e-11 / tau)
        assert together.gap.max() < 1e-26
        for x in (0, 1234, 3999):
            one = MatrixGame(games.matrix[x], Tabular(games.reference.log_probs[x]))
            alone = regularized_nash(one, tau)
            assert_close(alone.policy.log_probs, together.policy.log_probs[x], atol=1e-11 / tau)


def test_the_compiled_solver_is_not_needed() -> None:
    """Two modules alone import numba, and what imports those asks for it first."""
    root_folder = os.path.dirname(equilibrium.__file__)
    for name in os.listdir(root_folder):
        if name.endswith(".py") and name not in ("fast.py", "sweeps.py"):
            with open(os.path.join(root_folder, name)) as file:
                assert "import numba" not in file.read()


def test_quantal_response_equilibrium_of_gambit() -> None:
    """pygambit's logit solver, another method in another language; its reference is uniform."""
    gambit = pytest.importorskip("pygambit")
    for n, lam in ((3, 2.0), (6, 10.0), (8, 30.0)):
        game = MatrixGame.random(n, n)
        table = gambit.Game.from_arrays(game.matrix, game.matrix.T)
        profile = gambit.qre.logit_solve_lambda(table, lam=[lam])[0].profile
        theirs = [float(probability) for _, probability in profile][:n]
        assert_close(regularized_nash(game, 1 / lam).policy.probs, theirs, atol=1e-9)


# --- paths and large games --------------------------------------------------------------------------------------------


@given(instances(tau_min=0.01, tau_max=1.0), st.floats(1e-4, 0.1))
def test_the_path_is_continuous(instance: Instance, step: float) -> None:
    """Warm starts end where cold ones do; and a small step in tau is a small step of the equilibrium."""
    game, tau, _ = instance
    path = equilibrium_path(game, [tau, tau * (1 + step)])
    near, far = path.probs[1], path.probs[0]
    for e, level in zip(path.equilibria, path.taus, strict=True):
        assert_close(e.policy.log_probs, regularized_nash(game, level).policy.log_probs, atol=1e-9)
    # (I5) with w' = M pi' / tau' as the second argument: KL(pi, pi') + KL(pi', pi) = step <w', pi - pi'>, which is at
    # most step span(w') |pi - pi'|_1 / 2 <= step |pi - pi'|_1 / (2 tau), and by Pinsker at least |pi - pi'|_1^2
    assert np.abs(near - far).sum() <= step / (2 * tau) + 1e-12


def test_path_from_the_reference_to_the_maximal_lottery() -> None:
    game = MatrixGame.rock_paper_scissors(reference=[0.5, 0.3, 0.2])
    path = equilibrium_path(game, [0, 1e-3, 0.1, 1e6])
    assert path.taus.tolist() == [1e6, 0.1, 1e-3, 0]
    assert_close(path.probs[0], game.reference.probs, atol=1e-6)  # at most span(P) / tau away
    assert_close(path.probs[3], [1 / 3] * 3, atol=1e-12)
    assert_close(path.probs[2], path.probs[3], atol=1e-3)
    games = MatrixGame.random(4, 0, prompts=3)
    several = equilibrium_path(games, [1.0, 0.1, 0.0])
    assert several.probs.shape == (3, 3, 4)
    assert_close(several.probs[1], regularized_nash(games, 0.1).policy.probs, atol=1e-12)


def test_path_plot() -> None:
    from matplotlib.figure import Figure

    path = equilibrium_path(MatrixGame.rock_paper_scissors(reference=[0.5, 0.3, 0.2]), [0, 0.01, 0.1, 1])
    ax = path.plot(Figure().subplots())
    assert ax.get_xscale() == "log"
    assert len(ax.get_legend().get_texts()) == 3
    assert ax.get_xticklabels()[0].get_text() == "0"
    with pytest.raises(ValueError, match=r"probs must be those of one game, \(T, n\), got shape \(1, 2, 3\)"):
        equilibrium_path(MatrixGame.random(3, 0, prompts=2), [1.0]).plot(Figure().subplots())


@given(st.integers(2, 40), st.sampled_from([2, 4, 8]), st.floats(1e-5, 1.0), st.integers(0, 2**32 - 1))
def test_low_rank_games_at_every_tau(n: int, rank: int, tau: float, seed: int) -> None:
    """Newton in the features against Newton in the responses, down to where a step from mu lands on one response."""
    low = LowRankGame.random(n, rank, seed)
    found = regularized_nash(low, tau)
    assert found.gap <= 2 * tau * (200 * EPS * (1 + 0.5 / tau)) ** 2
    expected = regularized_nash(MatrixGame(np.clip(low.win_prob([0], ..., ...)[0], 0, 1)), tau).policy
    assert_close(found.policy.probs, expected.probs, atol=1e-9 / min(tau, 0.1) ** 1)
    assert regularized_nash(low, tau, 1e-6).gap <= 1e-6


def test_a_hundred_thousand_responses() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((100_000, 8)) + rng.standard_normal(8)
    features *= np.sqrt(0.5 / np.square(features).sum(axis=1).max())
    game = LowRankGame(features[:, :4], features[:, 4:])
    found = regularized_nash(game, 0.01)
    assert found.gap < 1e-26
    assert found.products <= 20
    sample = rng.choice(game.n, 50, replace=False)
    reply = metrics.best_response(found.policy, game, 0.01)
    assert_close(reply[sample], found.policy.log_probs[sample], atol=1e-10)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tol", [-1.0, float("nan"), "0", True])
def test_tolerance_is_checked(tol: Any) -> None:
    with pytest.raises(ValueError, match="tol must be a finite number >= 0"):
        regularized_nash(MatrixGame.rock_paper_scissors(), 0.1, tol)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: equilibrium_path(MatrixGame.cyclic(3), []), "taus must hold at least one number"),
        (lambda: equilibrium_path(MatrixGame.cyclic(3), [0.1, -1]), "tau must be a finite number >= 0, got -1"),
        (lambda: MatrixGame([[0.5]], dtype=np.float16), "dtype must be float64 or float32"),
        (lambda: LowRankGame([[1.0], [0.0]], [[0.0], [1.0]]), r"win probabilities in \[0, 1\], got P\[0, 1\] = 1.5"),
        (lambda: LowRankGame([[1.0]], [[0.0, 1.0]]), r"left and right must have one shape .* \(1, 1\) and \(1, 2\)"),
        (lambda: LowRankGame([[np.nan]], [[0.0]]), "finite numbers, got NaN or inf"),
        (lambda: LowRankGame([[0.1]] * 2, [[0.1]] * 2, [0.5, 0.6]), "reference must sum to 1, got 1.1"),
        (lambda: OperatorGame(np.eye(3)), r"skew must satisfy M \+ M\^T = 0"),
        (lambda: OperatorGame(np.zeros((2, 3))), r"skew must be a square operator .* got shape \(2, 3\)"),
        (lambda: OperatorGame(1j * np.zeros((2, 2))), "skew must be real, got a complex operator"),
        (lambda: MatrixGame([[0.5j]]), "win_prob must hold real numbers, got complex ones"),
        (lambda: OperatorGame("skew"), r"skew must be a square operator .* got shape \(\)"),
    ],
)
def test_bad_games_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_long_rows_that_never_meet_are_fine() -> None:
    """|w_y| |w_z| > 1/2 for a pair whose product is small."""
    game = LowRankGame([[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.4, 1.0]])
    assert_close(game.win_prob([0], ..., ...)[0], [[0.5, 0.9], [0.1, 0.5]], atol=1e-15)


def test_equilibrium_is_a_value() -> None:
    found: Equilibrium = regularized_nash(MatrixGame.cyclic(3), 0.1)
    with pytest.raises(AttributeError):
        found.tau = 1.0  # type: ignore[misc]
