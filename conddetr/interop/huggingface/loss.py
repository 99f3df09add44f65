"""The loss of transformers' Conditional DETR, computed by our criterion."""

import importlib.util
from functools import lru_cache, partial

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss, DeformableDetrImageLoss

from conddetr.config import ModelConfig
from conddetr.kernels import paths
from conddetr.loss.criterion import Criterion, loss_backend
from conddetr.zoo import build_criterion

MATCHING_ALPHA = 0.25
"""transformers matches with this α, independent of `config.focal_alpha`; ours has one α for both."""


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
    """transformers' `DeformableDetrForObjectDetectionLoss`: the same interface and, up to rounding, the same values.

    Its peculiarities are kept: the classification loss always has weight 1, with several processes the losses are
    divided by the mean count of objects over the number of processes, and predictions that are not finite are matched
    as well. On a GPU the host never waits. If α differs from the matching's, the original runs.

    Args:
        logits: [B, Q, K].
        labels: per image `class_labels` [n] and `boxes` [n, 4] cxcywh in [0, 1].
        device: not used.
        pred_boxes: [B, Q, 4].
        config: transformers' configuration.
        outputs_class, outputs_coord: [L, B, Q, K] and [L, B, Q, 4] of all layers, with `config.auxiliary_loss`.
        backend: as in `build_criterion`.
        kwargs: ignored, as in the original.

    Returns:
        The total; the unweighted losses and the cardinality error, by name; the outputs of the earlier layers.

    Raises:
        ValueError: labels do not fit; names the image. Values on a GPU stop the device instead.
    """
    if config.focal_alpha != MATCHING_ALPHA:
        # The configuration was changed after `accelerate`.
        paths.note("loss", "transformers' own")
        layers = (outputs_class, outputs_coord)
        return DeformableDetrForObjectDetectionLoss(logits, labels, device, pred_boxes, config, *layers, **kwargs)
    targets = [{"labels": label["class_labels"].long(), "boxes": label["boxes"]} for label in labels]
    auxiliary = []
    if config.auxiliary_loss:
        auxiliary = [
            {"logits": a, "pred_boxes": b} for a, b in zip(outputs_class[:-1], outputs_coord[:-1], strict=True)
        ]
    outputs = {"pred_logits": logits, "pred_boxes": pred_boxes}
    outputs["aux_outputs"] = [{"pred_logits": a["logits"], "pred_boxes": a["pred_boxes"]} for a in auxiliary]
    normalizer = _normalizer(sum(len(target["labels"]) for target in targets), logits.device)
    result = _criterion(config, backend)(outputs, targets, normalizer)

    losses = {}
    errors = _cardinality_errors(torch.stack([logits, *(layer["logits"] for layer in auxiliary)]), labels)
    for suffix, error in zip(["", *(f"_{i}" for i in range(len(auxiliary)))], errors, strict=True):
        losses |= {f"{name}{suffix}": result[f"{name}{suffix}"] for name in ("loss_ce", "loss_bbox", "loss_giou")}
        losses[f"cardinality_error{suffix}"] = error
    return result["loss"], losses, auxiliary if config.auxiliary_loss else None


@torch.no_grad()
def _cardinality_errors(logits: Tensor, labels: list[dict[str, Tensor]]) -> list[Tensor]:
    """[L, B, Q, K] -> for each layer, the mean absolute error of the predicted number of objects."""
    counts = torch.tensor([len(label["class_labels"]) for label in labels], dtype=torch.float32)
    counts = counts.to(logits.device, non_blocking=True)
    is_object = logits.amax(-1).sigmoid() > 0.5 if _counts_scores() else logits.argmax(-1) != logits.shape[-1] - 1
    return list((is_object.sum(-1).float() - counts).abs().mean(-1).unbind())


@lru_cache
def _counts_scores() -> bool:
    """Whether this version of transformers counts scores above one half; others count best classes except the last.

    One prediction that only the latter count shows it. transformers' own function makes the host wait in every layer.
    """
    unlikely = {"logits": torch.tensor([[[-1.0, -2.0]]])}
    nothing = [{"class_labels": torch.zeros(0, dtype=torch.int64)}]
    counter = DeformableDetrImageLoss(None, 2, MATCHING_ALPHA, [])
    return counter.loss_cardinality(unlikely, nothing, None, None)["cardinality_error"].item() == 0


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
        ),
        loss_backend(backend),
    )


# transformers replaces costs that are not finite and continues.
_build_criterion = lru_cache(maxsize=8)(partial(build_criterion, check_finite=False))


def _normalizer(count: int, device: torch.device) -> Tensor:
    """transformers' divisor, in the form of `Criterion.normalizer`; the focal loss does not use its second number.

    It is the count of this process, unless the package accelerate has several: then it is the mean over them, divided
    by their number again.
    """
    sums = torch.tensor([count, 1], dtype=torch.float64).to(device, non_blocking=True)
    processes = _accelerate_processes()
    if processes is not None and dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
        sums /= dist.get_world_size() * processes
    return sums.clamp(min=1)


def _accelerate_processes() -> int | None:
    """The number of processes that the package accelerate reports; None if it was not set up."""
    if importlib.util.find_spec("accelerate") is None:
        return None
    from accelerate import PartialState

    return PartialState().num_processes if PartialState._shared_state != {} else None
