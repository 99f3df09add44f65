"""The projected conditional spatial query in plain PyTorch: the reference for the kernels.

Source: Conditional DETR, equation 5 and section 3.3; the projection is `ca_qpos_sine_proj` of the official
implementation.
"""

import torch.nn.functional as F
from torch import Tensor


def spatial_query(transform: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """W (λ ⊙ p_s) + b: transform [..., Q, C] is λ, embedding [Q, C] or [..., Q, C] is p_s -> [..., Q, O]."""
    return F.linear(transform * embedding, weight, bias)
