"""Focal loss in one pass over the logits, and its gradient in another.

The backward pass recomputes the derivative from the logits. Storing it in the forward pass instead would move more
bytes (four tensors' worth instead of three: it must still be read and scaled by the incoming gradient), keep a copy as
large as the logits, and round it twice in half precision.

A program handles a block of rows, one row of K logits per prediction. All arithmetic is float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from conddetr.kernels.common.launch import cdiv, next_power_of_2
from conddetr.kernels.common.triton import load_float, own_block, store_cast, tile
from conddetr.kernels.focal.reference import class_weights

SIZES = ("rows", "queries", "capacity")
"""Not specialised (`operators.py` says why)."""
BLOCK_ELEMENTS = 2048
"""Logits per program: enough loads in flight for bandwidth, few enough registers not to spill."""


@triton.jit
def logistic(x):
    """σ(x) and log(1 + e^x), float32: without overflow, and exact to rounding on both sides of zero."""
    e = tl.exp(-tl.abs(x))
    one_more = 1.0 + e
    # log(1 + e) with the rounding of 1 + e divided out again.
    log1p = tl.where(one_more == 1.0, e, tl.log(one_more) * (e / tl.where(one_more == 1.0, 1.0, one_more - 1.0)))
    return tl.where(x >= 0, 1.0, e) / one_more, tl.maximum(x, 0.0) + log1p


@triton.jit
def class_of_object(labels, matched, image, capacity, mask):
    """Class of the object that a query is matched with, -1 for none."""
    is_object = mask & (matched >= 0) & (matched < capacity)
    return tl.load(labels + image.to(tl.int64) * capacity + matched, mask=is_object, other=-1)


@triton.jit
def load_block(
    logits, target, labels, rows, queries, capacity,
    CLASSES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, HAS_LABELS: tl.constexpr,
):  # fmt: skip
    """Offsets and mask [BLOCK, PADDED] of a block of one layer's rows, the logits, and whether each is the target's."""
    row = own_block(BLOCK)
    column = tl.arange(0, PADDED)
    inside = row < rows
    first = tl.program_id(1).to(tl.int64) * rows
    offset, mask = tile(first + row, inside, column, column < CLASSES, CLASSES)
    x = load_float(logits + offset, mask)
    wanted = tl.load(target + first + row, mask=inside, other=-1)
    if HAS_LABELS:
        wanted = class_of_object(labels, wanted, row // queries, capacity, inside)
    return offset, mask, x, column[None, :] == wanted[:, None]


@triton.jit(do_not_specialize=SIZES)
def focal_kernel(
    logits, target, labels, partial, rows, queries, capacity, gamma, present, absent,
    CLASSES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, HAS_LABELS: tl.constexpr,
):  # fmt: skip
    """partial[layer, block] = the loss of a block of rows."""
    _, mask, x, is_target = load_block(
        logits, target, labels, rows, queries, capacity, CLASSES, PADDED, BLOCK, HAS_LABELS
    )
    # Each class is a binary problem; z is the logit of the wrong answer.
    z = tl.where(is_target, -x, x)
    _, softplus = logistic(z)
    _, of_right = logistic(-z)
    loss = tl.where(is_target, present, absent) * tl.exp(-gamma * of_right) * softplus
    total = tl.sum(tl.sum(tl.where(mask, loss, 0.0), axis=1), axis=0)
    tl.store(partial + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), total)


@triton.jit(do_not_specialize=SIZES)
def focal_backward_kernel(
    grad_loss, logits, target, labels, grad, rows, queries, capacity, gamma, present, absent,
    CLASSES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, HAS_LABELS: tl.constexpr,
):  # fmt: skip
    """grad = grad_loss[layer] · derivative of the loss of each logit."""
    offset, mask, x, is_target = load_block(
        logits, target, labels, rows, queries, capacity, CLASSES, PADDED, BLOCK, HAS_LABELS
    )
    z = tl.where(is_target, -x, x)
    wrong, softplus = logistic(z)
    right, of_right = logistic(-z)
    weight = tl.where(is_target, -present, absent) * tl.load(grad_loss + tl.program_id(1))
    slope = weight * tl.exp(-gamma * of_right) * (gamma * right * softplus + wrong)
    store_cast(grad + offset, slope, mask)


def launch(classes: int) -> dict[str, int]:
    """Block sizes for a number of classes."""
    padded = next_power_of_2(classes)
    return {"CLASSES": classes, "PADDED": padded, "BLOCK": max(1, BLOCK_ELEMENTS // padded)}


def _grid(logits: Tensor, labels: Tensor | None) -> tuple[tuple[int, int], tuple[int, int, int], dict[str, object]]:
    """The grid; rows per layer, rows per image and objects per image; and the block sizes."""
    sizes = {**launch(logits.shape[-1]), "HAS_LABELS": labels is not None}
    rows = logits[0, ..., 0].numel()
    queries, capacity = (rows, 0) if labels is None else (rows // len(labels), labels.shape[1])
    return (cdiv(rows, sizes["BLOCK"]), len(logits)), (rows, queries, capacity), sizes


def forward(logits: Tensor, target: Tensor, labels: Tensor | None, alpha: float, gamma: float) -> Tensor:
    """Contiguous logits [L, ..., K], target [L, ...], labels [B, N] -> [L] float32; the order of the sum is fixed."""
    grid, counts, sizes = _grid(logits, labels)
    partial = logits.new_empty((grid[1], grid[0]), dtype=torch.float32)
    focal_kernel[grid](logits, target, labels, partial, *counts, gamma, *class_weights(alpha), **sizes)
    return partial.sum(1)


def backward(
    grad_loss: Tensor, logits: Tensor, target: Tensor, labels: Tensor | None, alpha: float, gamma: float
) -> Tensor:
    """Gradient of contiguous logits, in their dtype; grad_loss [L] float32, contiguous."""
    grid, counts, sizes = _grid(logits, labels)
    grad = torch.empty_like(logits)
    focal_backward_kernel[grid](grad_loss, logits, target, labels, grad, *counts, gamma, *class_weights(alpha), **sizes)
    return grad
