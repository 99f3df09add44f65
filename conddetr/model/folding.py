"""ResNets whose frozen batch norm is part of the convolution before it, in inference and in training.

conv(x)·s + t is a convolution with weights scaled by s and bias t: two passes over every feature map less, each way.
Gradients flow through the scaling to the weights. Everything runs in channels-last, which convolutions prefer on CPUs
and, in half precision, on GPUs.

For the ResNets of torchvision and timm, whose parts have the same names.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGES = ("layer1", "layer2", "layer3", "layer4")
CONVOLUTIONS = {"BasicBlock": 2, "Bottleneck": 3}
"""Kind of residual block → its convolutions, the shortcut's not counted."""
EPS = 1e-5
"""Of norms that do not say theirs: transformers' have it as a constant."""

Folded = dict[nn.Conv2d, tuple[Tensor, Tensor]]
"""Weight and bias of each convolution together with the norm behind it."""
Kept = tuple[tuple, Folded]
"""What the weights were, and what was made of them."""


def fold(body: nn.Module, kept: Kept | None) -> tuple[Folded, Kept | None]:
    """Weights and biases of all convolutions, in channels-last.

    Args:
        body: a ResNet.
        kept: what this returned last time.

    Returns:
        The folded weights, and what to keep of them: nothing where gradients are recorded; else they serve again
        until a weight changes.
    """
    pairs = list(conv_norm_pairs(body))
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return {conv: _fold(conv, norm) for conv, norm in pairs}, None
    tensors = (x for conv, norm in pairs for x in (conv.weight, *norm.buffers()))
    key = tuple((x.data_ptr(), None if x.is_inference() else x._version, x.dtype) for x in tensors)
    if kept is None or kept[0] != key:
        kept = (key, {conv: _fold(conv, norm) for conv, norm in pairs})
    return kept[1], kept


def stages(body: nn.Module, folded: Folded, images: Tensor) -> Iterator[Tensor]:
    """[B, 3, H, W] images -> the feature map of each stage in turn, in channels-last."""
    x = images.contiguous(memory_format=torch.channels_last)
    x = body.maxpool(_convolve(x, body.conv1, folded).relu_())
    for stage in STAGES:
        for block in getattr(body, stage):
            x = _residual_block(x, block, folded)
        yield x


def conv_norm_pairs(body: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.Module]]:
    """Every convolution with the norm behind it."""
    yield body.conv1, body.bn1
    for stage in STAGES:
        for block in getattr(body, stage):
            if block.downsample is not None:
                yield tuple(block.downsample)
            for index in range(1, CONVOLUTIONS[type(block).__name__] + 1):
                yield getattr(block, f"conv{index}"), getattr(block, f"bn{index}")


def _fold(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)
    weight, bias, mean, variance = (x.to(dtype) for x in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    scale = weight * (variance + getattr(norm, "eps", EPS)).rsqrt()
    folded = (conv.weight * scale[:, None, None, None], bias - mean * scale)
    return folded[0].to(conv.weight.dtype, memory_format=torch.channels_last), folded[1].to(conv.weight.dtype)


def _convolve(x: Tensor, conv: nn.Conv2d, folded: Folded) -> Tensor:
    return F.conv2d(x, *folded[conv], conv.stride, conv.padding, conv.dilation, conv.groups)


def _residual_block(x: Tensor, block: nn.Module, folded: Folded) -> Tensor:
    shortcut = x if block.downsample is None else _convolve(x, block.downsample[0], folded)
    count = CONVOLUTIONS[type(block).__name__]
    for index in range(1, count + 1):
        x = _convolve(x, getattr(block, f"conv{index}"), folded)
        x = x.relu_() if index < count else x
    return (x + shortcut).relu_()
