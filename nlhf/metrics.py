"""How good a policy is. Everything is exact where the responses can be listed, and says so where it cannot.

Functions that take a game average over its prompts with `game.prompt_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import scipy
from numpy.typing import NDArray

from nlhf.core import Policy
from nlhf.schedules import check_tau

Floats: TypeAlias = NDArray[np.float64]

Metric: TypeAlias = Callable[[Any, Any, float], float | Mapping[str, float]]
"""`metric(policy, game, tau)`: a number that `nlhf.run` records under the metric's `__name__`, or numbers by name."""


def table(policy: Policy) -> Floats:
    """(n,) or (X, n) log pi(y | x) of a policy whose responses can be listed, as float64."""
    return np.asarray(policy.log_prob(..., ...), dtype=np.float64)


def kl(policy: Policy, other: Policy, prompt_weights: Floats | None = None) -> float:
    """KL(policy, other) = sum_y pi(y) log(pi(y) / other(y)), in nats, >= 0, averaged over prompts.

    >>> from nlhf.tabular import Tabular
    >>> round(kl(Tabular(np.log([0.5, 0.5])), Tabular(np.log([0.25, 0.75]))), 12)
    0.143841036226
    """
    p, q = table(policy), table(other)
    return _over_prompts(kl_rows(p, q), prompt_weights)


def entropy(policy: Policy, prompt_weights: Floats | None = None) -> float:
    """-sum_y pi(y) log pi(y), in nats, averaged over prompts."""
    p = table(policy)
    return _over_prompts(-np.sum(np.exp(p) * np.where(np.isneginf(p), 0.0, p), axis=-1), prompt_weights)


def win_rate(policy: Policy, game: Any, opponent: Policy | None = None) -> float:
    """P(policy > opponent) = E[P(y > z)] in [0, 1]; the opponent is the reference by default.

    >>> from nlhf.tabular import MatrixGame, Tabular
    >>> game = MatrixGame.rock_paper_scissors()
    >>> round(win_rate(Tabular(np.log([0.5, 0.25, 0.25])), game, Tabular(np.log([0.25, 0.5, 0.25]))), 12)
    0.53125
    """
    other = game.reference if opponent is None else opponent
    p, q = np.exp(table(policy)), np.exp(table(other))
    return _over_prompts(np.sum(p * game.versus(q), axis=-1), game.prompt_weights)


def best_response(policy: Policy, game: Any, tau: float) -> Floats:
    """(n,) or (X, n) log BR(y) = log mu(y) + P(y > pi) / tau - log Z, the best reply to the policy; tau > 0."""
    check_tau(tau, positive=True)
    log_mu, win = table(game.reference), game.versus(np.exp(table(policy)))
    return np.asarray(scipy.special.log_softmax(log_mu + win / tau, axis=-1))


def duality_gap(policy: Policy, game: Any, tau: float) -> float:
    """How much the best response gains: the certificate of a regularised equilibrium, computed from the policy alone.

        gap(pi) = max_pi' P_tau(pi' > pi) - 1/2
                = tau log sum_y mu(y) exp(P(y > pi) / tau) + tau KL(pi, mu) - 1/2 = tau KL(pi, BR(pi))

    Zero exactly at the equilibrium pi*, and KL(pi, pi*) <= gap / tau. The two-player gap of (pi, pi), which some
    papers report, is twice this. With tau = 0 it is the exploitability max_y P(y > pi) - 1/2.

    Args:
        policy: any policy whose responses can be listed.
        game: a `MatrixGame`.
        tau: KL strength >= 0.

    Raises ValueError if tau < 0.

    >>> from nlhf.tabular import MatrixGame
    >>> game = MatrixGame.cyclic(3, 5 / 9, reference=[0.6, 0.3, 0.1])
    >>> round(duality_gap(game.reference, game, tau=0.1), 11)
    0.00157621432
    """
    if check_tau(tau) == 0:
        against = game.versus(np.exp(table(policy)))
        return _over_prompts(against.max(axis=-1) - 0.5, game.prompt_weights)
    return tau * _over_prompts(kl_rows(table(policy), best_response(policy, game, tau)), game.prompt_weights)


def kl_from(target: Policy, name: str = "kl_from_target") -> Metric:
    """The metric KL(target, policy), for instance from the equilibrium, under a name of your choice."""

    def metric(policy: Policy, game: Any, tau: float) -> float:
        return kl(target, policy, game.prompt_weights)

    metric.__name__ = name
    return metric


def win_rate_over(opponent: Policy | None = None, name: str = "win_rate") -> Metric:
    """The metric P(policy > opponent); the opponent is the reference by default."""

    def metric(policy: Policy, game: Any, tau: float) -> float:
        return win_rate(policy, game, opponent)

    metric.__name__ = name
    return metric


def gap_from_kl(kl: float, tau: float) -> float:
    """What KL(pi*, pi) = kl implies for the duality gap of a policy with span(log pi / mu) <= 1 / tau.

        gap(pi) <= [tau c(2 / tau) + 1 / (4 tau)] KL(pi*, pi),   c(s) = (s e^s - e^s + 1) / (e^s - 1 - s)

    Every algorithm here that starts from the reference stays within that span. Proof: gap <= tau KL(pi, pi*) +
    |pi - pi*|_1^2 / (8 tau), where the last term is at most KL(pi*, pi) / (4 tau) by Pinsker; and log(pi / pi*) is at
    most s = 2 / tau, because both log-ratios to mu change sign and span at most 1 / tau, so KL(pi, pi*) is at most
    c(s) KL(pi*, pi): c(log r) is the ratio of the two integrands, r log r - r + 1 and r - 1 - log r, and grows with r.
    """
    c = reverse_kl_factor(np.array(2 / check_tau(tau, positive=True)))
    return float((tau * c + 1 / (4 * tau)) * kl)


def reverse_kl_factor(s: Floats) -> Floats:
    """c(s) with KL(q, p) <= c(s) KL(p, q) wherever log(q / p) <= s: the larger of the two ratios of integrands.

    1 + s / 3 + ... for small s, about s for large.
    """
    # both sides times e^-s, which may be 0 but never overflows; near s = 0 the ratio cancels
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = (s - 1 + np.exp(-s)) / (1 - (1 + s) * np.exp(-s))
    return np.where(s > 1e-3, ratio, 1 + s / 2)


def cramer(one: Any, other: Any) -> Any:
    """(...) Cramér distance of return laws, (integral of (F - F')^2)^(1/2); signed measures of mass 1 are welcome.

    Args:
        one: a `tabular.Categorical` (..., m), or a `tabular.Quantile`.
        other: the same or another kind, on the same or other atoms.

    >>> from nlhf.tabular import Categorical
    >>> float(cramer(Categorical([1.0, 0.0], [0.0, 1.0]), Categorical([0.5, 0.5], [0.0, 1.0])))
    0.5
    """
    return np.sqrt(_integrate(one, other, lambda d: d * d))


def wasserstein(one: Any, other: Any) -> Any:
    """(...) W1, the integral of |F - F'|, which of signed measures of mass 1 is the l1 distance of their CDFs."""
    if hasattr(one, "values") and hasattr(other, "values") and one.values.shape == other.values.shape:
        return np.abs(one.values - other.values).mean(axis=-1)
    return _integrate(one, other, np.abs)


def kolmogorov(one: Any, other: Any) -> Any:
    """(...) the largest |F - F'|."""
    grid = _merged(one, other)
    return np.abs(_cdf_at(one, grid) - _cdf_at(other, grid)).max(axis=-1)


def wasserstein_inf(one: Any, other: Any) -> Any:
    """(...) W_inf, the largest distance of two quantiles. Raises ValueError for laws that are not quantiles alike."""
    if not (hasattr(one, "values") and hasattr(other, "values") and one.values.shape == other.values.shape):
        raise ValueError(f"wasserstein_inf needs two Quantile laws of one shape, got {one} and {other}")
    return np.abs(one.values - other.values).max(axis=-1)


def _integrate(one: Any, other: Any, of: Any) -> Any:
    grid = _merged(one, other)
    d = of(_cdf_at(one, grid[..., :-1]) - _cdf_at(other, grid[..., :-1]))
    return np.sum(d * np.diff(grid, axis=-1), axis=-1)


def _merged(one: Any, other: Any) -> Floats:
    """(..., K) all places where one of the CDFs jumps."""
    if hasattr(one, "atoms") and hasattr(other, "atoms") and np.array_equal(one.atoms, other.atoms):
        return one.atoms
    places = [law.atoms if hasattr(law, "atoms") else law.values for law in (one, other)]
    shape = np.broadcast_shapes(*(p.shape[:-1] for p in places))
    return np.sort(np.concatenate([np.broadcast_to(p, (*shape, p.shape[-1])) for p in places], axis=-1), axis=-1)


def _cdf_at(law: Any, points: Floats) -> Floats:
    """(..., K) F at the points (K,) or (..., K)."""
    if hasattr(law, "values"):
        return np.mean(law.values[..., :, None] <= points[..., None, :], axis=-2)
    steps = np.concatenate([np.zeros((*law.probs.shape[:-1], 1)), np.cumsum(law.probs, axis=-1)], axis=-1)
    index = np.searchsorted(law.atoms, points, side="right")
    shape = np.broadcast_shapes(steps.shape[:-1], index.shape[:-1])
    return np.take_along_axis(
        np.broadcast_to(steps, (*shape, steps.shape[-1])), np.broadcast_to(index, (*shape, index.shape[-1])), axis=-1
    )


class Estimate(NamedTuple):
    """A number with a bootstrap interval."""

    value: float
    low: float
    high: float


def estimated_gap(
    win: Floats,
    log_ratio: Floats,
    tau: float,
    rng: np.random.Generator,
    level: float = 0.9,
    resamples: int = 1000,
) -> Estimate:
    """The duality gap of a policy whose responses cannot be listed, from samples, with a bootstrap interval.

        gap ≈ tau log mean_i exp(a_i / tau) + sum_i q_i (b_i - a_i) + tau mean_j log_ratio_j - 1/2
        q = softmax(a / tau)

    where a_i and b_i are the mean wins of y_i over one half and over the other half of the policy's samples, averaged
    over the two ways to call them. The reply q is chosen on one half and paid on the other, so that it does not
    profit from noise that it was fitted to.

    Bias: DOWN. The reply is not the best one, and it is sought among N reference samples only (the logarithm of a mean
    is low, Jensen). For tau below about 1 / log N what N samples cannot see dominates, and the value is no more than a
    lower bound. The interval shows the spread of the estimate over new samples, around its own biased mean; it is
    not a confidence interval for the gap.

    Args:
        win: (X, N, M) P(y_i > z_j | x), y_i from the reference, z_j from the policy.
        log_ratio: (X, M) log pi(z_j | x) - log mu(z_j | x), in nats.
        tau: KL strength > 0.
        rng: randomness of the bootstrap; both sets of samples are resampled, prompts are kept.
        level: coverage of the interval.
        resamples: bootstrap replications.

    Raises ValueError for shapes that do not fit or values that are not finite.

    >>> rng = np.random.default_rng(0)
    >>> estimated_gap(np.full((1, 4, 4), 0.5), np.zeros((1, 4)), tau=0.1, rng=rng)
    Estimate(value=0.0, low=0.0, high=0.0)
    """
    check_tau(tau, positive=True)
    if win.ndim != 3 or log_ratio.shape != (win.shape[0], win.shape[2]) or min(win.shape) < 1 or win.shape[2] < 2:
        raise ValueError(
            f"win must be (X, N, M) with M >= 2 and log_ratio (X, M), got {win.shape} and {log_ratio.shape}"
        )
    if not (np.isfinite(log_ratio).all() and ((win >= 0) & (win <= 1)).all()):
        raise ValueError(
            "win must hold probabilities and log_ratio finite numbers, got NaN, inf or a number outside [0, 1]"
        )

    def gap(by_reference: Floats, one: Floats, two: Floats) -> Floats:
        """(R,) from how often each sample was drawn, as shares (R, X, N), (R, X, M / 2) and (R, X, M / 2)."""
        a = np.einsum("xnm,rxm->rxn", win[:, :, ::2], one)
        b = np.einsum("xnm,rxm->rxn", win[:, :, 1::2], two)
        paid = 0.5 * (_paid(a, b, by_reference, tau) + _paid(b, a, by_reference, tau))
        kl = 0.5 * np.sum(log_ratio[:, ::2] * one, axis=-1) + 0.5 * np.sum(log_ratio[:, 1::2] * two, axis=-1)
        return np.mean(paid + tau * kl - 0.5, axis=-1)

    (X, N, M) = win.shape
    sizes = N, (M + 1) // 2, M // 2
    value = gap(*(np.full((1, X, size), 1 / size) for size in sizes))[0]
    drawn = gap(*(rng.multinomial(size, np.full(size, 1 / size), size=(resamples, X)) / size for size in sizes))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(value), float(low), float(high))


def _paid(a: Floats, b: Floats, shares: Floats, tau: float) -> Floats:
    """Value against b, less its KL, of the reply to a, over the last axis: y_i has the reference weight shares_i."""
    with np.errstate(divide="ignore"):  # a sample that was not drawn weighs nothing
        q = scipy.special.softmax(a / tau + np.log(shares), axis=-1)
    return np.asarray(tau * scipy.special.logsumexp(a / tau, b=shares, axis=-1) + np.sum(q * (b - a), axis=-1))


def kl_rows(p: Floats, q: Floats) -> Floats:
    """(...) KL over the last axis of log-probabilities (..., n), as sum p (e^d - 1 - d) with d = log q - log p.

    No term is negative and none cancels: it resolves 1e-40 as well as 1.
    """
    nothing = np.isneginf(p)
    d = np.where(nothing, 0.0, q) - np.where(nothing, 0.0, p)
    near = np.exp(p) * _excess(np.minimum(d, 1.0))
    far = np.exp(q) - np.exp(p) * (1 + d)  # where e^d could overflow
    return np.asarray(np.sum(np.where((d > 1) | nothing, far, near), axis=-1))


def _excess(d: Floats) -> Floats:
    """e^d - 1 - d >= 0, to full relative precision: by its series where the difference would cancel."""
    near = np.clip(d, -0.02, 0.02)
    series = np.full_like(d, 1 / 5040)
    for term in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2):
        series = term + near * series
    return np.where(near == d, d * d * series, np.expm1(d) - d)


def _over_prompts(values: Any, weights: Floats | None) -> float:
    if weights is None:
        return float(np.mean(values))
    if np.size(values) != np.size(weights):
        raise ValueError(f"policy must have {np.size(weights)} prompts as the game has, got {np.size(values)}")
    return float(np.ravel(values) @ np.ravel(weights))
