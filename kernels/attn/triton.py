"""Conditional attention, forward and backward, as tiled online softmax: scores never leave the chip.

One program handles a block of queries (or, for the gradients of keys and values, a block of keys) of one head of one
image. Keys are counted over the valid rectangle in row-major order: ordinal i is row i // valid_w and column
i % valid_w, so padding is never visited, right or bottom. Separable spatial keys R[y] + C[x] are added on chip.

Scores are kept in base 2. A dropped weight is decided by Philox at (seed, query, i // 4) and lane i % 4: the mask
depends on neither tile sizes nor direction.

Images, heads and positions are 64 bits wide: a tensor may hold more than 2³¹ elements.

Shapes: q_content [B, Q, h, d], q_spatial [B, Q, h, ds], k_content [B, N, h, d], v [B, N, h, dv],
k_spatial [B, N, h, ds], or rows [B, H, h, ds] and columns [B, W, h, ds], or one image's for all: [1, ...].
"""

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from conddetr.kernels import registry

SIZES = ("queries", "keys", "heads", "height", "width", "images", "channels")
"""Not specialised (`registry.py` says why)."""
SEED = ("seed_pointer",)
"""Neither is its alignment: it may be any element of the seeds of a step."""
GRID_TILE = {"BLOCK": 16, "BLOCK_C": 64}
"""Cells and channels per program of the sums over the grid."""


@triton.jit
def valid_rectangle(valid_hw, image, keys, height, width, HAS_VALID: tl.constexpr):
    """Number of keys to visit and width of a row of them. Clamped: a wrong `valid_hw` never reads outside."""
    visited, row_width = keys, width
    if HAS_VALID:
        valid_height = tl.minimum(tl.maximum(tl.load(valid_hw + 2 * image), 0), height)
        row_width = tl.minimum(tl.maximum(tl.load(valid_hw + 2 * image + 1), 0), width)
        visited = valid_height * row_width
        row_width = tl.maximum(row_width, 1)
    return visited, row_width


@triton.jit
def outside_position(ordinal, visited, row_width, width):
    """Where the cells outside the valid rectangle are: first those to its right, row by row, then those below."""
    valid_height = visited // row_width
    rest = width - row_width
    to_the_right = valid_height * rest
    safe = tl.maximum(rest, 1)
    right = ordinal // safe * width + row_width + ordinal % safe
    return tl.where(ordinal < to_the_right, right, valid_height * width + ordinal - to_the_right)


@triton.jit
def load_rows(base, position, stride, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """[len(position), PADDED] of a tensor whose last dimension is contiguous; zeros where outside."""
    column = tl.arange(0, PADDED)
    pointers = base + position[:, None].to(tl.int64) * stride + column[None, :]
    return tl.load(pointers, mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(base, position, stride, inside, value, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The counterpart of `load_rows`."""
    column = tl.arange(0, PADDED)
    pointers = base + position[:, None].to(tl.int64) * stride + column[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=inside[:, None] & (column < WIDTH)[None, :])


@triton.jit
def load_key_tile(
    k_content, k_spatial, columns, v, padding, ordinal, visited, row_width, width,
    stride_kc_n, stride_ks_n, stride_co_n, stride_v_n,
    D: tl.constexpr, DS: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDS: tl.constexpr, PDV: tl.constexpr,
    SEPARABLE: tl.constexpr, HAS_PADDING: tl.constexpr,
):  # fmt: skip
    """Content keys, spatial keys and values of some ordinals, their positions, and which of them are visible.

    Pointers are those of one head of one image; `padding` is of one image.
    """
    inside = ordinal < visited
    row, column = ordinal // row_width, ordinal % row_width
    position = row * width + column
    k_c = load_rows(k_content, position, stride_kc_n, inside, D, PD)
    if SEPARABLE:
        row_part = load_rows(k_spatial, row, stride_ks_n, inside, DS, PDS).to(tl.float32)
        column_part = load_rows(columns, column, stride_co_n, inside, DS, PDS).to(tl.float32)
        k_s = (row_part + column_part).to(k_spatial.dtype.element_ty)
    else:
        k_s = load_rows(k_spatial, position, stride_ks_n, inside, DS, PDS)
    value = load_rows(v, position, stride_v_n, inside, DV, PDV)
    visible = inside
    if HAS_PADDING:
        visible = visible & (tl.load(padding + position, mask=inside, other=1) == 0)
    return k_c, k_s, value, position, visible


@triton.jit
def keep_mask(seed, query_index, start, keys, dropout_p, BLOCK_N: tl.constexpr):
    """[queries, BLOCK_N] bool: which weights of the keys start…start + BLOCK_N survive. Four lanes a counter."""
    groups = (keys + 3) // 4
    group = start // 4 + tl.arange(0, BLOCK_N // 4)
    counter = query_index[:, None].to(tl.int64) * groups + group[None, :]
    a, b, c, d = tl.randint4x(seed, counter)
    lanes = tl.join(tl.join(a, c), tl.join(b, d))
    lanes = tl.reshape(lanes, (query_index.shape[0], BLOCK_N))
    # The upper 24 bits as a number in [0, 1): exact in float32.
    uniform = ((lanes.to(tl.uint32, bitcast=True)) >> 8).to(tl.float32) * (1.0 / 16777216.0)
    return uniform >= dropout_p


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a b, summed in float32. `emulate`: Triton's interpreter can not multiply bfloat16."""
    if PRECISION == "emulate":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def score_tile(q_c, q_s, k_c, k_s, visible, log2_scale, PRECISION: tl.constexpr):
    """[queries, keys] scores in base 2, float32; -inf where a key is not visible."""
    scores = tl.zeros((q_c.shape[0], k_c.shape[0]), tl.float32)
    scores = product(q_c, tl.trans(k_c), scores, PRECISION)
    scores = product(q_s, tl.trans(k_s), scores, PRECISION)
    return tl.where(visible[None, :], scores * log2_scale, float("-inf"))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SEED)
def forward_kernel(
    q_content, q_spatial, k_content, k_spatial, columns, v, out, lse, valid_hw, padding, seed_pointer,
    log2_scale, dropout_p, queries, keys, heads, height, width,
    stride_qc_b, stride_qc_n, stride_qc_h, stride_qs_b, stride_qs_n, stride_qs_h,
    stride_kc_b, stride_kc_n, stride_kc_h, stride_ks_b, stride_ks_n, stride_ks_h,
    stride_co_b, stride_co_n, stride_co_h, stride_v_b, stride_v_n, stride_v_h,
    D: tl.constexpr, DS: tl.constexpr, DV: tl.constexpr,
    PD: tl.constexpr, PDS: tl.constexpr, PDV: tl.constexpr,
    SEPARABLE: tl.constexpr, HAS_VALID: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [B, Q, h, dv] contiguous; lse [B, h, Q] float32, base 2, +inf where no key is visible."""
    head, image = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_query = query < queries
    q_c = load_rows(q_content + image * stride_qc_b + head * stride_qc_h, query, stride_qc_n, is_query, D, PD)
    q_s = load_rows(q_spatial + image * stride_qs_b + head * stride_qs_h, query, stride_qs_n, is_query, DS, PDS)
    k_content += image * stride_kc_b + head * stride_kc_h
    k_spatial += image * stride_ks_b + head * stride_ks_h
    if SEPARABLE:
        columns += image * stride_co_b + head * stride_co_h
    if HAS_PADDING:
        padding += image * keys
    v += image * stride_v_b + head * stride_v_h
    query_index = (image * heads + head) * queries + query
    seed = tl.load(seed_pointer) if HAS_DROPOUT else 0

    visited, row_width = valid_rectangle(valid_hw, image, keys, height, width, HAS_VALID)
    highest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    accumulator = tl.zeros((BLOCK_Q, PDV), tl.float32)
    for start in range(0, visited, BLOCK_N):
        k_c, k_s, value, _, visible = load_key_tile(
            k_content, k_spatial, columns, v, padding, start + tl.arange(0, BLOCK_N), visited, row_width, width,
            stride_kc_n, stride_ks_n, stride_co_n, stride_v_n,
            D, DS, DV, PD, PDS, PDV, SEPARABLE, HAS_PADDING,
        )  # fmt: skip
        scores = score_tile(q_c, q_s, k_c, k_s, visible, log2_scale, PRECISION)
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        # As long as no key was visible the maximum is -inf, and -inf - -inf is NaN.
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - reference[:, None])
        shrink = tl.exp2(highest - reference)
        total = total * shrink + tl.sum(weights, axis=1)
        if HAS_DROPOUT:
            kept = keep_mask(seed, query_index, start, keys, dropout_p, BLOCK_N)
            weights = tl.where(kept, weights / (1.0 - dropout_p), 0.0)
        accumulator = accumulator * shrink[:, None]
        accumulator = product(weights.to(value.dtype), value, accumulator, PRECISION)
        highest = higher
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    accumulator = accumulator / total[:, None]
    base = out + image * queries * heads * DV + head * DV
    store_rows(base, query, heads * DV, is_query, accumulator, DV, PDV)
    tl.store(lse + query_index, tl.where(empty, float("inf"), highest + tl.log2(total)), mask=is_query)


@triton.jit
def backward_tile(
    q_c, q_s, k_c, k_s, value, upstream, lse, delta, visible, scale, log2_scale,
    seed, query_index, start, keys, dropout_p,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Weights after dropout and gradient of the scores before `scale`, [queries, keys] float32 each."""
    scores = score_tile(q_c, q_s, k_c, k_s, visible, log2_scale, PRECISION)
    weights = tl.exp2(scores - lse[:, None])
    grad_weights = tl.zeros((upstream.shape[0], value.shape[0]), tl.float32)
    grad_weights = product(upstream, tl.trans(value), grad_weights, PRECISION)
    dropped = weights
    if HAS_DROPOUT:
        kept = keep_mask(seed, query_index, start, keys, dropout_p, BLOCK_N)
        factor = tl.where(kept, 1.0 / (1.0 - dropout_p), 0.0)
        dropped = weights * factor
        grad_weights = grad_weights * factor
    return dropped, weights * (grad_weights - delta[:, None]) * scale


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SEED)
def backward_query_kernel(
    q_content, q_spatial, k_content, k_spatial, columns, v, upstream, lse, delta, out, grad_qc, grad_qs,
    valid_hw, padding, seed_pointer,
    scale, log2_scale, dropout_p, queries, keys, heads, height, width,
    stride_qc_b, stride_qc_n, stride_qc_h, stride_qs_b, stride_qs_n, stride_qs_h,
    stride_kc_b, stride_kc_n, stride_kc_h, stride_ks_b, stride_ks_n, stride_ks_h,
    stride_co_b, stride_co_n, stride_co_h, stride_v_b, stride_v_n, stride_v_h,
    D: tl.constexpr, DS: tl.constexpr, DV: tl.constexpr,
    PD: tl.constexpr, PDS: tl.constexpr, PDV: tl.constexpr,
    SEPARABLE: tl.constexpr, HAS_VALID: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of both queries, contiguous [B, Q, h, ·]; a program keeps its queries and walks over the keys.

    delta [B, h, Q] float32, the products of `upstream` with `out`, is written here and read by the kernel of the keys.
    """
    head, image = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_query = query < queries
    query_index = (image * heads + head) * queries + query
    rows = (image * queries * heads + head) * DV
    gradient = load_rows(upstream + rows, query, heads * DV, is_query, DV, PDV)
    attended = load_rows(out + rows, query, heads * DV, is_query, DV, PDV)
    tl.store(delta + query_index, tl.sum(gradient.to(tl.float32) * attended.to(tl.float32), axis=1), mask=is_query)
    # Through memory: handed on in registers, its layout becomes that of all scores, and those in float32 then spill.
    tl.debug_barrier()
    delta_rows = tl.load(delta + query_index, mask=is_query, other=0.0)
    q_c = load_rows(q_content + image * stride_qc_b + head * stride_qc_h, query, stride_qc_n, is_query, D, PD)
    q_s = load_rows(q_spatial + image * stride_qs_b + head * stride_qs_h, query, stride_qs_n, is_query, DS, PDS)
    k_content += image * stride_kc_b + head * stride_kc_h
    k_spatial += image * stride_ks_b + head * stride_ks_h
    if SEPARABLE:
        columns += image * stride_co_b + head * stride_co_h
    if HAS_PADDING:
        padding += image * keys
    v += image * stride_v_b + head * stride_v_h
    seed = tl.load(seed_pointer) if HAS_DROPOUT else 0
    lse_rows = tl.load(lse + query_index, mask=is_query, other=float("inf"))

    visited, row_width = valid_rectangle(valid_hw, image, keys, height, width, HAS_VALID)
    content = tl.zeros((BLOCK_Q, PD), tl.float32)
    spatial = tl.zeros((BLOCK_Q, PDS), tl.float32)
    for start in range(0, visited, BLOCK_N):
        k_c, k_s, value, _, visible = load_key_tile(
            k_content, k_spatial, columns, v, padding, start + tl.arange(0, BLOCK_N), visited, row_width, width,
            stride_kc_n, stride_ks_n, stride_co_n, stride_v_n,
            D, DS, DV, PD, PDS, PDV, SEPARABLE, HAS_PADDING,
        )  # fmt: skip
        _, grad_scores = backward_tile(
            q_c, q_s, k_c, k_s, value, gradient, lse_rows, delta_rows, visible, scale, log2_scale,
            seed, query_index, start, keys, dropout_p, HAS_DROPOUT, PRECISION, BLOCK_N,
        )  # fmt: skip
        grad_scores = grad_scores.to(k_c.dtype)
        content = product(grad_scores, k_c, content, PRECISION)
        spatial = product(grad_scores, k_s, spatial, PRECISION)
    store_rows(grad_qc + (image * queries * heads + head) * D, query, heads * D, is_query, content, D, PD)
    store_rows(grad_qs + (image * queries * heads + head) * DS, query, heads * DS, is_query, spatial, DS, PDS)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SEED)
def backward_key_kernel(
    q_content, q_spatial, k_content, k_spatial, columns, v, upstream, lse, delta, grad_kc, grad_ks, grad_v,
    valid_hw, padding, seed_pointer,
    scale, log2_scale, dropout_p, queries, keys, heads, height, width,
    stride_qc_b, stride_qc_n, stride_qc_h, stride_qs_b, stride_qs_n, stride_qs_h,
    stride_kc_b, stride_kc_n, stride_kc_h, stride_ks_b, stride_ks_n, stride_ks_h,
    stride_co_b, stride_co_n, stride_co_h, stride_v_b, stride_v_n, stride_v_h,
    D: tl.constexpr, DS: tl.constexpr, DV: tl.constexpr,
    PD: tl.constexpr, PDS: tl.constexpr, PDV: tl.constexpr,
    SEPARABLE: tl.constexpr, HAS_VALID: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of content keys, values and dense spatial keys, contiguous [B, N, h, ·].

    A program keeps its keys and walks over the queries. Ordinals past the valid rectangle are the cells outside of it,
    whose gradients are zero, so that every key is written once and nothing need be cleared before.
    """
    head, image = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * BLOCK_N
    visited, row_width = valid_rectangle(valid_hw, image, keys, height, width, HAS_VALID)
    k_content += image * stride_kc_b + head * stride_kc_h
    k_spatial += image * stride_ks_b + head * stride_ks_h
    if SEPARABLE:
        columns += image * stride_co_b + head * stride_co_h
    if HAS_PADDING:
        padding += image * keys
    v += image * stride_v_b + head * stride_v_h
    ordinal = start + tl.arange(0, BLOCK_N)
    k_c, k_s, value, position, visible = load_key_tile(
        k_content, k_spatial, columns, v, padding, ordinal, visited, row_width, width,
        stride_kc_n, stride_ks_n, stride_co_n, stride_v_n,
        D, DS, DV, PD, PDS, PDV, SEPARABLE, HAS_PADDING,
    )  # fmt: skip
    if HAS_VALID:
        position = tl.where(ordinal < visited, position, outside_position(ordinal - visited, visited, row_width, width))
    q_content += image * stride_qc_b + head * stride_qc_h
    q_spatial += image * stride_qs_b + head * stride_qs_h
    upstream += (image * queries * heads + head) * DV
    seed = tl.load(seed_pointer) if HAS_DROPOUT else 0

    content = tl.zeros((BLOCK_N, PD), tl.float32)
    spatial = tl.zeros((BLOCK_N, PDS), tl.float32)
    values = tl.zeros((BLOCK_N, PDV), tl.float32)
    for first in range(0, tl.where(start < visited, queries, 0), BLOCK_Q):
        query = first + tl.arange(0, BLOCK_Q)
        is_query = query < queries
        query_index = (image * heads + head) * queries + query
        q_c = load_rows(q_content, query, stride_qc_n, is_query, D, PD)
        q_s = load_rows(q_spatial, query, stride_qs_n, is_query, DS, PDS)
        gradient = load_rows(upstream, query, heads * DV, is_query, DV, PDV)
        lse_rows = tl.load(lse + query_index, mask=is_query, other=float("inf"))
        delta_rows = tl.load(delta + query_index, mask=is_query, other=0.0)
        dropped, grad_scores = backward_tile(
            q_c, q_s, k_c, k_s, value, gradient, lse_rows, delta_rows, visible, scale, log2_scale,
            seed, query_index, start, keys, dropout_p, HAS_DROPOUT, PRECISION, BLOCK_N,
        )  # fmt: skip
        values = product(tl.trans(dropped.to(gradient.dtype)), gradient, values, PRECISION)
        turned = tl.trans(grad_scores.to(q_c.dtype))
        content = product(turned, q_c, content, PRECISION)
        spatial = product(turned, q_s, spatial, PRECISION)
    is_key = ordinal < keys
    if HAS_VALID:
        # Not left to the products, which make NaN of 0 · NaN.
        inside = (ordinal < visited)[:, None]
        content, spatial = tl.where(inside, content, 0.0), tl.where(inside, spatial, 0.0)
        values = tl.where(inside, values, 0.0)
    store_rows(grad_kc + (image * keys * heads + head) * D, position, heads * D, is_key, content, D, PD)
    store_rows(grad_ks + (image * keys * heads + head) * DS, position, heads * DS, is_key, spatial, DS, PDS)
    store_rows(grad_v + (image * keys * heads + head) * DV, position, heads * DV, is_key, values, DV, PDV)


@triton.jit(do_not_specialize=SIZES)
def backward_grid_kernel(
    grad_ks, grad_rows, grad_columns, images, height, width, channels,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of grad_ks [B, H·W, channels] float32 over a row, a column, and `images` images, in a fixed order.

    The first `height` programs make grad_rows [B / images, H, channels], the others grad_columns.
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
            total += tl.load(pointers, mask=(cell < count)[:, None] & is_channel[None, :], other=0.0)
    value = tl.sum(total, axis=0).to(grad_rows.dtype.element_ty)
    offset = (group * tl.where(is_row, height, width) + index) * channels + channel
    tl.store(grad_rows + offset, value, mask=channel < tl.where(is_row, channels, 0))
    tl.store(grad_columns + offset, value, mask=channel < tl.where(is_row, 0, channels))


@dataclass(frozen=True)
class Tiles:
    """Launch settings of one kernel."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Launch:
    """Launch settings of the three kernels."""

    forward: Tiles
    backward_query: Tiles
    backward_key: Tiles


# Chosen so that nothing spills, by what the compiler reports; not yet tuned on a device. How products are formed, then
# the widest of d, ds and dv.
_LAUNCH = {
    ("half", 64): Launch(Tiles(64, 64, 8, 2), Tiles(32, 32, 4, 1), Tiles(64, 32, 8, 1)),
    ("half", 128): Launch(Tiles(64, 64, 8, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)),
    ("tf32", 64): Launch(Tiles(32, 32, 4, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 4, 1)),
    ("tf32", 128): Launch(Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(16, 32, 4, 1)),
    ("ieee", 32): Launch(Tiles(32, 32, 8, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 8, 1)),
    ("ieee", 64): Launch(Tiles(64, 32, 8, 1), Tiles(32, 64, 8, 1), Tiles(32, 32, 4, 1)),
    ("ieee", 128): Launch(Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1), Tiles(32, 16, 8, 1)),
}
# The model's own widths on tensor cores: GPUs of data centres have more registers to give to a block.
_DATACENTER = Launch(Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2), Tiles(32, 64, 4, 2))
_OTHER = Launch(Tiles(64, 64, 4, 2), Tiles(64, 16, 4, 1), Tiles(64, 32, 8, 2))


@functools.cache
def launch_settings(architecture: int, products: str, width: int) -> Launch:
    """Launch settings by table; an architecture that is not in it takes the cautious ones.

    Args:
        architecture: compute capability, e.g. 90.
        products: `half` (bfloat16, float16), `tf32`, or `ieee` (float32 without tensor cores).
        width: the widest of d, ds and dv, up to 128.
    """
    padded = max(32, registry.next_power_of_2(width))
    if padded == 32 and products != "ieee":
        return _DATACENTER if architecture in (90, 100) else _OTHER
    return _LAUNCH[products, padded]


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call; the last dimension of each is contiguous."""

    q_content: Tensor
    q_spatial: Tensor
    k_content: Tensor
    k_spatial: Tensor
    columns: Tensor | None
    v: Tensor
    valid_hw: Tensor | None
    padding: Tensor | None
    seed: Tensor | None
    scale: float
    dropout_p: float

    def launch(self) -> Launch:
        """The settings that ship, for these tensors on their device."""
        architecture = 0
        if self.v.device.type == "cuda":
            major, minor = registry.capability(self.v.device)
            architecture = 10 * major + minor
        products = _precision(self.v) if self.v.dtype == torch.float32 else "half"
        width = max(self.q_content.shape[-1], self.q_spatial.shape[-1], self.v.shape[-1])
        return launch_settings(architecture, "half" if products == "emulate" else products, width)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, Q, h, N."""
        batch, queries, heads, _ = self.q_content.shape
        return batch, queries, heads, self.k_content.shape[1]

    def scalars(self) -> tuple:
        """Arguments of every kernel from `log2_scale` on, up to the widths."""
        _, queries, heads, keys = self.sizes
        height, width = (1, keys) if self.columns is None else (self.k_spatial.shape[1], self.columns.shape[1])
        columns = self.k_spatial if self.columns is None else self.columns
        tensors = (self.q_content, self.q_spatial, self.k_content, self.k_spatial, columns, self.v)
        strides = [stride for tensor in tensors for stride in _strides(tensor)]
        log2_scale = self.scale * math.log2(math.e)
        return log2_scale, self.dropout_p, queries, keys, heads, height, width, *strides

    def options(self, tiles: Tiles) -> dict[str, object]:
        """Compile-time arguments and launch settings."""
        return {
            **_widths(self.q_content.shape[-1], self.q_spatial.shape[-1], self.v.shape[-1]),
            "SEPARABLE": self.columns is not None,
            "HAS_VALID": self.valid_hw is not None,
            "HAS_PADDING": self.padding is not None,
            "HAS_DROPOUT": self.dropout_p > 0,
            "PRECISION": _precision(self.v),
            "BLOCK_Q": tiles.queries,
            "BLOCK_N": tiles.keys,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
            # Asked for, since its default differs between Triton's releases.
            "enable_fp_fusion": True,
        }


@functools.cache
def _widths(d: int, ds: int, dv: int) -> dict[str, int]:
    """Of heads, and their next powers of two."""
    widths = {"D": d, "DS": ds, "DV": dv}
    return {**widths, **{f"P{name}": max(16, registry.next_power_of_2(width)) for name, width in widths.items()}}


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """Of all dimensions but the last; 0 for images where all have the same."""
    image, position, head, _ = tensor.stride()
    return 0 if len(tensor) == 1 else image, position, head


def _precision(v: Tensor) -> str:
    """How products of float32 are formed; TF32 by PyTorch's own switch."""
    if v.device.type == "cpu":
        return "emulate"
    # Of PyTorch's several ways to ask, the one that answers whichever way was used to set it.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def forward(inputs: Inputs, launch: Launch | None = None) -> tuple[Tensor, Tensor]:
    """out [B, Q, h, dv] and log-sum-exp [B, h, Q] float32, base 2; see `op.py`. `launch`: for tuning."""
    batch, queries, heads, _ = inputs.sizes
    tiles = (launch or inputs.launch()).forward
    out = inputs.v.new_empty((batch, queries, heads, inputs.v.shape[-1]))
    lse = inputs.v.new_empty((batch, heads, queries), dtype=torch.float32)
    forward_kernel[(registry.cdiv(queries, tiles.queries), heads, batch)](
        inputs.q_content, inputs.q_spatial, inputs.k_content, inputs.k_spatial, inputs.columns, inputs.v, out, lse,
        inputs.valid_hw, inputs.padding, inputs.seed, *inputs.scalars(), **inputs.options(tiles),
    )  # fmt: skip
    return out, lse


def backward(
    inputs: Inputs, upstream: Tensor, out: Tensor, lse: Tensor, launch: Launch | None = None
) -> tuple[Tensor, ...]:
    """Gradients of q_content, q_spatial, k_content, k_spatial, columns (empty if dense) and v.

    Those of rows and columns are sums of the dense gradient in a fixed order, so that two runs agree bit for bit.
    """
    batch, queries, heads, keys = inputs.sizes
    settings = launch or inputs.launch()
    upstream = upstream.contiguous()
    delta = torch.empty_like(lse)
    saved = (
        inputs.q_content, inputs.q_spatial, inputs.k_content, inputs.k_spatial, inputs.columns, inputs.v,
        upstream, lse, delta,
    )  # fmt: skip
    rest = (inputs.valid_hw, inputs.padding, inputs.seed, inputs.scale, *inputs.scalars())
    grad_qc, grad_qs, grad_kc, grad_v = (
        x.new_empty(x.shape) for x in (inputs.q_content, inputs.q_spatial, inputs.k_content, inputs.v)
    )
    # Of separable keys the dense gradient is summed up afterwards.
    sums = inputs.k_spatial.dtype if inputs.columns is None else torch.float32
    grad_ks = upstream.new_empty((batch, keys, heads, inputs.q_spatial.shape[-1]), dtype=sums)
    backward_query_kernel[(registry.cdiv(queries, settings.backward_query.queries), heads, batch)](
        *saved, out, grad_qc, grad_qs, *rest, **inputs.options(settings.backward_query)
    )
    backward_key_kernel[(registry.cdiv(keys, settings.backward_key.keys), heads, batch)](
        *saved, grad_kc, grad_ks, grad_v, *rest, **inputs.options(settings.backward_key)
    )
    if inputs.columns is None:
        return grad_qc, grad_qs, grad_kc, grad_ks, upstream.new_empty(0), grad_v
    return grad_qc, grad_qs, grad_kc, *_sum_over_the_grid(grad_ks, inputs.k_spatial, inputs.columns), grad_v


def _sum_over_the_grid(grad_ks: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows and columns, from that of dense spatial keys [B, H·W, h, ds] float32, in one launch."""
    groups, height, width = len(rows), rows.shape[1], columns.shape[1]
    channels = grad_ks[0, 0].numel()
    grad_rows, grad_columns = rows.new_empty(rows.shape), columns.new_empty(columns.shape)
    backward_grid_kernel[(height + width, registry.cdiv(channels, GRID_TILE["BLOCK_C"]), groups)](
        grad_ks, grad_rows, grad_columns, len(grad_ks) // groups, height, width, channels, **GRID_TILE
    )
    return grad_rows, grad_columns
