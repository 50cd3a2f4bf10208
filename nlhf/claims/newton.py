"""Newton's method on the dual of the regularised game, its linear systems, and the path of equilibria in tau.

y = log pi - log mu, r(y) = M pi / tau - y, J = -dr/dy = I - M C / tau with M = P - 1/2 and C = diag(pi) - pi pi^T.
C^(1/2) M C^(1/2) is skew: its eigenvalues are +-i omega_k, and those of J are 1 +- i omega_k / tau.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from scipy.sparse import csr_array

from nlhf import metrics
from nlhf.claims.claim import Claim
from nlhf.claims.instances import Duel, Floats, duels
from nlhf.claims.regularized_games import UNFINISHED, distance, jeffreys, patched
from nlhf.tabular import (
    Equilibrium,
    LowRankGame,
    MatrixGame,
    OperatorGame,
    Tabular,
    equilibrium_path,
    newton,
    regularized_nash,
)
from nlhf.tabular.newton import EPS, FactoredDual, FullDual, Point


def equations(i: Duel) -> FullDual:
    """One equation per response."""
    return FullDual(
        lambda q: i.skew @ q, i.mu.log_probs, lambda rows: np.asarray(i.skew[np.ix_(rows, rows)]), i.win_prob
    )


def in_features(i: Duel) -> LowRankGame:
    """The same game by features: M = U V^T - V U^T with U = M / 2 and V = I."""
    return LowRankGame(i.skew / 2, np.eye(i.n), i.mu)


def place(i: Duel, dual: FullDual, pi: Tabular) -> Point:
    """Where log pi - log mu is."""
    return dual.at(pi.log_probs - i.mu.log_probs, i.tau)


def inverse_in_features(i: Duel, pi: Tabular) -> Floats:
    """(2 n, 2 n) the inverse Jacobian in features: its eigenvalues are those of J^-1, and n ones."""
    game = in_features(i)
    dual = FactoredDual(game.features, game.symplectic, i.mu.log_probs)
    point = dual.at(np.concatenate([np.zeros(i.n), pi.log_probs - i.mu.log_probs]), i.tau)
    return np.asarray(dual.solve(point, np.eye(2 * i.n)))


def frequency(i: Duel, pi: Tabular) -> float:
    """The largest omega, read off the inverse Jacobian."""
    return i.tau * float(np.abs(np.imag(1 / np.linalg.eigvals(inverse_in_features(i, pi)))).max())


def frequencies(i: Duel, pi: Tabular) -> Floats:
    """(n,) all omega, each twice: the singular values of sqrt(pi) (M - (M pi) 1^T + 1 (M pi)^T) sqrt(pi)."""
    root, against = np.sqrt(pi.probs), i.skew @ pi.probs
    centred = i.skew - against[:, None] + against
    return np.asarray(np.linalg.svd(root[:, None] * centred * root, compute_uv=False), dtype=np.float64)


def circular(i: Duel) -> Duel:
    """The circular tournament of an odd number of responses, with uniform policies."""
    n = 2 * (i.n // 2) + 1
    flat = np.zeros(n)
    return Duel(MatrixGame.cyclic(n).matrix, flat, flat, flat, flat, i.tau, i.share)


def spread(pi: Tabular, x: Floats) -> float:
    """The standard deviation under pi: the seminorm of C."""
    return float(np.sqrt(pi.probs @ (x - pi.probs @ x) ** 2))


def covariance(pi: Tabular, x: Floats, z: Floats) -> float:
    """Cov_pi(x, z)."""
    return float(pi.probs @ ((x - pi.probs @ x) * (z - pi.probs @ z)))


def direction(i: Duel) -> Floats:
    """(n,) x = J^-1 b at pi, b = the logits of another policy, by elimination."""
    dual = equations(i)
    return dual.solve(place(i, dual, i.pi), i.other)


def lacking(i: Duel) -> float:
    """What sqrt(1 + 1 / (PI tau)^2) sd_pi(x) lacks to sd_pi(b)."""
    return spread(i.pi, i.other) - float(np.hypot(1, 1 / (np.pi * i.tau))) * spread(i.pi, direction(i))


def iterated(i: Duel, accuracy: float = 1e-9) -> tuple[Floats, int]:
    """x = J^-1 b by the short recurrence, and how many products it took."""
    dual = equations(i)
    dual.patience = 100_000
    point, before = place(i, dual, i.pi), dual.products
    return dual.solve(point, i.other, accuracy), dual.products - before


def single(i: Duel) -> float:
    """Up to 64 responses h = C x is found in single precision, 6e-8, of which M h / tau is made; ten times that."""
    return 6e-7 * max(1.0, 1 / i.tau)


def jacobian(i: Duel, x: Floats) -> Floats:
    """J x at pi."""
    p = i.pi.probs
    return x - i.skew @ (p * (x - p @ x)) / i.tau


def stencil(at: list[Floats], h: float) -> Floats:
    """The derivative from values at -2 h, -h, h and 2 h, with an error of h^4 / 30 times the fifth derivative."""
    return (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h)


def residual_slope(i: Duel) -> Floats:
    """(n,) dr/dy x for x = J^-1 b, scaled to length 1, and back."""
    dual, x = equations(i), direction(i)
    size, h = max(float(np.abs(x).max()), 1e-300), 1e-3
    y = i.pi.log_probs - i.mu.log_probs
    return size * stencil([dual.at(y + k * h / size * x, i.tau).residual for k in (-2, -1, 1, 2)], h)


def inverse_norm(i: Duel) -> float:
    """tau (|J^-1|_2 - 1), from one solve per response."""
    dual = equations(i)
    point = place(i, dual, i.pi)
    inverse = np.stack([dual.solve(point, column) for column in np.eye(i.n)], axis=1)
    return i.tau * (float(np.linalg.norm(inverse, 2)) - 1)


def rounding(i: Duel) -> float:
    """The rounding error of a residual: a few numbers as large as 1 / (2 tau)."""
    return EPS * (1 + 0.5 / i.tau)


def slack(i: Duel) -> float:
    """How far apart two computed log pi* may be.

    A residual of 64 rounding errors leaves |pi - pi*|_1 <= sqrt(2 KL(pi, BR(pi))) at most half as large as it is, and
    log pi* moves by M / tau times that.
    """
    return 64 * rounding(i) * (1 + 0.5 / i.tau)


def effort(i: Duel) -> Floats:
    """(2,) Newton steps; KL(pi, BR(pi)) in units of (200 rounding errors)^2."""
    found = regularized_nash(i.game, i.tau)
    return np.array(
        [found.iterations, metrics.duality_gap(found.policy, i.game, i.tau) / i.tau / (200 * rounding(i)) ** 2]
    )


def other_tau(i: Duel) -> float:
    """A larger tau, by a factor of up to 10."""
    return float(i.tau * 10 ** max(i.share, 1e-2))


def pair(i: Duel) -> tuple[Tabular, Tabular]:
    """The equilibria of tau and of the larger tau."""
    far, near = equilibrium_path(i.game, [i.tau, other_tau(i)]).equilibria
    return near.policy, far.policy


def path_slope(i: Duel) -> Floats:
    """(n,) d log pi* / d log tau by differences, centred under pi*."""
    h = 0.02 * min(i.tau, 1.0)
    found = stencil([regularized_nash(i.game, i.tau * np.exp(k * h)).policy.log_probs for k in (-2, -1, 1, 2)], h)
    return found - i.star.probs @ found


def tangent(i: Duel, sign: float = -1.0) -> Floats:
    """(n,) -J^-1 y at pi*, centred under pi*."""
    dual = equations(i)
    point = place(i, dual, i.star)
    found = dual.solve(point, sign * point.dual)
    return found - i.star.probs @ found


def approximate(i: Duel) -> Equilibrium:
    """Newton's method stopped at a tolerance between 1e-1 and 1e-9."""
    return regularized_nash(i.game, i.tau, tolerance(i))


def tolerance(i: Duel) -> float:
    """Of the two-player gap."""
    return float(10 ** (-1 - 8 * i.share))


def euler(i: Duel, factor: float = 1.0) -> float:
    """KL(pi*, pi) after a step of dy/dt = r(y) as long as is allowed, or shorter."""
    dual = equations(i)
    point = place(i, dual, i.pi)
    after = dual.at(point.dual + factor * step(i) * point.residual, i.tau)
    return metrics.kl(i.star, Tabular.from_logits(dual.log_probs(after)))


def step(i: Duel) -> float:
    """A share of the longest step, tau^2 / (tau^2 + 1/4)."""
    return i.share * i.tau**2 / (i.tau**2 + 0.25)


def longest(i: Duel, omega: float) -> float:
    """Products until the recurrence has reduced the residual to 1e-9, if no frequency is larger than omega."""
    s = omega / i.tau
    return float(1 + np.log(2e9 * np.hypot(1, s)) / np.log(s / (np.hypot(1, s) - 1)))


NO_TAU = patched(
    FullDual,
    "solve",
    lambda self, point, rhs, accuracy=0.0, solve=FullDual.solve: solve(self, point._replace(tau=1.0), rhs),
)
"""The system solved for tau = 1."""

NO_COUPLING = patched(FullDual, "solve", lambda self, point, rhs, accuracy=0.0: rhs)
"""The identity in the place of J."""

TOO_LONG = patched(FullDual, "_factorised", lambda self, *args, solve=FullDual._factorised: 3 * solve(self, *args))
"""The answer to the linear system, three times as long."""


CLAIMS = (
    Claim(
        id="newton/monotone",
        statement="<r(y') - r(y), pi_y - pi_y'> = KL(pi_y, pi_y') + KL(pi_y', pi_y), for y' anything and the solution",
        source="y - y' = log pi_y / pi_y' + const, and d^T M d = 0",
        tag="proved",
        instances=duels(),
        lhs=lambda i: np.array(
            [
                (place(i, equations(i), z).residual - place(i, equations(i), i.pi).residual) @ (i.pi.probs - z.probs)
                for z in (i.q, i.star)
            ]
        ),
        identity=lambda i: np.array([jeffreys(i.pi, z) for z in (i.q, i.star)]),
        mutants={
            "2 KL(pi, pi')": {"identity": lambda i: np.array([2 * metrics.kl(i.pi, z) for z in (i.q, i.star)])},
            "a softmax that is not normalised": patched(newton, "log_normalised", lambda z: z - z.max()),
        },
    ),
    Claim(
        id="newton/derivative",
        statement="x = J^-1 b: dr/dy x = -b",
        source="d pi / dy = C",
        tag="proved",
        instances=duels(tau=(0.02, 10.0)),
        lhs=residual_slope,
        identity=lambda i: -i.other,
        mutants={"tau = 1 in the system": NO_TAU, "the identity instead of J": NO_COUPLING},
        # single precision, of J x whose terms are as large as |x| / tau
        tol=lambda i: single(i) * max(1.0, float(np.abs(direction(i)).max())),
    ),
    Claim(
        id="newton/real-part",
        statement="x = J^-1 b: Cov_pi(x, b) = Var_pi(x); so every eigenvalue of J has real part 1",
        source="x^T C J x = x^T C x - (C x)^T M (C x) / tau, and the last term is 0",
        tag="proved",
        instances=duels(),
        lhs=lambda i: covariance(i.pi, direction(i), i.other) / max(covariance(i.pi, i.other, i.other), 1e-300),
        identity=lambda i: spread(i.pi, direction(i)) ** 2 / max(covariance(i.pi, i.other, i.other), 1e-300),
        mutants={
            "Var_pi(b)": {"identity": lambda i: np.sign(spread(i.pi, i.other))},
            "an answer three times too long": TOO_LONG,
        },
        tol=single,
    ),
    Claim(
        id="newton/contracts",
        statement="x = J^-1 b: 0 < sd_pi(x) <= sd_pi(b) unless b is constant",
        source="real-part and Cauchy's inequality; the lower bound is that of expands",
        tag="proved",
        instances=duels(),
        lhs=lambda i: np.array([spread(i.pi, direction(i)), lacking(i)]),
        rhs=lambda i: np.array([spread(i.pi, i.other), 0.0]),
        mutants={
            "0.9 sd(b)": {"rhs": lambda i: np.array([0.9 * spread(i.pi, i.other), 0.0])},
            "an answer three times too long": TOO_LONG,
        },
        tol=single,
    ),
    Claim(
        id="newton/expands",
        statement="x = J^-1 b: sd_pi(b) <= sqrt(1 + 1 / (PI tau)^2) sd_pi(x)",
        source="frequency: the singular values of J are sqrt(1 + omega^2 / tau^2)",
        tag="proved",
        instances=duels(),
        lhs=lambda i: spread(i.pi, i.other),
        rhs=lambda i: np.hypot(1, 1 / (np.pi * i.tau)) * spread(i.pi, direction(i)),
        mutants={
            "1 / (2 PI tau)": {"rhs": lambda i: np.hypot(1, 0.5 / (np.pi * i.tau)) * spread(i.pi, direction(i))},
            "no solution": patched(FullDual, "solve", lambda self, point, rhs, accuracy=0.0: 0 * rhs),
        },
        tol=single,
    ),
    Claim(
        id="newton/frequency",
        statement="omega <= 1 / PI for every policy: every eigenvalue of J is 1 +- i omega / tau",
        source="f, g centred, uncorrelated, of unit variance: omega <= E |f g' - f' g| / 4 = E R R' |sin(t - t')| / 4, "
        "polar, and |sin x| is 2 / PI minus a positive definite series: omega <= (E R)^2 / (2 PI) <= 1 / PI. "
        "Pick 1922 for matrices",
        tag="proved",
        instances=duels(),
        lhs=lambda i: np.array([frequency(i, pi) for pi in (i.pi, i.mu)]),
        rhs=lambda i: 1 / np.pi,
        mutants={
            "1 / (2 sqrt 3)": {"rhs": lambda i: 0.5 / np.sqrt(3)},
            "tau forgotten": patched(
                FactoredDual,
                "solve",
                lambda self, point, rhs, solve=FactoredDual.solve: solve(self, point._replace(tau=1.0), rhs),
            ),
        },
    ),
    Claim(
        id="newton/circular-tournament",
        statement="circular tournament, n odd, uniform policy: omega = cot(PI / (2 n)) / (2 n), which tends to 1 / PI",
        source="M is circulant: its eigenvalues are Fourier coefficients",
        tag="proved",
        instances=duels(),
        lhs=lambda i: frequency(circular(i), circular(i).mu),
        identity=lambda i: 0.5 / circular(i).n / np.tan(0.5 * np.pi / circular(i).n),
        mutants={
            "1 / PI": {"identity": lambda i: 1 / np.pi},
            "cot(PI / n) / n": {"identity": lambda i: 1 / circular(i).n / np.tan(np.pi / circular(i).n)},
        },
    ),
    Claim(
        id="newton/determinant",
        statement="log det J = sum over the pairs +-i omega_k of log(1 + omega_k^2 / tau^2) >= 0: never singular",
        source="C^(1/2) M C^(1/2) is skew",
        tag="proved",
        instances=duels(),
        lhs=lambda i: -np.linalg.slogdet(inverse_in_features(i, i.pi))[1],
        identity=lambda i: 0.5 * np.log1p((frequencies(i, i.pi) / i.tau) ** 2).sum(),
        mutants={
            "omega / tau": {"identity": lambda i: 0.5 * np.log1p(frequencies(i, i.pi) / i.tau).sum()},
            "not centred": {
                "identity": lambda i: (
                    0.5
                    * np.log1p(
                        (np.linalg.svd(np.sqrt(np.outer(i.pi.probs, i.pi.probs)) * i.skew, compute_uv=False) / i.tau)
                        ** 2
                    ).sum()
                )
            },
        },
    ),
    Claim(
        id="newton/inverse-norm",
        statement="tau (|J^-1|_2 - 1) <= |M|_2 / 2 <= cot(PI / (2 n)) / 4 <= sqrt(n (n - 1) / 2) / 4",
        source="J^-1 = I + M C^(1/2) (I - skew)^-1 C^(1/2) / tau, |C|_2 <= 1/2; Pick 1922 (Gregory, Kirkland and "
        "Shader 1993); Frobenius norm",
        tag="proved",
        instances=duels(sizes=(3, 8)),
        lhs=inverse_norm,
        rhs=lambda i: np.array(
            [np.linalg.norm(i.skew, 2) / 2, 0.25 / np.tan(0.5 * np.pi / i.n), np.sqrt(i.n * (i.n - 1) / 2) / 4]
        ),
        mutants={
            "|M|_2 / 4": {"rhs": lambda i: np.linalg.norm(i.skew, 2) / 4},
            "tau = 1 in the system": NO_TAU,
        },
        tol=lambda i: single(i) * max(1.0, i.tau),
    ),
    Claim(
        id="newton/recurrence",
        statement="the short recurrence, to an accuracy of 1e-9: sd_pi(J x - b) <= 1e-9 sd_pi(b) / (PI tau)",
        source="the recurrence (Concus and Golub 1976, Widlund 1978) stops at a residual r of C^(1/2) x; x lacks "
        "M C^(1/2) r / tau; frequency",
        tag="proved",
        instances=duels(tau=(0.05, 10.0)),
        lhs=lambda i: spread(i.pi, jacobian(i, iterated(i)[0]) - i.other),
        rhs=lambda i: 1e-9 * spread(i.pi, i.other) / (np.pi * i.tau),
        mutants={
            "an accuracy of 1e-7": {"lhs": lambda i: spread(i.pi, jacobian(i, iterated(i, 1e-7)[0]) - i.other)},
            "a product that errs by 1 %": patched(
                FullDual, "_rough_product", lambda self, h, product=FullDual._rough_product: 1.01 * product(self, h)
            ),
        },
        # rounding of products with M / tau, summed over the recurrence
        tol=lambda i: 1e-13 * max(1.0, 1 / i.tau),
    ),
    Claim(
        id="newton/recurrence-length",
        statement="the short recurrence reduces the residual to a share e in at most 1 + log(2 sqrt(1 + s^2) / e) / "
        "log(s / (sqrt(1 + s^2) - 1)) products, s = 1 / (PI tau)",
        source="Widlund 1978: the error falls by (sqrt(1 + s^2) - 1) / s per step; s by frequency",
        tag="checked",
        instances=duels(tau=(0.05, 10.0)),
        lhs=lambda i: np.array([iterated(i)[1], 1e9 * i.tau * spread(i.pi, jacobian(i, iterated(i)[0]) - i.other)]),
        rhs=lambda i: np.array([longest(i, 1 / np.pi), spread(i.pi, i.other)]),
        mutants={
            "s = 1 / (10 PI tau)": {
                "rhs": lambda i: np.array([longest(i, 0.1 / np.pi), spread(i.pi, i.other)]),
            },
            "no step at all": patched(FullDual, "_recurrence", lambda self, root, b, tau, accuracy: np.zeros_like(b)),
        },
    ),
    Claim(
        id="newton/effort",
        statement="n <= 8, tau >= 1/50, span(log mu) <= 8: at most 30 Newton steps, and then "
        "gap <= tau (200 eps (1 + 1 / (2 tau)))^2",
        source="no proof; a reference that spans more may take more steps",
        tag="checked",
        instances=duels(tau=(0.02, 10.0), sizes=(3, 8)),
        where=lambda i: i.tau >= 0.02 and np.ptp(i.mu.log_probs) <= 8,
        lhs=effort,
        rhs=lambda i: np.array([30.0, 1.0]),
        mutants={
            "4 steps": {"rhs": lambda i: np.array([4.0, 1.0])},
            "stopped early": UNFINISHED,
        },
    ),
    Claim(
        id="newton/warm-start",
        statement="pi* does not depend on where the search starts: from mu, or from the equilibrium of another tau",
        source="monotone: of two solutions KL(pi, pi') + KL(pi', pi) = 0",
        tag="proved",
        instances=duels(),
        lhs=lambda i: pair(i)[0].log_probs,
        identity=lambda i: i.star.log_probs,
        mutants={
            "the other tau": {"lhs": lambda i: pair(i)[1].log_probs},
            "stopped early": UNFINISHED,
        },
        tol=slack,
    ),
    Claim(
        id="newton/engines",
        statement="a matrix, a sparse operator and features of the same game have the same pi*",
        source="they are the same equations",
        tag="proved",
        instances=duels(),
        lhs=lambda i: np.stack(
            [
                regularized_nash(game, i.tau).policy.log_probs
                for game in (in_features(i), OperatorGame(csr_array(i.skew), i.mu))
            ]
        ),
        identity=lambda i: i.star.log_probs,
        mutants={
            "stopped early": UNFINISHED,
            "another tau": {
                "lhs": lambda i: regularized_nash(in_features(i), 1.01 * i.tau).policy.log_probs,
            },
        },
        tol=slack,
    ),
    Claim(
        id="newton/certificate",
        statement="stopped at a tolerance: 2 gap <= tolerance, and KL(pi*, pi) and KL(pi, pi*) <= the bound it reports",
        source="KL(pi, pi*) <= KL(pi, BR(pi)); log(pi* / pi) <= s = span(log BR(pi) / pi) + |pi - pi*|_1 / tau, so "
        "that KL(pi*, pi) <= c(s) KL(pi, pi*), c(s) = (s e^s - e^s + 1) / (e^s - 1 - s)",
        tag="proved",
        instances=duels(tau=(0.02, 10.0)),
        lhs=lambda i: np.array(
            [
                2 * metrics.duality_gap(approximate(i).policy, i.game, i.tau) / tolerance(i),
                metrics.kl(i.star, approximate(i).policy) / max(float(approximate(i).kl_bound), 1e-12),
                metrics.kl(approximate(i).policy, i.star) / max(float(approximate(i).kl_bound), 1e-12),
            ]
        ),
        rhs=lambda i: np.ones(3),
        mutants={
            "a tenth": {"rhs": lambda i: np.full(3, 0.1)},
            "stopped early": UNFINISHED,
        },
        # log-probabilities are known to `slack`, so a KL of 1e-12, the least looked at, to 2 slack / 1e-6 of itself
        tol=lambda i: 2e6 * slack(i),
    ),
    Claim(
        id="newton/tangent",
        statement="d log pi* / d log tau = -J^-1 y + const, y = log pi* - log mu",
        source="y = M pi* / tau, differentiated",
        tag="proved",
        instances=duels(tau=(0.02, 10.0)),
        lhs=path_slope,
        identity=tangent,
        mutants={
            "plus": {"identity": partial(tangent, sign=1.0)},
            "the identity instead of J": NO_COUPLING,
        },
        tol=single,
    ),
    Claim(
        id="newton/path",
        statement="tau < t: (1/tau - 1/t) (P(pi*_tau > pi*_t) - 1/2) = KL(pi*_tau, pi*_t) + KL(pi*_t, pi*_tau)",
        source="monotone, at both equilibria; t -> infinity is the win rate over mu",
        tag="proved",
        instances=duels(),
        lhs=lambda i: (1 / i.tau - 1 / other_tau(i)) * (metrics.win_rate(pair(i)[0], i.game, pair(i)[1]) - 0.5),
        identity=lambda i: jeffreys(*pair(i)),
        mutants={
            "1/tau": {"lhs": lambda i: (metrics.win_rate(pair(i)[0], i.game, pair(i)[1]) - 0.5) / i.tau},
            "2 KL": {"identity": lambda i: 2 * metrics.kl(*pair(i))},
        },
        # the rounding of a win rate, times 1 / tau
        tol=lambda i: 1e-9 + 1e-14 / i.tau,
    ),
    Claim(
        id="newton/path-length",
        statement="tau < t: KL(pi*_tau, pi*_t) + KL(pi*_t, pi*_tau) <= (1/tau - 1/t)^2 / 12",
        source="path; P(p > q) - 1/2 <= G / 2, G^2 <= J(p, q) / 3, where G = E_q |p(y) / q(y) - p(z) / q(z)| / 2",
        tag="proved",
        instances=duels(),
        lhs=lambda i: jeffreys(*pair(i)) / (1 / i.tau - 1 / other_tau(i)) ** 2,
        rhs=lambda i: 1 / 12,
        mutants={"1/24": {"rhs": lambda i: 1 / 24}},
    ),
    Claim(
        id="newton/path-monotone",
        statement="tau < t: KL(pi*_t, mu) + KL(pi*_tau, pi*_t) <= KL(pi*_tau, mu): away from mu as tau falls",
        source="P(pi*_tau > pi*_t) = 1/2 + t (KL(pi*_tau, mu) - KL(pi*_t, mu) - KL(pi*_tau, pi*_t)) >= 1/2, by path",
        tag="proved",
        instances=duels(),
        lhs=lambda i: metrics.kl(pair(i)[1], i.mu) + metrics.kl(*pair(i)),
        rhs=lambda i: metrics.kl(pair(i)[0], i.mu),
        mutants={
            "3 KL(pi*_tau, pi*_t)": {"lhs": lambda i: metrics.kl(pair(i)[1], i.mu) + 3 * metrics.kl(*pair(i))},
            "the other way round": {
                "lhs": lambda i: metrics.kl(pair(i)[0], i.mu),
                "rhs": lambda i: metrics.kl(pair(i)[1], i.mu),
            },
        },
    ),
    Claim(
        id="newton/euler",
        statement="dy/dt = r(y), a step h <= tau^2 / (tau^2 + 1/4): KL(pi*, pi_(y + h r)) <= (1 - h) KL(pi*, pi_y)",
        source="the step is self-play with eta = h / tau; three-point identity, |M d| <= |d|_1 / 2, Pinsker",
        tag="proved",
        instances=duels(),
        lhs=euler,
        rhs=lambda i: (1 - step(i)) * metrics.kl(i.star, i.pi),
        mutants={
            "(1 - 2 h)": {"rhs": lambda i: (1 - 2 * step(i)) * metrics.kl(i.star, i.pi)},
            "h 20 times as long, no growth": {
                "lhs": partial(euler, factor=20.0),
                "rhs": lambda i: metrics.kl(i.star, i.pi),
            },
        },
    ),
    Claim(
        id="newton/path-lipschitz",
        statement="tau < t: |pi*_tau - pi*_t|_1 <= (1/tau - 1/t) / (2 sqrt 3)",
        source="path-length and Pinsker's inequality, |p - q|_1^2 <= J(p, q)",
        tag="proved",
        instances=duels(),
        lhs=lambda i: distance(*pair(i)) / (1 / i.tau - 1 / other_tau(i)),
        rhs=lambda i: 0.5 / np.sqrt(3),
        mutants={"half": {"rhs": lambda i: 0.25 / np.sqrt(3)}},
    ),
)
