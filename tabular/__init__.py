"""The exact world: NumPy and SciPy, float64, log space, vectorised over prompts."""

if not __name__.startswith("nlhf."):
    raise ImportError(f"this folder is the package nlhf.tabular: write `import nlhf.tabular`, not `import {__name__}`")

from nlhf.tabular.equilibrium import (
    Equilibrium,
    EquilibriumPath,
    Interval,
    equilibrium_interval,
    equilibrium_path,
    nash,
    regularized_nash,
)
from nlhf.tabular.games import MatrixGame
from nlhf.tabular.operators import LowRankGame, OperatorGame
from nlhf.tabular.policy import Tabular
from nlhf.tabular.solver import ExactSolver

__all__ = [
    "Equilibrium",
    "EquilibriumPath",
    "ExactSolver",
    "Interval",
    "LowRankGame",
    "MatrixGame",
    "OperatorGame",
    "Tabular",
    "equilibrium_interval",
    "equilibrium_path",
    "nash",
    "regularized_nash",
]
