"""The training loss of both families.

Source: DETR section 3.1, Conditional DETR section 3.4; `SetCriterion` of the official code.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conddetr.config import ModelConfig
from conddetr.kernels import matched_box_loss, prediction_errors, registry
from conddetr.kernels.stack import stacked
from conddetr.loss.matcher import assign
from conddetr.loss.targets import PackedTargets, pack_targets
from conddetr.model.families.table import PARTS


def loss_backend(backend: str) -> str:
    """The backend of matching and losses for a model's: `auto` for `native`, because losses have no native kernels."""
    return "auto" if backend == "native" else backend


class Criterion(nn.Module):
    """Matches predictions and objects, then computes the losses of every decoder layer at once.

    All arithmetic is float32 or wider, for predictions of any dtype. On fused kernels everything stays on the device,
    and the host never waits.
    """

    class_weight: Tensor

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
                CPU `auto` is plain PyTorch with the native matching, if that is built.
            max_targets: objects per image to which every batch is padded, so that all have one shape, as CUDA graphs
                require; None: those of the batch's fullest image.
            check_finite: raise an error if a matching cost is NaN or infinite; that waits for the device. Without the
                check, such a pair is matched only if nothing else is left, and the losses follow from the predictions:
                most likely NaN. None: check if matching is on the host anyway.
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
        """Pack a list of targets, as `forward` does. If this is done beforehand, the step itself copies nothing.

        Raises:
            ValueError: targets do not fit; names the image, the expected and the actual value.
        """
        return pack_targets(targets, self.config.num_classes, self.max_targets).to(device)

    def normalizer(self, counts: Sequence[int], num_queries: int, device: torch.device) -> Tensor:
        """The divisors of sums over images: averaged over the processes, so that averaging their gradients gives the
        gradient of one big batch.

        Args:
            counts: objects of each image: of one batch, or of all batches whose gradients are added up.
            num_queries: predictions per image.
            device: of the predictions.

        Returns:
            [2] float64: objects, at least 1; and the summed weights of the `detr` family's cross-entropy.
        """
        matched = sum(min(count, num_queries) for count in counts)
        unmatched = len(counts) * num_queries - matched
        weights = matched + unmatched * self.no_object_weight
        is_alone = not (dist.is_available() and dist.is_initialized())
        objects = max(1, sum(counts)) if is_alone else sum(counts)
        sums = torch.tensor([objects, weights], dtype=torch.float64).to(device, non_blocking=True)
        if not is_alone:
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
                the CPU, where they are checked; or the result of `pack`.
            normalizer: from the method of that name, if a step has more than this batch; default: this batch's.

        Returns:
            Scalars on the device: `loss`, the weighted total; `loss_ce`, `loss_bbox`, `loss_giou`, unweighted, of the
            last layer, and with suffix `_0`, `_1`… of the earlier ones; for logging, without gradient,
            `class_error` in percent and `cardinality_error[_i]` in objects.

        Raises:
            ValueError: targets do not fit; names the image, the expected and the actual value.
            RuntimeError: inside `torch.func.vmap`: the matching of a batch depends on values.
        """
        registry.refuse_vmap("the criterion, whose matching depends on values,")
        layers = [*outputs.get("aux_outputs", []), outputs]
        logits, boxes = (stacked([layer[k] for layer in layers]) for k in ("pred_logits", "pred_boxes"))
        if not isinstance(targets, PackedTargets):
            targets = self.pack(targets, logits.device)
        if len(targets.counts) != logits.shape[1]:
            raise ValueError(f"targets: expected {logits.shape[1]}, one per image, got {len(targets.counts)}.")
        assignment = assign(logits, boxes, targets, self.config, self.backend, self.check_finite)
        if normalizer is None:
            normalizer = self.normalizer(targets.counts, logits.shape[2], logits.device)
        losses = self._losses(logits, boxes, assignment, targets, normalizer)
        class_error, cardinality = prediction_errors(
            logits, assignment, targets.labels, targets.device_counts, self.backend
        )
        named = dict(zip(self.weights, losses, strict=True))
        logs = {"class_error": class_error, "cardinality_error": cardinality}
        return {"loss": self._total(losses), **_name_by_layer({**named, **logs})}

    def _losses(
        self, logits: Tensor, boxes: Tensor, assignment: Tensor, targets: PackedTargets, normalizer: Tensor
    ) -> Tensor:
        """Unweighted losses in the order of `self.weights`, for each layer: [3, L]. In one tensor, common operations
        run once.
        """
        box_losses = matched_box_loss(boxes, targets.boxes, assignment, self.backend)
        family = PARTS[self.config.family]
        options = (self.class_weight, self.config, self.backend)
        class_losses = family.class_loss(logits, assignment, targets.labels, *options)
        divisor = family.divisor(normalizer, class_losses.dtype)
        return torch.cat([class_losses.unsqueeze(0), box_losses]) / divisor

    def _total(self, losses: Tensor) -> Tensor:
        """[3, L] -> the weighted sum, a scalar."""
        class_loss, l1, overlap = losses.sum(1)
        weights = self.weights
        total = class_loss.mul(weights["loss_ce"]).add(l1, alpha=weights["loss_bbox"])
        return total.add(overlap, alpha=weights["loss_giou"])


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
