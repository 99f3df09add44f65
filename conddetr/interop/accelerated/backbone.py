"""timm's plain ResNets with frozen batch norm: the norm is part of the convolution, in training as well.

conv(x)·s + t is a convolution with weights scaled by s and bias t: two passes over every feature map less, each way.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.conditional_detr import modeling_conditional_detr as theirs

from conddetr.model.detr import resize_mask

_STAGES = ("layer1", "layer2", "layer3", "layer4")
_CONVOLUTIONS = {"BasicBlock": 2, "Bottleneck": 3}
_PLAIN = {"conv1", "conv2", "conv3", "bn1", "bn2", "bn3", "act1", "act2", "act3", "downsample", "drop_block", "aa"}


class ConvEncoder(theirs.ConditionalDetrConvEncoder):
    """In channels-last, which convolutions prefer on CPUs and on GPUs in half precision."""

    _kept: tuple[tuple, "Folded"] | None = None

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """[B, 3, H, W] and its mask [B, H, W] -> of each stage, the feature map and its mask [B, h, w] bool."""
        folded = self._folded()
        x = pixel_values.contiguous(memory_format=torch.channels_last)
        x = self.model["maxpool"](_convolve(x, self.model["conv1"], folded).relu_())
        found = []
        for stage in _STAGES:
            for block in self.model[stage]:
                x = _residual_block(x, block, folded)
            found.append((x, resize_mask(pixel_mask, tuple(x.shape[-2:]))))
        return found

    def _folded(self) -> "Folded":
        """Anew where gradients are recorded, else kept until a weight changes."""
        pairs = list(_pairs(self.model))
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._kept = None
            return {conv: _fold(conv, norm) for conv, norm in pairs}
        tensors = (x for conv, norm in pairs for x in (conv.weight, *norm.buffers()))
        key = tuple((x.data_ptr(), None if x.is_inference() else x._version, x.dtype) for x in tensors)
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, {conv: _fold(conv, norm) for conv, norm in pairs})
        return self._kept[1]


def misfit(encoder: theirs.ConditionalDetrConvEncoder) -> str | None:
    """The reason why `ConvEncoder` is not the same as this one; None where it is."""
    body = encoder.model
    names = [name for name, _ in body.named_children()]
    if names != ["conv1", "bn1", "act1", "maxpool", *_STAGES]:
        return f"{type(body).__name__} is no ResNet of timm"
    if tuple(body.feature_info.out_indices) != (1, 2, 3, 4):
        return f"out_indices {tuple(body.feature_info.out_indices)}, expected (1, 2, 3, 4)"
    if not (_is_foldable(body["conv1"], body["bn1"]) and type(body["act1"]) is nn.ReLU):
        return "its stem is more than convolution, frozen batch norm and ReLU"
    for stage in _STAGES:
        for block in body[stage]:
            reason = _block_misfit(block)
            if reason is not None:
                return f"{stage} of {type(body).__name__}: {reason}"
    return None


def _block_misfit(block: nn.Module) -> str | None:
    count = _CONVOLUTIONS.get(type(block).__name__)
    parts = dict(block.named_children())
    if count is None or not set(parts) <= _PLAIN:
        return f"{type(block).__name__} has parts that a plain ResNet has not"
    pairs = [(parts[f"conv{i}"], parts[f"bn{i}"]) for i in range(1, count + 1)]
    if block.downsample is not None:
        pairs.append(tuple(block.downsample))
    if not all(len(pair) == 2 and _is_foldable(*pair) for pair in pairs):
        return "expected pairs of convolution without bias and frozen batch norm"
    rest = [parts[name] for name in ("drop_block", "aa") if name in parts]
    activations = [parts[f"act{i}"] for i in range(1, count + 1)]
    if not all(type(part) is nn.Identity for part in rest) or not all(type(part) is nn.ReLU for part in activations):
        return "expected ReLU, no dropped blocks and no anti-aliasing"
    return None


def _is_foldable(conv: nn.Module, norm: nn.Module) -> bool:
    is_plain = type(conv) is nn.Conv2d and conv.bias is None and conv.padding_mode == "zeros"
    return is_plain and type(norm) is theirs.ConditionalDetrFrozenBatchNorm2d


Folded = dict[nn.Conv2d, tuple[Tensor, Tensor]]
"""Weight and bias of each convolution together with the norm behind it."""


def _fold(conv: nn.Conv2d, norm: theirs.ConditionalDetrFrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    scale = norm.weight * (norm.running_var + 1e-5).rsqrt()
    return conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


def _pairs(body: nn.Module) -> Iterator[tuple[nn.Conv2d, theirs.ConditionalDetrFrozenBatchNorm2d]]:
    """Every convolution with the norm behind it."""
    yield body["conv1"], body["bn1"]
    for stage in _STAGES:
        for block in body[stage]:
            if block.downsample is not None:
                yield tuple(block.downsample)
            for index in range(1, _CONVOLUTIONS[type(block).__name__] + 1):
                yield getattr(block, f"conv{index}"), getattr(block, f"bn{index}")


def _convolve(x: Tensor, conv: nn.Conv2d, folded: Folded) -> Tensor:
    return F.conv2d(x, *folded[conv], conv.stride, conv.padding, conv.dilation, conv.groups)


def _residual_block(x: Tensor, block: nn.Module, folded: Folded) -> Tensor:
    shortcut = x if block.downsample is None else _convolve(x, block.downsample[0], folded)
    count = _CONVOLUTIONS[type(block).__name__]
    for index in range(1, count + 1):
        x = _convolve(x, getattr(block, f"conv{index}"), folded)
        x = x.relu_() if index < count else x
    return (x + shortcut).relu_()
