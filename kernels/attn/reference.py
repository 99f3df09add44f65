"""Conditional cross-attention in plain PyTorch: the truth that every kernel is held to.

Source: Conditional DETR, section 3.2; `models/attention.py` of the official implementation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_weights(query: Tensor, key: Tensor, key_padding_mask: Tensor | None, scale: float) -> Tensor:
    """Softmax of the scaled scores over the keys that are not padding.

    Args:
        query: [B, Q, h, d], floating.
        key: [B, N, h, d], same dtype.
        key_padding_mask: [B, N] bool, True = padding, or None.
        scale: factor of the scores.

    Returns:
        [B, h, Q, N]; rows sum to 1, or are all zero where every key is padding.
    """
    scores = torch.einsum("bqhd,bnhd->bhqn", query * scale, key)
    if key_padding_mask is None:
        return scores.softmax(dim=-1)
    padding = key_padding_mask[:, None, None, :]
    # The lowest finite number rather than -inf: a row with no key left then has no NaN, not even in backward.
    scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1).masked_fill(padding, 0.0)


def conditional_attention(
    q_content: Tensor,
    q_spatial: Tensor,
    k_content: Tensor,
    k_spatial: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention whose score is a content product plus a spatial product, per head.

    softmax(scale · (q_content·k_content + q_spatial·k_spatial)) v

    Args:
        q_content: [B, Q, h, d] content query.
        q_spatial: [B, Q, h, ds] conditional spatial query.
        k_content: [B, N, h, d] content key.
        k_spatial: [B, N, h, ds] spatial key.
        v: [B, N, h, dv] value. All five share one floating dtype.
        key_padding_mask: [B, N] bool, True = padding.
        scale: default (d + ds) ** -0.5.
        dropout_p: probability, in [0, 1), that an attention weight is dropped.

    Returns:
        [B, Q, h, dv]; zeros for an image whose keys are all padding.

    Raises:
        ValueError: shapes or dtypes do not fit; names the tensor, what was expected and what was found.
    """
    _check(q_content, q_spatial, k_content, k_spatial, v, key_padding_mask, dropout_p)
    if scale is None:
        scale = (q_content.shape[-1] + q_spatial.shape[-1]) ** -0.5
    query = torch.cat([q_content, q_spatial], dim=-1)
    key = torch.cat([k_content, k_spatial], dim=-1)
    weights = F.dropout(attention_weights(query, key, key_padding_mask, scale), dropout_p)
    return torch.einsum("bhqn,bnhd->bqhd", weights, v)


def _check(
    q_content: Tensor,
    q_spatial: Tensor,
    k_content: Tensor,
    k_spatial: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    dropout_p: float,
) -> None:
    if q_content.dim() != 4:
        raise ValueError(f"q_content: expected [B, Q, h, d], got shape {tuple(q_content.shape)}.")
    batch, queries, heads, width = q_content.shape
    keys = k_content.shape[1] if k_content.dim() == 4 else "N"
    spatial = q_spatial.shape[-1]
    expected = {
        "q_spatial": (q_spatial, (batch, queries, heads, spatial)),
        "k_content": (k_content, (batch, keys, heads, width)),
        "k_spatial": (k_spatial, (batch, keys, heads, spatial)),
        "v": (v, (batch, keys, heads, v.shape[-1])),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}.")
        if tensor.dtype != q_content.dtype:
            raise ValueError(f"{name}: expected dtype {q_content.dtype} as of q_content, got {tensor.dtype}.")
    if key_padding_mask is not None:
        if tuple(key_padding_mask.shape) != (batch, keys):
            raise ValueError(f"key_padding_mask: expected shape {(batch, keys)}, got {tuple(key_padding_mask.shape)}.")
        if key_padding_mask.dtype != torch.bool:
            raise ValueError(f"key_padding_mask: expected dtype torch.bool, got {key_padding_mask.dtype}.")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a value in [0, 1), got {dropout_p}.")
