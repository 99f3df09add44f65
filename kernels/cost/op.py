"""Matching cost: the public function, its checks, and the operator behind the kernel. There is no gradient.

Autocast changes nothing here: all arithmetic is float32, or float64 for float64 inputs.
"""

from typing import Any

import torch
from torch import Tensor

from conddetr.kernels import operators, paths, registry
from conddetr.kernels.cost import reference

OPERATION = registry.declare("matching_cost", triton=registry.Kernels())


@torch.no_grad()
def matching_cost(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    objects: Tensor,
    counts: Tensor,
    *,
    activation: str = "sigmoid",
    class_weight: float = 2.0,
    bbox_weight: float = 5.0,
    giou_weight: float = 2.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
    backend: str = "auto",
) -> Tensor:
    """Cost of matching every prediction with every object of its own image (DETR, section 3.1).

    class_weight · class cost + bbox_weight · L1 - giou_weight · GIoU

    Args:
        logits: [L, B, Q, K], floating.
        boxes: [L, B, Q, 4] as (cx, cy, w, h), floating.
        labels: [B, N] int64 in [0, K), padded to N.
        objects: [B, N, 4] as (cx, cy, w, h), floating, padded to N.
        counts: [B] int32, how many of the N are objects of each image.
        activation: `sigmoid`: the class cost comes from the focal loss; `softmax`: it is minus the probability.
        class_weight, bbox_weight, giou_weight: weights of the three terms.
        alpha, gamma: parameters of the focal loss.
        backend: `auto`, `triton` or `eager`.

    Returns:
        [L, B, N, Q] float32 (float64 if `logits` is), contiguous; zeros past an image's count. Finite for finite
        input: costs beyond the dtype become its largest number.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the tensor, the expected and the actual value.
        RuntimeError: the requested backend cannot run here; says why.
    """
    _check(logits, boxes, labels, objects, counts, activation)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # Logarithm of the softmax's denominator, once per prediction; afterwards only the objects' classes are read.
    log_total = logits.to(dtype).logsumexp(-1) if activation == "softmax" else None
    weights = (class_weight, bbox_weight, giou_weight)
    choice = OPERATION.choose(backend, logits.device, logits.dtype)
    if choice.backend == "eager" or labels.numel() * logits.numel() == 0:
        paths.note("matching_cost", "eager", choice.refused)
        return reference.matching_cost(logits, boxes, labels, objects, counts, log_total, weights, alpha, gamma)
    paths.note("matching_cost", choice.backend)
    tensors = [x.contiguous() for x in (logits, boxes, labels, objects, counts)]
    return torch.ops.conddetr.matching_cost(*tensors, log_total, *weights, alpha, gamma)


def _check(logits: Tensor, boxes: Tensor, labels: Tensor, objects: Tensor, counts: Tensor, activation: str) -> None:
    if logits.dim() != 4:
        raise ValueError(f"logits: expected [L, B, Q, K], got shape {tuple(logits.shape)}.")
    batch = logits.shape[1]
    capacity = labels.shape[1] if labels.dim() == 2 else "N"
    for name, tensor, shape, dtype in (
        ("logits", logits, tuple(logits.shape), None),
        ("boxes", boxes, (*logits.shape[:3], 4), None),
        ("labels", labels, (batch, capacity), torch.int64),
        ("objects", objects, (batch, capacity, 4), None),
        ("counts", counts, (batch,), torch.int32),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}.")
        if tensor.dtype != dtype if dtype else not tensor.is_floating_point():
            raise ValueError(f"{name}: expected dtype {dtype or 'floating'}, got {tensor.dtype}.")
        if tensor.device != logits.device:
            raise ValueError(f"{name}: expected device {logits.device} like logits, got {tensor.device}.")
    if activation not in ("sigmoid", "softmax"):
        raise ValueError(f"activation: expected sigmoid or softmax, got {activation!r}.")


def _fake(*inputs: Any) -> Tensor:
    logits, labels = inputs[0], inputs[2]
    layers, batch, queries, _ = logits.shape
    return logits.new_empty((layers, batch, labels.shape[1], queries), dtype=torch.float32)


operators.register(
    "matching_cost",
    "(Tensor logits, Tensor boxes, Tensor labels, Tensor objects, Tensor counts, Tensor? log_total, "
    "float class_weight, float bbox_weight, float giou_weight, float alpha, float gamma) -> Tensor",
    launch=operators.launcher(__package__, "forward"),
    fake=_fake,
)
