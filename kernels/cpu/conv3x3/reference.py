"""3×3 convolution in plain PyTorch: forward, transposed, and the gradient of its weights."""

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight


def convolution_3x3(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, relu: bool) -> Tensor:
    """Convolution with a window of 3×3 around each cell, zeros beyond the edge; shapes as in `op.py`."""
    convolve = F.conv_transpose2d if transposed else F.conv2d
    out = convolve(x, weight, bias, padding=1)
    return out.relu_() if relu else out


def convolution_3x3_weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """For each weight, the sum over all cells of the gradient times the weight's input; shapes as in `op.py`."""
    return conv2d_weight(x, (grad.shape[1], x.shape[1], 3, 3), grad, padding=1)
