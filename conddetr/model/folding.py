"""ResNets whose frozen batch norm is part of the convolution before it, in inference and in training.

conv(x)·s + t is a convolution with weights scaled by s and bias t: two passes over every feature map less, each way.
Gradients flow through the scaling to the weights. Everything runs in channels-last, which convolutions prefer on CPUs
and, in half precision, on GPUs; all but the gradients of weights on CPUs, which are made of matrix products here.

For the ResNets of torchvision and timm, whose parts have the same names.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

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
    x = body.maxpool(_convolve(x, body.conv1, folded, "relu"))
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


def _convolve(x: Tensor, conv: nn.Conv2d, folded: Folded, then: str = "none") -> Tensor:
    """`then`: `relu` or `none`."""
    weight, bias = folded[conv]
    window = (conv.stride, conv.padding, conv.dilation)
    if _is_fusible(x, weight):
        stride, padding, dilation = window
        convolve = torch.ops.mkldnn._convolution_pointwise
        return convolve(x, weight, bias, padding, stride, dilation, conv.groups, then, [], "")
    by_products = weight.requires_grad and x.device.type == "cpu" and x.dtype == weight.dtype and conv.groups == 1
    if by_products and not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()):
        x = ConvolutionByProducts.apply(x, weight, bias, *window)
    else:
        x = F.conv2d(x, weight, bias, *window, conv.groups)
    return x.relu_() if then == "relu" else x


def _convolve_onto(shortcut: Tensor, x: Tensor, conv: nn.Conv2d, folded: Folded) -> Tensor:
    """The ReLU of the sum; `shortcut` may be overwritten."""
    weight, bias = folded[conv]
    if not _is_fusible(x, weight):
        return (_convolve(x, conv, folded) + shortcut).relu_()
    window = (conv.padding, conv.stride, conv.dilation, conv.groups)
    convolve = torch.ops.mkldnn._convolution_pointwise_.binary
    return convolve(shortcut, x, weight, bias, *window, "add", 1.0, "relu", [], "")


def _is_fusible(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes a convolution together with what follows it, as torch.compile has it do: float32 on a CPU
    without gradients. On others, and on tensors without values, everything is plain."""
    is_plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not is_plain or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    records = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return not records and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled


class ConvolutionByProducts(torch.autograd.Function):
    """A convolution in channels-last whose weights get their gradient from one matrix product per cell of the window.

    On two AVX2 cores that took 0.4 to 0.9 of the time of PyTorch's own way in this layout, by shape.
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
    ) -> Tensor:
        """As `F.conv2d`."""
        ctx.save_for_backward(x, weight)
        ctx.window = (stride, padding, dilation)
        return F.conv2d(x, weight, bias, *ctx.window)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x, _, _ = torch.ops.aten.convolution_backward(
                grad, x, weight, None, *ctx.window, False, [0, 0], 1, [True, False, False]
            )
        if ctx.needs_input_grad[1]:
            of_weight = _weight_gradient(x, grad, weight.shape[2:], *ctx.window)
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum((0, 2, 3))
        return of_x, of_weight, of_bias, None, None, None


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


def _residual_block(x: Tensor, block: nn.Module, folded: Folded) -> Tensor:
    shortcut = x if block.downsample is None else _convolve(x, block.downsample[0], folded)
    count = CONVOLUTIONS[type(block).__name__]
    for index in range(1, count):
        x = _convolve(x, getattr(block, f"conv{index}"), folded, "relu")
    return _convolve_onto(shortcut, x, getattr(block, f"conv{count}"), folded)
