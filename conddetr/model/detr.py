"""The detector: backbone, transformer and prediction heads.

Source: DETR section 3 and Conditional DETR section 3; parameter names are those of the official code.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conddetr.config import ModelConfig
from conddetr.model.backbone import build_backbone
from conddetr.model.layers import MLP
from conddetr.model.position import sine_position_encoding
from conddetr.model.transformer import Transformer


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) with x, and both numerator and denominator, clamped at `eps`; any shape."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def pad_images(images: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stack images of different sizes, with zeros at the bottom and right.

    Args:
        images: [3, H_i, W_i] floating tensors of one dtype and device.

    Returns:
        batch [B, 3, H, W] and mask [B, H, W] bool, True = padding; mask is None if all sizes are equal.

    Raises:
        ValueError: no image, or one that is not a floating [3, H, W] tensor; names its index.
    """
    if not images:
        raise ValueError("images: expected at least one image, got an empty list.")
    for index, image in enumerate(images):
        if not isinstance(image, Tensor) or image.dim() != 3 or image.shape[0] != 3 or image.numel() == 0:
            found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"images[{index}]: expected a non-empty [3, H, W] tensor, got {found}.")
        if not image.is_floating_point():
            raise ValueError(f"images[{index}]: expected a floating dtype, got {image.dtype}.")
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    if all(image.shape[1:] == (height, width) for image in images):
        return torch.stack(images), None
    batch = images[0].new_zeros(len(images), 3, height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool, device=batch.device)
    for index, image in enumerate(images):
        batch[index, :, : image.shape[1], : image.shape[2]] = image
        mask[index, : image.shape[1], : image.shape[2]] = False
    return batch, mask


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest-neighbour resize of a padding mask: [B, H, W] bool -> [B, h, w] bool."""
    return F.interpolate(mask[:, None].to(torch.float32), size=size).squeeze(1).to(torch.bool)


class DETR(nn.Module):
    """Conditional DETR or the original DETR, as `config.family` says."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.hidden_dim
        self.transformer = Transformer(config)
        self.class_embed = nn.Linear(dim, config.num_logits)
        self.bbox_embed = MLP(dim, dim, 4, 3)
        self.query_embed = nn.Embedding(config.num_queries, dim)
        backbone = build_backbone(config)
        self.input_proj = nn.Conv2d(backbone.num_channels, dim, kernel_size=1)
        # A Sequential of one: official checkpoints name it `backbone.0`.
        self.backbone = nn.Sequential(backbone)
        if config.family == "conditional-detr":
            self._initialize_heads()

    def _initialize_heads(self) -> None:
        """Every class starts at probability 0.01 (focal prior), every box at its reference point."""
        nn.init.constant_(self.class_embed.bias, -math.log((1 - 0.01) / 0.01))
        nn.init.zeros_(self.bbox_embed.layers[-1].weight)
        nn.init.zeros_(self.bbox_embed.layers[-1].bias)

    def forward(self, images: Tensor | list[Tensor], mask: Tensor | None = None) -> dict:
        """Detect objects.

        Args:
            images: list of [3, H, W], or a batch [B, 3, H, W]; floating, normalised with ImageNet's mean
                and standard deviation.
            mask: [B, H, W] bool, True = padding; only with a batch. None: nothing is padded.

        Returns:
            `pred_logits` [B, Q, K], `pred_boxes` [B, Q, 4] as (cx, cy, w, h) in [0, 1] of the valid image,
            and, with `aux_loss`, `aux_outputs`: one such dict per earlier decoder layer.

        Raises:
            ValueError: shapes or dtypes do not fit; names the tensor, what was expected and what was found.
        """
        images, mask = _check_input(images, mask)
        features = self.backbone(images)
        size = features.shape[-2:]
        padding = None if mask is None else resize_mask(mask, size)
        # Without padding one encoding serves the whole batch.
        grid = features.new_zeros((1, *size), dtype=torch.bool) if padding is None else padding
        position = sine_position_encoding(grid, self.config.hidden_dim).to(features.dtype)
        tokens = self.input_proj(features).flatten(2).transpose(1, 2)
        if padding is not None:
            padding = padding.flatten(1)
        hidden, reference = self.transformer(
            tokens, padding, position.expand(len(tokens), -1, -1), self.query_embed.weight
        )
        return self._predict(hidden, reference)

    def _predict(self, hidden: Tensor, reference: Tensor | None) -> dict:
        """Heads, shared by all layers: hidden [L, B, Q, C], reference [Q, 2] or None -> the output dict."""
        if not self.config.aux_loss:
            hidden = hidden[-1:]
        logits = self.class_embed(hidden)
        offsets = self.bbox_embed(hidden)
        if reference is not None:
            offsets = offsets + F.pad(inverse_sigmoid(reference), (0, 2))
        boxes = offsets.sigmoid()
        layers = [{"pred_logits": a, "pred_boxes": b} for a, b in zip(logits, boxes, strict=True)]
        output = layers.pop()
        if self.config.aux_loss:
            output["aux_outputs"] = layers
        return output


def _check_input(images: Tensor | list[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if not isinstance(images, Tensor):
        if mask is not None:
            raise ValueError("mask: give it with a batch tensor only; a list of images makes its own.")
        return pad_images(list(images))
    if images.dim() != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"images: expected a non-empty batch [B, 3, H, W], got shape {tuple(images.shape)}.")
    if not images.is_floating_point():
        raise ValueError(f"images: expected a floating dtype, got {images.dtype}.")
    expected = (images.shape[0], *images.shape[2:])
    if mask is not None and (tuple(mask.shape) != expected or mask.dtype != torch.bool):
        raise ValueError(
            f"mask: expected shape {expected} and dtype torch.bool, got {tuple(mask.shape)} and {mask.dtype}."
        )
    return images, mask
