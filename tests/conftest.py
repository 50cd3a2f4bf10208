"""Hypothesis profiles: the same instances every time, or HYPOTHESIS_PROFILE=explore to look for new ones."""

import os

# before torch is imported, and for the processes that tests start: a second thread only waits for a busy core
os.environ["OMP_NUM_THREADS"] = "1"

from hypothesis import HealthCheck, settings

slow_ok = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("replay", deadline=None, max_examples=50, derandomize=True, suppress_health_check=slow_ok)
settings.register_profile("explore", deadline=None, max_examples=500, print_blob=True, suppress_health_check=slow_ok)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "replay"))
