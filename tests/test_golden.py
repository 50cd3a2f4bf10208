"""Numbers computed once, far from this code, to about ten digits."""

from __future__ import annotations

import numpy as np
import pytest

from nlhf import BestResponse, MirrorProx, NashMD, OptimisticMD, SelfPlay, metrics, run
from nlhf.tabular import ExactSolver, MatrixGame, Tabular, regularized_nash
from tests.checks import assert_close

DICE = MatrixGame.cyclic(3, 5 / 9, reference=[0.6, 0.3, 0.1])
DICE_NASH = [0.6437299335, 0.2284984188, 0.1277716477]
RPS = MatrixGame.rock_paper_scissors(reference=[0.5, 0.3, 0.2])
DIGIT = 1e-10  # all numbers are printed with ten digits


def test_dice_equilibrium() -> None:
    star = regularized_nash(DICE, 0.1).policy
    assert_close(star.probs, DICE_NASH, atol=DIGIT)
    mu = DICE.reference
    assert metrics.duality_gap(mu, DICE, 0.1) == pytest.approx(0.00157621432, abs=1e-11)
    assert metrics.duality_gap(Tabular.from_logits(np.zeros(3)), DICE, 0.1) == pytest.approx(0.02405155517, abs=1e-11)
    assert metrics.kl(star, mu) == pytest.approx(0.01439030775, abs=1e-11)
    assert metrics.kl(mu, star) == pytest.approx(0.01495873204, abs=1e-11)
    assert metrics.win_rate(star, DICE) == pytest.approx(0.50293490398, abs=1e-11)


def test_dice_nash_md_constant_step_is_biased() -> None:
    star = regularized_nash(DICE, 0.1).policy
    limit = run(NashMD(eta=1.0, tau=0.1), ExactSolver(DICE), 2000, every=2000).policy
    assert_close(limit.probs, [0.6454452358, 0.2276888203, 0.1268659439], atol=DIGIT)
    assert metrics.kl(star, limit) == pytest.approx(6.944e-6, rel=1e-3)


def test_dice_nash_md_schedule() -> None:
    distance = metrics.kl_from(regularized_nash(DICE, 0.1).policy, "kl")
    trace = run(NashMD.default(0.1), ExactSolver(DICE), 1000, metrics=(distance,))
    _, kl = trace.values("kl")
    for t, golden in ((10, 6.08043e-5), (100, 9.26199e-7), (1000, 9.55736e-9)):
        assert kl[t] == pytest.approx(golden, rel=1e-5)  # six digits are printed


@pytest.mark.parametrize(
    ("b", "mixture", "gap"),
    [
        (0.125, [0.6458727522, 0.2274976153, 0.1266296325], 1.144e-6),
        (0.25, [0.6479997674, 0.2266096901, 0.1253905425], 4.659e-6),
        (0.5, [0.6521785008, 0.2251784916, 0.1226430076], 1.933e-5),
        (1.0, [0.6600256006, 0.2236858369, 0.1162885624], 8.280e-5),
    ],
)
def test_dice_opponent_mixed_with_the_reference(b: float, mixture: list[float], gap: float) -> None:
    """pi = BR(pi^(1-b) mu^b): where Nash-MD-PG stands still. At b = 1 it is the best response to the reference."""
    policy = Tabular.from_logits(
        DICE.reference.log_probs + DICE.matrix @ regularized_nash(DICE, 0.1 / (1 - b)).policy.probs / 0.1
        if b < 1
        else metrics.best_response(DICE.reference, DICE, 0.1)
    )
    assert_close(policy.probs, mixture, atol=DIGIT)
    assert metrics.duality_gap(policy, DICE, 0.1) == pytest.approx(gap, rel=5e-4)  # four digits are printed
    if b == 1:
        assert_close(run(BestResponse.default(0.1), ExactSolver(DICE), 1).policy.probs, mixture, atol=DIGIT)


@pytest.mark.parametrize(
    ("tau", "probs", "digit"),
    [
        (0.05, [0.411125726, 0.3350913525, 0.2537829215], 1e-9),
        (0.01, [0.3926285763, 0.3730130787, 0.234358345], 1e-9),
        (
            1e-4,
            [0.38333, 0.38333, 0.23333],
            2e-4,
        ),  # at tau = 0 the golden value; the path leaves it at order tau
    ],
)
def test_three_annotator_types(tau: float, probs: list[float], digit: float) -> None:
    e = 0.1
    types = []
    for winner, loser in ((1, 0), (0, 2), (2, 1)):
        win = np.full((3, 3), 0.5)
        win[winner, loser], win[loser, winner] = 1.0, 0.0
        types.append(MatrixGame(win))
    game = MatrixGame.annotators(types, [1 / 3 - e, 1 / 3 + e / 2, 1 / 3 + e / 2])
    assert game.matrix[1, 0] == pytest.approx(2 / 3 - e / 2)
    assert_close(regularized_nash(game, tau).policy.probs, probs, atol=digit)


@pytest.mark.parametrize(
    ("tau", "probs"),
    [
        (1.0, [0.5108675583, 0.2615561887, 0.2275762530]),
        (0.3, [0.4628769834, 0.2361897348, 0.3009332818]),
        (0.1, [0.3753269575, 0.2774326283, 0.3472404143]),
        (0.03, [0.3430734504, 0.3150791195, 0.3418474301]),
    ],
)
def test_rock_paper_scissors(tau: float, probs: list[float]) -> None:
    assert_close(regularized_nash(RPS, tau).policy.probs, probs, atol=DIGIT)


@pytest.mark.parametrize(
    ("algorithm", "iterations"),
    [
        (SelfPlay.default(0.1), 239),
        (MirrorProx(eta=2, tau=0.1), 25),
        (NashMD.default(0.1), 5179),
    ],
)
def test_rock_paper_scissors_iterations_to_1e8(algorithm: SelfPlay, iterations: int) -> None:
    distance = metrics.kl_from(regularized_nash(RPS, 0.1).policy, "kl")
    _, kl = run(algorithm, ExactSolver(RPS), iterations, metrics=(distance,)).values("kl")
    assert int(np.argmax(kl < 1e-8)) == iterations


def test_rock_paper_scissors_optimistic_iterations() -> None:
    """125 gradients of the two-sequence form with eta = 1/2; its half-step sequence, ours, is there within one."""
    distance = metrics.kl_from(regularized_nash(RPS, 0.1).policy, "kl")
    _, kl = run(OptimisticMD(eta=0.5, tau=0.1), ExactSolver(RPS), 130, metrics=(distance,)).values("kl")
    assert abs(int(np.argmax(kl < 1e-8)) - 125) <= 1
