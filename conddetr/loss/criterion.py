"""The training loss of both families.

Source: DETR section 3.1, Conditional DETR section 3.4; `SetCriterion` of the official code.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from conddetr.config import ModelConfig
from conddetr.kernels import focal_loss, matched_box_loss, registry
from conddetr.loss.matcher import assign
from conddetr.loss.targets import PackedTargets, pack_targets


class Criterion(nn.Module):
    """Matches predictions and objects, then computes the losses of every decoder layer at once.

    All arithmetic is float32 or wider, whatever the dtype of the predictions. On fused kernels everything stays on
    the device, and the host waits for nothing.
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: str = "auto",
        max_targets: int | None = None,
        check_finite: bool | None = None,
    ) -> None:
        """
        Args:
            config: of the model.
            backend: of matching and losses: `auto`, `triton`, or `eager` (plain PyTorch, and scipy on the host). On a
                CPU `auto` is plain PyTorch with the native matching, where that is built.
            max_targets: objects per image that every batch is padded to, so that all have one shape, as CUDA graphs
                need it; None: those of the batch's fullest image.
            check_finite: raise where a matching cost is NaN or infinite; that waits for the device. If not, such a
                pair is matched only where nothing else is left, and the losses are what the predictions make them:
                NaN, most likely. None: check where matching is on the host anyway.
        """
        super().__init__()
        self.config = config
        self.backend, self.max_targets, self.check_finite = backend, max_targets, check_finite
        self.weights = {
            "loss_ce": config.class_weight,
            "loss_bbox": config.bbox_weight,
            "loss_giou": config.giou_weight,
        }
        class_weight = torch.ones(config.num_logits)
        class_weight[-1] = config.no_object_weight
        self.no_object_weight = class_weight[-1].item()
        self.register_buffer("class_weight", class_weight, persistent=False)

    def pack(self, targets: list[dict], device: torch.device) -> PackedTargets:
        """What `forward` makes of targets given as a list; beforehand, the step itself need not copy anything.

        Raises:
            ValueError: targets do not fit; names the image, what was expected and what was found.
        """
        return pack_targets(targets, self.config.num_classes, self.max_targets).to(device)

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

    def forward(
        self, outputs: dict, targets: list[dict] | PackedTargets, normalizer: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The losses.

        Args:
            outputs: as the model returns them.
            targets: per image `labels` [n] int64 in [0, num_classes) and `boxes` [n, 4] cxcywh in [0, 1], best on
                the CPU, where they are checked; or what `pack` made of them.
            normalizer: from the method of that name, where more than this batch makes a step; default: this batch's.

        Returns:
            Scalars on the device: `loss`, the weighted total; `loss_ce`, `loss_bbox`, `loss_giou`, unweighted, of the
            last layer, and with suffix `_0`, `_1`… of the earlier ones; for logging, without gradient,
            `class_error` in percent and `cardinality_error[_i]` in objects.

        Raises:
            ValueError: targets do not fit; names the image, what was expected and what was found.
            RuntimeError: inside `torch.func.vmap`: the matching of a batch depends on values.
        """
        registry.refuse_vmap("the criterion, whose matching depends on values,")
        layers = [*outputs.get("aux_outputs", []), outputs]
        logits, boxes = (torch.stack([layer[k] for layer in layers]) for k in ("pred_logits", "pred_boxes"))
        if not isinstance(targets, PackedTargets):
            targets = self.pack(targets, logits.device)
        if len(targets.counts) != logits.shape[1]:
            raise ValueError(f"targets: expected {logits.shape[1]}, one per image, got {len(targets.counts)}.")
        assignment = assign(logits, boxes, targets, self.config, self.backend, self.check_finite)
        if normalizer is None:
            normalizer = self.normalizer(targets.counts, logits.shape[2], logits.device)
        num_boxes, class_weights = normalizer.to(torch.promote_types(logits.dtype, torch.float32))
        classes = _matched_classes(assignment, targets.labels)
        l1, overlap = matched_box_loss(boxes, targets.boxes, assignment, self.backend)
        losses = {
            "loss_ce": self._classification(logits, classes, num_boxes, class_weights),
            "loss_bbox": l1 / num_boxes,
            "loss_giou": overlap / num_boxes,
        }
        logs = _logs(logits.detach(), classes, targets.device_counts)
        total = sum(self.weights[name] * value.sum() for name, value in losses.items())
        return {"loss": total, **_name_by_layer({**losses, **logs})}

    def _classification(self, logits: Tensor, classes: Tensor, num_boxes: Tensor, class_weights: Tensor) -> Tensor:
        """Classification loss per layer, [L]."""
        if self.config.family == "detr":
            logits = logits.to(num_boxes.dtype)
            target = torch.where(classes < 0, logits.shape[-1] - 1, classes)
            weight = self.class_weight.to(logits.dtype)
            loss = F.cross_entropy(logits.flatten(0, 2), target.flatten(), weight, reduction="none")
            return loss.view(len(logits), -1).sum(1) / class_weights
        return focal_loss(logits, classes, self.config.focal_alpha, self.config.focal_gamma, self.backend) / num_boxes


def _matched_classes(assignment: Tensor, labels: Tensor) -> Tensor:
    """Class of the object that each query got, -1 for none: [L, B, Q], [B, N] -> [L, B, Q]."""
    if labels.shape[1] == 0:
        return assignment
    of_object = labels.expand(len(assignment), -1, -1).gather(2, assignment.clamp(min=0))
    return torch.where(assignment < 0, assignment, of_object)


@torch.no_grad()
def _logs(logits: Tensor, classes: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Class error in percent of the last layer (scalar) and cardinality error in objects per layer, [L].

    As in the official code, cardinality counts queries whose best class is not the last logit; that counts
    objects in DETR, where the last is no-object, and says little in Conditional DETR.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    is_matched = classes[-1] >= 0
    correct = (is_matched & (logits[-1].argmax(-1) == classes[-1])).sum()
    # Of equal logits the first counts as the best. `amax` takes a quarter of the time of `argmax` on a CPU.
    is_object = torch.zeros_like(classes, dtype=torch.bool)
    if logits.shape[-1] > 1:
        is_object = logits[..., :-1].amax(-1) >= logits[..., -1]
    return {
        "class_error": 100 - 100 * correct.to(dtype) / is_matched.sum().clamp(min=1),
        "cardinality_error": (is_object.sum(-1) - counts).abs().to(dtype).mean(1),
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
