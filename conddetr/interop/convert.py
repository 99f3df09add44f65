"""Whole models from one implementation to the other, each with a report of how far their outputs differ."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from conddetr.interop.huggingface.weights import from_huggingface, model_options, to_huggingface
from conddetr.interop.official.model import is_model
from conddetr.model.detr import DETR
from conddetr.weights.load import load_weights
from conddetr.weights.read import identify
from conddetr.zoo import build


@dataclass(frozen=True)
class ParityReport:
    """How far two models differ on the same images."""

    differences: dict[str, float]
    """Largest absolute difference of each output."""
    magnitudes: dict[str, float]
    """Largest absolute value of each output, of either model."""

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: largest difference {self.differences[name]:.1e}, of values up to {self.magnitudes[name]:.1f}"
            for name in self.differences
        )


class _Nested(NamedTuple):
    """What the official code's `NestedTensor` offers a model."""

    tensors: Tensor
    mask: Tensor

    def decompose(self) -> tuple[Tensor, Tensor]:
        return self.tensors, self.mask


@torch.no_grad()
def parity(
    model_a: nn.Module, model_b: nn.Module, images: Tensor | None = None, mask: Tensor | None = None
) -> ParityReport:
    """Run two detectors in evaluation mode on the same images and compare what they predict.

    Args:
        model_a, model_b: ours, the official repository's, or transformers' `ConditionalDetrForObjectDetection`, on
            one device, of one dtype.
        images: [B, 3, H, W], normalised; default: two of noise, 128×160, of which the second is padded.
        mask: [B, H, W] bool, True = padding; None: nothing is, unless the images are the default ones.
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
    found_a, found_b = (_predict(model, images, mask) for model in (model_a, model_b))
    differences = {name: (found_a[name] - found_b[name]).abs().max().item() for name in found_a}
    magnitudes = {name: max(f[name].abs().max().item() for f in (found_a, found_b)) for name in found_a}
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


def convert_from_official(model: nn.Module) -> tuple[DETR, ParityReport]:
    """Our model with the weights of the official repository's `ConditionalDETR`; names and shapes are the same.

    Args:
        model: with a ResNet-50 or ResNet-101, dilated or not; not changed.

    Returns:
        Ours, on the same device, in evaluation mode; and the parity of the two.

    Raises:
        ValueError: the weights are none of such a model; says what does not fit.
    """
    state, transformer = model.state_dict(), model.transformer
    converted = build(
        "conditional-detr-r50",
        **identify(state),
        dilation=model.backbone[0].body["layer4"][1].conv2.dilation != (1, 1),
        num_heads=transformer.nhead,
        dropout=float(transformer.decoder.layers[0].dropout.p),
    )
    load_weights(converted, state)
    converted.to(next(model.parameters())).eval()
    return converted, parity(model, converted)


def convert_to_official(model: DETR, official: nn.Module) -> ParityReport:
    """Our weights into a model that the official repository's `build_model` made, in place.

    Returns:
        The parity of the two.

    Raises:
        ValueError: its names or shapes are others (it is unchanged); says which.
    """
    load_weights(official, model.state_dict())
    return parity(model, official)


def convert_from_huggingface(model: nn.Module) -> tuple[DETR, ParityReport]:
    """Our model with the weights of transformers' `ConditionalDetrForObjectDetection`.

    The settings of its loss are not taken over: ours has those of the paper. In training, `dropout` is that of
    attention and of the feed-forward's inside too, as in the official code; transformers has rates of their own there.

    Args:
        model: with timm's ResNet-50 or ResNet-101; not changed.

    Returns:
        Ours, on the same device, in evaluation mode; and the parity of the two. With `auxiliary_loss` in its
        configuration transformers' forward pass is another (normalised tokens go to the next layer): the report then
        shows a difference, and the official code's outputs are ours.

    Raises:
        ValueError: it has another backbone, activation or position encoding, or encoder and decoder differ in heads
            or width; says which.
    """
    options = model_options(model.config.to_dict())
    converted = build("conditional-detr-r50", num_classes=model.config.num_labels, **options)
    load_weights(converted, from_huggingface(model.state_dict()))
    converted.to(next(model.parameters())).eval()
    return converted, parity(model, converted)


def convert_to_huggingface(model: DETR) -> tuple[nn.Module, ParityReport]:
    """transformers' `ConditionalDetrForObjectDetection` with the weights of ours; needs transformers and timm.

    Args:
        model: of a `conditional-detr` preset with a ResNet, in the paper's form; not changed.

    Returns:
        Theirs, on the same device, in evaluation mode; and the parity of the two. In training theirs differs: dropout
        sits elsewhere, the whole backbone may train, the classification loss has weight 1.

    Raises:
        ValueError: the model is one that transformers does not have; says why.
    """
    from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection

    config = model.config
    form = {"family": "conditional-detr", "csq": "full", "reference_points": "generated"}
    for name, expected in form.items():
        if getattr(config, name) != expected:
            raise ValueError(
                f"{name}: expected {expected}, the form that transformers has, got {getattr(config, name)}."
            )
    if config.backbone == "tiny":
        raise ValueError("backbone: expected resnet50 or resnet101, which timm has, got tiny.")
    peer = ConditionalDetrForObjectDetection(
        ConditionalDetrConfig(
            use_timm_backbone=True,
            backbone=config.backbone,
            use_pretrained_backbone=False,
            dilation=config.dilation,
            num_labels=config.num_classes,
            d_model=config.hidden_dim,
            encoder_layers=config.encoder_layers,
            decoder_layers=config.decoder_layers,
            encoder_attention_heads=config.num_heads,
            decoder_attention_heads=config.num_heads,
            encoder_ffn_dim=config.ffn_dim,
            decoder_ffn_dim=config.ffn_dim,
            dropout=config.dropout,
            attention_dropout=config.dropout,
            num_queries=config.num_queries,
            auxiliary_loss=False,
        )
    )
    is_old = any(name.startswith("model.backbone.conv_encoder.") for name in peer.state_dict())
    peer.load_state_dict(to_huggingface(model.state_dict(), "4" if is_old else "5"), strict=True)
    peer.to(next(model.parameters())).eval()
    return peer, parity(model, peer)
