"""The exact world: NumPy and SciPy, float64, log space, vectorised over prompts."""

if not __name__.startswith("nlhf."):
    raise ImportError(f"this folder is the package nlhf.tabular: write `import nlhf.tabular`, not `import {__name__}`")

from nlhf.tabular.equilibrium import Equilibrium, regularized_nash
from nlhf.tabular.games import MatrixGame
from nlhf.tabular.policy import Tabular
from nlhf.tabular.solver import ExactSolver

__all__ = ["Equilibrium", "ExactSolver", "MatrixGame", "Tabular", "regularized_nash"]
