"""Preference-learning algorithms written once: exact on a bandit, approximate on a transformer."""

from nlhf import metrics
from nlhf.algorithms import BestResponse, MagneticMD, MirrorProx, NashEMA, NashMD, OptimisticMD, SelfPlay
from nlhf.run import Trace, run, seeded

__all__ = [
    "BestResponse",
    "MagneticMD",
    "MirrorProx",
    "NashEMA",
    "NashMD",
    "OptimisticMD",
    "SelfPlay",
    "Trace",
    "metrics",
    "run",
    "seeded",
]
