"""The exact solver of `Backup` on a grid of atoms."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike
from scipy.sparse.linalg import splu

from nlhf.core import Info
from nlhf.evaluation import Backup
from nlhf.tabular.bellman import Linear, Shift, grid
from nlhf.tabular.fixed_point import solve
from nlhf.tabular.mdp import MDP
from nlhf.tabular.policy import Floats
from nlhf.tabular.returns import Categorical

SMALL = 20_000
"""Up to so many unknowns a sparse factorisation of I - T^{c mu} is made, once for each c mu."""

sparse: Any = scipy.sparse  # whose stubs know fewer arguments than it takes


class BackupSolver:
    """eta + (I - Pi T^{c mu})^{-1} (Pi T^pi eta - eta): every backup of the multi-step sum is projected on the atoms.

    So the fixed point is that of one projected backup, `categorical_fixed_point`, whatever the traces.

    Args:
        mdp: the decision process.
        atoms: how many, from the smallest to the largest return, or the atoms themselves.
        clip: let a grid that is too narrow keep the mass that leaves it at its ends.

    Raises ValueError for atoms that cannot hold every return.
    """

    def __init__(self, mdp: MDP, atoms: int | ArrayLike = 51, clip: bool = False) -> None:
        self.mdp = self.game = mdp  # `nlhf.run` asks for a game
        self.shift = Shift(mdp, grid(mdp, atoms, clip))
        self._factors: dict[bytes, Any] = {}

    def init(self) -> Categorical:
        """Where `nlhf.run` starts by default: all mass on the middle atom, for every state and action."""
        z = self.shift.atoms
        probs = np.zeros((self.mdp.n_states, self.mdp.n_actions, z.size))
        probs[..., z.size // 2] = 1.0
        return Categorical(probs, z)

    def __call__(self, backup: Backup, start: Any = None, seed: int | None = None) -> tuple[Categorical, Info]:
        """The exact answer. `start` and `seed` are for solvers that search and sample."""
        target = self.mdp.check_policy(backup.target, "target")
        behaviour = self.mdp.check_policy(backup.behaviour, "behaviour")
        cdf = np.asarray(backup.returns.cdf, dtype=np.float64).reshape(self.shift.shape)
        one_step = Linear(self.shift, target)
        error = one_step(cdf) + one_step.constant - cdf
        weights = np.broadcast_to(backup.trace * behaviour, target.shape)
        cdf = cdf + (self._summed(weights, error) if weights.any() else error)
        shape = (self.mdp.n_states, self.mdp.n_actions, -1)
        return Categorical.from_cdf(cdf.reshape(shape), self.shift.atoms), Info(0.0, 0)

    def _summed(self, weights: Floats, error: Floats) -> Floats:
        """(I - T^{c mu})^{-1} error: the errors of all later steps, a linear solve and no loop over trajectories."""
        operator = Linear(self.shift, weights)
        if error.size > SMALL:
            return solve(operator, error, 1e-14).cdf
        key = weights.tobytes()
        if key not in self._factors:
            self._factors.clear()  # one at a time is what a run needs
            system = sparse.eye_array(error.size, format="csc") - sparse.csc_array(operator.explicit())
            self._factors[key] = splu(system)
        return np.asarray(self._factors[key].solve(error.ravel())).reshape(error.shape)

    def __repr__(self) -> str:
        z = self.shift.atoms
        return f"BackupSolver({self.mdp}, atoms={z.size} from {z[0]:g} to {z[-1]:g})"
