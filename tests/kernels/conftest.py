"""Every kernel test runs with poisoned allocations, and without a GPU in Triton's interpreter."""

import pytest
import torch

from conddetr.kernels import native

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """`torch.empty` and similar functions return NaN, so that an unwritten element shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> torch.device:
    """CUDA if available, else the CPU."""
    return DEVICE


@pytest.fixture(params=["triton", "native"])
def backend(request, device) -> str:
    """Each hand-written implementation; `native` skips, with the reason, if it is not built for this device."""
    if request.param == "native":
        reason = native.why_not(device, torch.float32)
        if reason is not None:
            pytest.skip(reason)
    return request.param
