"""Boxes from offsets and reference points, forward and backward, in one launch each way.

Predictions of all layers and images are rows of 4·Q numbers: a column is one coordinate of one query. In backward a
program handles a block of columns and all rows, so it sums the gradient of its reference points alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from conddetr.kernels.common.launch import cdiv
from conddetr.kernels.common.triton import load_float, store_cast, tile
from conddetr.kernels.prediction import reference

SIZES = ("rows", "numbers")
"""Not specialised (`operators.py` says why)."""
BLOCK = 64
"""Columns per program: 19 programs for 300 queries."""
ROWS = 32
"""Rows per program and iteration."""
EPS = tl.constexpr(reference.EPS)


@triton.jit
def load_points(points, numbers, BLOCK: tl.constexpr):
    """Columns of a program; the mask of those with a point; numerator and denominator of its odds before they are
    clamped at EPS, 0.5 and 0.5 for sizes; and whether it is in [0, 1].
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_point = (column % 4 < 2) & (column < numbers)
    point = tl.load(points + column // 4 * 2 + column % 4, mask=is_point, other=0.5).to(tl.float32)
    # Not `clamp`, which would lose a NaN.
    inside = tl.where(point < 0, 0.0, tl.where(point > 1, 1.0, point))
    return column, is_point, inside, 1.0 - inside, (point >= 0) & (point <= 1)


@triton.jit(do_not_specialize=SIZES)
def predict_kernel(offsets, points, boxes, rows, numbers, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """boxes = sigmoid(offsets + log(x / (1 - x)) of the reference points)."""
    column, is_point, x, rest, _ = load_points(points, numbers, BLOCK)
    logit = tl.log(tl.where(x < EPS, EPS, x) / tl.where(rest < EPS, EPS, rest))
    logit = tl.where(is_point, logit, 0.0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    index, mask = tile(row.to(tl.int64), row < rows, column, column < numbers, numbers)
    value = load_float(offsets + index, mask) + logit[None, :]
    store_cast(boxes + index, 1.0 / (1.0 + tl.exp(-value)), mask)


@triton.jit(do_not_specialize=SIZES)
def predict_backward_kernel(
    grad, boxes, points, grad_offsets, grad_points, rows, numbers, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Gradients of the offsets, and of the reference points: the sum over all layers and images."""
    column, is_point, x, rest, is_inside = load_points(points, numbers, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        index, mask = tile(row.to(tl.int64), row < rows, column, column < numbers, numbers)
        box = load_float(boxes + index, mask)
        by_offset = load_float(grad + index, mask) * (box * (1.0 - box))
        store_cast(grad_offsets + index, by_offset, mask)
        total += tl.sum(by_offset, axis=0)
    # The derivative of log x - log(1 - x); a clamped term contributes nothing.
    slope = tl.where(x >= EPS, 1.0 / tl.where(x >= EPS, x, 1.0), 0.0)
    slope += tl.where(rest >= EPS, 1.0 / tl.where(rest >= EPS, rest, 1.0), 0.0)
    gradient = tl.where(is_inside, total * slope, 0.0)
    store_cast(grad_points + column // 4 * 2 + column % 4, gradient, is_point)


def forward(offsets: Tensor, points: Tensor) -> Tensor:
    """Contiguous offsets [L, B, Q, 4] and points [Q, 2] -> boxes."""
    boxes = torch.empty_like(offsets, dtype=torch.promote_types(offsets.dtype, points.dtype))
    rows, numbers = offsets.shape[0] * offsets.shape[1], 4 * offsets.shape[2]
    grid = (cdiv(numbers, BLOCK), cdiv(rows, ROWS))
    predict_kernel[grid](offsets, points, boxes, rows, numbers, ROWS=ROWS, BLOCK=BLOCK)
    return boxes


def backward(grad: Tensor, boxes: Tensor, points: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of offsets, of the given dtype, and of points; all contiguous."""
    grad_offsets, grad_points = torch.empty_like(boxes, dtype=dtype), torch.empty_like(points)
    rows, numbers = boxes.shape[0] * boxes.shape[1], 4 * boxes.shape[2]
    grid = (cdiv(numbers, BLOCK),)
    predict_backward_kernel[grid](grad, boxes, points, grad_offsets, grad_points, rows, numbers, ROWS=ROWS, BLOCK=BLOCK)
    return grad_offsets, grad_points
