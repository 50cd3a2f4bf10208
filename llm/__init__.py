"""The torch world: a logit table, a tiny transformer whose responses can be listed, a Hugging Face causal LM."""

if not __name__.startswith("nlhf."):
    raise ImportError(f"this folder is the package nlhf.llm: write `import nlhf.llm`, not `import {__name__}`")

from nlhf.llm.causal_lm import CausalLM
from nlhf.llm.data import read_comparisons
from nlhf.llm.fit import fit_preference
from nlhf.llm.judges import Annotators, Cached
from nlhf.llm.policy import LogitTable, TokenMixture
from nlhf.llm.preference import JudgedGame
from nlhf.llm.preference_model import BradleyTerry, PreferenceModel
from nlhf.llm.solver import ContrastiveSolver, Descent, Enumerate, PolicyGradientSolver, RegressionSolver, Sample
from nlhf.llm.tiny import TinyTransformer

__all__ = [
    "Annotators",
    "BradleyTerry",
    "Cached",
    "CausalLM",
    "ContrastiveSolver",
    "Descent",
    "Enumerate",
    "JudgedGame",
    "LogitTable",
    "PolicyGradientSolver",
    "PreferenceModel",
    "RegressionSolver",
    "Sample",
    "TinyTransformer",
    "TokenMixture",
    "fit_preference",
    "read_comparisons",
]
