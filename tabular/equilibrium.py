"""The equilibrium of the regularised game, with a certificate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from nlhf.metrics import duality_gap
from nlhf.schedules import check_tau
from nlhf.tabular.games import MatrixGame
from nlhf.tabular.policy import Floats, Tabular


@dataclass(frozen=True)
class Equilibrium:
    """A policy and the proof of how good it is."""

    policy: Tabular
    duality_gap: float
    """`metrics.duality_gap` of the policy, computed from it alone: KL(policy, pi*) <= duality_gap / tau."""
    iterations: int
    """Newton steps, summed over prompts."""


def regularized_nash(game: MatrixGame, tau: float) -> Equilibrium:
    """The unique pi* = argmax_pi min_pi' P(pi > pi') - tau KL(pi, mu) + tau KL(pi', mu), to rounding error.

    Damped Newton on R(w) = w - P softmax(log mu + w) / tau, whose Jacobian I - M C(pi) / tau has eigenvalues of real
    part exactly 1 and so is never singular, with continuation from large tau, where w = 0 is nearly the answer.

    Args:
        game: one game, or one per prompt.
        tau: KL strength > 0.

    Raises ValueError if tau is not a positive number.

    >>> game = MatrixGame.rock_paper_scissors(reference=[0.5, 0.3, 0.2])
    >>> regularized_nash(game, tau=0.1).policy.probs.round(10)
    array([0.37532696, 0.27743263, 0.34724041])

    Source: the fixed point is Munos et al. 2024, arXiv:2312.00886, section 4.
    """
    check_tau(tau, positive=True)
    matrices = game.matrix.reshape(-1, game.n, game.n)
    references = game.reference.log_probs.reshape(-1, game.n)
    solved = [_newton(matrix - 0.5, log_mu, tau) for matrix, log_mu in zip(matrices, references, strict=True)]
    policy = Tabular(np.stack([log_probs for log_probs, _ in solved]).reshape(game.reference.log_probs.shape))
    return Equilibrium(policy, duality_gap(policy, game, tau), sum(steps for _, steps in solved))


def _newton(skew: Floats, log_mu: Floats, tau: float) -> tuple[Floats, int]:
    w, steps = np.zeros_like(log_mu), 0
    # At tau >= 1 the map pi -> BR(pi) is a contraction and Newton needs no help; below, follow the path there.
    path = tau * np.geomspace(max(1.0, 1.0 / tau), 1.0, 1 + max(0, int(np.ceil(2 * np.log(1.0 / tau)))))
    for level in path:
        w, taken = _newton_at(skew, log_mu, float(level), w)
        steps += taken
    return log_softmax(log_mu + w), steps


def _newton_at(skew: Floats, log_mu: Floats, tau: float, w: Floats) -> tuple[Floats, int]:
    def residual(w: Floats) -> tuple[Floats, Floats]:
        pi = np.exp(log_softmax(log_mu + w))
        return pi, w - skew @ pi / tau

    pi, r = residual(w)
    rounding = 8 * np.finfo(np.float64).eps * np.sqrt(w.size) * (1 + 0.5 / tau)  # of r, whose entries reach 0.5 / tau
    for step in range(200):
        size = np.linalg.norm(r)
        if size <= rounding:
            return w, step
        jacobian = np.eye(pi.size) - (skew * pi - np.outer(skew @ pi, pi)) / tau
        direction = np.linalg.solve(jacobian, -r)
        t = 1.0
        pi_new, r_new = residual(w + direction)
        while not np.linalg.norm(r_new) <= (1 - 1e-4 * t) * size and t > 1e-8:
            t /= 2
            pi_new, r_new = residual(w + t * direction)
        if not np.linalg.norm(r_new) < size:
            return w, step
        w, pi, r = w + t * direction, pi_new, r_new
    raise RuntimeError(f"Newton did not converge at tau = {tau}: residual {np.linalg.norm(r):.1e} after 200 steps")
