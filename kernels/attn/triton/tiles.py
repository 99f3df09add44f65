"""Shared code of the attention kernels: their tensors, the order of keys, tiles, and scores.

Keys are counted over the valid rectangle in row-major order: ordinal i is row i // valid_w and column i % valid_w, so
padding is never visited, right or bottom. Separable spatial keys R[y] + C[x] are added on chip.

Whole tiles need no mask. The last one, which may reach beyond the valid rectangle, is computed after them by separate
code. Images and heads are 64 bits wide; so are positions if one head of one image needs that (`OFFSET`).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from conddetr.kernels.common.triton import product


class Rows(NamedTuple):
    """A tensor [B, items, h, width] with a contiguous last dimension: its pointer and its strides."""

    data: object
    image: object
    item: object
    head: object


class Operands(NamedTuple):
    """Tensors that enter scores and sums. `k_spatial` has the rows of the grid if there are columns, else every key."""

    q_content: Rows
    q_spatial: Rows
    k_content: Rows
    k_spatial: Rows
    columns: Rows | None
    v: Rows


@triton.jit
def of_head(rows, image, head):
    """The tensor of one head of one image."""
    return rows.data + image * rows.image + head * rows.head


@triton.jit
def valid_rectangle(valid_cells, image, keys, height, width):
    """Number of keys to visit and width of a row of them. Clamped: a wrong `valid_cells` never reads outside."""
    visited, row_width = keys, width
    if valid_cells is not None:
        valid_height = tl.minimum(tl.maximum(tl.load(valid_cells + 2 * image), 0), height)
        row_width = tl.minimum(tl.maximum(tl.load(valid_cells + 2 * image + 1), 0), width)
        visited = valid_height * row_width
        row_width = tl.maximum(row_width, 1)
    return visited, row_width


@triton.jit
def outside_position(ordinal, visited, row_width, width):
    """Positions of the cells outside the valid rectangle: first those to its right, row by row, then those below."""
    valid_height = visited // row_width
    rest = width - row_width
    to_the_right = valid_height * rest
    safe = tl.maximum(rest, 1)
    right = ordinal // safe * width + row_width + ordinal % safe
    return tl.where(ordinal < to_the_right, right, valid_height * width + ordinal - to_the_right)


@triton.jit
def position_of(ordinal, row, column, width, valid_cells):
    """Positions of keys in the grid; without `valid_cells` they are the ordinals, which cost less."""
    position = ordinal
    if valid_cells is not None:
        position = row * width + column
    return position


@triton.jit
def last_row_of(visited, row_width):
    """Last row of the valid rectangle; of an empty one, the first. Reads there stay in the image and need no mask."""
    return tl.maximum(visited // row_width - 1, 0)


@triton.jit
def next_tile(row, column, row_width, BLOCK_N: tl.constexpr):
    """Rows and columns of the ordinals BLOCK_N further on, without a division for each."""
    column += BLOCK_N % row_width
    wraps = column >= row_width
    return row + BLOCK_N // row_width + wraps.to(tl.int32), tl.where(wraps, column - row_width, column)


@triton.jit
def load_rows(base, item, stride, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr, OFFSET: tl.constexpr):
    """[len(item), PADDED] of a tensor whose last dimension is contiguous; zeros outside. `inside` None: all inside."""
    channel = tl.arange(0, PADDED)
    pointers = base + item[:, None].to(OFFSET) * stride + channel[None, :]
    if inside is not None:
        value = tl.load(pointers, mask=inside[:, None] & (channel < WIDTH)[None, :], other=0.0)
    elif WIDTH == PADDED:
        value = tl.load(pointers)
    else:
        value = tl.load(pointers, mask=(channel < WIDTH)[None, :], other=0.0)
    return value


@triton.jit
def store_rows(base, item, stride, inside, value, WIDTH: tl.constexpr, PADDED: tl.constexpr, OFFSET: tl.constexpr):
    """The counterpart of `load_rows`."""
    channel = tl.arange(0, PADDED)
    pointers = base + item[:, None].to(OFFSET) * stride + channel[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=inside[:, None] & (channel < WIDTH)[None, :])


@triton.jit
def load_queries(
    tensors, image, head, query, is_query, D: tl.constexpr, DS: tl.constexpr, PD: tl.constexpr, PDS: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """Content and spatial queries."""
    content, spatial = of_head(tensors.q_content, image, head), of_head(tensors.q_spatial, image, head)
    q_c = load_rows(content, query, tensors.q_content.item, is_query, D, PD, OFFSET)
    return q_c, load_rows(spatial, query, tensors.q_spatial.item, is_query, DS, PDS, OFFSET)


@triton.jit
def load_parts(tensors, image, head, row, column, inside, DS: tl.constexpr, PDS: tl.constexpr, OFFSET: tl.constexpr):
    """Row and column parts of separable spatial keys; zeros for dense ones, which `load_keys` loads."""
    if tensors.columns is None:
        row_part = tl.zeros((row.shape[0], PDS), tensors.k_spatial.data.dtype.element_ty)
        column_part = row_part
    else:
        rows, columns = of_head(tensors.k_spatial, image, head), of_head(tensors.columns, image, head)
        row_part = load_rows(rows, row, tensors.k_spatial.item, inside, DS, PDS, OFFSET)
        column_part = load_rows(columns, column, tensors.columns.item, inside, DS, PDS, OFFSET)
    return row_part, column_part


@triton.jit
def load_keys(
    tensors, image, head, position, row_part, column_part, inside,
    D: tl.constexpr, DS: tl.constexpr, PD: tl.constexpr, PDS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Content and spatial keys of some positions; separable spatial keys are summed from their parts."""
    k_c = load_rows(of_head(tensors.k_content, image, head), position, tensors.k_content.item, inside, D, PD, OFFSET)
    if tensors.columns is None:
        spatial = of_head(tensors.k_spatial, image, head)
        k_s = load_rows(spatial, position, tensors.k_spatial.item, inside, DS, PDS, OFFSET)
    else:
        k_s = (row_part.to(tl.float32) + column_part.to(tl.float32)).to(row_part.dtype)
    return k_c, k_s


@triton.jit
def load_values(tensors, image, head, position, inside, DV: tl.constexpr, PDV: tl.constexpr, OFFSET: tl.constexpr):
    """Values of some positions."""
    return load_rows(of_head(tensors.v, image, head), position, tensors.v.item, inside, DV, PDV, OFFSET)


@triton.jit
def load_kept(keep, query, start, queries, BLOCK_N: tl.constexpr, OFFSET: tl.constexpr):
    """[queries, BLOCK_N] bool: which weights of the keys from `start` on dropout keeps; queries must be in bounds.

    keep: [words, queries] of one head of one image; bit j of word w is ordinal 32 w + j.
    """
    if BLOCK_N < 32:
        word = tl.load(keep + start // 32 * queries.to(OFFSET) + query)
        bits = (word[:, None] >> (start % 32 + tl.arange(0, BLOCK_N))[None, :]) & 1
    else:
        index = start // 32 + tl.arange(0, BLOCK_N // 32)
        words = tl.load(keep + index[None, :] * queries.to(OFFSET) + query[:, None])
        bits = tl.reshape((words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1, (query.shape[0], BLOCK_N))
    return bits != 0


@triton.jit
def load_kept_turned(keep, query, start, queries, BLOCK_N: tl.constexpr, OFFSET: tl.constexpr):
    """`load_kept`, transposed: [BLOCK_N, queries] bool."""
    if BLOCK_N < 32:
        word = tl.load(keep + start // 32 * queries.to(OFFSET) + query)
        bits = (word[None, :] >> (start % 32 + tl.arange(0, BLOCK_N))[:, None]) & 1
    else:
        index = start // 32 + tl.arange(0, BLOCK_N // 32)
        words = tl.load(keep + index[:, None] * queries.to(OFFSET) + query[None, :])
        bits = tl.reshape((words[:, None, :] >> tl.arange(0, 32)[None, :, None]) & 1, (BLOCK_N, query.shape[0]))
    return bits != 0


@triton.jit
def drop(weights, kept, kept_factor):
    """Weights after dropout, unscaled: zero if dropped. `kept` None: all are kept.

    The zero is not a constant to the compiler. With a constant it would round each weight before selecting, one by one;
    this way two are rounded at a time.
    """
    if kept is not None:
        weights = tl.where(kept, weights, 0.0 * kept_factor)
    return weights


@triton.jit
def scores_of(left_content, left_spatial, right_content, right_spatial, PRECISION: tl.constexpr):
    """[left, right] float32 before the scale: of queries with keys, or of keys with queries."""
    scores = tl.zeros((left_content.shape[0], right_content.shape[0]), tl.float32)
    scores = product(left_content, tl.trans(right_content), scores, PRECISION)
    return product(left_spatial, tl.trans(right_spatial), scores, PRECISION)
