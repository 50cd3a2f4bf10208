"""Preference-learning algorithms written once: exact on a bandit, approximate on a transformer."""

from nlhf import metrics
from nlhf.algorithms import BestResponse, MagneticMD, MirrorProx, NashEMA, NashMD, OptimisticMD, SelfPlay
from nlhf.evaluation import CategoricalDP, NStep, QLambda, Retrace, TreeBackup
from nlhf.run import Trace, run, seeded

__all__ = [
    "BestResponse",
    "CategoricalDP",
    "MagneticMD",
    "MirrorProx",
    "NStep",
    "NashEMA",
    "NashMD",
    "OptimisticMD",
    "QLambda",
    "Retrace",
    "SelfPlay",
    "Trace",
    "TreeBackup",
    "metrics",
    "run",
    "seeded",
]
