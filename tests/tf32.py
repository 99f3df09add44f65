"""Simulates cuDNN's default for float32 convolutions on a CPU: inputs are rounded to ten bits of mantissa."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F


def rounded(x: Tensor) -> Tensor:
    """float32 rounded to the nearest number with ten bits of mantissa."""
    bits = x.contiguous().view(torch.int32)
    # Half of the last kept bit is added first; a tie rounds to even.
    bits = (bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF
    return bits.view(torch.float32)


def plant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make convolutions round their inputs as cuDNN's do, while PyTorch's switch for TF32 is on."""
    exact = F.conv2d

    def conv2d(x: Tensor, weight: Tensor, *options: object, **more: object) -> Tensor:
        if torch.backends.cudnn.allow_tf32 and x.dtype == torch.float32:
            x, weight = rounded(x), rounded(weight)
        return exact(x, weight, *options, **more)

    monkeypatch.setattr(F, "conv2d", conv2d)
