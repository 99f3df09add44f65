"""The training loss of both families.

Source: DETR section 3.1, Conditional DETR section 3.4; `SetCriterion` of the official code.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, sigmoid_focal_loss

from conddetr.config import ModelConfig
from conddetr.loss.boxes import generalized_iou
from conddetr.loss.matcher import match


class Criterion(nn.Module):
    """Matches predictions and objects, then computes the losses of every decoder layer at once.

    All arithmetic is float32 or wider, whatever the dtype of the predictions.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weights = {
            "loss_ce": config.class_weight,
            "loss_bbox": config.bbox_weight,
            "loss_giou": config.giou_weight,
        }
        class_weight = torch.ones(config.num_logits)
        class_weight[-1] = config.no_object_weight
        self.no_object_weight = class_weight[-1].item()
        self.register_buffer("class_weight", class_weight, persistent=False)

    def normalizer(self, counts: Sequence[int], num_queries: int, device: torch.device) -> Tensor:
        """What sums over images are divided by: averaged over the processes, so that averaging their gradients gives
        the gradient of one big batch.

        Args:
            counts: objects of each image: of one batch, or of all batches whose gradients are added up.
            num_queries: predictions per image.
            device: of the predictions.

        Returns:
            [2] float64: objects, at least 1; and the summed weights of the `detr` family's cross-entropy.
        """
        matched = sum(min(count, num_queries) for count in counts)
        unmatched = len(counts) * num_queries - matched
        sums = torch.tensor([sum(counts), matched + unmatched * self.no_object_weight], dtype=torch.float64)
        sums = sums.to(device, non_blocking=True)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
            sums /= dist.get_world_size()
        sums[0].clamp_(min=1)
        return sums

    def forward(self, outputs: dict, targets: list[dict], normalizer: Tensor | None = None) -> dict[str, Tensor]:
        """The losses.

        Args:
            outputs: as the model returns them.
            targets: per image `labels` [n] int64 in [0, num_classes) and `boxes` [n, 4] cxcywh in [0, 1].
            normalizer: from the method of that name, where more than this batch makes a step; default: this batch's.

        Returns:
            Scalars: `loss`, the weighted total; `loss_ce`, `loss_bbox`, `loss_giou`, unweighted, of the last
            layer, and with suffix `_0`, `_1`… of the earlier ones; for logging, without gradient,
            `class_error` in percent and `cardinality_error[_i]` in objects.

        Raises:
            ValueError: targets do not fit; names the image, what was expected and what was found.
        """
        layers = [*outputs.get("aux_outputs", []), outputs]
        logits, boxes = (torch.stack([layer[k] for layer in layers]) for k in ("pred_logits", "pred_boxes"))
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logits, boxes = logits.to(dtype), boxes.to(dtype)
        check_targets(targets, logits.shape[1], self.config.num_classes)

        matched = _flatten(match(logits.detach(), boxes.detach(), targets, self.config), targets, logits)
        if normalizer is None:
            counts = [len(target["labels"]) for target in targets]
            normalizer = self.normalizer(counts, logits.shape[2], logits.device)
        num_boxes, class_weights = normalizer.to(dtype)
        losses = {
            **self._classification(logits, matched, class_weights if self.config.family == "detr" else num_boxes),
            **_box_losses(boxes, matched, num_boxes),
        }
        logs = _logs(logits.detach(), matched, targets)
        total = sum(self.weights[name] * value.sum() for name, value in losses.items())
        return {"loss": total, **_name_by_layer({**losses, **logs})}

    def _classification(self, logits: Tensor, matched: "_Matched", divisor: Tensor) -> dict[str, Tensor]:
        """Classification loss per layer, [L]."""
        num_layers, batch, queries, classes = logits.shape
        if self.config.family == "detr":
            target = matched.labels.new_full((num_layers, batch, queries), classes - 1)
            target[matched.layer, matched.image, matched.query] = matched.labels
            weight = self.class_weight.to(logits.dtype)
            loss = F.cross_entropy(logits.flatten(0, 2), target.flatten(), weight, reduction="none")
        else:
            target = torch.zeros_like(logits)
            target[matched.layer, matched.image, matched.query, matched.labels] = 1.0
            loss = sigmoid_focal_loss(logits, target, self.config.focal_alpha, self.config.focal_gamma)
        return {"loss_ce": loss.view(num_layers, -1).sum(1) / divisor}


class _Matched:
    """Matched pairs of all layers. Every layer has the same number of pairs M, so all are [L, M]."""

    def __init__(self, layer: Tensor, image: Tensor, query: Tensor, labels: Tensor, boxes: Tensor) -> None:
        self.layer, self.image, self.query, self.labels, self.boxes = layer, image, query, labels, boxes


def _flatten(indices: list, targets: list[dict], logits: Tensor) -> _Matched:
    """Matching of each layer and image -> index tensors over all of them, on the device of `logits`.

    The copies are small and from memory of their own: `non_blocking` keeps them from waiting for the device.
    """
    device = logits.device
    image = torch.cat([torch.full_like(query, b) for b, (query, _) in enumerate(indices[0])])
    query = torch.stack([torch.cat([query for query, _ in layer]) for layer in indices])
    offsets = torch.tensor([0] + [len(target["labels"]) for target in targets]).cumsum(0)
    index = torch.stack([torch.cat([obj + offsets[b] for b, (_, obj) in enumerate(layer)]) for layer in indices])
    labels = torch.cat([target["labels"] for target in targets]).to(device, non_blocking=True)
    boxes = torch.cat([target["boxes"].reshape(-1, 4) for target in targets]).to(
        device, logits.dtype, non_blocking=True
    )
    index = index.to(device, non_blocking=True)
    layer = torch.arange(len(indices), device=device)[:, None].expand_as(index)
    image, query = (part.to(device, non_blocking=True) for part in (image, query))
    return _Matched(layer, image.expand_as(index), query, labels[index], boxes[index])


def _box_losses(boxes: Tensor, matched: _Matched, num_boxes: Tensor) -> dict[str, Tensor]:
    """L1 and GIoU loss of the matched pairs per layer, [L] each."""
    predicted = boxes[matched.layer, matched.image, matched.query]
    giou = generalized_iou(box_convert(predicted, "cxcywh", "xyxy"), box_convert(matched.boxes, "cxcywh", "xyxy"))
    return {
        "loss_bbox": (predicted - matched.boxes).abs().sum((1, 2)) / num_boxes,
        "loss_giou": (1 - giou).sum(1) / num_boxes,
    }


@torch.no_grad()
def _logs(logits: Tensor, matched: _Matched, targets: list[dict]) -> dict[str, Tensor]:
    """Class error in percent of the last layer (scalar) and cardinality error in objects per layer, [L].

    As in the official code, cardinality counts queries whose best class is not the last logit; that counts
    objects in DETR, where the last is no-object, and says little in Conditional DETR.
    """
    best = logits[-1, matched.image[-1], matched.query[-1]].argmax(-1)
    correct = (best == matched.labels[-1]).sum()
    counts = torch.tensor([len(target["labels"]) for target in targets]).to(logits.device, non_blocking=True)
    predicted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)
    return {
        "class_error": 100 - 100 * correct / max(best.numel(), 1),
        "cardinality_error": (predicted - counts).abs().to(logits.dtype).mean(1),
    }


def _name_by_layer(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split vectors over layers into named scalars: the last layer keeps the bare name."""
    named = {}
    for name, value in values.items():
        if value.dim() == 0:
            named[name] = value
            continue
        *earlier, named[name] = value.unbind()
        named.update({f"{name}_{layer}": scalar for layer, scalar in enumerate(earlier)})
    return named


def check_targets(targets: list[dict], batch: int, num_classes: int) -> None:
    """Raise a ValueError that names the image, what was expected and what was found."""
    if len(targets) != batch:
        raise ValueError(f"targets: expected {batch}, one per image, got {len(targets)}.")
    for image, target in enumerate(targets):
        labels, boxes = target["labels"], target["boxes"]
        if labels.dim() != 1 or labels.dtype != torch.int64:
            raise ValueError(
                f"targets[{image}]['labels']: expected [n] int64, got {tuple(labels.shape)} {labels.dtype}."
            )
        if tuple(boxes.shape) != (len(labels), 4) and (len(labels) or boxes.numel()):
            raise ValueError(f"targets[{image}]['boxes']: expected shape {(len(labels), 4)}, got {tuple(boxes.shape)}.")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(
                f"targets[{image}]['labels']: expected values in [0, {num_classes}), got "
                f"{int(labels.min())}…{int(labels.max())}. Build the model with a larger num_classes."
            )
        if len(labels) and not (torch.isfinite(boxes).all() and (boxes[:, 2:] >= 0).all()):
            raise ValueError(f"targets[{image}]['boxes']: expected finite cxcywh with sizes ≥ 0, got {boxes.tolist()}.")
