"""Predicted boxes in plain PyTorch: the reference for the kernels.

Source: Conditional DETR, section 3.2; `inverse_sigmoid` of the official code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5


def inverse_sigmoid(x: Tensor, eps: float = EPS) -> Tensor:
    """log(x / (1 - x)) with x, and both numerator and denominator, clamped at `eps`; any shape."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def predicted_boxes(offsets: Tensor, points: Tensor) -> Tensor:
    """offsets [L, B, Q, 4], points [Q, 2] -> [L, B, Q, 4]; see `op.py`."""
    return (offsets + F.pad(inverse_sigmoid(points), (0, 2))).sigmoid()
