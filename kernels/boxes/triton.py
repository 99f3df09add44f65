"""L1 and generalised IoU of matched boxes, forward and backward, in one launch each.

A program handles a block of one layer's predictions, matched or not. It also writes the zero gradients of unmatched
boxes, so nothing is cleared before, and nothing is added atomically.

All arithmetic is float32. Boxes are split by axis: width and height have the same formulas.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from conddetr.kernels.boxes import reference
from conddetr.kernels.common.launch import cdiv
from conddetr.kernels.common.triton import load_float, store_cast

SIZES = ("predictions", "queries", "capacity")
"""Not specialised (`operators.py` says why)."""
BLOCK = 128
"""Predictions per program."""
SMALL = tl.constexpr(reference.SMALL)


@triton.jit
def load_box(boxes, index, mask):
    """cx, cy, w, h of boxes [..., 4] in float32; zeros where masked."""
    cx = load_float(boxes + 4 * index, mask)
    cy = load_float(boxes + 4 * index + 1, mask)
    w = load_float(boxes + 4 * index + 2, mask)
    h = load_float(boxes + 4 * index + 3, mask)
    return cx, cy, w, h


@triton.jit
def ends(center, size):
    """Start and end of a box on one axis, over four: exact, and finite for every finite box."""
    return 0.25 * center - 0.125 * size, 0.25 * center + 0.125 * size


@triton.jit
def extents(center_a, size_a, center_b, size_b):
    """Lengths on one axis of a and b from corner to corner, of their intersection, and of their hull; over four."""
    a0, a1 = ends(center_a, size_a)
    b0, b1 = ends(center_b, size_b)
    shared = tl.maximum(tl.minimum(a1, b1) - tl.maximum(a0, b0), 0.0)
    return a1 - a0, b1 - b0, shared, tl.maximum(a1, b1) - tl.minimum(a0, b0)


@triton.jit
def relative_extents(ax, ay, aw, ah, bx, by, bw, bh):
    """Lengths on both axes: the hull's, and those of a, b and their intersection in units of the hull, so that no
    product overflows. Also whether the hull has an area; if not, its lengths are 1.
    """
    width_a, width_b, width, hull_width = extents(ax, aw, bx, bw)
    height_a, height_b, height, hull_height = extents(ay, ah, by, bh)
    is_area = (hull_width >= SMALL) & (hull_height >= SMALL)
    hull_width, hull_height = tl.where(is_area, hull_width, 1.0), tl.where(is_area, hull_height, 1.0)
    width_a, width_b, width = width_a / hull_width, width_b / hull_width, width / hull_width
    height_a, height_b, height = height_a / hull_height, height_b / hull_height, height / hull_height
    return width_a, width_b, width, hull_width, height_a, height_b, height, hull_height, is_area


@triton.jit
def area_ratio(part, whole):
    """part / whole; 0 if the whole has no area."""
    is_area = whole >= SMALL
    return tl.where(is_area, part / tl.where(is_area, whole, 1.0), 0.0)


@triton.jit
def generalized_iou(ax, ay, aw, ah, bx, by, bw, bh):
    """Generalised IoU of boxes (cx, cy, w, h) that broadcast against each other."""
    width_a, width_b, width, _, height_a, height_b, height, _, is_area = relative_extents(
        ax, ay, aw, ah, bx, by, bw, bh
    )
    intersection = width * height
    union = width_a * height_a + width_b * height_b - intersection
    return tl.where(is_area, area_ratio(intersection, union) + union - 1.0, 0.0)


@triton.jit
def above(a, b):
    """Derivative of max(a, b) by a: half at a tie, as in PyTorch."""
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def axis_gradient(center_a, size_a, center_b, size_b, by_length, by_shared, by_hull):
    """Gradients of a's center and size, from those of the lengths that `extents` returns."""
    a0, a1 = ends(center_a, size_a)
    b0, b1 = ends(center_b, size_b)
    by_shared = tl.where(tl.minimum(a1, b1) > tl.maximum(a0, b0), by_shared, 0.0)
    by_a0 = -by_length - by_shared * above(a0, b0) - by_hull * above(b0, a0)
    by_a1 = by_length + by_shared * above(b1, a1) + by_hull * above(a1, b1)
    return 0.25 * (by_a0 + by_a1), 0.125 * (by_a1 - by_a0)


@triton.jit
def sign(x):
    """-1, 0 or 1."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def load_pairs(boxes, objects, assignment, predictions, queries, capacity, BLOCK: tl.constexpr):
    """A block of one layer's predictions: their index and mask, whether each is matched, both boxes of each pair."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = position < predictions
    index = tl.program_id(1).to(tl.int64) * predictions + position
    matched = tl.load(assignment + index, mask=inside, other=-1)
    is_matched = (matched >= 0) & (matched < capacity)
    image = (position // queries).to(tl.int64)
    ax, ay, aw, ah = load_box(boxes, index, is_matched)
    bx, by, bw, bh = load_box(objects, image * capacity + matched, is_matched)
    return index, inside, is_matched, ax, ay, aw, ah, bx, by, bw, bh


@triton.jit(do_not_specialize=SIZES)
def box_loss_kernel(boxes, objects, assignment, partial, predictions, queries, capacity, BLOCK: tl.constexpr):
    """partial[0, layer, block] = L1 and partial[1, layer, block] = GIoU loss of a block's matched predictions."""
    _, _, is_matched, ax, ay, aw, ah, bx, by, bw, bh = load_pairs(
        boxes, objects, assignment, predictions, queries, capacity, BLOCK
    )
    l1 = tl.abs(ax - bx) + tl.abs(ay - by) + tl.abs(aw - bw) + tl.abs(ah - bh)
    overlap = tl.where(is_matched, 1.0 - generalized_iou(ax, ay, aw, ah, bx, by, bw, bh), 0.0)
    slot = partial + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(slot, tl.sum(l1, axis=0))
    tl.store(slot + tl.num_programs(0) * tl.num_programs(1), tl.sum(overlap, axis=0))


@triton.jit(do_not_specialize=SIZES)
def box_loss_backward_kernel(
    grad_loss, boxes, objects, assignment, grad, predictions, queries, capacity, BLOCK: tl.constexpr
):
    """Gradient of every prediction, from grad_loss [2, L] of the two losses."""
    index, inside, is_matched, ax, ay, aw, ah, bx, by, bw, bh = load_pairs(
        boxes, objects, assignment, predictions, queries, capacity, BLOCK
    )
    of_l1 = tl.load(grad_loss + tl.program_id(1))
    of_giou = -tl.load(grad_loss + tl.num_programs(1) + tl.program_id(1))
    width_a, width_b, width, hull_width, height_a, height_b, height, hull_height, is_area = relative_extents(
        ax, ay, aw, ah, bx, by, bw, bh
    )
    of_giou = tl.where(is_area, of_giou, 0.0)
    intersection = width * height
    union = width_a * height_a + width_b * height_b - intersection
    by_union = of_giou * (1.0 - area_ratio(area_ratio(intersection, union), union))
    by_intersection = of_giou * area_ratio(1.0, union) - by_union
    # Gradients of both axes' lengths in units of the hull; then of the lengths and of the hull, their divisor.
    by_width, by_shared_width = by_union * height_a, by_intersection * height
    by_hull = -(by_width * width_a + by_union * height_b * width_b + by_shared_width * width) / hull_width
    by_cx, by_w = axis_gradient(ax, aw, bx, bw, by_width / hull_width, by_shared_width / hull_width, by_hull)
    by_height, by_shared_height = by_union * width_a, by_intersection * width
    by_hull = -(by_height * height_a + by_union * width_b * height_b + by_shared_height * height) / hull_height
    by_cy, by_h = axis_gradient(ay, ah, by, bh, by_height / hull_height, by_shared_height / hull_height, by_hull)
    store_cast(grad + 4 * index, tl.where(is_matched, by_cx + of_l1 * sign(ax - bx), 0.0), inside)
    store_cast(grad + 4 * index + 1, tl.where(is_matched, by_cy + of_l1 * sign(ay - by), 0.0), inside)
    store_cast(grad + 4 * index + 2, tl.where(is_matched, by_w + of_l1 * sign(aw - bw), 0.0), inside)
    store_cast(grad + 4 * index + 3, tl.where(is_matched, by_h + of_l1 * sign(ah - bh), 0.0), inside)


def _sizes(boxes: Tensor, objects: Tensor) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """The grid; predictions per layer, queries and capacity."""
    layers, batch, queries, _ = boxes.shape
    return (cdiv(batch * queries, BLOCK), layers), (batch * queries, queries, objects.shape[1])


def forward(boxes: Tensor, objects: Tensor, assignment: Tensor) -> Tensor:
    """Contiguous boxes [L, B, Q, 4], objects [B, N, 4], assignment [L, B, Q] -> [2, L] float32."""
    grid, sizes = _sizes(boxes, objects)
    partial = boxes.new_empty((2, grid[1], grid[0]), dtype=torch.float32)
    box_loss_kernel[grid](boxes, objects, assignment, partial, *sizes, BLOCK=BLOCK)
    return partial.sum(2)


def backward(grad_loss: Tensor, boxes: Tensor, objects: Tensor, assignment: Tensor) -> Tensor:
    """Gradient of the boxes, in their dtype; grad_loss [2, L] float32; all contiguous."""
    grid, sizes = _sizes(boxes, objects)
    grad = torch.empty_like(boxes)
    box_loss_backward_kernel[grid](grad_loss, boxes, objects, assignment, grad, *sizes, BLOCK=BLOCK)
    return grad
