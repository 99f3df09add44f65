"""Conditional attention of split heads, as the replaced modules of all versions of transformers call it."""

import torch
from torch import Tensor

from conddetr.kernels import conditional_attention, paths


def cross_attention(
    q_content: Tensor,
    q_spatial: Tensor,
    k_content: Tensor,
    k_spatial: Tensor,
    v: Tensor,
    padding: Tensor | None,
    dropout_p: float,
    backend: str,
) -> Tensor:
    """Conditional attention of split heads: [B, Q, h, d] queries, [B, N, h, d] keys and values -> [B, Q, C]."""
    paths.note("cross-attention", "conditional_attention, dense spatial keys")
    attended = conditional_attention(
        *as_under_autocast(q_content, q_spatial, k_content, k_spatial, v),
        key_padding_mask=padding,
        dropout_p=dropout_p,
        backend=backend,
    )
    return attended.flatten(-2)


def as_under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype if it is on, as PyTorch's attention takes them: one of several projections may be
    wrapped in a module that computes in float32.
    """
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor.to(dtype) for tensor in tensors)
