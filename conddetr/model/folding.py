"""ResNets whose frozen batch norm is part of the convolution before it, in inference and in training.

conv(x)·s + t is a convolution with weights scaled by s and bias t: two passes over every feature map less, each way.
Gradients flow through the scaling to the weights. Everything runs in channels-last, which convolutions prefer on CPUs
and, in half precision, on GPUs; all but the gradients of weights on CPUs, which are made of matrix products here. Those
of 3×3 are ours on a CPU: a quarter of the multiplications, each way.

For the ResNets of torchvision and timm, whose parts have the same names.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from conddetr.kernels import conv3x3, convolution_3x3, convolution_3x3_weight_gradient

STAGES = ("layer1", "layer2", "layer3", "layer4")
CONVOLUTIONS = {"BasicBlock": 2, "Bottleneck": 3}
"""Kind of residual block → its convolutions, the shortcut's not counted."""
EPS = 1e-5
"""Of norms that do not say theirs: transformers' have it as a constant."""

UNIT = ((1, 1), (1, 1), (1, 1))
"""Stride, padding and dilation of a convolution of 3×3 that leaves the size of a map as it is."""

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


def stages(body: nn.Module, folded: Folded, images: Tensor, backend: str) -> Iterator[Tensor]:
    """[B, 3, H, W] images -> the feature map of each stage in turn, in channels-last.

    Args:
        body: a ResNet.
        folded: what `fold` made of it.
        images: of the dtype of its weights, or under autocast.
        backend: `eager` does without our convolution; all others take it where it can run.
    """
    x = images.contiguous(memory_format=torch.channels_last)
    x = body.maxpool(_convolve(x, body.conv1, folded, backend, "relu"))
    for stage in STAGES:
        for block in getattr(body, stage):
            x = _residual_block(x, block, folded, backend)
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


def _convolve(x: Tensor, conv: nn.Conv2d, folded: Folded, backend: str, then: str = "none") -> Tensor:
    """`then`: `relu` or `none`."""
    weight, bias = folded[conv]
    window = (conv.stride, conv.padding, conv.dilation)
    is_plain, is_whole = _is_plain(x, weight), conv.groups == 1
    minimal = is_plain and is_whole and backend != "eager" and window == UNIT and _is_minimal(x, weight)
    if minimal and not _records(x, weight):
        return convolution_3x3(x, weight, bias, relu=then == "relu", backend="native")
    if is_plain and not _records(x, weight) and _has_onednn(x):
        stride, padding, dilation = window
        convolve = torch.ops.mkldnn._convolution_pointwise
        return convolve(x, weight, bias, padding, stride, dilation, conv.groups, then, [], "")
    if is_plain and is_whole and weight.requires_grad:
        x = ConvolutionByProducts.apply(x, weight, bias, *window, minimal)
    else:
        x = F.conv2d(x, weight, bias, *window, conv.groups)
    return x.relu_() if then == "relu" else x


def _convolve_onto(shortcut: Tensor, x: Tensor, conv: nn.Conv2d, folded: Folded, backend: str) -> Tensor:
    """The ReLU of the sum; `shortcut` may be overwritten."""
    weight, bias = folded[conv]
    if not _is_plain(x, weight) or _records(x, weight) or not _has_onednn(x):
        return (_convolve(x, conv, folded, backend) + shortcut).relu_()
    window = (conv.padding, conv.stride, conv.dilation, conv.groups)
    convolve = torch.ops.mkldnn._convolution_pointwise_.binary
    return convolve(shortcut, x, weight, bias, *window, "add", 1.0, "relu", [], "")


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether these are numbers on a CPU of one dtype, which nothing will cast. On GPUs, and on tensors without values,
    everything is PyTorch's."""
    is_plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype == weight.dtype
    return is_plain and not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())


def _records(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def _is_minimal(x: Tensor, weight: Tensor) -> bool:
    """Whether our kernel takes a convolution of this window."""
    return (
        tuple(weight.shape[2:]) == (3, 3)
        and x.dtype == torch.float32
        and conv3x3.why_not(x, tuple(weight.shape[:2])) is None
    )


def _has_onednn(x: Tensor) -> bool:
    """Whether oneDNN takes a convolution together with what follows it, as torch.compile has it do."""
    return x.dtype == torch.float32 and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled


class ConvolutionByProducts(torch.autograd.Function):
    """A convolution in channels-last whose weights get their gradient from one matrix product per cell of the window.

    On two AVX2 cores that took 0.4 to 0.9 of the time of PyTorch's own way in this layout, by shape. Where our
    convolution of 3×3 can run, it makes everything, gradients too (`benchmarks/conv3x3.py`).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        minimal: bool,
    ) -> Tensor:
        """As `F.conv2d`; `minimal`: by `convolution_3x3`, whose window it must have."""
        ctx.save_for_backward(x, weight)
        ctx.window, ctx.minimal = (stride, padding, dilation), minimal
        if minimal:
            return convolution_3x3(x, weight, bias, backend="native")
        return F.conv2d(x, weight, bias, *ctx.window)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0] and ctx.minimal:
            of_x = convolution_3x3(grad, weight, transposed=True, backend="native")
        elif ctx.needs_input_grad[0]:
            of_x, _, _ = torch.ops.aten.convolution_backward(
                grad, x, weight, None, *ctx.window, False, [0, 0], 1, [True, False, False]
            )
        if ctx.needs_input_grad[1] and ctx.minimal:
            of_weight = convolution_3x3_weight_gradient(x, grad, backend="native")
        elif ctx.needs_input_grad[1]:
            of_weight = _weight_gradient(x, grad, weight.shape[2:], *ctx.window)
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum((0, 2, 3))
        return of_x, of_weight, of_bias, None, None, None, None


def _weight_gradient(
    x: Tensor,
    grad: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """[B, Cin, H, W] input and [B, Cout, h, w] gradient -> [Cout, Cin, *kernel], in channels-last."""
    height, width = ((size - 1) * step + 1 for size, step in zip(grad.shape[2:], stride, strict=True))
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    grad = grad.permute(0, 2, 3, 1).flatten(0, 2).t()
    found = grad.new_empty(len(grad), *kernel, x.shape[-1])
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            y, left = i * dilation[0], j * dilation[1]
            seen = x[:, y : y + height : stride[0], left : left + width : stride[1]]
            found[:, i, j] = grad @ seen.flatten(0, 2)
    return found.permute(0, 3, 1, 2)


def _residual_block(x: Tensor, block: nn.Module, folded: Folded, backend: str) -> Tensor:
    shortcut = x if block.downsample is None else _convolve(x, block.downsample[0], folded, backend)
    count = CONVOLUTIONS[type(block).__name__]
    for index in range(1, count):
        x = _convolve(x, getattr(block, f"conv{index}"), folded, backend, "relu")
    return _convolve_onto(shortcut, x, getattr(block, f"conv{count}"), folded, backend)
