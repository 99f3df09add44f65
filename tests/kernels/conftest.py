"""Every kernel test runs with poisoned allocations, and with Triton's interpreter where there is no GPU."""

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """`torch.empty` and its kin return NaN, so that an element never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> torch.device:
    """CUDA where there is one."""
    return DEVICE
