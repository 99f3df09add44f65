"""ResNets whose frozen batch norms are folded into the convolutions before them, within the graph.

conv(x)·s + t is a convolution with weights scaled by s and bias t: two passes over every feature map less, each way.
Gradients flow through the scaling to the weights, and nothing is kept from call to call. Everything runs in
channels-last, which convolutions prefer on CPUs and, in half precision, on GPUs.

For the ResNets of torchvision and timm, whose parts have the same names. A part is fused if it is no more than its
class says; one that is hooked, wrapped, parametrised or replaced is called as the module that it is.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from conddetr.kernels import convolution, paths
from conddetr.model.layers import channels_last
from conddetr.model.plain import why_not_plain

STAGES = ("layer1", "layer2", "layer3", "layer4")
CONVOLUTIONS = {"BasicBlock": 2, "Bottleneck": 3}
"""Kind of residual block → its convolutions, the shortcut's not counted."""
EPS = 1e-5
"""Of norms that do not say theirs: transformers' have it as a constant."""

_PACKAGES = ("torchvision.models.resnet", "timm.models.resnet")
_FROZEN_BUFFERS = {"weight", "bias", "running_mean", "running_var"}


def stages(body: nn.Module, images: Tensor, backend: str) -> Iterator[Tensor]:
    """[B, 3, H, W] images -> the feature map of each stage in turn, in channels-last.

    Args:
        body: a ResNet.
        images: of the dtype of its weights, or under autocast.
        backend: `eager` does without our convolutions; all others take them where they can run.
    """
    backend = convolution_backend(backend)
    x = channels_last(images)
    x = body.maxpool(_stem(body, x, backend))
    for name in STAGES:
        stage = getattr(body, name)
        if type(stage) is nn.Sequential and why_not_plain(stage) is None:
            for block in stage:
                x = _residual_block(block, x, backend)
        else:
            note_modules(stage)
            x = stage(x)
        yield x


def fold(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight, in channels-last, and bias of a convolution together with the frozen norm behind it."""
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)
    weight, bias, mean, variance = (x.to(dtype) for x in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    scale = weight * (variance + getattr(norm, "eps", EPS)).rsqrt()
    folded = (conv.weight * scale[:, None, None, None], bias - mean * scale)
    return channels_last(folded[0].to(conv.weight.dtype)), folded[1].to(conv.weight.dtype)


def convolution_backend(backend: str) -> str:
    """What a model's backend means for its convolutions, for which no GPU needs kernels of ours."""
    return "eager" if backend == "eager" else "auto"


def conv_norm_pairs(block: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Every convolution of a residual block's branch with the norm behind it."""
    indices = range(1, CONVOLUTIONS[type(block).__name__] + 1)
    return [(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in indices]


def stem_misfit(body: nn.Module) -> str | None:
    """The reason why the first convolution has to be called as the modules that it is; None if it can be fused."""
    parts = (body.conv1, body.bn1, _stem_activation(body))
    reason = next(filter(None, map(why_not_plain, parts)), None)
    return reason or _pair_misfit(*parts[:2]) or _activation_misfit(parts[2])


def block_misfit(block: nn.Module) -> str | None:
    """The reason why a residual block has to be called as a module; None if it can be fused."""
    kind = type(block)
    if kind.__name__ not in CONVOLUTIONS or kind.__module__ not in _PACKAGES:
        return f"{kind.__name__} is no residual block of torchvision or timm"
    # Asked in every call: names are looked for only where there is something to say.
    for module in block.modules():
        reason = why_not_plain(module)
        if reason is not None:
            name = next(name for name, other in block.named_modules() if other is module)
            return f"{name}: {reason}" if name else reason
    parts = dict(block.named_children())
    shortcut = parts.pop("downsample", None)
    pairs = conv_norm_pairs(block)
    if shortcut is not None and type(shortcut) is not nn.Identity:
        if type(shortcut) is not nn.Sequential or len(shortcut) != 2:
            return "its shortcut is more than convolution and frozen batch norm"
        pairs = [*pairs, tuple(shortcut)]
    for conv, norm in pairs:
        reason = _pair_misfit(conv, norm)
        if reason is not None:
            return reason
    known = {id(part) for pair in pairs for part in pair}
    rest = [part for part in parts.values() if id(part) not in known]
    # Of what timm has for others it leaves the identity: dropped blocks, anti-aliasing, attention.
    odd = [part for part in rest if _activation_misfit(part) is not None and type(part) is not nn.Identity]
    return f"{type(odd[0]).__name__} is no part of a plain ResNet" if odd else None


def survey(body: nn.Module) -> dict[str, str | None]:
    """Each part that can be fused by itself → None, or the reason why it stays as it is."""
    found = {"conv1": stem_misfit(body)}
    for name in STAGES:
        stage = getattr(body, name)
        reason = why_not_plain(stage)
        if reason is None and type(stage) is not nn.Sequential:
            reason = f"it is a {type(stage).__name__}, expected Sequential"
        if reason is not None:
            found[name] = reason
        else:
            found |= {f"{name}.{index}": block_misfit(block) for index, block in enumerate(stage)}
    return found


def note_modules(part: nn.Module) -> None:
    """Record that a part is called as it is; parts of frozen copies record their own way."""
    if not getattr(part, "is_fused", False):
        paths.note("backbone", "modules")


def _stem_activation(body: nn.Module) -> nn.Module:
    """timm's name, or torchvision's."""
    return body.act1 if hasattr(body, "act1") else body.relu


def _stem(body: nn.Module, x: Tensor, backend: str) -> Tensor:
    if stem_misfit(body) is None:
        paths.note("backbone", "norms folded in the graph")
        return _fused(x, body.conv1, body.bn1, backend, relu=True)
    note_modules(body.conv1)
    return _stem_activation(body)(body.bn1(body.conv1(x)))


def _residual_block(block: nn.Module, x: Tensor, backend: str) -> Tensor:
    if block_misfit(block) is not None:
        note_modules(block)
        return block(x)
    paths.note("backbone", "norms folded in the graph")
    shortcut = x
    if type(block.downsample) is nn.Sequential:
        shortcut = _fused(x, *block.downsample, backend)
    *inner, last = conv_norm_pairs(block)
    for pair in inner:
        x = _fused(x, *pair, backend, relu=True)
    return _fused(x, *last, backend, relu=True, residual=shortcut)


def _fused(
    x: Tensor, conv: nn.Conv2d, norm: nn.Module, backend: str, relu: bool = False, residual: Tensor | None = None
) -> Tensor:
    return convolution(x, *fold(conv, norm), **window(conv), residual=residual, relu=relu, backend=backend)


def window(conv: nn.Conv2d) -> dict[str, object]:
    """Stride, padding, dilation and groups, as `convolution` takes them."""
    return {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}


def _pair_misfit(conv: nn.Module, norm: nn.Module) -> str | None:
    """The reason why this is no convolution without bias, followed by a frozen batch norm; of plain modules."""
    is_conv = type(conv) is nn.Conv2d and conv.bias is None and conv.padding_mode == "zeros"
    if not is_conv or isinstance(conv.padding, str) or type(conv.weight) not in (Tensor, nn.Parameter):
        return f"{type(conv).__name__}: expected a convolution without bias, with ordinary weights"
    # Each package has its own class of this name; what they do is the same.
    is_frozen = type(norm).__name__.endswith("FrozenBatchNorm2d") and set(norm._buffers) == _FROZEN_BUFFERS
    if not is_frozen or norm._parameters:
        return f"{type(norm).__name__}: expected a frozen batch norm"
    return None


def _activation_misfit(module: nn.Module) -> str | None:
    return None if type(module) is nn.ReLU else f"{type(module).__name__}: expected ReLU"
