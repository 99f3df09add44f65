"""ResNets whose frozen batch norms are folded into the convolutions before them, within the graph.

conv(x)·s + t is a convolution with weights scaled by s and bias t: it saves two passes over every feature map, forward
and backward. Gradients flow through the scaling to the weights, and nothing is cached between calls. Everything runs in
channels-last, which is faster for convolutions on CPUs and, in half precision, on GPUs.

On a GPU a convolution is then one pass with bias, residual add and ReLU. No kernel follows a shortcut's convolution to
add its bias, so that bias is added to the bias of the convolution whose output the shortcut is added to.

This works for the ResNets of torchvision and timm, whose parts have the same names. Plain parts are fused; parts that
are hooked, wrapped, parametrised or replaced are called as modules.
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
from conddetr.model.recompute import recomputed

STAGES = ("layer1", "layer2", "layer3", "layer4")
CONVOLUTIONS = {"BasicBlock": 2, "Bottleneck": 3}
"""Class name of a residual block → number of its convolutions, without the shortcut's."""
_NAMES = {block: [(f"conv{i}", f"bn{i}") for i in range(1, count + 1)] for block, count in CONVOLUTIONS.items()}
_KNOWN = {"downsample", *(name for pair in _NAMES["Bottleneck"] for name in pair)}
POINTWISE = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
"""The window of a pointwise convolution, together with a 1×1 kernel."""
KEPT = 48 << 20
"""Largest feature map, in bytes, before a strided convolution that is kept for backward on a GPU; larger ones are
recomputed. ResNet-50 at 800×1066 has two larger ones for 8 images, of 105 and 52 MiB, and none for 2.
"""
EPS = 1e-5
"""Epsilon of norms without an attribute for it: in transformers it is a constant."""

_PACKAGES = ("torchvision.models.resnet", "timm.models.resnet")
_FROZEN_BUFFERS = {"weight", "bias", "running_mean", "running_var"}

Folded = Callable[[nn.Conv2d, nn.Module], tuple[Tensor, Tensor]]
"""A convolution and the norm behind it → the folded weight, in channels-last, and the folded bias."""


def stages(body: nn.Module, images: Tensor, backend: str, folded: Folded | None = None) -> Iterator[Tensor]:
    """[B, 3, H, W] images -> the feature map of each stage in turn, in channels-last.

    Parts are checked for being plain once, before the first part runs.

    Args:
        body: a ResNet.
        images: in the dtype of the weights; any floating dtype under autocast or with `folded`.
        backend: `eager` avoids our convolutions; all others use them where they can run.
        folded: returns weights that are already folded and cast, all of one dtype, in which all plain parts then
            compute. If the modules have another dtype, parts that are not plain need autocast. Default: weights are
            folded here, under autocast on a GPU in its dtype.
    """
    parts = [_parts(getattr(body, name)) for name in STAGES]
    mode = _mode(images, convolution_backend(backend), folded, [part for stage in parts for part in stage])
    x = _pool(body.maxpool, _stem(body, images, mode), mode)
    # Two tensors for the next block's branch and shortcut, so that no extra kernel sums their gradients.
    maps = (x, x)
    for stage in parts:
        maps = recomputed(body, "backbone stage", partial(_stage, stage, mode), *maps)
        yield maps[0]


def _stage(parts: "list[_Part]", mode: "_Mode", *maps: Tensor) -> tuple[Tensor, Tensor]:
    """Run the parts of a stage on two equal maps; returns two equal maps."""
    for module, is_plain in parts:
        if is_plain:
            maps = _residual_block(module, maps, mode)
        else:
            note_modules(module)
            maps = (module(maps[0]),) * 2
    return maps


class _Part(NamedTuple):
    """A block or a stage, which is called as a module or computed here."""

    module: nn.Module
    is_plain: bool


class _Mode(NamedTuple):
    """How plain parts are computed."""

    name: str
    """For `paths.note`."""
    backend: str
    folded: Folded
    casts: bool
    """Whether inputs are cast to the weights' dtype here; otherwise autocast casts them, if it is on."""
    moves_biases: bool
    """Whether a shortcut's bias is added to the bias of the block's last convolution."""
    biases: dict[int, Tensor]
    """`id` of a block → the sum of both biases, if it is already computed."""


def _mode(images: Tensor, backend: str, folded: Folded | None, parts: list[_Part]) -> _Mode:
    if folded is not None:
        biases = _biases_of_shortcuts(parts, folded)
        return _Mode("norms folded before", backend, folded, casts=True, moves_biases=True, biases=biases)
    on_gpu = images.is_cuda and backend != "eager"
    casts = on_gpu and torch.is_autocast_enabled("cuda")
    folded = partial(fold, dtype=torch.get_autocast_dtype("cuda")) if casts else fold
    return _Mode("norms folded in the graph", backend, folded, casts, moves_biases=on_gpu, biases={})


def _parts(stage: nn.Module) -> list[_Part]:
    """The blocks of a stage, or the stage itself if it is not a plain sequence."""
    if type(stage) is nn.Sequential and why_not_plain(stage) is None:
        return [_Part(block, block_misfit(block) is None) for block in stage._modules.values()]
    return [_Part(stage, False)]


def _biases_of_shortcuts(parts: list[_Part], folded: Folded) -> dict[int, Tensor]:
    """Add the biases of the shortcut's and the last convolution, for all plain blocks with both, in one launch."""
    blocks = [part.module for part in parts if part.is_plain and type(part.module.downsample) is nn.Sequential]
    if not blocks:
        return {}
    last = [folded(*conv_norm_pairs(block)[-1])[1] for block in blocks]
    sums = torch._foreach_add(last, [folded(*block.downsample)[1] for block in blocks])
    return {id(block): bias for block, bias in zip(blocks, sums, strict=True)}


def fold(conv: nn.Conv2d, norm: nn.Module, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Fold a frozen norm into the convolution before it: returns the weight, in channels-last, and the bias.

    Args:
        conv: a convolution without bias.
        norm: a frozen batch norm.
        dtype: of the result; default: of the convolution's weight. The computation is in float32 or wider.
    """
    exact = torch.promote_types(conv.weight.dtype, torch.float32)
    weight, bias, mean, variance = (x.to(exact) for x in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    scale = weight * (variance + getattr(norm, "eps", EPS)).rsqrt()
    dtype = dtype or conv.weight.dtype
    return channels_last(conv.weight * scale[:, None, None, None], dtype), (bias - mean * scale).to(dtype)


def is_unproven(backend: str, images: Tensor) -> bool:
    """Whether a model with backend `auto` must call its modules: on a GPU where our convolution is not proven."""
    if backend != "auto" or not images.is_cuda:
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else images.dtype
    return OPERATIONS["convolution"].choose("auto", images.device, dtype).backend == "eager"


def convolution_backend(backend: str) -> str:
    """Backend of the convolutions in a model of this backend: on GPUs they run without our kernels too."""
    return "eager" if backend == "eager" else "auto"


def conv_norm_pairs(block: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Each convolution of a residual block's branch, with the norm behind it."""
    return [(getattr(block, conv), getattr(block, norm)) for conv, norm in _NAMES[type(block).__name__]]


def stem_misfit(body: nn.Module) -> str | None:
    """The reason why convolution, norm and activation of the stem have to be called; None if they can be fused."""
    parts = (body.conv1, body.bn1, _stem_activation(body))
    reason = next(filter(None, map(why_not_plain, parts)), None)
    return reason or _pair_misfit(*parts[:2]) or _activation_misfit(parts[2])


def block_misfit(block: nn.Module) -> str | None:
    """The reason why a residual block has to be called as a module; None if it can be fused."""
    block_class = type(block)
    if block_class.__name__ not in CONVOLUTIONS or block_class.__module__ not in _PACKAGES:
        return f"{block_class.__name__} is not a residual block of torchvision or timm"
    reason = why_not_plain(block)
    if reason is not None:
        return reason
    # This runs for every block in every call, so parts are read from the module's own dictionary.
    parts = block._modules
    reason = _first_reason(parts)
    if reason is not None:
        return reason
    pairs = [(parts.get(conv), parts.get(norm)) for conv, norm in _NAMES[block_class.__name__]]
    shortcut = parts.get("downsample")
    if shortcut is not None and type(shortcut) is not nn.Identity:
        if type(shortcut) is not nn.Sequential or len(shortcut) != 2:
            return "its shortcut is more than a convolution and a frozen batch norm"
        reason = _first_reason(shortcut._modules, "downsample.")
        if reason is not None:
            return reason
        pairs.append(tuple(shortcut._modules.values()))
    for conv, norm in pairs:
        reason = _pair_misfit(conv, norm)
        if reason is not None:
            return reason
    for name, part in parts.items():
        # timm sets unused parts to the identity: dropped blocks, anti-aliasing, attention.
        if name not in _KNOWN and type(part) not in (nn.ReLU, nn.Identity, type(None)):
            return f"{type(part).__name__} is not part of a plain ResNet"
    return None


def _first_reason(parts: dict[str, nn.Module | None], prefix: str = "") -> str | None:
    """Name and reason of the first part that has to be called as a module."""
    for name, part in parts.items():
        reason = None if part is None else why_not_plain(part)
        if reason is not None:
            return f"{prefix}{name}: {reason}"
    return None


def plain_pairs(body: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Each convolution of the plain parts, with the norm behind it."""
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
    """Each part that can be fused on its own → None, or the reason why it is not fused."""
    reasons = {"conv1": stem_misfit(body)}
    for name in STAGES:
        stage = getattr(body, name)
        reason = why_not_plain(stage)
        if reason is None and type(stage) is not nn.Sequential:
            reason = f"expected Sequential, got {type(stage).__name__}"
        if reason is not None:
            reasons[name] = reason
        else:
            reasons |= {f"{name}.{index}": block_misfit(block) for index, block in enumerate(stage)}
    return reasons


def note_modules(part: nn.Module) -> None:
    """Record that a part is called as a module; parts of frozen copies record themselves."""
    if not getattr(part, "is_fused", False):
        paths.note("backbone", "modules")


def _stem_activation(body: nn.Module) -> nn.Module:
    """The stem's activation, under timm's or torchvision's name."""
    return body.act1 if hasattr(body, "act1") else body.relu


def _stem(body: nn.Module, images: Tensor, mode: _Mode) -> Tensor:
    if stem_misfit(body) is None:
        paths.note("backbone", mode.name)
        weight, bias = mode.folded(body.conv1, body.bn1)
        x = channels_last(images, weight.dtype if mode.casts else None)
        return convolution(x, weight, bias, **window(body.conv1), relu=True, backend=mode.backend)
    note_modules(body.conv1)
    # The convolution of a frozen copy converts the layout itself, together with the dtype.
    x = images if getattr(body.conv1, "is_fused", False) else channels_last(images)
    return _stem_activation(body)(body.bn1(body.conv1(x)))


def _pool(module: nn.Module, x: Tensor, mode: _Mode) -> Tensor:
    if not mode.moves_biases or type(module) is not nn.MaxPool2d or why_not_plain(module) is not None:
        return module(x)
    settings = (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
    is_ours = settings == (3, 2, 1, 1, False) and not module.return_indices
    return max_pool(x, mode.backend) if is_ours else module(x)


def _residual_block(block: nn.Module, maps: tuple[Tensor, Tensor], mode: _Mode) -> tuple[Tensor, Tensor]:
    """Run a block on two equal maps, one for the branch and one for the shortcut; returns two equal maps."""
    paths.note("backbone", mode.name)
    *inner, last = conv_norm_pairs(block)
    weight, bias = mode.folded(*last)
    # After a part that is not plain both are the same tensor, perhaps of another dtype.
    x, shortcut = maps if maps[0].dtype == weight.dtype or not mode.casts else (maps[0].to(weight.dtype),) * 2
    if type(block.downsample) is nn.Sequential:
        shortcut_weight, shortcut_bias = mode.folded(*block.downsample)
        if mode.moves_biases:
            bias = mode.biases[id(block)] if id(block) in mode.biases else bias + shortcut_bias
            shortcut_bias = None
        shortcut = convolution(
            shortcut, shortcut_weight, shortcut_bias, **window(block.downsample[0]), backend=mode.backend
        )
    if len(inner) == 2 and max(inner[1][0].stride) > 1 and _map_bytes(x, inner[0][0]) > KEPT:
        # The map between the two is the block's largest: backward recomputes it.
        x = convolution_pair(
            x, *(Layer(*mode.folded(*pair), **window(pair[0])) for pair in inner), backend=mode.backend
        )
    else:
        for conv, norm in inner:
            x = convolution(x, *mode.folded(conv, norm), **window(conv), relu=True, backend=mode.backend)
    options = {**window(last[0]), "residual": shortcut, "relu": True, "uses": 2}
    return convolution(x, weight, bias, **options, backend=mode.backend)


def _map_bytes(x: Tensor, conv: nn.Conv2d) -> int:
    """Bytes of a 1×1 convolution's output."""
    return x[:, :1].numel() * conv.out_channels * x.element_size()


def window(conv: nn.Conv2d) -> dict[str, object]:
    """Stride, padding, dilation and groups, as `convolution` takes them."""
    return {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}


def _pair_misfit(conv: nn.Module, norm: nn.Module) -> str | None:
    """The reason why a convolution and a norm cannot be folded; both are plain modules."""
    is_conv = type(conv) is nn.Conv2d and conv.bias is None and conv.padding_mode == "zeros"
    if not is_conv or isinstance(conv.padding, str) or type(conv.weight) not in (Tensor, nn.Parameter):
        return f"{type(conv).__name__}: expected a convolution without bias, with ordinary weights"
    # Each package has its own class of this name; all compute the same.
    is_frozen = type(norm).__name__.endswith("FrozenBatchNorm2d") and norm._buffers.keys() == _FROZEN_BUFFERS
    if not is_frozen or norm._parameters:
        return f"{type(norm).__name__}: expected a frozen batch norm"
    return None


def _activation_misfit(module: nn.Module) -> str | None:
    return None if type(module) is nn.ReLU else f"{type(module).__name__}: expected ReLU"
