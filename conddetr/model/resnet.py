"""ResNets whose frozen batch norms are folded into the convolutions before them, within the graph.

conv(x)·s + t is a convolution with weights scaled by s and bias t: two passes over every feature map less, each way.
Gradients flow through the scaling to the weights, and nothing is kept from call to call. Everything runs in
channels-last, which convolutions prefer on CPUs and, in half precision, on GPUs.

On a GPU a convolution is then one pass with bias, residual sum and ReLU. A shortcut's convolution has nothing behind it
that would take its bias along: it goes into the bias of the convolution to whose result the shortcut is added.

For the ResNets of torchvision and timm, whose parts have the same names. A part is fused if it is no more than its
class says; one that is hooked, wrapped, parametrised or replaced is called as the module that it is.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from conddetr.kernels import convolution, convolution_pair, max_pool, paths
from conddetr.kernels.conv import Layer
from conddetr.kernels.registry import OPERATIONS
from conddetr.model.layers import channels_last
from conddetr.model.plain import why_not_plain

STAGES = ("layer1", "layer2", "layer3", "layer4")
CONVOLUTIONS = {"BasicBlock": 2, "Bottleneck": 3}
"""Kind of residual block → its convolutions, the shortcut's not counted."""
_NAMES = {kind: [(f"conv{i}", f"bn{i}") for i in range(1, count + 1)] for kind, count in CONVOLUTIONS.items()}
_KNOWN = {"downsample", *(name for pair in _NAMES["Bottleneck"] for name in pair)}
POINTWISE = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
"""A window that sees one pixel and skips none, where its kernel is 1×1."""
KEPT = 48 << 20
"""Bytes of a map before a strided convolution up to which it is kept for backward on a GPU; a larger one is computed
again. Of ResNet-50 at 800×1066 these are two for 8 images, of 105 and 52 MiB, and none for 2.
"""
EPS = 1e-5
"""Of norms that do not say theirs: transformers' have it as a constant."""

_PACKAGES = ("torchvision.models.resnet", "timm.models.resnet")
_FROZEN_BUFFERS = {"weight", "bias", "running_mean", "running_var"}

Folded = Callable[[nn.Conv2d, nn.Module], tuple[Tensor, Tensor]]
"""A convolution and the norm behind it → the weight, in channels-last, and the bias that both have together."""


def stages(body: nn.Module, images: Tensor, backend: str, folded: Folded | None = None) -> Iterator[Tensor]:
    """[B, 3, H, W] images -> the feature map of each stage in turn, in channels-last.

    Which parts are plain is looked up once, before the first runs.

    Args:
        body: a ResNet.
        images: of the dtype of its weights, or under autocast, or floating where weights are given.
        backend: `eager` does without our convolutions; all others take them where they can run.
        folded: gives weights that were folded and cast already, all of one dtype, in which all plain parts then
            compute; where modules have another one, autocast has to be on, for parts that are not plain. Default:
            they are folded here, under autocast on a GPU in its dtype.
    """
    parts = [_parts(getattr(body, name)) for name in STAGES]
    way = _way(images, convolution_backend(backend), folded, [part for stage in parts for part in stage])
    x = _pool(body.maxpool, _stem(body, images, way), way)
    # For the branch of the next block and its shortcut: two tensors, so that nothing else sums their gradients.
    maps = (x, x)
    for stage in parts:
        for module, is_plain in stage:
            if is_plain:
                maps = _residual_block(module, maps, way)
            else:
                note_modules(module)
                x = module(maps[0])
                maps = (x, x)
        yield maps[0]


class _Part(NamedTuple):
    """What is called, or computed by us, at once."""

    module: nn.Module
    is_plain: bool


class _Way(NamedTuple):
    """How plain parts are computed."""

    name: str
    """For records."""
    backend: str
    folded: Folded
    casts: bool
    """Whether their input takes the dtype of their weights, which autocast sees to elsewhere."""
    moves_biases: bool
    """Whether a shortcut's bias goes into that of the last convolution of the block."""
    biases: dict[int, Tensor]
    """`id` of a block → the sum of both, where it is there already."""


def _way(images: Tensor, backend: str, folded: Folded | None, parts: list[_Part]) -> _Way:
    if folded is not None:
        biases = _biases_of_shortcuts(parts, folded)
        return _Way("norms folded before", backend, folded, casts=True, moves_biases=True, biases=biases)
    on_gpu = images.is_cuda and backend != "eager"
    casts = on_gpu and torch.is_autocast_enabled("cuda")
    folded = partial(fold, dtype=torch.get_autocast_dtype("cuda")) if casts else fold
    return _Way("norms folded in the graph", backend, folded, casts, moves_biases=on_gpu, biases={})


def _parts(stage: nn.Module) -> list[_Part]:
    """The blocks of a stage, or the stage itself if it is more than their sequence."""
    if type(stage) is nn.Sequential and why_not_plain(stage) is None:
        return [_Part(block, block_misfit(block) is None) for block in stage._modules.values()]
    return [_Part(stage, False)]


def _biases_of_shortcuts(parts: list[_Part], folded: Folded) -> dict[int, Tensor]:
    """Of plain blocks with a convolution in the shortcut, its bias and that of the last one in sum: one launch."""
    blocks = [part.module for part in parts if part.is_plain and type(part.module.downsample) is nn.Sequential]
    if not blocks:
        return {}
    last = [folded(*conv_norm_pairs(block)[-1])[1] for block in blocks]
    sums = torch._foreach_add(last, [folded(*block.downsample)[1] for block in blocks])
    return {id(block): bias for block, bias in zip(blocks, sums, strict=True)}


def fold(conv: nn.Conv2d, norm: nn.Module, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Weight, in channels-last, and bias of a convolution together with the frozen norm behind it.

    Args:
        conv: without a bias.
        norm: a frozen batch norm.
        dtype: of the result; default: of the convolution's weight. At least float32 is computed in.
    """
    exact = torch.promote_types(conv.weight.dtype, torch.float32)
    weight, bias, mean, variance = (x.to(exact) for x in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    scale = weight * (variance + getattr(norm, "eps", EPS)).rsqrt()
    dtype = dtype or conv.weight.dtype
    return channels_last(conv.weight * scale[:, None, None, None], dtype), (bias - mean * scale).to(dtype)


def is_unproven(backend: str, images: Tensor) -> bool:
    """Whether the modules are to be called for a model's backend `auto`: on a GPU where ours is not proven."""
    if backend != "auto" or not images.is_cuda:
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else images.dtype
    return OPERATIONS["convolution"].choose("auto", images.device, dtype).backend == "eager"


def convolution_backend(backend: str) -> str:
    """What a model's backend means for its convolutions, for which no GPU needs kernels of ours."""
    return "eager" if backend == "eager" else "auto"


def conv_norm_pairs(block: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Every convolution of a residual block's branch with the norm behind it."""
    return [(getattr(block, conv), getattr(block, norm)) for conv, norm in _NAMES[type(block).__name__]]


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
    reason = why_not_plain(block)
    if reason is not None:
        return reason
    # Asked in every call of every block: parts are looked up once, in the dictionary where a module has them.
    parts = block._modules
    reason = _first_reason(parts)
    if reason is not None:
        return reason
    pairs = [(parts.get(conv), parts.get(norm)) for conv, norm in _NAMES[kind.__name__]]
    shortcut = parts.get("downsample")
    if shortcut is not None and type(shortcut) is not nn.Identity:
        if type(shortcut) is not nn.Sequential or len(shortcut) != 2:
            return "its shortcut is more than convolution and frozen batch norm"
        reason = _first_reason(shortcut._modules, "downsample.")
        if reason is not None:
            return reason
        pairs.append(tuple(shortcut._modules.values()))
    for conv, norm in pairs:
        reason = _pair_misfit(conv, norm)
        if reason is not None:
            return reason
    for name, part in parts.items():
        # Of what timm has for others it leaves the identity: dropped blocks, anti-aliasing, attention.
        if name not in _KNOWN and type(part) not in (nn.ReLU, nn.Identity, type(None)):
            return f"{type(part).__name__} is no part of a plain ResNet"
    return None


def _first_reason(parts: dict[str, nn.Module | None], prefix: str = "") -> str | None:
    """The name of the first part that has to be called as a module, with the reason."""
    for name, part in parts.items():
        reason = None if part is None else why_not_plain(part)
        if reason is not None:
            return f"{prefix}{name}: {reason}"
    return None


def plain_pairs(body: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Every convolution of the parts that are fused, with the norm behind it."""
    if stem_misfit(body) is None:
        yield body.conv1, body.bn1
    for name in STAGES:
        stage = getattr(body, name)
        if type(stage) is not nn.Sequential or why_not_plain(stage) is not None:
            continue
        for block in stage:
            if block_misfit(block) is None:
                yield from conv_norm_pairs(block)
                if type(block.downsample) is nn.Sequential:
                    yield tuple(block.downsample)


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


def _stem(body: nn.Module, images: Tensor, way: _Way) -> Tensor:
    if stem_misfit(body) is None:
        paths.note("backbone", way.name)
        weight, bias = way.folded(body.conv1, body.bn1)
        x = channels_last(images, weight.dtype if way.casts else None)
        return convolution(x, weight, bias, **window(body.conv1), relu=True, backend=way.backend)
    note_modules(body.conv1)
    # That of a frozen copy sees to the layout itself, together with the dtype.
    x = images if getattr(body.conv1, "is_fused", False) else channels_last(images)
    return _stem_activation(body)(body.bn1(body.conv1(x)))


def _pool(module: nn.Module, x: Tensor, way: _Way) -> Tensor:
    if not way.moves_biases or type(module) is not nn.MaxPool2d or why_not_plain(module) is not None:
        return module(x)
    settings = (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
    is_ours = settings == (3, 2, 1, 1, False) and not module.return_indices
    return max_pool(x, way.backend) if is_ours else module(x)


def _residual_block(block: nn.Module, maps: tuple[Tensor, Tensor], way: _Way) -> tuple[Tensor, Tensor]:
    """One map for the branch and one for the shortcut, of the same values, as of the result."""
    paths.note("backbone", way.name)
    *inner, last = conv_norm_pairs(block)
    weight, bias = way.folded(*last)
    # After a part that is not plain they may be of another dtype, and are one.
    x, shortcut = maps if maps[0].dtype == weight.dtype or not way.casts else (maps[0].to(weight.dtype),) * 2
    if type(block.downsample) is nn.Sequential:
        of_shortcut, its_bias = way.folded(*block.downsample)
        if way.moves_biases:
            bias = way.biases[id(block)] if id(block) in way.biases else bias + its_bias
            its_bias = None
        shortcut = convolution(shortcut, of_shortcut, its_bias, **window(block.downsample[0]), backend=way.backend)
    if len(inner) == 2 and max(inner[1][0].stride) > 1 and _map_bytes(x, inner[0][0]) > KEPT:
        # The map between them is the largest of the block: it is computed again in backward.
        x = convolution_pair(x, *(Layer(*way.folded(*pair), **window(pair[0])) for pair in inner), backend=way.backend)
    else:
        for conv, norm in inner:
            x = convolution(x, *way.folded(conv, norm), **window(conv), relu=True, backend=way.backend)
    options = {**window(last[0]), "residual": shortcut, "relu": True, "uses": 2}
    return convolution(x, weight, bias, **options, backend=way.backend)


def _map_bytes(x: Tensor, conv: nn.Conv2d) -> int:
    """Memory of the result of a 1×1 convolution."""
    return x[:, :1].numel() * conv.out_channels * x.element_size()


def window(conv: nn.Conv2d) -> dict[str, object]:
    """Stride, padding, dilation and groups, as `convolution` takes them."""
    return {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}


def _pair_misfit(conv: nn.Module, norm: nn.Module) -> str | None:
    """The reason why this is no convolution without bias, followed by a frozen batch norm; of plain modules."""
    is_conv = type(conv) is nn.Conv2d and conv.bias is None and conv.padding_mode == "zeros"
    if not is_conv or isinstance(conv.padding, str) or type(conv.weight) not in (Tensor, nn.Parameter):
        return f"{type(conv).__name__}: expected a convolution without bias, with ordinary weights"
    # Each package has its own class of this name; what they do is the same.
    is_frozen = type(norm).__name__.endswith("FrozenBatchNorm2d") and norm._buffers.keys() == _FROZEN_BUFFERS
    if not is_frozen or norm._parameters:
        return f"{type(norm).__name__}: expected a frozen batch norm"
    return None


def _activation_misfit(module: nn.Module) -> str | None:
    return None if type(module) is nn.ReLU else f"{type(module).__name__}: expected ReLU"
