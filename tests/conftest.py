"""What every test starts from: NaN in memory that nobody wrote, and hypothesis profiles."""

import pytest
import torch
from hypothesis import HealthCheck, settings

_ALWAYS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("default", max_examples=300, derandomize=True, **_ALWAYS)
settings.register_profile("deep", max_examples=10_000, **_ALWAYS)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill what torch.empty returns with NaN, so that a row that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_flush_denormal(False)  # as a command sets it for its process
