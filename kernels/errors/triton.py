"""Errors of predictions: one program counts for each image and layer, then one program per layer sums.

Counts are exact in float32: there are fewer than 2²⁴ queries in a batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from conddetr.kernels.common.triton import tile
from conddetr.kernels.focal.triton import class_of_object
from conddetr.kernels.focal.triton import launch as tiles

SIZES = ("queries", "capacity", "batch", "layers")
"""Not specialised (see `operators.py`)."""
BLOCK = 64
"""Images that are summed at a time."""


@triton.jit(do_not_specialize=SIZES)
def count_errors_kernel(
    logits, assignment, labels, counts, partial, queries, capacity, batch, layers,
    CLASSES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[layer, image] = (|predicted - actual| objects, matched queries, matched queries of a wrong class)."""
    image, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = (layer * batch + image) * queries
    column = tl.arange(0, PADDED)
    objects = tl.zeros((BLOCK,), tl.int32)
    matched = tl.zeros((BLOCK,), tl.int32)
    wrong = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, queries, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < queries
        offset, mask = tile(first + row, inside, column, column < CLASSES, CLASSES)
        x = tl.load(logits + offset, mask=mask, other=float("-inf")).to(tl.float32)
        # As in PyTorch, NaN is the largest, and among equal logits the first is the best.
        x = tl.where(x == x, x, float("inf"))
        best = tl.max(x, axis=1)
        choice = tl.min(tl.where((x == best[:, None]) & (column < CLASSES)[None, :], column[None, :], PADDED), axis=1)
        objects += (inside & (choice < CLASSES - 1)).to(tl.int32)
        matches = tl.load(assignment + first + row, mask=inside, other=-1)
        label = class_of_object(labels, matches, image, capacity, inside)
        matched += (label >= 0).to(tl.int32)
        wrong += ((label >= 0) & (label != choice)).to(tl.int32)
    slot = partial + 3 * (layer * batch + image)
    difference = tl.sum(objects, axis=0) - tl.load(counts + image)
    tl.store(slot, tl.abs(difference).to(tl.float32))
    tl.store(slot + 1, tl.sum(matched, axis=0).to(tl.float32))
    tl.store(slot + 2, tl.sum(wrong, axis=0).to(tl.float32))


@triton.jit(do_not_specialize=SIZES)
def sum_errors_kernel(partial, errors, batch, layers, BLOCK: tl.constexpr):
    """errors[layer] = mean difference per image; errors[layers] = percentage of wrong classes in the last layer."""
    layer = tl.program_id(0)
    differences = tl.zeros((BLOCK,), tl.float32)
    matched = tl.zeros((BLOCK,), tl.float32)
    wrong = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, batch, BLOCK):
        image = start + tl.arange(0, BLOCK)
        slot = partial + 3 * (layer * batch + image)
        differences += tl.load(slot, mask=image < batch, other=0.0)
        matched += tl.load(slot + 1, mask=image < batch, other=0.0)
        wrong += tl.load(slot + 2, mask=image < batch, other=0.0)
    tl.store(errors + layer, tl.sum(differences, axis=0) / batch)
    if layer == layers - 1:
        total = tl.sum(matched, axis=0)
        right = total - tl.sum(wrong, axis=0)
        tl.store(errors + layers, 100.0 - 100.0 * right / tl.maximum(total, 1.0))


def forward(logits: Tensor, assignment: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Contiguous tensors; shapes as in `op.py` -> [L + 1] float32: cardinality error per layer, then class error."""
    layers, batch, queries, classes = logits.shape
    partial = logits.new_empty((layers, batch, 3), dtype=torch.float32)
    errors = logits.new_empty(layers + 1, dtype=torch.float32)
    count_errors_kernel[(batch, layers)](
        logits, assignment, labels, counts, partial, queries, labels.shape[1], batch, layers, **tiles(classes)
    )
    sum_errors_kernel[(layers,)](partial, errors, batch, layers, BLOCK=BLOCK)
    return errors
