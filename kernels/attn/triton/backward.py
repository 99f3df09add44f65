"""Conditional attention, backward: a kernel for the queries, one for the keys, one for rows and columns of the grid.

Weights are recomputed from scores and their log-sum-exp. The common factors of all terms, the scale and dropout's
1 / (1 - p), multiply the sums at the end: with `kept` 0 or 1, weight · (kept · grad · v - delta) is the gradient of a
score over scale / (1 - p), where delta is (1 - p) grad · out.
"""

import triton
import triton.language as tl

from conddetr.kernels.attn.triton.tiles import (
    drop,
    load_kept,
    load_kept_turned,
    load_keys,
    load_parts,
    load_queries,
    load_rows,
    load_values,
    next_tile,
    outside_position,
    position_of,
    scores_of,
    store_rows,
    valid_rectangle,
)
from conddetr.kernels.common.triton import product

SIZES = ("queries", "keys", "heads", "height", "width", "padded", "images", "channels")
"""Not specialised (`operators.py` says why)."""


@triton.jit
def query_tile(
    q_c, q_s, k_c, k_s, value, gradient, lse_rows, delta_rows, content, spatial, visible, kept, log2_scale,
    kept_factor, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one tile of keys to the sums of both queries' gradients; arguments as in `softmax_tile`."""
    scores = scores_of(q_c, q_s, k_c, k_s, PRECISION)
    if visible is not None:
        scores = tl.where(visible[None, :], scores, float("-inf"))
    weights = tl.exp2(scores * log2_scale - lse_rows[:, None])
    by_weight = tl.zeros((gradient.shape[0], value.shape[0]), tl.float32)
    by_weight = product(gradient, tl.trans(value), by_weight, PRECISION)
    by_score = (weights * (drop(by_weight, kept, kept_factor) - delta_rows[:, None])).to(k_c.dtype)
    return product(by_score, k_c, content, PRECISION), product(by_score, k_s, spatial, PRECISION)


@triton.jit(do_not_specialize=SIZES)
def backward_query_kernel(
    tensors, upstream, out, lse, statistics, grad_qc, grad_qs, valid_cells, padding, keep,
    scale, log2_scale, kept_factor, queries, keys, heads, height, width,
    D: tl.constexpr, DS: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDS: tl.constexpr, PDV: tl.constexpr,
    OFFSET: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of both queries, contiguous [B, Q, h, ·]; a program keeps its queries and loops over the keys.

    statistics [B, h, 2, blocks of Q] float32 has lse and delta. It is written here and read by the kernel of the keys.
    It covers queries past the last one too, which makes their weights zero.
    """
    head, image = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    group = image * heads + head
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_query = query < queries
    within = tl.minimum(query, queries - 1)
    rows = (image * queries * heads + head) * DV
    gradient = load_rows(upstream + rows, query, heads * DV, is_query, DV, PDV, OFFSET)
    attended = load_rows(out + rows, query, heads * DV, is_query, DV, PDV, OFFSET)
    sums = tl.sum(gradient.to(tl.float32) * attended.to(tl.float32), axis=1)
    padded = tl.num_programs(0) * BLOCK_Q
    statistics += group * 2 * padded
    tl.store(statistics + query, tl.load(lse + group * queries + query, mask=is_query, other=float("inf")))
    tl.store(statistics + padded + query, sums / kept_factor)
    # Through memory: in registers, its layout would become that of all scores, and float32 scores would spill.
    tl.debug_barrier()
    lse_rows, delta_rows = tl.load(statistics + query), tl.load(statistics + padded + query)
    q_c, q_s = load_queries(tensors, image, head, query, is_query, D, DS, PD, PDS, OFFSET)
    if scale < 0:
        q_c, q_s = -q_c, -q_s
    if padding is not None:
        padding += image * keys
    if keep is not None:
        keep += group * ((keys + 63) // 64 * 2) * queries

    visited, row_width = valid_rectangle(valid_cells, image, keys, height, width)
    content = tl.zeros((BLOCK_Q, PD), tl.float32)
    spatial = tl.zeros((BLOCK_Q, PDS), tl.float32)
    ordinal = tl.arange(0, BLOCK_N)
    row, column = ordinal // row_width, ordinal % row_width
    # One tile ahead, into registers: copies to shared memory would have to be read back to add them.
    row_part, column_part = load_parts(tensors, image, head, row, column, ordinal < visited, DS, PDS, OFFSET)
    whole = visited // BLOCK_N * BLOCK_N
    for start in tl.range(0, whole, BLOCK_N):
        position = position_of(start + ordinal, row, column, width, valid_cells)
        k_c, k_s = load_keys(tensors, image, head, position, row_part, column_part, None, D, DS, PD, PDS, OFFSET)
        value = load_values(tensors, image, head, position, None, DV, PDV, OFFSET)
        row, column = next_tile(row, column, row_width, BLOCK_N)
        is_next = start + BLOCK_N + ordinal < visited
        row_part, column_part = load_parts(tensors, image, head, row, column, is_next, DS, PDS, OFFSET)
        visible = tl.load(padding + position) == 0 if padding is not None else None
        kept = load_kept(keep, within, start, queries, BLOCK_N, OFFSET) if keep is not None else None
        content, spatial = query_tile(
            q_c, q_s, k_c, k_s, value, gradient, lse_rows, delta_rows, content, spatial, visible, kept, log2_scale,
            kept_factor, PRECISION,
        )  # fmt: skip
    # At most once.
    for start in tl.range(whole, visited, BLOCK_N, num_stages=1):
        inside = start + ordinal < visited
        position = position_of(start + ordinal, row, column, width, valid_cells)
        row_part, column_part = load_parts(tensors, image, head, row, column, inside, DS, PDS, OFFSET)
        k_c, k_s = load_keys(tensors, image, head, position, row_part, column_part, inside, D, DS, PD, PDS, OFFSET)
        value = load_values(tensors, image, head, position, inside, DV, PDV, OFFSET)
        visible = inside
        if padding is not None:
            visible = inside & (tl.load(padding + position, mask=inside, other=1) == 0)
        kept = load_kept(keep, within, start, queries, BLOCK_N, OFFSET) if keep is not None else None
        content, spatial = query_tile(
            q_c, q_s, k_c, k_s, value, gradient, lse_rows, delta_rows, content, spatial, visible, kept, log2_scale,
            kept_factor, PRECISION,
        )  # fmt: skip
    factor = scale * kept_factor
    rows = image * queries * heads + head
    store_rows(grad_qc + rows * D, query, heads * D, is_query, content * factor, D, PD, OFFSET)
    store_rows(grad_qs + rows * DS, query, heads * DS, is_query, spatial * factor, DS, PDS, OFFSET)


@triton.jit(do_not_specialize=SIZES)
def backward_key_kernel(
    tensors, upstream, statistics, grad_kc, grad_ks, grad_v, valid_cells, padding, keep,
    scale, log2_scale, kept_factor, queries, keys, heads, height, width, padded,
    D: tl.constexpr, DS: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDS: tl.constexpr, PDV: tl.constexpr,
    OFFSET: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of content keys, values and dense spatial keys, contiguous [B, N, h, ·].

    A program keeps its keys, which are the rows of all its products, and loops over the queries: nothing is transposed.
    A key that is not visible affects only its own sums, which are set to zero at the end. Ordinals past the valid
    rectangle are the cells outside it, so every key is written once and nothing needs clearing before.
    """
    head, image = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    group = image * heads + head
    start = tl.program_id(0) * BLOCK_N
    visited, row_width = valid_rectangle(valid_cells, image, keys, height, width)
    ordinal = start + tl.arange(0, BLOCK_N)
    row, column = ordinal // row_width, ordinal % row_width
    position = position_of(ordinal, row, column, width, valid_cells)
    visible = ordinal < visited
    row_part, column_part = load_parts(tensors, image, head, row, column, visible, DS, PDS, OFFSET)
    k_c, k_s = load_keys(tensors, image, head, position, row_part, column_part, visible, D, DS, PD, PDS, OFFSET)
    value = load_values(tensors, image, head, position, visible, DV, PDV, OFFSET)
    # The sign goes to the keys here, because their gradients are sums over the queries.
    if scale < 0:
        k_c, k_s = -k_c, -k_s
    upstream += (image * queries * heads + head) * DV
    statistics += group * 2 * padded
    if keep is not None:
        keep += group * ((keys + 63) // 64 * 2) * queries

    content = tl.zeros((BLOCK_N, PD), tl.float32)
    spatial = tl.zeros((BLOCK_N, PDS), tl.float32)
    values = tl.zeros((BLOCK_N, PDV), tl.float32)
    for first in tl.range(0, tl.where(start < visited, queries, 0), BLOCK_Q):
        query = first + tl.arange(0, BLOCK_Q)
        is_query = query < queries
        q_c, q_s = load_queries(tensors, image, head, query, is_query, D, DS, PD, PDS, OFFSET)
        gradient = load_rows(upstream, query, heads * DV, is_query, DV, PDV, OFFSET)
        lse_rows, delta_rows = tl.load(statistics + query), tl.load(statistics + padded + query)
        weights = tl.exp2(scores_of(k_c, k_s, q_c, q_s, PRECISION) * log2_scale - lse_rows[None, :])
        by_weight = tl.zeros((BLOCK_N, BLOCK_Q), tl.float32)
        by_weight = product(value, tl.trans(gradient), by_weight, PRECISION)
        within = tl.minimum(query, queries - 1)
        kept = load_kept_turned(keep, within, start, queries, BLOCK_N, OFFSET) if keep is not None else None
        dropped = drop(weights, kept, kept_factor)
        by_score = (dropped * by_weight - weights * delta_rows[None, :]).to(q_c.dtype)
        values = product(dropped.to(gradient.dtype), gradient, values, PRECISION)
        content = product(by_score, q_c, content, PRECISION)
        spatial = product(by_score, q_s, spatial, PRECISION)
    if padding is not None:
        visible = visible & (tl.load(padding + image * keys + position, mask=visible, other=1) == 0)
    factor = scale * kept_factor
    content, spatial = (
        tl.where(visible[:, None], content * factor, 0.0),
        tl.where(visible[:, None], spatial * factor, 0.0),
    )
    values = tl.where(visible[:, None], values * kept_factor, 0.0)
    if valid_cells is not None:
        position = tl.where(ordinal < visited, position, outside_position(ordinal - visited, visited, row_width, width))
    is_key = ordinal < keys
    rows = image * keys * heads + head
    store_rows(grad_kc + rows * D, position, heads * D, is_key, content, D, PD, OFFSET)
    store_rows(grad_ks + rows * DS, position, heads * DS, is_key, spatial, DS, PDS, OFFSET)
    store_rows(grad_v + rows * DV, position, heads * DV, is_key, values, DV, PDV, OFFSET)


@triton.jit(do_not_specialize=SIZES)
def backward_grid_kernel(
    grad_ks, grad_rows, grad_columns, images, height, width, channels,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of grad_ks [B, H·W, channels] over a row or a column, and over `images` images, in a fixed order.

    The first `height` programs compute grad_rows [B / images, H, channels], the others grad_columns.
    """
    line, group = tl.program_id(0), tl.program_id(2).to(tl.int64)
    is_row = line < height
    index = tl.where(is_row, line, line - height)
    first = tl.where(is_row, index * width, index)
    step, count = tl.where(is_row, 1, width), tl.where(is_row, width, height)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < channels
    total = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for image in range(0, images):
        of_image = grad_ks + (group * images + image) * height * width * channels
        for start in range(0, count, BLOCK):
            cell = start + tl.arange(0, BLOCK)
            pointers = of_image + (first + cell * step).to(tl.int64)[:, None] * channels + channel[None, :]
            part = tl.load(pointers, mask=(cell < count)[:, None] & is_channel[None, :], other=0.0)
            total += part.to(tl.float32)
    value = tl.sum(total, axis=0).to(grad_rows.dtype.element_ty)
    offset = (group * tl.where(is_row, height, width) + index) * channels + channel
    tl.store(grad_rows + offset, value, mask=channel < tl.where(is_row, channels, 0))
    tl.store(grad_columns + offset, value, mask=channel < tl.where(is_row, 0, channels))
