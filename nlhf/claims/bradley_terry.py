"""What a reward can say of preferences, and what it cannot: the examples of Munos et al. 2024, and Bradley-Terry fits.

r maximises sum over pairs of pi(y) pi(z) P(y > z) log sigma(r(y) - r(z)): pairs are drawn from pi.
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit

from nlhf import metrics
from nlhf.claims.claim import Claim
from nlhf.claims.instances import Duel, Floats, duels
from nlhf.claims.regularized_games import FLIPPED, patched
from nlhf.tabular import MatrixGame, Tabular, nash, tournament

PAPER = "Munos et al. 2024, arXiv:2312.00886, section 3"


def fit(game: MatrixGame, law: Tabular | None = None) -> Floats:
    """(n,) scores fitted to pairs from the law; uniform by default."""
    return tournament.bradley_terry_scores(game.matrix, None if law is None else np.outer(law.probs, law.probs))


def open_game(i: Duel) -> bool:
    """Whether nothing is certain, so that every fit is finite."""
    return bool((i.win_prob > 0.001).all())


def expected(i: Duel) -> Floats:
    """(n,) E_z~pi sigma(r(y) - r(z)) of the fit."""
    r = fit(i.game, i.pi)
    return np.asarray(expit(r[:, None] - r) @ i.pi.probs)


def stopping(i: Duel) -> float:
    """Newton stops at a gradient, in which y weighs pi(y), of 1e-12 times its largest weight."""
    return float(1e-12 * i.pi.probs.max() / i.pi.probs.min() + 1e-11)


def tilt(i: Duel) -> float:
    """e in [-1/3, 1/3]."""
    return (2 * i.share - 1) / 3


def annotators(i: Duel) -> MatrixGame:
    """Three types of annotators, who see a difference between two of three responses each."""
    e, types = tilt(i), []
    for better, worse in ((1, 0), (0, 2), (2, 1)):
        matrix = np.full((3, 3), 0.5)
        matrix[better, worse], matrix[worse, better] = 1, 0
        types.append(MatrixGame(matrix))
    return MatrixGame.annotators(types, [1 / 3 - e, 1 / 3 + e / 2, 1 / 3 + e / 2])


def answer(i: Duel, sign: int = 1) -> Floats:
    """(1/3 + e/2, 1/3 + e/2, 1/3 - e)."""
    e = sign * tilt(i)
    return np.array([1 / 3 + e / 2, 1 / 3 + e / 2, 1 / 3 - e])


def order(scores: Floats) -> Floats:
    """(2,) the signs of scores 1 minus 3, and 3 minus 2."""
    return np.sign([scores[0] - scores[2], scores[2] - scores[1]])


def constrained(share: float) -> Tabular:
    """The policies with pi(1) = 2 pi(2), from (2/3, 1/3, 0) to (0, 0, 1)."""
    with np.errstate(divide="ignore"):
        return Tabular(np.log([2 * (1 - share) / 3, (1 - share) / 3, share]))


def over_best_reward(i: Duel) -> float:
    """P(pi_s > pi_0) for the reward r = (0, log 9, log 2)."""
    return metrics.win_rate(constrained(i.share), MatrixGame.bradley_terry([0, np.log(9), np.log(2)]), constrained(0.0))


def ring(win: float = 2 / 3) -> Floats:
    """(3, 3) fits to the ring of three responses: pairs from (1, 1, 1) / 3, (.6, .3, .1), (.1, .3, .6); r(1) = 0."""
    game, laws = MatrixGame.cyclic(3, win), ([1 / 3] * 3, [0.6, 0.3, 0.1], [0.1, 0.3, 0.6])
    fits = np.stack([fit(game, Tabular(np.log(law))) for law in laws])
    return np.asarray(fits - fits[:, :1])


UNWEIGHTED = patched(
    tournament, "bradley_terry_scores", lambda p, weights=None, scores=tournament.bradley_terry_scores: scores(p)
)
"""A fit that takes all pairs for equally frequent."""


CLAIMS = (
    Claim(
        id="bradley_terry/stationary",
        statement="E_z~pi sigma(r(y) - r(z)) = P(y > pi) for every y, r fitted to pairs from pi",
        source="the gradient of the likelihood in r(y)",
        tag="proved",
        instances=duels(tau=(1.0, 1.0)),
        where=open_game,
        lhs=expected,
        identity=lambda i: i.game.versus(i.pi.probs),
        mutants={
            "pairs taken for equally frequent": UNWEIGHTED,
            "the preference read the wrong way round": FLIPPED,
        },
        tol=stopping,
    ),
    Claim(
        id="bradley_terry/recovers",
        statement="P(y > z) = sigma(r(y) - r(z)): the fit is r - mean(r), whatever law the pairs come from",
        source="stationary; the likelihood is strictly concave up to a constant",
        tag="proved",
        instances=duels(sizes=(2, 9)),
        lhs=lambda i: fit(MatrixGame.bradley_terry(np.tanh(i.other)), i.pi),
        identity=lambda i: np.tanh(i.other) - np.tanh(i.other).mean(),
        mutants={
            "r": {"identity": lambda i: np.tanh(i.other)},
            "2 r": {"identity": lambda i: 2 * (np.tanh(i.other) - np.tanh(i.other).mean())},
        },
        # |sigma'| >= 1/10 for differences of at most 2, and the stopping rule
        tol=lambda i: 10 * i.n * stopping(i),
    ),
    Claim(
        id="bradley_terry/must-move",
        statement="4 (max_y P(y > pi) - 1/2) <= span(r): where pi is exploitable its pairs cannot fit r = 0",
        source="stationary, and |sigma(x) - 1/2| <= |x| / 4",
        tag="proved",
        instances=duels(),
        where=open_game,
        lhs=lambda i: 4 * metrics.duality_gap(i.pi, i.game, 0.0),
        rhs=lambda i: np.ptp(fit(i.game, i.pi)),
        mutants={
            "half of the span": {"rhs": lambda i: np.ptp(fit(i.game, i.pi)) / 2},
            "no fit": patched(tournament, "bradley_terry_scores", lambda p, weights=None: np.zeros(len(p))),
        },
        tol=lambda i: 4 * stopping(i),
    ),
    Claim(
        id="bradley_terry/ring",
        statement="1 beats 2 beats 3 beats 1 with 2/3: uniform pairs fit r = 0, pairs from (.6, .3, .1) fit "
        "r - r(1) = (0, -0.4759, 0.0680), pairs from (.1, .3, .6) fit (0, 0.5438, 0.0680)",
        source=f"{PAPER}: a reward depends on who sampled the pairs",
        tag="checked",
        instances=duels(sizes=(2, 3)),
        lhs=lambda i: ring(),
        identity=lambda i: np.array([[0, 0, 0], [0, -0.4759, 0.0680], [0, 0.5438, 0.0680]]),
        mutants={
            "the same for every law": {"identity": lambda i: np.zeros((3, 3))},
            "pairs taken for equally frequent": UNWEIGHTED,
        },
        tol=6e-5,  # printed digits
    ),
    Claim(
        id="bradley_terry/three-annotators",
        statement="2 beats 1 for 1/3 - e of the annotators, 1 beats 3 and 3 beats 2 for 1/3 + e/2 each, all else tied: "
        "the equilibrium is (1/3 + e/2, 1/3 + e/2, 1/3 - e), |e| <= 1/3",
        source=f"{PAPER}: M pi = 0",
        tag="proved",
        instances=duels(sizes=(2, 3)),
        lhs=lambda i: nash(annotators(i)).policy.probs,
        identity=answer,
        mutants={
            "-e": {"identity": lambda i: answer(i, -1)},
            "uniform": {"identity": lambda i: 1 / 3},
        },
    ),
    Claim(
        id="bradley_terry/jump",
        statement="the same annotators: r(1) > r(3) > r(2) for e > 0 and r(1) < r(3) < r(2) for e < 0, uniform pairs; "
        "the best reward jumps where the equilibrium is continuous",
        source=f"{PAPER}: the mean win rates of 1, 2, 3 are 1/2 + e/8, 1/2 - e/8 and 1/2 but for a common factor",
        tag="proved",
        instances=duels(sizes=(2, 3)),
        where=lambda i: abs(tilt(i)) > 1e-6,
        lhs=lambda i: order(fit(annotators(i))),
        identity=lambda i: np.full(2, np.sign(tilt(i))),
        mutants={
            "the equilibrium, too": {"lhs": lambda i: order(nash(annotators(i)).policy.probs)},
            "-e": {"identity": lambda i: -np.full(2, np.sign(tilt(i)))},
        },
    ),
    Claim(
        id="bradley_terry/best-reward-loses",
        statement="r = (0, log 9, log 2), pi_s = (2/3 (1 - s), (1 - s)/3, s): P(pi_s > pi_0) = 1/2 + s/198, so that "
        "(0, 0, 1) beats the policy of the largest reward, s = 0, with 50/99",
        source=f"{PAPER}: win rates and rewards disagree on a constrained set of policies",
        tag="proved",
        instances=duels(sizes=(2, 3)),
        lhs=over_best_reward,
        identity=lambda i: 0.5 + i.share / 198,
        mutants={
            "1/2": {"identity": lambda i: 0.5},
            "the preference read the wrong way round": FLIPPED,
        },
    ),
)
