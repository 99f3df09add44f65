"""The loss of transformers' Conditional DETR, computed by our criterion."""

import importlib.util
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.loss.loss_deformable_detr import DeformableDetrImageLoss

from conddetr.config import ModelConfig
from conddetr.loss.criterion import Criterion
from conddetr.zoo import build_criterion

MATCHING_ALPHA = 0.25
"""transformers matches with this α whatever `config.focal_alpha` says; ours has one for both."""


def detection_loss(
    logits: Tensor,
    labels: list[dict[str, Tensor]],
    device: torch.device,
    pred_boxes: Tensor,
    config: object,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    backend: str = "auto",
    **kwargs: object,
) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
    """transformers' `DeformableDetrForObjectDetectionLoss`: the same interface and, up to rounding, values.

    Its habits are kept: the classification loss has weight 1 whatever the configuration says, and with several
    processes the losses are divided by the mean count of objects over the number of processes.

    Args:
        logits: [B, Q, K].
        labels: per image `class_labels` [n] and `boxes` [n, 4] cxcywh in [0, 1].
        device: not used.
        pred_boxes: [B, Q, 4].
        config: transformers' configuration.
        outputs_class, outputs_coord: [L, B, Q, K] and [L, B, Q, 4] of all layers, with `config.auxiliary_loss`.
        backend: as in `build_criterion`.
        kwargs: of no meaning here, as in the original.

    Returns:
        The total; the unweighted losses and the cardinality error, by name; the outputs of the earlier layers.

    Raises:
        ValueError: labels do not fit, or predictions are not finite; names the image.
    """
    targets = [{"labels": label["class_labels"].long(), "boxes": label["boxes"]} for label in labels]
    auxiliary = []
    if config.auxiliary_loss:
        auxiliary = [
            {"logits": a, "pred_boxes": b} for a, b in zip(outputs_class[:-1], outputs_coord[:-1], strict=True)
        ]
    outputs = {"pred_logits": logits, "pred_boxes": pred_boxes}
    outputs["aux_outputs"] = [{"pred_logits": a["logits"], "pred_boxes": a["pred_boxes"]} for a in auxiliary]
    normalizer = _normalizer(sum(len(target["labels"]) for target in targets), logits.device)
    found = _criterion(config, backend)(outputs, targets, normalizer)

    # What the cardinality error counts differs between versions of transformers, so theirs counts.
    counter = DeformableDetrImageLoss(None, config.num_labels, config.focal_alpha, [])
    losses = {}
    for suffix, layer in [("", {"logits": logits}), *((f"_{i}", layer) for i, layer in enumerate(auxiliary))]:
        losses |= {f"{name}{suffix}": found[f"{name}{suffix}"] for name in ("loss_ce", "loss_bbox", "loss_giou")}
        losses[f"cardinality_error{suffix}"] = counter.loss_cardinality(layer, labels, None, None)["cardinality_error"]
    return found["loss"], losses, auxiliary if config.auxiliary_loss else None


def _criterion(config: object, backend: str) -> Criterion:
    return _build_criterion(
        ModelConfig(
            num_classes=config.num_labels,
            class_weight=1.0,
            bbox_weight=config.bbox_loss_coefficient,
            giou_weight=config.giou_loss_coefficient,
            class_cost=config.class_cost,
            bbox_cost=config.bbox_cost,
            giou_cost=config.giou_cost,
            focal_alpha=config.focal_alpha,
            backend=backend,
        )
    )


_build_criterion = lru_cache(maxsize=8)(build_criterion)


def _normalizer(count: int, device: torch.device) -> Tensor:
    """transformers' divisor, as `Criterion.normalizer` gives ours; the focal loss has no use for its second number.

    It is the count of this process, unless the package accelerate knows of several: then it is the mean over them,
    divided by their number again.
    """
    sums = torch.tensor([count, 1], dtype=torch.float64).to(device, non_blocking=True)
    processes = _accelerate_processes()
    if processes is not None and dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
        sums /= dist.get_world_size() * processes
    return sums.clamp(min=1)


def _accelerate_processes() -> int | None:
    """The number of processes as the package accelerate knows it; None where it was not set up."""
    if importlib.util.find_spec("accelerate") is None:
        return None
    from accelerate import PartialState

    return PartialState().num_processes if PartialState._shared_state != {} else None
