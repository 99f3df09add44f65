"""Conditional attention, forward: tiled online softmax, scores never leave the chip.

A program handles a block of queries of one head of one image and loops over the keys. Scores are in base 2. `AHEAD`:
the next tile's scores are computed at the end of an iteration, right after the sums of values, during which its keys
are loaded.
"""

import triton
import triton.language as tl

from conddetr.kernels.attn.triton.tiles import (
    drop,
    last_row_of,
    load_kept,
    load_keys,
    load_parts,
    load_queries,
    load_values,
    next_tile,
    position_of,
    scores_of,
    store_rows,
    valid_rectangle,
)
from conddetr.kernels.common.triton import product

SIZES = ("queries", "keys", "heads", "height", "width")
"""Not specialised (`operators.py` says why)."""


@triton.jit
def softmax_tile(
    highest, total, accumulator, scores, value, visible, kept, log2_scale, kept_factor, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one tile of keys to the maximum and the sum of the weights, and to the weighted sum of values.

    visible: [keys] bool, or None for all; kept: [queries, keys] bool, or None without dropout.
    """
    if visible is not None:
        scores = tl.where(visible[None, :], scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, axis=1) * log2_scale)
    reference = higher
    if visible is not None:
        # Until a key is visible the maximum is -inf, and -inf - -inf is NaN.
        reference = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores * log2_scale - reference[:, None])
    shrink = tl.exp2(highest - reference)
    total = total * shrink + tl.sum(weights, axis=1)
    weights = drop(weights, kept, kept_factor).to(value.dtype)
    accumulator = product(weights, value, accumulator * shrink[:, None], PRECISION)
    return higher, total, accumulator


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    tensors, out, lse, valid_cells, padding, keep, scale, log2_scale, kept_factor, queries, keys, heads, height, width,
    D: tl.constexpr, DS: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDS: tl.constexpr, PDV: tl.constexpr,
    OFFSET: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """out [B, Q, h, dv] contiguous; lse [B, h, Q] float32, base 2, +inf where no key is visible."""
    head, image = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    group = image * heads + head
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_query = query < queries
    within = tl.minimum(query, queries - 1)
    q_c, q_s = load_queries(tensors, image, head, query, is_query, D, DS, PD, PDS, OFFSET)
    # The maximum is taken before scaling, so the scale must be positive: `log2_scale` is.
    if scale < 0:
        q_c, q_s = -q_c, -q_s
    if padding is not None:
        padding += image * keys
    if keep is not None:
        keep += group * ((keys + 63) // 64 * 2) * queries

    visited, row_width = valid_rectangle(valid_cells, image, keys, height, width)
    highest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    accumulator = tl.zeros((BLOCK_Q, PDV), tl.float32)
    ordinal = tl.arange(0, BLOCK_N)
    row, column = ordinal // row_width, ordinal % row_width
    # Reads past the last key go to the last row, which is cheaper than a mask; their values are not used.
    last_row = last_row_of(visited, row_width)
    # One tile ahead, into registers: copies to shared memory would have to be read back to add them.
    row_part, column_part = load_parts(tensors, image, head, tl.minimum(row, last_row), column, None, DS, PDS, OFFSET)
    if AHEAD:
        position = tl.minimum(position_of(ordinal, row, column, width, valid_cells), keys - 1)
        k_c, k_s = load_keys(tensors, image, head, position, row_part, column_part, None, D, DS, PD, PDS, OFFSET)
        scores = scores_of(q_c, q_s, k_c, k_s, PRECISION)
        row, column = next_tile(row, column, row_width, BLOCK_N)
        row_part, column_part = load_parts(
            tensors, image, head, tl.minimum(row, last_row), column, None, DS, PDS, OFFSET
        )
    whole = visited // BLOCK_N * BLOCK_N
    for start in tl.range(0, whole, BLOCK_N):
        if not AHEAD:
            position = position_of(start + ordinal, row, column, width, valid_cells)
        value = load_values(tensors, image, head, position, None, DV, PDV, OFFSET)
        visible = tl.load(padding + position) == 0 if padding is not None else None
        kept = load_kept(keep, within, start, queries, BLOCK_N, OFFSET) if keep is not None else None
        if AHEAD:
            position = tl.minimum(position_of(start + BLOCK_N + ordinal, row, column, width, valid_cells), keys - 1)
        k_c, k_s = load_keys(tensors, image, head, position, row_part, column_part, None, D, DS, PD, PDS, OFFSET)
        row, column = next_tile(row, column, row_width, BLOCK_N)
        row_part, column_part = load_parts(
            tensors, image, head, tl.minimum(row, last_row), column, None, DS, PDS, OFFSET
        )
        if not AHEAD:
            scores = scores_of(q_c, q_s, k_c, k_s, PRECISION)
        highest, total, accumulator = softmax_tile(
            highest, total, accumulator, scores, value, visible, kept, log2_scale, kept_factor, PRECISION
        )
        if AHEAD:
            scores = scores_of(q_c, q_s, k_c, k_s, PRECISION)
    # At most once.
    for start in tl.range(whole, visited, BLOCK_N, num_stages=1):
        inside = start + ordinal < visited
        if not AHEAD:
            position = position_of(start + ordinal, row, column, width, valid_cells)
            k_c, k_s = load_keys(tensors, image, head, position, row_part, column_part, inside, D, DS, PD, PDS, OFFSET)
            scores = scores_of(q_c, q_s, k_c, k_s, PRECISION)
        value = load_values(tensors, image, head, position, inside, DV, PDV, OFFSET)
        visible = inside
        if padding is not None:
            visible = inside & (tl.load(padding + position, mask=inside, other=1) == 0)
        kept = load_kept(keep, within, start, queries, BLOCK_N, OFFSET) if keep is not None else None
        highest, total, accumulator = softmax_tile(
            highest, total, accumulator, scores, value, visible, kept, log2_scale, kept_factor, PRECISION
        )
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    accumulator = accumulator * (kept_factor / total)[:, None]
    base = out + image * queries * heads * DV + head * DV
    store_rows(base, query, heads * DV, is_query, accumulator, DV, PDV, OFFSET)
    tl.store(lse + group * queries + query, tl.where(empty, float("inf"), highest + tl.log2(total)), mask=is_query)
