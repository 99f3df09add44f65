"""A convolution by PyTorch's operators, and its gradient.

On a CPU, oneDNN's operators fuse bias, residual add and ReLU, and gradients of weights come from matrix products.
Elsewhere, and if anything is cast or traced, the reference runs.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conddetr.kernels import operators, paths, registry
from conddetr.kernels.conv import reference


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: tuple,
    residual: Tensor | None,
    overwrite: bool,
    relu: bool,
    by_products: bool,
    refused: dict[str, str],
) -> Tensor:
    """relu(x * weight + bias + residual); arguments as in `op.py`, and

    Args:
        by_products: gradients of weights may come from matrix products.
        refused: backends that `auto` would have preferred, and why they were refused.
    """
    tensors = [tensor for tensor in (x, weight, bias, residual) if tensor is not None]
    if not is_plain(tensors):
        paths.note("convolution", "eager", refused)
        return reference.convolution(x, weight, bias, *window, residual, relu)
    if not records_gradients(tensors) and _has_onednn(x):
        paths.note("convolution", "oneDNN, fused")
        return _by_onednn(x, weight, bias, window, residual, overwrite, relu)
    by_products = by_products and weight.requires_grad
    paths.note("convolution", "gradient of weights by products" if by_products else "eager")
    if by_products:
        out = ConvolutionByProducts.apply(x, weight, bias, *window[:3])
    else:
        out = F.conv2d(x, weight, bias, *window)
    if residual is not None:
        return add(out, residual, relu)
    return out.relu_() if relu else out


def is_plain(tensors: list[Tensor]) -> bool:
    """Whether these are ordinary CPU tensors of one dtype that nothing will cast or trace, and that only autograd
    differentiates. Tensors without values are left to PyTorch.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or torch.jit.is_tracing():
        return False
    if registry.transforms():
        return False
    first = tensors[0]
    return all(
        type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.dtype == first.dtype for x in tensors
    )


def records_gradients(tensors: list[Tensor]) -> bool:
    """Whether autograd records operations on these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _has_onednn(x: Tensor) -> bool:
    """Whether oneDNN can fuse a convolution with residual add and ReLU, as it does under torch.compile."""
    return x.dtype == torch.float32 and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled


def _by_onednn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: tuple,
    residual: Tensor | None,
    overwrite: bool,
    relu: bool,
) -> Tensor:
    stride, padding, dilation, groups = window
    window = (padding, stride, dilation, groups)
    if residual is None:
        convolve = torch.ops.mkldnn._convolution_pointwise.default
        return convolve(x, weight, bias, *window, "relu" if relu else "none", [], "")
    end = ("add", 1.0, "relu" if relu else None, [], "")
    if residual.shape[-2:] == (1, 1) and not overwrite:
        # In PyTorch 2.11 the other operator does not allocate a result of one cell.
        residual, overwrite = residual.clone(), True
    if overwrite and residual.is_contiguous(memory_format=torch.channels_last):
        return torch.ops.mkldnn._convolution_pointwise_.binary(residual, x, weight, bias, *window, *end)
    return torch.ops.mkldnn._convolution_pointwise.binary(x, residual, weight, bias, *window, *end)


def add(out: Tensor, residual: Tensor, relu: bool) -> Tensor:
    """Adds in place, because `out` is new; then ReLU if requested."""
    out = out.add_(residual)
    return out.relu_() if relu else out


class ConvolutionByProducts(torch.autograd.Function):
    """A convolution in channels-last whose weights get their gradient from one matrix product per cell of the window.

    On two AVX2 cores forward and backward took 0.7 to 0.9 of PyTorch's time in this layout, but 1.4 times that for 256
    to 64 channels of the first stage, which detectors do not train (`benchmarks/run.py conv`). The backward consists of
    operators that autograd records, so it can be differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> Tensor:
        """As `F.conv2d`."""
        ctx.save_for_backward(x, weight)
        ctx.window = (stride, padding, dilation)
        return F.conv2d(x, weight, bias, *ctx.window)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x, _, _ = torch.ops.aten.convolution_backward(
                grad, x, weight, None, *ctx.window, False, [0, 0], 1, [True, False, False]
            )
        if ctx.needs_input_grad[1]:
            # Nothing here is cast, even if autocast is on for backward alone.
            with torch.autocast(x.device.type, enabled=False):
                grad_weight = _weight_gradient(x, grad, weight.shape[2:], *ctx.window)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, None, None, None


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
    gradient = grad.new_empty(len(grad), *kernel, x.shape[-1])
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            top, left = i * dilation[0], j * dilation[1]
            cells = x[:, top : top + height : stride[0], left : left + width : stride[1]]
            gradient[:, i, j] = grad @ cells.flatten(0, 2)
    return gradient.permute(0, 3, 1, 2)


def _flops_of_onednn(*arguments: object, out_shape: tuple, **_: object) -> int:
    """Operations of oneDNN's convolutions, from shapes: the weight comes second, or third if there is a residual."""
    weight = [shape for shape in arguments[:3] if isinstance(shape, (tuple, list)) and len(shape) == 4][-1]
    return _flops_of_cudnn(None, weight, out_shape=out_shape)


def _flops_of_cudnn(_: object, weight: tuple, *_others: object, out_shape: tuple, **_more: object) -> int:
    """Operations of cuDNN's convolutions, from shapes: the weight is always second."""
    return 2 * math.prod(weight) * out_shape[0] * out_shape[2] * out_shape[3]


if torch.backends.mkldnn.is_available():
    operators.count_flops("mkldnn::_convolution_pointwise", _flops_of_onednn)
    operators.count_flops("mkldnn::_convolution_pointwise_", _flops_of_onednn)
operators.count_flops("aten::cudnn_convolution_relu", _flops_of_cudnn)
operators.count_flops("aten::cudnn_convolution_add_relu", _flops_of_cudnn)
