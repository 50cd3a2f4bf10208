"""Hypothesis profiles. CI replays the same instances every time and prints how to reproduce a failure."""

import os

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # small operations; a second thread only waits for a busy core
slow_ok = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("dev", deadline=None, max_examples=40, suppress_health_check=slow_ok)
settings.register_profile(
    "ci", deadline=None, max_examples=100, derandomize=True, print_blob=True, suppress_health_check=slow_ok
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
