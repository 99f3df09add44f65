"""Conditional cross-attention in plain PyTorch: the reference for every kernel.

Source: Conditional DETR, section 3.2; `models/attention.py` of the official implementation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from conddetr.kernels.bits.reference import unpacked


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
    # The lowest finite number instead of -inf: a row without a visible key then has no NaN, not even in backward.
    scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1).masked_fill(padding, 0.0)


def conditional_attention(
    q_content: Tensor,
    q_spatial: Tensor,
    k_content: Tensor,
    k_spatial: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    kept: Tensor | None = None,
) -> Tensor:
    """softmax(scale · (q_content·k_content + q_spatial·k_spatial)) v, as the official code computes it: concatenated.

    Shapes as in `op.py`, with dense spatial keys; checks are there too. kept [B, h, Q, N] bool: the weights that
    dropout keeps; None: sampled by PyTorch.
    """
    query = torch.cat([q_content, q_spatial], dim=-1)
    key = torch.cat([k_content, k_spatial], dim=-1)
    weights = attention_weights(query, key, key_padding_mask, scale)
    weights = F.dropout(weights, dropout_p) if kept is None else weights * kept / (1 - dropout_p)
    return torch.einsum("bhqn,bnhd->bqhd", weights, v)


def kept_weights(keep: Tensor, valid_cells: Tensor | None, height: int, width: int) -> Tensor:
    """The weights that dropout keeps, from the bits that kernels read.

    Args:
        keep: [B, h, words, Q] int32; bit j of word w is the key with ordinal 32 w + j.
        valid_cells: [B, 2], clamped to the grid, or None for all of it. Ordinals count the keys inside, row by row.
        height, width: size of the grid of keys.

    Returns:
        [B, h, Q, height · width] bool; values outside the valid rectangle have no meaning.
    """
    bits = unpacked(keep.transpose(2, 3)).flatten(-2)
    ordinal = torch.arange(height * width, device=keep.device).expand(len(keep), -1)
    if valid_cells is not None:
        valid_width = valid_cells[:, 1:].clamp(0, width)
        inside = ordinal // width * valid_width + ordinal % width
        ordinal = inside.clamp(max=height * width - 1)
    return bits.gather(-1, ordinal[:, None, None].expand(*bits.shape[:3], -1))


def dense_spatial_keys(rows: Tensor, columns: Tensor) -> Tensor:
    """k[y, x] = R[y] + C[x]: rows [B, H, ...] and columns [B, W, ...] -> [B, H·W, ...]."""
    return (rows[:, :, None] + columns[:, None]).flatten(1, 2)


def rectangle_padding(valid_cells: Tensor, height: int, width: int) -> Tensor:
    """valid_cells [B, 2], clamped to the grid -> key padding mask [B, H·W] bool, True outside the rectangle."""
    y = torch.arange(height, device=valid_cells.device)[:, None]
    x = torch.arange(width, device=valid_cells.device)[None, :]
    valid = (y < valid_cells[:, 0, None, None]) & (x < valid_cells[:, 1, None, None])
    return ~valid.flatten(1)
