"""Distributional Q(lambda) on a control task: C51 with signed multi-step targets, the deep rung of `Backup`.

Needs the extra `nlhf[gym]` (Gymnasium).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nlhf.schedules import check_count, is_number

LOSSES = ("cramer", "cross-entropy")


class Segments(NamedTuple):
    """B pieces of n steps, as they were lived; what follows the end of an episode is never looked at."""

    observations: Tensor
    """(B, n + 1, d)."""
    actions: Tensor
    """(B, n + 1)."""
    behaviour: Tensor
    """(B, n + 1, A) the probabilities that the actions were drawn from."""
    rewards: Tensor
    """(B, n)."""
    ends: Tensor
    """(B, n) 1 where the episode ended with the step."""


@dataclass(frozen=True)
class QLambdaC51:
    """C51 whose targets are off-policy Q(lambda) backups, without importance weights, along replayed segments.

        w = sum_{t=1}^{n} lam^(t-1) Pi B_t eta^pi(X_t) - sum_{t=1}^{n-1} lam^t Pi B_t eta(X_t, A_t)
        pi = alpha greedy + (1 - alpha) mu

    with B_t the shift by the rewards so far and gamma^t, and Pi the projection on the atoms. The masses of w sum to 1
    and may be negative. Then cross-entropy has no minimum; the Cramér loss, stride sum (F_p - F_w)^2, has one, the law
    closest to w. Mixing the greedy policy with the one that acted, mu, keeps the two within the reach of lambda.

    Args:
        lam: lambda in [0, 1].
        alpha: share of the greedy policy in the target, in [0, 1].
        length: n, steps of a segment.
        low, high: the first and the last atom, which returns must lie between.
        atoms: how many.
        gamma: discount in [0, 1).
        loss: "cramer" or "cross-entropy".
        learning_rate, batch, hidden, epsilon, target_every: of the training.

    Raises ValueError naming the argument and the value that is wrong.

    Source: Tang et al. 2024, arXiv:2402.05766; Bellemare, Dabney and Munos 2017, arXiv:1707.06887 (C51).
    """

    lam: float = 0.7
    alpha: float = 0.7
    length: int = 5
    low: float = 0.0
    high: float = 100.0
    atoms: int = 51
    gamma: float = 0.99
    loss: str = "cramer"
    learning_rate: float = 1e-3
    batch: int = 64
    hidden: int = 64
    epsilon: float = 0.05
    target_every: int = 200

    def __post_init__(self) -> None:
        for name in ("lam", "alpha", "epsilon"):
            if not is_number(value := getattr(self, name)) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
        if not is_number(self.gamma) or not 0 <= self.gamma < 1:
            raise ValueError(f"gamma must be a number in [0, 1), got {self.gamma!r}")
        for name, least in (("length", 1), ("atoms", 2), ("batch", 1), ("hidden", 1), ("target_every", 1)):
            check_count(name, getattr(self, name), least)
        if not (is_number(self.low) and is_number(self.high) and self.low < self.high):
            raise ValueError(f"low must be below high, got {self.low!r} and {self.high!r}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")

    @property
    def grid(self) -> Tensor:
        """(m,) the atoms."""
        return torch.linspace(self.low, self.high, self.atoms)

    def project(self, values: Tensor, masses: Tensor) -> Tensor:
        """(B, m) the Cramér projection of sum_j masses_j delta(values_j), (B, K) each; beyond the grid to its end."""
        stride = (self.high - self.low) / (self.atoms - 1)
        position = ((values - self.low) / stride).clamp(0, self.atoms - 1)
        lower = position.floor().clamp(max=self.atoms - 2).long()
        share = position - lower
        projected = torch.zeros(len(values), self.atoms, dtype=masses.dtype)
        projected.scatter_add_(1, lower, masses * (1 - share))
        return projected.scatter_add_(1, lower + 1, masses * share)

    def target(self, network: Any, segments: Segments) -> Tensor:
        """(B, m) w of each segment, with the laws softmax(network(x)) (B, A, m)."""
        observations, actions, behaviour, rewards, ends = segments
        rows, n = torch.arange(len(actions)), rewards.shape[1]
        alive, total = torch.ones(len(actions)), torch.zeros(len(actions))
        w = torch.zeros(len(actions), self.atoms)
        for t in range(1, n + 1):
            total = total + alive * self.gamma ** (t - 1) * rewards[:, t - 1]
            over, alive = alive * ends[:, t - 1], alive * (1 - ends[:, t - 1])
            laws = network(observations[:, t]).softmax(-1)
            greedy = nn.functional.one_hot((laws @ self.grid).argmax(-1), laws.shape[1])
            policy = self.alpha * greedy + (1 - self.alpha) * behaviour[:, t]
            masses = self.lam ** (t - 1) * (policy[..., None] * laws).sum(1)
            if t < n:
                masses = masses - self.lam**t * laws[rows, actions[:, t]]
            w += self.project(total[:, None] + self.gamma**t * self.grid, alive[:, None] * masses)
            w += self.project(total[:, None], (self.lam ** (t - 1) * over)[:, None])
        return w

    def objective(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of laws softmax(logits) (B, m) for targets (B, m) of mass 1, perhaps signed."""
        if self.loss == "cross-entropy":
            return -(target * logits.log_softmax(-1)).sum(-1).mean()
        stride = (self.high - self.low) / (self.atoms - 1)
        return stride * (logits.softmax(-1) - target).cumsum(-1).square().sum(-1).mean()


class Replay:
    """The last `size` steps, in order."""

    def __init__(self, size: int, dimension: int, actions: int) -> None:
        self.observations = torch.zeros(size, dimension)
        self.actions, self.behaviour = torch.zeros(size, dtype=torch.long), torch.zeros(size, actions)
        self.rewards, self.ends, self.cuts = torch.zeros(size), torch.zeros(size), torch.zeros(size, dtype=torch.bool)
        self.size, self.seen = size, 0

    def add(self, observation: Tensor, action: int, behaviour: Tensor, reward: float, end: bool, cut: bool) -> None:
        """A step; `cut` if the episode was stopped after it without an end."""
        i = self.seen % self.size
        self.observations[i], self.actions[i], self.behaviour[i] = observation, action, behaviour
        self.rewards[i], self.ends[i], self.cuts[i] = reward, float(end), cut
        self.seen += 1

    def draw(self, count: int, n: int, generator: torch.Generator) -> Segments:
        """Segments of n steps, none of which was cut or overwritten."""
        held = min(self.seen, self.size)
        oldest = self.seen - held
        start = oldest + torch.randint(held - n, (4 * count,), generator=generator)
        steps = (start[:, None] + torch.arange(n + 1)) % self.size
        ended = self.ends[steps[:, :-1]].cumsum(1) - self.ends[steps[:, :-1]]
        whole = ~(self.cuts[steps[:, :-1]] & (ended == 0)).any(1)
        steps = steps[whole][:count]
        now = steps[:, :-1]
        return Segments(
            self.observations[steps], self.actions[steps], self.behaviour[steps], self.rewards[now], self.ends[now]
        )


def train(agent: QLambdaC51, task: str, steps: int, seed: int = 0, every: int = 1000) -> list[tuple[int, float]]:
    """Train on a Gymnasium task with discrete actions; (step, mean undiscounted return of ten greedy episodes).

    Raises ModuleNotFoundError without Gymnasium, ValueError for a task without discrete actions or for bad counts.
    """
    check_count("steps", steps, 1)
    check_count("every", every, 1)
    check_count("seed", seed, 0)
    try:
        import gymnasium
    except ModuleNotFoundError:
        raise ModuleNotFoundError("control tasks need Gymnasium: pip install 'nlhf[gym]'") from None
    env, judge = gymnasium.make(task), gymnasium.make(task)
    if not isinstance(env.action_space, gymnasium.spaces.Discrete):
        raise ValueError(f"task must have discrete actions, {task} has {env.action_space}")
    actions, dimension = int(env.action_space.n), int(np.prod(env.observation_space.shape or (1,)))
    generator = torch.Generator().manual_seed(seed)
    network = _network(agent, dimension, actions, generator)
    target, optimizer = copy.deepcopy(network), torch.optim.Adam(network.parameters(), lr=agent.learning_rate)
    replay, scores = Replay(20_000, dimension, actions), []
    observation, _ = env.reset(seed=seed)
    for step in range(1, steps + 1):
        seen = torch.as_tensor(observation, dtype=torch.float32).reshape(-1)
        epsilon = max(agent.epsilon, 1 - step / min(4000, steps))
        behaviour = torch.full((actions,), epsilon / actions)
        behaviour[_greedy(agent, network, seen)] += 1 - epsilon
        action = int(torch.multinomial(behaviour, 1, generator=generator))
        observation, reward, end, cut, _ = env.step(action)
        replay.add(seen, action, behaviour, float(reward), end, cut and not end)
        if end or cut:
            observation, _ = env.reset()
        if step > 500 and step % 2 == 0:
            batch = replay.draw(agent.batch, agent.length, generator)
            with torch.no_grad():
                w = agent.target(target, batch)
            logits = network(batch.observations[:, 0])[torch.arange(len(batch.actions)), batch.actions[:, 0]]
            loss = agent.objective(logits, w)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 10.0)
            optimizer.step()
        if step % agent.target_every == 0:
            target = copy.deepcopy(network)
        if step % every == 0:
            scores.append((step, float(np.mean([_episode(agent, network, judge, seed + k) for k in range(10)]))))
    return scores


def _network(agent: QLambdaC51, dimension: int, actions: int, generator: torch.Generator) -> Any:
    sizes = (dimension, agent.hidden, agent.hidden, actions * agent.atoms)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layer = nn.Linear(fan_in, fan_out)
        with torch.no_grad():
            bound = fan_in**-0.5
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1], nn.Unflatten(-1, (actions, agent.atoms)))


@torch.no_grad()
def _greedy(agent: QLambdaC51, network: Any, observation: Tensor) -> int:
    return int((network(observation[None])[0].softmax(-1) @ agent.grid).argmax())


def _episode(agent: QLambdaC51, network: Any, env: Any, seed: int) -> float:
    observation, _ = env.reset(seed=10_000 + seed)
    total, over = 0.0, False
    while not over:
        seen = torch.as_tensor(observation, dtype=torch.float32).reshape(-1)
        observation, reward, end, cut, _ = env.step(_greedy(agent, network, seen))
        total, over = total + float(reward), end or cut
    return total
