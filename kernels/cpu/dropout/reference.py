"""Dropout before a residual sum in plain PyTorch.

Source: "Attention is all you need", section 5.4.
"""

import torch.nn.functional as F
from torch import Tensor


def dropout_add(x: Tensor, residual: Tensor, p: float) -> Tensor:
    """The residual plus x after dropout."""
    return residual + F.dropout(x, p)
