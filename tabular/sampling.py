"""`Backup` from samples: trajectories of the behaviour policy, started from every state and action."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from nlhf.core import Info
from nlhf.evaluation import Backup
from nlhf.schedules import check_count, is_number
from nlhf.tabular.bellman import grid
from nlhf.tabular.mdp import MDP
from nlhf.tabular.policy import Floats
from nlhf.tabular.returns import Categorical, project


class Trajectories(NamedTuple):
    """B trajectories of n steps: states (B, n + 1), actions (B, n + 1) and rewards (B, n)."""

    states: NDArray[np.int64]
    actions: NDArray[np.int64]
    rewards: Floats


class SampledBackupSolver:
    """(1 - step) eta + step w, w an unbiased estimate of a truncated backup, projected once.

        w = Pi sum_{t=1}^{n} rho_{t-1} law(G_t + gamma^t Z), Z ~ eta^pi(X_t)
            - Pi sum_{t=1}^{n-1} rho_t law(G_t + gamma^t Z), Z ~ eta(X_t, A_t),     rho_t = c(X_1, A_1) ... c(X_t, A_t)

    averaged over trajectories of the behaviour policy, G_t their discounted rewards. The masses of w sum to 1; some may
    be negative. With length 1 it samples a generative model, and the behaviour does not matter.

    Args:
        mdp: the decision process to sample from.
        atoms: how many, from the smallest to the largest return, or the atoms themselves.
        samples: trajectories from each state and action.
        length: n >= 1 steps.
        step: how far to go to the estimate, in (0, 1].

    Raises ValueError naming the argument and the value that is wrong.

    >>> from nlhf import QLambda, run
    >>> mdp = MDP.two_state(gamma=0.5)
    >>> solver = SampledBackupSolver(mdp, atoms=11, samples=20, step=0.2)
    >>> trace = run(QLambda(mdp.uniform, mdp.uniform, lam=0.5), solver, steps=100, seed=0)
    >>> bool(abs(trace.policy.mean - mdp.values(mdp.uniform)).max() < 0.1)
    True

    Source: Tang et al. 2024, arXiv:2402.05766 (the target); Bellemare, Dabney and Munos 2017, arXiv:1707.06887.
    """

    def __init__(
        self, mdp: MDP, atoms: int | ArrayLike = 51, samples: int = 16, length: int = 1, step: float = 0.1
    ) -> None:
        check_count("samples", samples, 1)
        check_count("length", length, 1)
        if not is_number(step) or not 0 < step <= 1:
            raise ValueError(f"step must be a number in (0, 1], got {step!r}")
        self.mdp = self.game = mdp  # `nlhf.run` asks for a game
        self.atoms, self.samples, self.length, self.step = grid(mdp, atoms), samples, length, step
        rows: Any = scipy.sparse.csr_array(mdp.transitions)
        self._to, self._starts = rows.indices, rows.indptr
        self._reached = np.cumsum(rows.data)  # over all rows: one search finds where a draw lands

    def init(self) -> Categorical:
        """Where `nlhf.run` starts by default: all mass on the middle atom, for every state and action."""
        probs = np.zeros((self.mdp.n_states, self.mdp.n_actions, self.atoms.size))
        probs[..., self.atoms.size // 2] = 1.0
        return Categorical(probs, self.atoms)

    def __call__(self, backup: Backup, start: Any = None, seed: int | None = None) -> tuple[Categorical, Info]:
        """A step towards the estimate; the randomness is that of the seed."""
        target = self.mdp.check_policy(backup.target, "target")
        behaviour = self.mdp.check_policy(backup.behaviour, "behaviour")
        drawn = self.sample(behaviour, np.random.default_rng(seed))
        trace = np.broadcast_to(np.asarray(backup.trace, dtype=np.float64), target.shape)
        estimates = self.estimate(backup.returns, target, trace, drawn)
        estimate = estimates.reshape(*target.shape, self.samples, -1).mean(axis=2)
        probs = (1 - self.step) * backup.returns.probs + self.step * estimate
        return Categorical(probs, self.atoms), Info(0.0, drawn.rewards.size)

    def sample(self, behaviour: Floats, rng: np.random.Generator) -> Trajectories:
        """`samples` trajectories from each state and action, one after the other."""
        pairs = np.repeat(np.arange(behaviour.size), self.samples)
        upper = np.cumsum(behaviour, axis=1)
        laws = np.cumsum(self.mdp.reward_probs.reshape(behaviour.size, -1), axis=1)
        values = self.mdp.rewards.reshape(behaviour.size, -1)
        states, actions, rewards = [pairs // self.mdp.n_actions], [pairs % self.mdp.n_actions], []
        for _ in range(self.length):
            paid = np.sum(rng.uniform(size=(pairs.size, 1)) >= laws[pairs, :-1], axis=1)
            rewards.append(values[pairs, paid])
            first, last = self._starts[pairs], self._starts[pairs + 1] - 1
            before = np.where(first > 0, self._reached[first - 1], 0.0)
            u = before + rng.uniform(size=pairs.size) * (self._reached[last] - before)
            states.append(self._to[np.clip(np.searchsorted(self._reached, u, side="right"), first, last)])
            actions.append(np.sum(rng.uniform(size=(pairs.size, 1)) >= upper[states[-1], :-1], axis=1))
            pairs = states[-1] * self.mdp.n_actions + actions[-1]
        return Trajectories(np.stack(states, axis=1), np.stack(actions, axis=1), np.stack(rewards, axis=1))

    def estimate(self, returns: Categorical, target: Floats, trace: Floats, drawn: Trajectories) -> Floats:
        """(B, m) w of each trajectory."""
        states, actions, rewards = drawn
        averaged = np.sum(target[..., None] * returns.probs, axis=1)
        total, kept, discount = np.zeros(len(states)), np.ones(len(states)), 1.0
        w = np.zeros((len(states), self.atoms.size))
        for t in range(1, rewards.shape[1] + 1):
            total = total + discount * rewards[:, t - 1]
            discount *= self.mdp.gamma
            masses = kept[:, None] * averaged[states[:, t]]
            if t < rewards.shape[1]:
                kept = kept * trace[states[:, t], actions[:, t]]
                masses = masses - kept[:, None] * returns.probs[states[:, t], actions[:, t]]
            w += project(total[:, None] + discount * self.atoms, masses, self.atoms)
        return w

    def __repr__(self) -> str:
        return (
            f"SampledBackupSolver({self.mdp}, atoms={self.atoms.size}, samples={self.samples}, length={self.length}, "
            f"step={self.step})"
        )
