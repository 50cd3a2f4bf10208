"""The deep rung of distributional Q(lambda): its targets are those of the tabular world, and it learns to balance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nlhf.llm.control import QLambdaC51, Replay, Segments, train
from nlhf.tabular import MDP, Categorical, SampledBackupSolver
from tests.checks import assert_close


@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_targets_are_those_of_the_tabular_estimator(length: int, lam: float) -> None:
    """The same trajectories through both worlds: a look-up table for a network, one-hot states to look at."""
    mdp = MDP.dirichlet(4, 1.0, 0.8, 0, actions=2)
    behaviour = np.random.default_rng(0).dirichlet([1, 1], size=4)
    solver = SampledBackupSolver(mdp, atoms=11, samples=5, length=length)
    returns = Categorical(np.random.default_rng(1).dirichlet(np.ones(11), size=(4, 2)), solver.atoms)
    low, high = float(solver.atoms[0]), float(solver.atoms[-1])
    agent = QLambdaC51(lam=lam, alpha=0.6, length=length, low=low, high=high, atoms=11, gamma=0.8)
    policy = 0.6 * np.eye(2)[returns.mean.argmax(axis=1)] + 0.4 * behaviour
    drawn = solver.sample(behaviour, np.random.default_rng(2))
    expected = solver.estimate(returns, policy, np.full((4, 2), lam), drawn)
    states = torch.tensor(drawn.states)
    segments = Segments(
        torch.nn.functional.one_hot(states, 4).float(),
        torch.tensor(drawn.actions),
        torch.tensor(behaviour, dtype=torch.float32)[states],
        torch.tensor(drawn.rewards, dtype=torch.float32),
        torch.zeros(drawn.rewards.shape),
    )
    logits = torch.tensor(np.log(returns.probs), dtype=torch.float32)
    found = agent.target(lambda x: logits[x.argmax(-1)], segments)
    assert_close(found.numpy(), expected, atol=2e-6)  # single precision
    if lam and length > 1:
        assert found.min() < 0  # signed, as they are in the exact world


def test_an_end_is_an_end() -> None:
    """What comes after the end of an episode, of any value, does not enter; masses sum to 1 all the same."""
    agent = QLambdaC51(lam=0.5, length=3, low=0.0, high=4.0, atoms=5, gamma=0.5)
    logits = torch.randn(2, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    rewards, ends = torch.tensor([[1.0, 2.0, 9.0], [1.0, 1.0, 1.0]]), torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    found = []
    for after in (0, 1):
        observations = torch.tensor([[0, 1, 2, 2], [0, 2, 2, 2]])
        segments = Segments(observations, torch.zeros(2, 4).long(), torch.full((2, 4, 2), 0.5), rewards, ends)
        table = logits[0].clone()
        table[2] = logits[after, 2]
        found.append(agent.target(lambda x, table=table: table[x], segments))
    assert_close(found[0], found[1], atol=0)
    assert_close(found[0].sum(1), 1.0, atol=1e-6)
    assert_close(found[0][1], [0, 1, 0, 0, 0], atol=1e-6)  # reward 1, then nothing


def test_losses() -> None:
    """Claim 59: cross-entropy has the gradient p - w; the Cramér loss of a law vanishes only there, and is bounded."""
    w = torch.tensor([[0.7, -0.2, 0.5]], dtype=torch.float64)
    logits = torch.randn(1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    QLambdaC51(atoms=3, loss="cross-entropy").objective(logits, w).backward()
    assert logits.grad is not None
    assert_close(logits.grad, (logits.softmax(-1) - w).detach(), atol=1e-12)
    cramer = QLambdaC51(atoms=3, low=0.0, high=1.0)
    law = logits.detach().softmax(-1)
    assert cramer.objective(logits, law).item() == pytest.approx(0, abs=1e-15)
    assert cramer.objective(logits, w).item() == pytest.approx(0.5 * float(((law - w).cumsum(-1)[0, :2] ** 2).sum()))
    far = torch.tensor([[0.0, 800.0, 0.0]], dtype=torch.float64)  # on the negative mass
    assert QLambdaC51(atoms=3, loss="cross-entropy").objective(far, w) > 500
    assert QLambdaC51(atoms=3, loss="cross-entropy").objective(-far, w) < -100  # no minimum
    assert 0 < cramer.objective(-far, w) < 1


def test_replay_gives_whole_segments() -> None:
    """In order, across ends, never across a cut, and nothing that was overwritten."""
    replay = Replay(50, 1, 2)
    for i in range(120):
        replay.add(torch.tensor([float(i)]), i % 2, torch.tensor([0.5, 0.5]), float(i), i % 7 == 0, i % 11 == 0)
    segments = replay.draw(200, 4, torch.Generator().manual_seed(0))
    first = segments.observations[:, 0, 0]
    assert len(first) > 50
    assert first.min() >= 70
    for start, piece, rewards, ends in zip(first, segments.observations, segments.rewards, segments.ends, strict=True):
        assert_close(piece[:, 0], start + torch.arange(5), atol=0)
        steps = [int(start) + t for t in range(4)]
        assert rewards.tolist() == steps
        assert ends.tolist() == [float(i % 7 == 0) for i in steps]
        until = steps.index(next((i for i in steps if i % 7 == 0), steps[-1]))
        assert not any(i % 11 == 0 and i % 7 for i in steps[: until + 1])


def test_training_repeats_itself() -> None:
    pytest.importorskip("gymnasium")
    agent = QLambdaC51(batch=16, hidden=16, length=3)
    runs = [train(agent, "CartPole-v1", 700, seed=3, every=350) for _ in range(2)]
    assert runs[0] == runs[1]
    assert [step for step, _ in runs[0]] == [350, 700]
    assert all(8 <= score <= 500 for _, score in runs[0])


@pytest.mark.slow
def test_it_learns_to_balance() -> None:
    """A random policy holds the pole for about 20 steps; 500 are the most."""
    pytest.importorskip("gymnasium")
    scores = train(QLambdaC51(), "CartPole-v1", 5000, seed=0, every=1000)
    assert max(score for _, score in scores) > 120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lam": 1.5}, r"lam must be a number in \[0, 1\], got 1.5"),
        ({"alpha": float("nan")}, r"alpha must be a number in \[0, 1\], got nan"),
        ({"gamma": 1.0}, r"gamma must be a number in \[0, 1\), got 1.0"),
        ({"length": 0}, "length must be an integer >= 1, got 0"),
        ({"atoms": 1}, "atoms must be an integer >= 2, got 1"),
        ({"low": 5.0, "high": 5.0}, "low must be below high, got 5.0 and 5.0"),
        ({"loss": "mse"}, "loss must be one of cramer, cross-entropy, got 'mse'"),
    ],
)
def test_agents_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QLambdaC51(**arguments)


def test_tasks_are_checked() -> None:
    pytest.importorskip("gymnasium")
    with pytest.raises(ValueError, match="task must have discrete actions, Pendulum-v1 has"):
        train(QLambdaC51(), "Pendulum-v1", 10)
    with pytest.raises(ValueError, match="steps must be an integer >= 1, got 0"):
        train(QLambdaC51(), "CartPole-v1", 0)
