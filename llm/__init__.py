"""The torch world: a logit table, a tiny transformer whose responses can be listed, a Hugging Face causal LM."""

if not __name__.startswith("nlhf."):
    raise ImportError(f"this folder is the package nlhf.llm: write `import nlhf.llm`, not `import {__name__}`")

from nlhf.llm.causal_lm import CausalLM
from nlhf.llm.policy import LogitTable, TokenMixture
from nlhf.llm.preference import JudgedGame
from nlhf.llm.solver import ContrastiveSolver, Enumerate, PolicyGradientSolver, RegressionSolver, Sample
from nlhf.llm.tiny import TinyTransformer

__all__ = [
    "CausalLM",
    "ContrastiveSolver",
    "Enumerate",
    "JudgedGame",
    "LogitTable",
    "PolicyGradientSolver",
    "RegressionSolver",
    "Sample",
    "TinyTransformer",
    "TokenMixture",
]
