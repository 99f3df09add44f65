"""The official `SetCriterion` on our operations."""

from functools import lru_cache

from torch import Tensor, nn

from conddetr import config as configs
from conddetr.interop.official.mixing import Accelerated, arguments, mix_in
from conddetr.interop.report import AccelerationReport, Part
from conddetr.kernels import paths
from conddetr.loss.criterion import loss_backend
from conddetr.zoo import build_criterion

MATCHING_ALPHA = 0.25
"""The official matcher's α, independent of the criterion's; ours has one α for both."""


def is_criterion(module: nn.Module) -> bool:
    """Whether this is the official `SetCriterion` of Conditional DETR: with focal loss, unlike the original DETR's."""
    names = ("num_classes", "matcher", "weight_dict", "losses", "focal_alpha")
    is_named = any(base.__name__ == "SetCriterion" for base in type(module).__mro__)
    return is_named and all(hasattr(module, name) for name in names) and arguments(module) == ["outputs", "targets"]


class SetCriterion(Accelerated):
    """Matching and losses of all layers at once; names and scales of the losses are the official ones."""

    backend: str

    def forward(self, outputs: dict, targets: list[dict]) -> dict[str, Tensor]:
        """Unweighted losses and errors by name. The official code runs for outputs that ours does not support (masks,
        an encoder's), for a matcher that was replaced or has hooks, and for settings that ours does not have.

        Raises:
            ValueError: targets do not fit, or matching is on the host and predictions are not finite; names the image.
        """
        is_known = set(outputs) <= {"pred_logits", "pred_boxes", "aux_outputs"} and self._is_unmodified()
        if not is_known or _misfit(self) is not None:
            paths.note("loss", "the official code")
            return super().forward(outputs, targets)
        targets = [{name: target[name] for name in ("labels", "boxes")} for target in targets]
        losses = _build_criterion(_loss_config(self), loss_backend(self.backend))(outputs, targets)
        del losses["loss"]
        return losses


_build_criterion = lru_cache(maxsize=8)(build_criterion)


def _loss_config(criterion: nn.Module) -> configs.ModelConfig:
    matcher = criterion.matcher
    return configs.resolve(
        "conditional-detr-r50",
        num_classes=criterion.num_classes,
        class_cost=matcher.cost_class,
        bbox_cost=matcher.cost_bbox,
        giou_cost=matcher.cost_giou,
        focal_alpha=criterion.focal_alpha,
    )


def accelerate_criterion(criterion: nn.Module, backend: str, report: AccelerationReport) -> None:
    """Like `accelerate_model`, for the official `SetCriterion`."""
    reason = _misfit(criterion)
    if reason is not None:
        report.left.append(Part("matcher and loss", 1, reason))
        return
    configs.check_backend(backend)
    _loss_config(criterion)  # Raises an error for values that ours does not support.
    mix_in(criterion, SetCriterion, backend=backend)
    report.replaced.append(Part("matcher and loss", 1, "all layers at once"))


def _misfit(criterion: nn.Module) -> str | None:
    """The reason why ours is not equivalent to this criterion; None if it is."""
    if {"labels", "boxes", "cardinality"} != set(criterion.losses):
        return f"losses: expected labels, boxes, cardinality, got {', '.join(criterion.losses)}"
    if not all(hasattr(criterion.matcher, f"cost_{name}") for name in ("class", "bbox", "giou")):
        return f"{type(criterion.matcher).__name__} is not a matcher by class, L1 and GIoU"
    if criterion.focal_alpha != MATCHING_ALPHA:
        return f"focal_alpha {criterion.focal_alpha}: its matcher always uses {MATCHING_ALPHA}"
    return None
