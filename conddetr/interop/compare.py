"""Differences between the outputs of two implementations of one model."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from conddetr.interop.official.model import is_model
from conddetr.model.detr import DETR


@dataclass(frozen=True)
class ParityReport:
    """Differences between two models on the same images."""

    differences: dict[str, float]
    """Largest absolute difference of each output."""
    magnitudes: dict[str, float]
    """Largest absolute value of each output in either model."""

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: largest difference {self.differences[name]:.1e}, of values up to {self.magnitudes[name]:.1f}"
            for name in self.differences
        )


class _Nested(NamedTuple):
    """The part of the official code's `NestedTensor` that a model uses."""

    tensors: Tensor
    mask: Tensor

    def decompose(self) -> tuple[Tensor, Tensor]:
        return self.tensors, self.mask


@torch.no_grad()
def parity(
    model_a: nn.Module, model_b: nn.Module, images: Tensor | None = None, mask: Tensor | None = None
) -> ParityReport:
    """Run two detectors in evaluation mode on the same images and compare their predictions.

    Args:
        model_a, model_b: ours, the official repository's, or transformers' `ConditionalDetrForObjectDetection`, on
            the same device and of the same dtype.
        images: [B, 3, H, W], normalised; default: two of noise, 128×160, the second one padded.
        mask: [B, H, W] bool, True = padding; None: no padding, unless the images are the default ones.
    """
    if images is None:
        images = torch.randn(2, 3, 128, 160, generator=torch.Generator().manual_seed(0))
        mask = torch.zeros(2, 128, 160, dtype=torch.bool)
        mask[1, 96:], mask[1, :, 100:] = True, True
        images = images.masked_fill(mask[:, None], 0.0)
    elif mask is None:
        mask = torch.zeros_like(images[:, 0], dtype=torch.bool)
    parameter = next(model_a.parameters())
    images, mask = images.to(parameter), mask.to(parameter.device)
    outputs_a, outputs_b = (_predict(model, images, mask) for model in (model_a, model_b))
    differences = {name: (outputs_a[name] - outputs_b[name]).abs().max().item() for name in outputs_a}
    magnitudes = {
        name: max(outputs[name].abs().max().item() for outputs in (outputs_a, outputs_b)) for name in outputs_a
    }
    return ParityReport(differences, magnitudes)


def _predict(model: nn.Module, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
    was_training = model.training
    model.eval()
    try:
        if isinstance(model, DETR):
            out = model(images, mask)
            return {"pred_logits": out["pred_logits"], "pred_boxes": out["pred_boxes"]}
        if is_model(model):
            out = model(_Nested(images, mask))
            return {"pred_logits": out["pred_logits"], "pred_boxes": out["pred_boxes"]}
        out = model(pixel_values=images, pixel_mask=(~mask).long())
        return {"pred_logits": out.logits, "pred_boxes": out.pred_boxes}
    finally:
        model.train(was_training)
