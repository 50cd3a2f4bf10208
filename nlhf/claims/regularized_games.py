"""The KL-regularised preference game: identities, certificates and the size of its equilibrium.

Most are in Munos et al. 2024 (arXiv:2312.00886) or follow in a line or two; where a proof is needed it is given.
"""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp

from nlhf import metrics
from nlhf.claims.claim import Claim
from nlhf.claims.instances import Duel, Floats, duels

PAPER = "Munos et al. 2024, arXiv:2312.00886"


def opponents(i: Duel) -> Floats:
    """(3,) P_tau(pi > z) for three opponents."""
    return np.array([i.prefers(i.pi, z) for z in (i.q, i.p, i.mu)])


CLAIMS = (
    Claim(
        id="regularized_games/symmetric",
        statement="P_tau(pi > q) = 1 - P_tau(q > pi)",
        source=f"{PAPER}, section 3",
        tag="proved",
        instances=duels(),
        lhs=opponents,
        identity=lambda i: np.array([1 - i.prefers(z, i.pi) for z in (i.q, i.p, i.mu)]),
        mutants={
            "the regularisation of one player only": {
                "lhs": lambda i: opponents(i) - i.tau * np.array([metrics.kl(z, i.mu) for z in (i.q, i.p, i.mu)])
            }
        },
    ),
    Claim(
        id="regularized_games/deviation",
        statement="P_tau(pi > pi*) = 1/2 - tau KL(pi, pi*)",
        source="P pi* = tau log(pi* / mu) + const, inserted; pi = pi* gives the constant",
        tag="proved",
        instances=duels(),
        lhs=lambda i: i.prefers(i.pi, i.star),
        identity=lambda i: 0.5 - i.tau * metrics.kl(i.pi, i.star),
        mutants={
            "KL(pi*, pi)": {"identity": lambda i: 0.5 - i.tau * metrics.kl(i.star, i.pi)},
            "plus": {"identity": lambda i: 0.5 + i.tau * metrics.kl(i.pi, i.star)},
        },
    ),
    Claim(
        id="regularized_games/gap",
        statement="gap(pi) = tau log sum mu exp(P pi / tau) + tau KL(pi, mu) - 1/2",
        source="Gibbs' variational principle, attained at BR(pi) = mu exp(P pi / tau) / Z",
        tag="proved",
        instances=duels(),
        lhs=lambda i: metrics.duality_gap(i.pi, i.game, i.tau),
        identity=lambda i: (
            i.tau * logsumexp(i.mu.log_probs + i.win_prob @ i.pi.probs / i.tau) + i.tau * metrics.kl(i.pi, i.mu) - 0.5
        ),
        mutants={
            "without KL(pi, mu)": {
                "identity": lambda i: i.tau * logsumexp(i.mu.log_probs + i.win_prob @ i.pi.probs / i.tau) - 0.5
            },
            "tau applied twice": {
                "identity": lambda i: (
                    i.tau**2 * metrics.kl(i.pi, type(i.pi)(metrics.best_response(i.pi, i.game, i.tau)))
                )
            },
        },
    ),
    Claim(
        id="regularized_games/gap-above",
        statement="gap(pi) - tau KL(pi, pi*) <= |pi - pi*|_1^2 / (8 tau)",
        source="gap(pi) - tau KL(pi, pi*) = tau log E_pi* exp(M d / tau) - <pi*, M d>, d = pi - pi*; Hoeffding's lemma",
        tag="proved",
        instances=duels(),
        lhs=lambda i: metrics.duality_gap(i.pi, i.game, i.tau) - i.tau * metrics.kl(i.pi, i.star),
        rhs=lambda i: np.abs(i.pi.probs - i.star.probs).sum() ** 2 / (8 * i.tau),
        mutants={
            "half of the constant": {"rhs": lambda i: np.abs(i.pi.probs - i.star.probs).sum() ** 2 / (16 * i.tau)},
        },
    ),
)
