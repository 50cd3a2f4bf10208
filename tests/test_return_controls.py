"""Return distributions where the truth is known, brackets of them, and controls: what breaks without a condition.

Numbers are those of the list that the other tests of returns follow, which states claims for rewards in [0, 1], whose
returns fill a range of 1 / (1 - gamma). Here that range is the span of the grid. Laws are tables of CDFs, (S A, m - 1).
"""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, example, given
from scipy.stats import wasserstein_distance

from nlhf import NStep, QLambda, run
from nlhf.evaluation import EvalState
from nlhf.tabular import MDP, BackupSolver, Categorical, categorical_fixed_point
from nlhf.tabular.bellman import Linear, Shift, grid
from nlhf.tabular.policy import Floats
from tests.checks import assert_close
from tests.processes import Process, linear, processes, scale


def is_certain(process: Process) -> bool:
    """Whether nothing is random, so that the return is a number."""
    return process.mdp.rewards.shape[-1] == 1 and bool(np.isin(dense(process.mdp.transitions), (0, 1)).all())


def dense(matrix: Any) -> Floats:
    return np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix)


def next_states(mdp: MDP) -> Floats:
    """(S, A, S)."""
    return dense(mdp.transitions).reshape(mdp.n_states, mdp.n_actions, -1)


def span(t: Linear) -> float:
    return float(np.ptp(t.shift.atoms))


def norm(difference: Floats, p: float) -> float:
    """The largest l_p norm of a row."""
    return float((np.abs(difference) ** p).sum(axis=1).max() ** (1 / p))


def solved(t: Linear) -> Floats:
    """The fixed point."""
    return categorical_fixed_point(t.shift.mdp, t.weights, t.shift.atoms).returns.cdf.reshape(t.shape)


def resolvent(t: Linear, cdf: Floats) -> Floats:
    """(1 - T)^{-1} F."""
    return np.asarray(np.linalg.solve(np.eye(cdf.size) - t.explicit().toarray(), cdf.ravel()).reshape(cdf.shape))


def applied(algorithm: Any, process: Process, cdf: Floats) -> Floats:
    """A step of the algorithm."""
    mdp, policy, _, m = process
    solver = BackupSolver(mdp, m)
    state = EvalState(Categorical.from_cdf(cdf.reshape(*policy.shape, m - 1), solver.shift.atoms))
    return np.asarray(algorithm.step(state, solver)[0].returns.cdf.reshape(cdf.shape))


# --- laws that are known ----------------------------------------------------------------------------------------------


def lottery(k: int, gamma: float) -> MDP:
    """One state that pays 0, 1 / (k - 1), ..., or 1: the return is uniform for gamma = 1 / k, Cantor's for 2, 1 / 3."""
    return MDP([[[1.0]]], [[np.arange(k) / (k - 1)]], gamma, np.full((1, 1, k), 1 / k))


LOTTERIES = st.sampled_from([(2, 1 / 3), *((k, 1 / k) for k in range(2, 7))])


@given(LOTTERIES, st.integers(2, 60))
def test_representation_error_of_self_similar_laws(case: tuple[int, float], m: int) -> None:
    """Claim 21: W1 to the truth <= stride / (2 (1 - gamma)). The truth by listing all that a few rewards can be.

    Later rewards are put at their middle, which is at most `rest` away.
    """
    k, gamma = case
    found = categorical_fixed_point(lottery(k, gamma), [[1.0]], m).returns
    paid = int(np.log(4000) / np.log(k))
    rest = gamma**paid / (1 - gamma) / 2
    truth = [rest + np.dot(r, gamma ** np.arange(paid)) for r in itertools.product(np.arange(k) / (k - 1), repeat=paid)]
    apart = wasserstein_distance(found.atoms, truth, found.probs.ravel())
    assert apart <= found.stride / (2 * (1 - gamma)) + rest


def alone(rows: Any, rewards: Any, gamma: float, atoms: int) -> Process:
    """A process with one action."""
    mdp = MDP(np.asarray(rows, dtype=float)[:, None], rewards, gamma)
    return Process(mdp, mdp.uniform, mdp.uniform, atoms)


# where the bound of claim 26 is reached, and that of claim 27 but for the number of atoms
FOR_EVER = alone(np.eye(3), [0.0, 0.5, 1.0], 0.9, 41)
FORK = alone([[0, 0.5, 0.5], [0, 1, 0], [0, 0, 1]], [0.0, 0.0, 1.0], 0.8, 21)  # gamma 20 is whole: no cell is averaged
COIN = alone(np.full((2, 2), 0.5), [0.0, 1.0], 0.5, 2001)  # the return is uniform on [0, 1] or on [1, 2]


def variation(t: Linear, cdf: Floats) -> Floats:
    """(S,) sig(x) = E |D_x F(X') + c_x - F(x)|^2 in Cramér's norm: what a backup from one next state X' errs by."""
    sampled = np.stack([t.shift(np.broadcast_to(row, t.shape)) for row in cdf])
    return np.asarray(t.stride * np.einsum("xy,yxi->x", dense(t.shift.mdp.transitions), (sampled - t(cdf)) ** 2))


def test_variation_where_it_is_known() -> None:
    """Claim 26 with equality where returns of 0 and 5 follow alike; claim 27 where returns are uniform on one unit."""
    t = linear(FORK)
    assert_close(variation(t, solved(t)), [0.8 * 5 / 4, 0, 0], atol=1e-12)
    t = linear(COIN)
    cdf = solved(t)
    assert_close(t.stride * np.sum(cdf * (1 - cdf), axis=1), 1 / 6, atol=t.stride)
    assert_close(variation(t, cdf), 1 / 6 - 1 / 12, atol=t.stride)


# --- brackets ---------------------------------------------------------------------------------------------------------


def rounded(process: Process, z: Floats, snap: str, start: int, backups: int) -> Floats:
    """(S A, m) masses after backups that move r + gamma z to one atom, from all mass on the atom `start`.

    A value within 1e-10 of the span of an atom, where rounding may leave it, counts as that atom.
    """
    mdp, p, m = process.mdp, dense(process.mdp.pairs(process.policy)), z.size
    paid, probs = (x.reshape(len(p), -1, 1) for x in (mdp.rewards, mdp.reward_probs))
    landed, slack = (paid + mdp.gamma * z - z[0]) / (z[1] - z[0]), 1e-10 * (m - 1)
    landed = {"down": np.floor(landed + slack), "up": np.ceil(landed - slack), "nearest": np.rint(landed)}[snap]
    landing = np.eye(m)[np.clip(landed, 0, m - 1).astype(int)]
    moves = np.einsum("xkj,xkji->xji", np.broadcast_to(probs, landed.shape), landing)
    masses = np.tile(np.eye(m)[start], (len(p), 1))
    for _ in range(backups):
        masses = np.einsum("xj,xji->xi", p @ masses, moves)
    return masses


@given(processes(gamma_max=0.9), st.sampled_from([(0, 0), (-1, -1), (0, -1)]), st.integers(1, 4), st.integers(1, 80))
@example(FOR_EVER, (0, -1), 2, 80)
def test_rounding_down_and_up_brackets_returns(process: Process, starts: Any, finer: int, backups: int) -> None:
    """Claims 37 and 38, not only at fixed points: a start adds gamma^k span to a mean's error. Sums round to 1e-12."""
    mdp, policy, _, m = process
    t, values = linear(process), mdp.values(policy).ravel()

    def bracket(z: Floats) -> list[Floats]:
        return [rounded(process, z, snap, at, backups) for snap, at in zip(("down", "up"), starts, strict=True)]

    (low, high), z = bracket(t.shift.atoms), t.shift.atoms
    assert np.cumsum(high - low, axis=1).max() <= 1e-12
    far, left = t.stride / (1 - mdp.gamma), mdp.gamma**backups * span(t)
    slack = 1e-9 * span(t) / (1 - mdp.gamma)  # of what counts as an atom, in each backup
    for error, below, above in ((low @ z - values, far, 0), (high @ z - values, 0, far)):
        assert error.min() >= -below - left - slack
        assert error.max() <= above + left + slack
    assert ((high - low) @ z).max() <= 2 * far + left * (starts[0] != starts[1]) + slack
    finer_low, finer_high = (np.cumsum(law, axis=1)[:, ::finer] for law in bracket(grid(mdp, finer * (m - 1) + 1)))
    assert (finer_low - np.cumsum(low, axis=1)).max() <= 1e-12
    assert (np.cumsum(high, axis=1) - finer_high).max() <= 1e-12


def test_brackets_from_opposite_ends_need_not_nest() -> None:
    """Claim 38 needs one end: where 1 is paid for ever, rounding down keeps the highest atom, and others near it."""
    coarse, fine = (grid(FOR_EVER.mdp, m) for m in (11, 21))
    assert rounded(FOR_EVER, coarse, "down", -1, 200)[2, -1] == 1  # at the return, 10
    assert rounded(FOR_EVER, fine, "down", 0, 200)[2, :-2].sum() == 1


# --- distances --------------------------------------------------------------------------------------------------------


# --- off-policy -------------------------------------------------------------------------------------------------------


def beta(lam: float, eps: float, g: float) -> float:
    """What a difference in l_p shrinks to, with g = gamma^(1/p)."""
    return g * (1 - lam + lam * eps) / (1 - lam * g)


def threshold(eps: float, g: float) -> float:
    """The lam below which beta < 1."""
    return (1 - g) / (g * eps) if eps > 0 else np.inf


# --- controls: what breaks, and when ----------------------------------------------------------------------------------


@given(processes())
def test_a_narrow_grid_loses_mass(process: Process) -> None:
    """Control 1: on 0.8 of the range a reward of 1 pushes the last atom off by 0.2, and claim 9 breaks there."""
    mdp, policy, _, m = process
    best = (mdp.rewards == mdp.rewards.max()).any(axis=-1)
    narrow = MDP(next_states(mdp), best.astype(float), mdp.gamma)
    t = Linear(Shift(narrow, grid(narrow, np.linspace(0, 0.8 / (1 - mdp.gamma), m), clip=True)), policy)
    last = t.explicit().toarray().reshape(*t.shape, *t.shape).sum(axis=(1, 2))[..., -1]
    assert_close(last, mdp.gamma - best.ravel() * min(0.2 / t.stride, mdp.gamma), atol=1e-12)  # sums of at most 450


def test_a_narrow_grid_biases_means_if_returns_leave_it() -> None:
    """Control 1: claim 17 breaks where 1 is paid for ever, and returns of 10 end at 8, not where it is paid once."""
    for rewards, bias in (([1.0, 1.0], 2.0), ([1.0, 0.0], 0.0)):
        mdp = MDP([[[0.0, 1.0]], [[0.0, 1.0]]], rewards, 0.9)
        found = categorical_fixed_point(mdp, mdp.uniform, np.linspace(0, 8, 9), clip=True)
        assert_close(mdp.values(mdp.uniform) - found.returns.mean, bias, atol=1e-11)  # 1e-12 / (1 - gamma)
        assert (found.clipped > 0) == (bias > 0)


@given(processes())
def test_backups_do_not_contract_the_largest_difference(process: Process) -> None:
    """Control 2: by gamma with two atoms, by nothing once r + gamma z covers a cell.

    Two strides must, and so must one for the lowest reward, which lands on the lowest atom.
    """
    gamma, m, (low, high) = process.mdp.gamma, process.atoms, process.mdp.reward_range
    size = linear(process).explicit().sum(axis=1).max()  # the norm, for no entry is negative
    if m == 2:
        assert size <= gamma + 1e-12
    elif gamma * (m - 1) > (1 if low < high else 2) and process.mdp.rewards.shape[-1] == 1:
        assert size == pytest.approx(1, abs=1e-12)


def test_multi_step_backups_may_contract_the_largest_difference() -> None:
    """Control 2: on policy, a reward of 0, gamma = lam = 1/2 and 5 atoms make it 5/6, by hand."""
    mdp = MDP([[[1.0]]], [0.0], 0.5)
    one = Linear(Shift(mdp, np.linspace(0, 2, 5)), mdp.uniform).explicit().toarray()
    several = np.linalg.solve(np.eye(4) - 0.5 * one, 0.5 * one)
    assert [np.abs(x).sum(axis=1).max() for x in (one, several)] == pytest.approx([1, 5 / 6], abs=1e-15)


@pytest.mark.parametrize("side", [0.8, 1.25])
def test_q_lambda_diverges_above_the_threshold(side: float) -> None:
    """Control 3: always switching against always staying, on both sides of lam = (1 - gamma) / (2 gamma)."""
    gamma, switch, stay = 0.9, 1 - np.eye(2), np.eye(2)
    mdp, lam = MDP(np.eye(2)[np.tile([0, 1], (2, 1))], [[0.0, 1.0], [0.3, 0.0]], gamma), side * threshold(2, gamma)
    rate, solver, algorithm = beta(lam, 2, gamma), BackupSolver(mdp, 5), QLambda(switch, stay, lam)
    one, kept = gamma * dense(mdp.pairs(switch)), lam * gamma * dense(mdp.pairs(stay))
    radius = np.abs(np.linalg.eigvals(np.linalg.solve(np.eye(4) - kept, one - kept))).max()
    assert radius == pytest.approx(rate, abs=1e-12)
    errors = [np.abs(run(algorithm, solver, k).policy.mean - mdp.values(switch)).max() for k in (400, 401)]
    assert errors[1] / errors[0] == pytest.approx(rate, abs=1e-6)  # other modes are (0.9 / 0.97)^400 of this one
    assert (rate < 1) == (side < 1)


@given(processes(), st.integers(2, 4), st.floats(0.01, 0.99))
def test_uncorrected_backups_are_biased_as_far_as_laws_differ(process: Process, n: int, lam: float) -> None:
    """Control 4: n steps and Peng's Q(lambda) move the law of pi iff that of mu is another, F_mu = F_pi + d.

    They move it by (1 - T^(n-1)) d and lam (1 - lam T)^{-1} (1 - T) d, where T, the linear part for mu, is below gamma.
    """
    mdp, pi, mu, _ = process
    t, gamma, slack = linear(process), mdp.gamma, 100 * scale(process)  # how well it is solved, in sums over atoms

    def peng(cdf: Floats) -> Floats:
        """(1 - lam) sum_k (lam T^mu)^k T^pi F."""
        return resolvent(linear(process, lam * mu), (1 - lam) * t(cdf) + t.constant)

    fixed, mixed = solved(t), solved(linear(process, lam * mu + (1 - lam) * pi))
    d = norm(solved(linear(process, mu)) - fixed, 1)
    moved, power = norm(applied(NStep(pi, mu, n), process, fixed) - fixed, 1), gamma ** (n - 1)
    assert (1 - power) * d - slack <= moved <= (1 + power) * d + slack
    moved, kept = norm(peng(fixed) - fixed, 1), lam * gamma
    assert lam * (1 - gamma) / (1 + kept) * d - slack <= moved <= lam * (1 + gamma) / (1 - kept) * d + slack
    assert norm(peng(mixed) - mixed, 1) <= slack  # claim 56: it evaluates the mixture of both policies


@given(processes(), st.floats(0.01, 0.99))
def test_errors_push_no_constant(process: Process, lam: float) -> None:
    """Control 5: R (T^pi F + b - lam (T^mu F + b)), one b too many, is wrong by lam R b >= lam b, which is not 0."""
    t, by_mu, mu = linear(process), linear(process, process.behaviour), process.behaviour
    fixed, b, slack = solved(t), t.constant, 100 * scale(process)  # how well it is solved, in sums over atoms
    error = t(fixed) - lam * by_mu(fixed)
    right, wrong = (resolvent(linear(process, lam * mu), error + share * b) for share in (1, 1 - lam))
    assert_close(right, fixed, atol=slack)
    assert (right - wrong >= lam * b - slack).all()
    assert b.max() > 0


@given(processes(actions=1).filter(is_certain))
def test_the_nearest_atom_biases_means(process: Process) -> None:
    """Control 6: all mass ends on one atom, and claim 17 breaks by how far the value is from its nearest."""
    mdp, policy, _, m = process
    z, values = grid(mdp, m), mdp.values(policy).ravel()
    enough = values.size * m  # mass starts at the lowest atom and only goes up
    law = rounded(process, z, "nearest", 0, enough)
    assert_close(law, rounded(process, z, "nearest", 0, enough + 1), atol=1e-12)  # rounding of P, in each backup
    assert_close(law.max(axis=1), 1, atol=1e-12)
    off = np.abs(values[:, None] - z).min(axis=1)
    assert (np.abs(law @ z - values) >= off - scale(process)).all()
    assume(off.max() > 1e-6)
    assert_close(categorical_fixed_point(mdp, policy, z).returns.mean.ravel(), values, atol=10 * scale(process))


def test_controls_break_nothing_where_there_is_nothing_to_break() -> None:
    """Controls 5 and 6: b = 0 where 1 is paid for ever, to rounding of 5 strides; the nearest atom to 0 is 0."""
    z = np.linspace(0, 10, 6)
    assert_close(Shift(alone([[1]], [1.0], 0.9, 6).mdp, z).constant, 0, atol=1e-14)
    assert_close(rounded(alone([[1]], [0.0], 0.9, 6), z, "nearest", 0, 9)[0], np.eye(6)[0], atol=0)
