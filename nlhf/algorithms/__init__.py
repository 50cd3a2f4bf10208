"""Algorithms that pose `Prox` sub-problems, one file each. None imports an array library."""

from nlhf.algorithms.best_response import BestResponse
from nlhf.algorithms.magnetic_md import MagneticMD
from nlhf.algorithms.mirror_prox import MirrorProx
from nlhf.algorithms.nash_ema import NashEMA
from nlhf.algorithms.nash_md import NashMD
from nlhf.algorithms.optimistic_md import OptimisticMD
from nlhf.algorithms.self_play import SelfPlay

__all__ = ["BestResponse", "MagneticMD", "MirrorProx", "NashEMA", "NashMD", "OptimisticMD", "SelfPlay"]
