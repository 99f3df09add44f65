"""The detector: backbone, transformer and prediction heads.

Source: DETR section 3 and Conditional DETR section 3; parameter names are those of the official code.
"""

import logging
from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conddetr.config import ModelConfig, check_build
from conddetr.graphed import Graphs
from conddetr.kernels import grid_positions, predicted_boxes, registry
from conddetr.kernels.stack import unstacked
from conddetr.model.attention import attention_kernels
from conddetr.model.backbone import build_backbone
from conddetr.model.families.table import PARTS
from conddetr.model.fast import make_plan
from conddetr.model.fused import FusionReport, fused_copy
from conddetr.model.grid import FeatureGrid
from conddetr.model.layers import MLP
from conddetr.model.plain import table
from conddetr.model.position import sine_position_encoding
from conddetr.model.recompute import switch_recomputation
from conddetr.model.transformer import Transformer

log = logging.getLogger(__name__)

_HERE = "conddetr.model."


def pad_images(images: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stack images of different sizes, with zeros at the bottom and right.

    Args:
        images: [3, H_i, W_i] floating tensors of one dtype and device.

    Returns:
        batch [B, 3, H, W] and valid_hw [B, 2] int32, each image's own height and width; None if all sizes are equal.

    Raises:
        ValueError: the list is empty, or an image is not a floating [3, H, W] tensor; names its index.
    """
    if not images:
        raise ValueError("images: expected at least one image, got an empty list.")
    for index, image in enumerate(images):
        if not isinstance(image, Tensor) or image.dim() != 3 or image.shape[0] != 3 or image.numel() == 0:
            actual = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"images[{index}]: expected a non-empty [3, H, W] tensor, got {actual}.")
        if not image.is_floating_point():
            raise ValueError(f"images[{index}]: expected a floating dtype, got {image.dtype}.")
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    if all(image.shape[1:] == (height, width) for image in images):
        return torch.stack(images), None
    batch = images[0].new_zeros(len(images), 3, height, width)
    for index, image in enumerate(images):
        batch[index, :, : image.shape[1], : image.shape[2]] = image
    valid_hw = torch.tensor([image.shape[1:] for image in images], dtype=torch.int32)
    return batch, valid_hw.to(batch.device, non_blocking=True)


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest-neighbour resize of a padding mask: [B, H, W] bool -> [B, h, w] bool."""
    return F.interpolate(mask[:, None].to(torch.float32), size=size).squeeze(1).to(torch.bool)


class DETR(nn.Module):
    """Conditional DETR or the original DETR, chosen by `config.family`."""

    def __init__(self, config: ModelConfig, *, backend: str = "auto", pretrained_backbone: bool = False) -> None:
        """
        Args:
            config: the architecture.
            backend: implementation of the operations, see `RunConfig.backend`.
            pretrained_backbone: as `RunConfig.pretrained_backbone`.

        Raises:
            ValueError: the backend is unknown, the backbone has no pretrained weights, or timm has no such backbone.
            ImportError: timm is not installed.
            OSError: the weights cannot be downloaded.
        """
        super().__init__()
        check_build(config.backbone, backend, pretrained_backbone)
        self.config = config
        self.backend = backend
        """Implementation of the operations; `set_backend` changes it in all parts."""
        self.fusion: FusionReport | None = None
        """Report of a frozen copy that `fused` made; None: this is an ordinary model."""
        self.autocast: torch.dtype | None = None
        """The dtype of the autocast that a frozen copy turns on itself; None: autocast is the caller's choice."""
        self.recomputes = False
        """Whether activations are recomputed in backward; `checkpoint_activations` changes it in all parts."""
        self.graphs: Graphs | None = None
        """The CUDA graphs of a frozen copy, one for each signature of the inputs; None: its modules are called."""
        dim = config.hidden_dim
        self.transformer = Transformer(config, backend)
        self.class_embed = nn.Linear(dim, config.num_logits)
        self.bbox_embed = MLP(dim, dim, 4, 3)
        self.query_embed = nn.Embedding(config.num_queries, dim)
        backbone = build_backbone(config, backend, pretrained_backbone)
        self.input_proj = nn.Conv2d(backbone.num_channels, dim, kernel_size=1)
        # A Sequential with one module: official checkpoints name it `backbone.0`.
        self.backbone = nn.Sequential(backbone)
        PARTS[config.family].initialize_heads(self.class_embed, self.bbox_embed)

    def forward(
        self, images: Tensor | list[Tensor], mask: Tensor | None = None, *, valid_hw: Tensor | None = None
    ) -> dict:
        """Detect objects.

        Args:
            images: list of [3, H, W], or a batch [B, 3, H, W]; floating, normalised with ImageNet's mean
                and standard deviation.
            mask: [B, H, W] bool, True = padding; only with a batch. None: no padding, or `valid_hw` describes it.
            valid_hw: [B, 2] int32, valid height and width in pixels of a batch padded at the bottom and right.
                Replaces `mask`: the fused kernels read it, so that padding costs nothing.

        Returns:
            `pred_logits` [B, Q, K], `pred_boxes` [B, Q, 4] as (cx, cy, w, h) in [0, 1] of the valid image,
            and, with `aux_loss`, `aux_outputs`: one such dict per earlier decoder layer.

        Raises:
            ValueError: shapes or dtypes do not match; names the tensor, the expected and the actual value.
        """
        inputs = _check_input(images, mask, valid_hw)
        outputs = None if self.graphs is None else self.graphs(self, self._detect_under_autocast, inputs)
        return self._detect_under_autocast(*inputs) if outputs is None else outputs

    def _detect_under_autocast(self, images: Tensor, mask: Tensor | None, valid_hw: Tensor | None) -> dict:
        autocast = nullcontext() if self.autocast is None else torch.autocast(images.device.type, self.autocast)
        with registry.demanded(self.backend), autocast:
            return self._detect(images, mask, valid_hw)

    def _detect(self, images: Tensor, mask: Tensor | None, valid_hw: Tensor | None) -> dict:
        """Same as `forward`, for checked arguments."""
        object_query = table(self.query_embed, self.config.num_queries, images.device)
        plan = make_plan(self, images, object_query)
        features = self.backbone(images) if plan is None else plan.backbone(images)
        grid, position = self._grid(features, tuple(images.shape[-2:]), mask, valid_hw)
        if plan is None:
            tokens, transformer = self.input_proj(features).flatten(2).transpose(1, 2), self.transformer
        else:
            tokens, transformer = plan.tokens(features), plan.transformer
        with attention_kernels(tokens.device):
            hidden, reference = transformer(tokens, grid, position, object_query)
        # The heads are small and boxes need the precision: float32 even under autocast.
        with torch.autocast(hidden.device.type, enabled=False):
            return self._predict(hidden, reference)

    def fused(self, backend: str | None = None, dtype: torch.dtype | None = None, graphs: bool = False) -> "DETR":
        """Make a frozen copy for inference at full speed; the model does not change.

        The copy's batch norms are folded into its convolutions permanently. The copy has its own weights: make a new
        one after the model's weights have changed. Parts that are hooked, wrapped, parametrised or replaced are not
        fused; the copy's `fusion` lists them. The copy is in evaluation mode and cannot be trained.

        Making it takes about as long as copying all weights: 0.1 s for ResNet-50 on two CPU cores.

        Args:
            backend: of the copy; default: the model's backend.
            dtype: float16 or bfloat16: the copy computes as under autocast of this dtype and stores the weights of
                its convolutions in it; norms, reference points and heads keep their dtype. Default: the model's dtype.
            graphs: on a GPU, replay CUDA graphs, one for each of the first `conddetr.capture.MAX_GRAPHS` shapes, so
                that the host launches one graph per call. If a graph cannot be recorded or would leave something out,
                such as hooks inside, the copy's modules are called, and a warning reports the reason once. The first
                call of each shape takes several times as long, and each shape has its own memory.
        """
        copy, report = fused_copy(self, dtype)
        copy.graphs = Graphs() if graphs else None
        copy.fusion = self.fusion or report
        copy.autocast = dtype or self.autocast
        if backend is not None:
            copy.set_backend(backend)
        return copy

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the input pixels: that of the backbone's first floating weight, unless the model casts them."""
        if self.autocast is not None:
            return torch.float32
        return next(weight.dtype for weight in self.backbone.parameters() if weight.is_floating_point())

    def set_backend(self, backend: str) -> None:
        """Switch all parts to another backend; `conddetr.accelerate` checks first that the backend can run."""
        for module in (self, *self.parts_with_backend()):
            module.backend = backend

    def parts_with_backend(self) -> Iterator[nn.Module]:
        """Our submodules that have a `backend`; foreign modules with an attribute of that name are not included."""
        for module in self.modules():
            is_ours = any(base.__module__.startswith(_HERE) for base in type(module).__mro__)
            if is_ours and module is not self and hasattr(module, "backend"):
                yield module

    def checkpoint_activations(self, on: bool = True) -> None:
        """Recompute the activations of encoder layers, decoder layers and backbone stages in backward, or keep them.

        Training then needs less memory and more time; results and gradients stay the same
        (`conddetr.model.recompute`). The setting applies to parts that this model has now. A backbone from another
        library is asked by its `set_grad_checkpointing`, as timm's have it. A part that cannot recompute keeps its
        activations, and a warning names it.
        """
        self.recomputes = on
        for name in ("backbone.0", "transformer.encoder", "transformer.decoder"):
            part = self.get_submodule(name)
            reason = switch_recomputation(part, on)
            if reason and on:
                log.warning("The activations of %s (%s) are kept: %s.", name, type(part).__name__, reason)

    def train(self, mode: bool = True) -> "DETR":
        """Same as `nn.Module.train`.

        Raises:
            RuntimeError: this is a frozen copy that `fused` made.
        """
        if mode and self.fusion is not None:
            raise RuntimeError("This is a frozen copy for inference (DETR.fused): train the original model instead.")
        return super().train(mode)

    def _grid(
        self, features: Tensor, image_size: tuple[int, int], mask: Tensor | None, valid_hw: Tensor | None
    ) -> tuple[FeatureGrid, Tensor]:
        """The grid of a feature map [B, C, h, w], and its position encoding [B or 1, h·w, dim] in the same dtype."""
        size, dim = tuple(features.shape[-2:]), self.config.hidden_dim
        if mask is None:
            # Without padding the whole batch shares one encoding.
            backend = "eager" if self.backend == "eager" else "auto"
            position, padding, cells = grid_positions(features, image_size, dim, valid_hw, backend=backend)
            return FeatureGrid(size, padding, cells), position
        padding = resize_mask(mask, size)
        return FeatureGrid(size, padding.flatten(1), None), sine_position_encoding(padding, dim).to(features.dtype)

    def _predict(self, hidden: Tensor, reference: Tensor | None) -> dict:
        """Apply the heads, which all layers share: hidden [L, B, Q, C], reference [Q, 2] or None -> the output dict."""
        if not self.config.aux_loss:
            hidden = hidden[-1:]
        logits = self.class_embed(hidden)
        offsets = self.bbox_embed(hidden)
        if reference is None:
            boxes = offsets.sigmoid()
        else:
            boxes = predicted_boxes(offsets, reference, "eager" if self.backend == "eager" else "auto")
        layers = [{"pred_logits": a, "pred_boxes": b} for a, b in zip(unstacked(logits), unstacked(boxes), strict=True)]
        output = layers.pop()
        if self.config.aux_loss:
            output["aux_outputs"] = layers
        return output


def _check_input(
    images: Tensor | list[Tensor], mask: Tensor | None, valid_hw: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if not isinstance(images, Tensor):
        if mask is not None or valid_hw is not None:
            name = "valid_hw" if mask is None else "mask"
            raise ValueError(f"{name}: pass it with a batch tensor only; a list of images defines its own padding.")
        images, valid_hw = pad_images(list(images))
        return images, None, valid_hw
    if images.dim() != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"images: expected a non-empty batch [B, 3, H, W], got shape {tuple(images.shape)}.")
    if not images.is_floating_point():
        raise ValueError(f"images: expected a floating dtype, got {images.dtype}.")
    if mask is not None and valid_hw is not None:
        raise ValueError("mask and valid_hw: expected at most one of them, got both.")
    expected = (images.shape[0], *images.shape[2:])
    if mask is not None and (tuple(mask.shape) != expected or mask.dtype != torch.bool):
        raise ValueError(
            f"mask: expected shape {expected} and dtype torch.bool, got {tuple(mask.shape)} and {mask.dtype}."
        )
    if valid_hw is not None and (tuple(valid_hw.shape) != (len(images), 2) or valid_hw.dtype != torch.int32):
        actual = f"{tuple(valid_hw.shape)} and {valid_hw.dtype}"
        raise ValueError(f"valid_hw: expected shape {(len(images), 2)} and dtype torch.int32, got {actual}.")
    return images, mask, valid_hw
