"""Self-attention of projected tokens [B, N, C]."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from conddetr.kernels import conditional_attention, paths, registry
from conddetr.kernels.registry import OPERATIONS


def attention_kernels(device: torch.device) -> AbstractContextManager:
    """Restrict PyTorch's attention to its math kernel where its fused kernels lack derivatives.

    They have no tangents, and on CPUs no second derivatives; with dropout no fused kernel runs on CPUs anyway.
    """
    is_recording = device.type == "cpu" and torch.is_grad_enabled()
    return sdpa_kernel(SDPBackend.MATH) if is_recording or registry.transforms() else nullcontext()


def attends_natively(backend: str, tokens: Tensor) -> bool:
    """Whether our native kernels compute the self-attention of these tokens, as they do on CPUs."""
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

    PyTorch computes it, but has no fused attention with dropout on CPUs. There the native kernels, if the backend
    allows them, compute it as conditional attention: the content and spatial part are the two halves of each head.
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
    # All heads and queries share one row per image: fused kernels accept this shape, without a copy of N × N numbers.
    visible = None if padding is None else ~padding[:, None, None, :]
    attended = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in heads), attn_mask=visible, dropout_p=dropout_p
    )
    return attended.transpose(1, 2).flatten(-2)
