"""Bipartite matching of predictions and objects.

Source: DETR section 3.1; `models/matcher.py` of the official Conditional DETR (focal cost) and DETR.
"""

import torch
from torch import Tensor

from conddetr.config import ModelConfig
from conddetr.kernels import linear_assignment
from conddetr.kernels import matching_cost as cost_of_pairs
from conddetr.kernels.registry import OPERATIONS
from conddetr.loss.targets import PackedTargets, pack_targets


class NonFiniteCostError(ValueError):
    """The predictions or the boxes hold NaN or infinity, so there is no assignment of least cost."""


def matching_cost(
    logits: Tensor, boxes: Tensor, targets: PackedTargets, config: ModelConfig, backend: str = "auto"
) -> Tensor:
    """Cost of every prediction for every object of its image, weighted as in the configuration.

    Args:
        logits: [L, B, Q, K]; boxes: [L, B, Q, 4] cxcywh; targets: on the same device.

    Returns:
        [L, B, N, Q] float32 (float64 if `logits` is).
    """
    return cost_of_pairs(
        logits,
        boxes,
        targets.labels,
        targets.boxes,
        targets.device_counts,
        activation=config.activation,
        class_weight=config.class_cost,
        bbox_weight=config.bbox_cost,
        giou_weight=config.giou_cost,
        alpha=config.focal_alpha,
        gamma=config.focal_gamma,
        backend=backend,
    )


def assign(
    logits: Tensor,
    boxes: Tensor,
    targets: PackedTargets,
    config: ModelConfig,
    backend: str = "auto",
    check_finite: bool | None = None,
) -> Tensor:
    """The assignment of least total cost, for each layer and image.

    Args:
        logits: [L, B, Q, K]; boxes: [L, B, Q, 4] cxcywh; targets: on the same device.
        config: of the model.
        backend: as in `linear_assignment`; with more objects than queries `auto` is `eager`.
        check_finite: see `Criterion`.

    Returns:
        [L, B, Q] int64: the object that each query gets, -1 for none.

    Raises:
        ValueError: more objects than queries, and the backend does not support that; names the image.
        NonFiniteCostError: a cost is not finite; names the layer and the image.
    """
    queries = logits.shape[2]
    cost = matching_cost(logits.detach(), boxes.detach(), targets, config, backend)
    most = max(targets.counts)
    if most > queries and backend == "auto":
        backend = "eager"
    choice = OPERATIONS["linear_assignment"].choose(backend, cost.device, cost.dtype, queries).backend
    if choice != "eager" and most > queries:
        image = targets.counts.index(most)
        raise ValueError(
            f"targets[{image}]: {most} objects, the model has {queries} queries: raise its "
            "num_queries, or build the criterion with backend='eager', which matches the best of them."
        )
    if choice != "triton" if check_finite is None else check_finite:
        _refuse_non_finite(cost)
    return linear_assignment(cost, targets.device_counts, choice)


def _refuse_non_finite(cost: Tensor) -> None:
    non_finite = (~torch.isfinite(cost)).flatten(2).any(2)
    if non_finite.any():
        layer, image = non_finite.nonzero()[0].tolist()
        raise NonFiniteCostError(
            f"Matching decoder layer {layer}, image {image} of the batch: the cost is not finite. "
            f"The predictions (or the boxes of the targets) hold NaN or infinity."
        )


def match(logits: Tensor, boxes: Tensor, targets: list[dict], config: ModelConfig) -> list[list[tuple[Tensor, Tensor]]]:
    """The assignment as pairs of indices, per layer and image.

    Args:
        logits: [L, B, Q, K]; boxes: [L, B, Q, 4] cxcywh in [0, 1].
        targets: per image `labels` [n] int64 and `boxes` [n, 4] cxcywh.

    Returns:
        `indices[layer][image]`: (query indices, object indices), int64 on the CPU, min(Q, n) pairs, sorted by
        query.

    Raises:
        ValueError: targets do not fit, or a cost is not finite; names the layer and the image.
    """
    packed = pack_targets(targets, config.num_classes).to(logits.device)
    assignment = assign(logits, boxes, packed, config, check_finite=True).cpu()
    return [[_pairs(image_assignment) for image_assignment in layer_assignment] for layer_assignment in assignment]


def _pairs(assignment: Tensor) -> tuple[Tensor, Tensor]:
    query = (assignment >= 0).nonzero()[:, 0]
    return query, assignment[query]
