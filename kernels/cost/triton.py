"""Matching cost of all layers and images in one launch.

A program handles a tile of objects × queries of one image in one layer. Predictions are compared only with objects of
their own image, and only the logits of those objects' classes are read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from conddetr.kernels.boxes.triton import generalized_iou, load_box
from conddetr.kernels.common.launch import cdiv
from conddetr.kernels.common.triton import load_float
from conddetr.kernels.focal.triton import logistic

SIZES = ("batch", "queries", "capacity", "classes")
"""Not specialised (`operators.py` says why)."""
BLOCK_N, BLOCK_Q = 16, 64
"""Objects and queries per program."""
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def focal_cost(x, alpha, gamma):
    """Focal loss of a present class minus that of an absent one; logarithms add 1e-8 to probabilities."""
    p, of_absent = logistic(x)
    rest, of_present = logistic(-x)
    present = alpha * tl.exp(-gamma * of_absent) * -tl.log(p + 1e-8)
    absent = (1.0 - alpha) * tl.exp(-gamma * of_present) * -tl.log(rest + 1e-8)
    return present - absent


@triton.jit(do_not_specialize=SIZES)
def cost_kernel(
    logits, boxes, labels, objects, counts, log_total, cost,
    batch, queries, capacity, classes, class_weight, bbox_weight, giou_weight, alpha, gamma,
    SOFTMAX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """cost [L, B, N, Q] float32; zeros past an image's count."""
    problem = tl.program_id(2).to(tl.int64)
    image = problem % batch
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    item = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_query, is_object = query < queries, item < tl.load(counts + image)
    prediction = problem * queries + query
    target = image * capacity + item
    # Clamped: a wrong label never reads outside.
    label = tl.load(labels + target, mask=is_object & (item < capacity), other=0)
    label = tl.minimum(tl.maximum(label, 0), classes - 1)
    inside = (is_object & (item < capacity))[:, None] & is_query[None, :]
    x = load_float(logits + (prediction * classes)[None, :] + label[:, None], inside)
    if SOFTMAX:
        value = -tl.exp(x - tl.load(log_total + prediction, mask=is_query, other=0.0)[None, :])
    else:
        value = focal_cost(x, alpha, gamma)
    ax, ay, aw, ah = load_box(boxes, prediction, is_query)
    bx, by, bw, bh = load_box(objects, target, is_object & (item < capacity))
    ax, ay, aw, ah = ax[None, :], ay[None, :], aw[None, :], ah[None, :]
    bx, by, bw, bh = bx[:, None], by[:, None], bw[:, None], bh[:, None]
    l1 = tl.abs(ax - bx) + tl.abs(ay - by) + tl.abs(aw - bw) + tl.abs(ah - bh)
    value = class_weight * value + bbox_weight * l1 - giou_weight * generalized_iou(ax, ay, aw, ah, bx, by, bw, bh)
    # Not `minimum`, which may lose NaN.
    value = tl.where(value > LARGEST, LARGEST, value)
    offset = (problem * capacity + item)[:, None] * queries + query[None, :]
    tl.store(cost + offset, tl.where(inside, value, 0.0), mask=(item < capacity)[:, None] & is_query[None, :])


def forward(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    objects: Tensor,
    counts: Tensor,
    log_total: Tensor | None,
    class_weight: float,
    bbox_weight: float,
    giou_weight: float,
    alpha: float,
    gamma: float,
) -> Tensor:
    """Contiguous tensors; shapes as in `op.py`, log_total [L, B, Q] float32 -> [L, B, N, Q] float32."""
    layers, batch, queries, classes = logits.shape
    capacity = labels.shape[1]
    out = logits.new_empty((layers, batch, capacity, queries), dtype=torch.float32)
    grid = (cdiv(queries, BLOCK_Q), cdiv(capacity, BLOCK_N), layers * batch)
    cost_kernel[grid](
        logits, boxes, labels, objects, counts, log_total, out, batch, queries, capacity, classes,
        class_weight, bbox_weight, giou_weight, alpha, gamma,
        SOFTMAX=log_total is not None, BLOCK_N=BLOCK_N, BLOCK_Q=BLOCK_Q,
    )  # fmt: skip
    return out
