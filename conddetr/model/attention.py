"""Self-attention of projected tokens, which are [B, N, C]."""

import torch.nn.functional as F
from torch import Tensor

from conddetr.kernels import conditional_attention, paths
from conddetr.kernels.registry import OPERATIONS


def attends_natively(backend: str, tokens: Tensor) -> bool:
    """Whether self-attention of such tokens is for our kernels, as it is on CPUs."""
    return OPERATIONS["self_attention"].prefer(backend, tokens.device, tokens.dtype).backend == "native"


def self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    padding: Tensor | None,
    dropout_p: float,
    backend: str,
) -> Tensor:
    """Scaled dot-product attention of projected tokens [B, N, C]; padding [B, N] bool -> [B, N, C].

    By PyTorch, which has no fused kernel with dropout on a CPU: there, native kernels of the backend take it as
    conditional attention, whose content and spatial part are the two halves of each head's channels.
    """
    heads = [x.unflatten(-1, (num_heads, -1)) for x in (query, key, value)]
    if attends_natively(backend, query):
        paths.note("self-attention", "conditional_attention")
        half = heads[0].shape[-1] // 2
        queries, keys = (x.tensor_split((half,), dim=-1) for x in heads[:2])
        attended = conditional_attention(
            *queries, *keys, heads[2], key_padding_mask=padding, dropout_p=dropout_p, backend="native"
        )
        return attended.flatten(-2)
    paths.note("self-attention", "PyTorch's scaled_dot_product_attention")
    # One row per image that all heads and queries share: fused kernels take that form, without a copy of N × N numbers.
    visible = None if padding is None else ~padding[:, None, None, :]
    attended = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in heads), attn_mask=visible, dropout_p=dropout_p
    )
    return attended.transpose(1, 2).flatten(-2)
