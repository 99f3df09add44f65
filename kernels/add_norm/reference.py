"""Bias, dropout, residual sum and layer norm in plain PyTorch: the reference for every kernel.

Source: "Attention is all you need", sections 3.1 and 5.4: LayerNorm(x + Dropout(Sublayer(x))).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_norm(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_bias: Tensor | None,
    position: Tensor | None,
    dropout_p: float,
    eps: float,
    trunks: int,
    outs: int,
) -> tuple[Tensor, ...]:
    """branch and residual [..., C], vectors [C], position [1 or B, N, C]; see `op.py`."""
    dtype = torch.promote_types(branch.dtype, residual.dtype)
    added = branch if branch_bias is None else branch + branch_bias
    z = (residual + F.dropout(added, dropout_p)).to(dtype)
    y = F.layer_norm(z, weight.shape, weight.to(dtype), bias.to(dtype), eps).to(dtype)
    outputs = (y,) * trunks + (y.to(branch.dtype),) * outs
    return outputs if position is None else (*outputs, (y + position).to(branch.dtype))
