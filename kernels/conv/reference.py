"""Convolution with bias, residual sum and ReLU in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """relu(x * weight + bias + residual); shapes as in `op.py`."""
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        out = out + residual
    return out.relu_() if relu else out
