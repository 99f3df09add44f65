"""ReLU and dropout after a bias in plain PyTorch.

Source: "Attention is all you need", section 5.4; DETR added the second dropout of feed-forward networks.
"""

import torch.nn.functional as F
from torch import Tensor


def relu_dropout(x: Tensor, p: float, bias: Tensor | None = None) -> Tensor:
    """ReLU of x plus the bias, then dropout: each element is zero with probability p, else divided by 1 - p."""
    added = x if bias is None else x + bias
    return F.dropout(added.relu(), p).to(x.dtype)
