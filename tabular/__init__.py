"""The exact world: NumPy and SciPy, float64, log space, vectorised over prompts."""

if not __name__.startswith("nlhf."):
    raise ImportError(f"this folder is the package nlhf.tabular: write `import nlhf.tabular`, not `import {__name__}`")

from nlhf.tabular.backup import BackupSolver
from nlhf.tabular.equilibrium import (
    Equilibrium,
    EquilibriumPath,
    Interval,
    equilibrium_interval,
    equilibrium_path,
    nash,
    regularized_nash,
)
from nlhf.tabular.fixed_point import FixedPoint, categorical_fixed_point, certificate, return_distribution
from nlhf.tabular.games import MatrixGame
from nlhf.tabular.mdp import MDP, random_off_policy
from nlhf.tabular.operators import LowRankGame, OperatorGame
from nlhf.tabular.policy import Tabular
from nlhf.tabular.quantile_dp import quantile_fixed_point
from nlhf.tabular.returns import Categorical, Quantile
from nlhf.tabular.sampling import SampledBackupSolver
from nlhf.tabular.solver import ExactSolver

__all__ = [
    "MDP",
    "BackupSolver",
    "Categorical",
    "Equilibrium",
    "EquilibriumPath",
    "ExactSolver",
    "FixedPoint",
    "Interval",
    "LowRankGame",
    "MatrixGame",
    "OperatorGame",
    "Quantile",
    "SampledBackupSolver",
    "Tabular",
    "categorical_fixed_point",
    "certificate",
    "equilibrium_interval",
    "equilibrium_path",
    "nash",
    "quantile_fixed_point",
    "random_off_policy",
    "regularized_nash",
    "return_distribution",
]
