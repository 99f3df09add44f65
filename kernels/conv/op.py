"""Convolution with bias, residual sum and ReLU: the public function, its checks, and how it runs on a CPU.

It only chooses among operators. On a CPU 3×3 convolutions are ours (`conv3x3`); the others are oneDNN's, which fuses
what follows them; weights that need a gradient get it from matrix products. On GPUs they are cuDNN's (`gpu.py`).
"""

import dataclasses
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from conddetr.kernels import conv3x3, operators, paths, registry
from conddetr.kernels.conv import gpu, reference

UNIT = ((1, 1), (1, 1), (1, 1), 1)
"""Stride, padding, dilation and groups of a 3×3 convolution that leaves the size of a map as it is."""


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    residual: Tensor | None = None,
    overwrite: bool = False,
    relu: bool = False,
    uses: int = 1,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """A convolution and what follows it in a residual network: relu(x * weight + bias + residual).

    Args:
        x: [B, Cin, H, W], floating; fastest in channels-last, which the result then has too.
        weight: [Cout, Cin / groups, kh, kw] of the dtype and device of x.
        bias: [Cout], likewise.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`, vertical and horizontal.
        residual: of the shape of the result.
        overwrite: the residual is not needed any more: the result may take its memory, which saves an allocation.
        relu: apply ReLU at the end.
        uses: how often the result will be used, 1 or 2. With 2 it is returned twice, in one memory, and on GPUs the
            gradients of both uses are summed by the kernel that reads them, not by another.
        backend: `eager`: PyTorch's operators, of which oneDNN's take bias, residual and ReLU along where no gradient is
            recorded; `native`: `convolution_3x3`, an error for others; `triton`: PyTorch's convolution, one kernel for
            all that follows it, which must end in ReLU, and one for ReLU's backward and the sum of gradients; `auto`:
            the fastest one. On CPUs it also makes the gradient of weights by matrix products. On GPUs it takes
            cuDNN's operators with bias, residual and ReLU in one pass, and `triton` for what these cannot do: they are
            tried once on a small map for each device, dtype and form of a convolution, which waits for the device.

    Returns:
        [B, Cout, h, w], or a pair of it with `uses` 2. Gradients of any order are recorded.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the tensor, what was expected and what was found.
        RuntimeError: the requested backend cannot run here; says why.
    """
    window = (stride, padding, dilation, groups)
    _check(x, weight, bias, window, residual)
    if uses not in (1, 2):
        raise ValueError(f"uses: expected 1 or 2, got {uses}.")
    choice = OPERATION.choose(backend, x.device, x.dtype, x, weight, bias, residual, relu, window)
    if choice.backend == "triton":
        return gpu.convolution(backend, x, weight, bias, window, residual, uses)
    if choice.backend == "native":
        paths.note("convolution", "native")
        out = conv3x3.convolution_3x3(x, weight, bias, relu=relu and residual is None, backend="native")
        out = out if residual is None else _add(out, residual, relu)
    else:
        by_products = backend != "eager" and groups == 1
        out = _by_pytorch(x, weight, bias, window, residual, overwrite, relu, by_products, choice.refused)
    return out if uses == 1 else (out, out)


class Layer(NamedTuple):
    """A convolution; all as of `convolution`."""

    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def convolution_pair(x: Tensor, first: Layer, second: Layer, *, backend: str = "auto") -> Tensor:
    """Two convolutions with ReLU: relu(second(relu(first(x)))).

    On GPUs the map between them is not kept for backward, but computed again there, by one launch. It pays where this
    map is large: where the second convolution has a stride.

    Args:
        x: [B, C, H, W], floating.
        first, second: what is convolved with.
        backend: as of `convolution`.

    Returns:
        As of the second convolution. Gradients of any order are recorded.

    Raises:
        ValueError, RuntimeError: as of `convolution`.
    """
    layers = (first, second)
    is_recorded = _records([tensor for tensor in (x, *first[:2], *second[:2]) if tensor is not None])
    if is_recorded and (backend == "triton" or (backend == "auto" and x.is_cuda)):
        _check(x, *first[:2], first[2:], None)
        # The map between has channels of the first weight, and its size is of no matter to the check.
        _check(x[:, :1].expand(-1, len(first.weight), -1, -1), *second[:2], second[2:], None)
        if all(_chosen(backend, x, layer) == "triton" for layer in layers):
            return gpu.convolution_pair(backend, x, tuple((*layer[:2], tuple(layer[2:])) for layer in layers))
    for weight, bias, stride, padding, dilation, groups in layers:
        window = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        x = convolution(x, weight, bias, **window, relu=True, backend=backend)
    return x


def _chosen(backend: str, x: Tensor, layer: Layer) -> str:
    return OPERATION.prefer(backend, x.device, x.dtype, x, *layer[:2], None, True, tuple(layer[2:])).backend


def _by_pytorch(
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
    """By PyTorch's operators.

    Args:
        by_products: gradients of weights may come from matrix products.
        refused: what `auto` would have preferred.
    """
    tensors = [tensor for tensor in (x, weight, bias, residual) if tensor is not None]
    if not _is_plain(tensors):
        paths.note("convolution", "eager", refused)
        return reference.convolution(x, weight, bias, *window, residual, relu)
    if not _records(tensors) and _has_onednn(x):
        paths.note("convolution", "oneDNN, fused")
        return _by_onednn(x, weight, bias, window, residual, overwrite, relu)
    by_products = by_products and weight.requires_grad
    paths.note("convolution", "gradient of weights by products" if by_products else "eager")
    if by_products:
        out = ConvolutionByProducts.apply(x, weight, bias, *window[:3])
    else:
        out = F.conv2d(x, weight, bias, *window)
    if residual is not None:
        return _add(out, residual, relu)
    return out.relu_() if relu else out


def _why_not_native(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool, window: tuple
) -> str | None:
    if window == UNIT and tuple(weight.shape[2:]) == (3, 3):
        return conv3x3.why_not(tuple(weight.shape[:2]), x.shape)
    return (
        f"its kernel takes a window of 3×3, stride, padding, dilation and groups 1, got {tuple(weight.shape[2:])} and "
        f"{window}: take backend auto or eager."
    )


def _why_not_plain(x: Tensor, weight: Tensor, *_: object) -> str | None:
    return None if _is_plain([x, weight]) else "x or weight will be cast, traced or differentiated by PyTorch."


OPERATION = registry.declare(
    "convolution",
    triton=registry.Kernels(why_not=gpu.why_not),
    native=dataclasses.replace(conv3x3.KERNELS, why_not=_why_not_native, why_not_auto=_why_not_plain),
)
"""It is told x, weight, bias, residual, ReLU and the window: stride, padding, dilation and groups."""


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, window: tuple, residual: Tensor | None) -> None:
    """What PyTorch's own checks do not say as clearly."""
    if weight.dim() != 4:
        raise ValueError(f"weight: expected [Cout, Cin / groups, kh, kw], got {tuple(weight.shape)}.")
    stride, padding, dilation, groups = window
    channels = weight.shape[1] * groups
    if x.dim() != 4 or x.shape[1] != channels or not x.is_floating_point():
        raise ValueError(f"x: expected [B, {channels}, H, W] as of weight, floating, got {tuple(x.shape)} {x.dtype}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected {tuple(weight.shape[:1])} as of weight, got {tuple(bias.shape)}.")
    if residual is None:
        return
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    cells = [(size + 2 * pad - far * (width - 1) - 1) // step + 1 for size, width, step, pad, far in sizes]
    expected = (x.shape[0], weight.shape[0], *cells)
    if tuple(residual.shape) != expected:
        raise ValueError(f"residual: expected {expected} as the result, got {tuple(residual.shape)}.")


def _is_plain(tensors: list[Tensor]) -> bool:
    """Whether these are numbers on a CPU of one dtype, which nothing will cast, trace or differentiate otherwise than
    autograd does. On tensors without values everything is PyTorch's.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or torch.jit.is_tracing():
        return False
    if registry.transforms():
        return False
    first = tensors[0]
    return all(
        type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.dtype == first.dtype for x in tensors
    )


def _records(tensors: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _has_onednn(x: Tensor) -> bool:
    """Whether oneDNN takes a convolution together with what follows it, as torch.compile has it do."""
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
        # Of one cell, the other operator finds no memory for its result in PyTorch 2.11.
        residual, overwrite = residual.clone(), True
    if overwrite and residual.is_contiguous(memory_format=torch.channels_last):
        return torch.ops.mkldnn._convolution_pointwise_.binary(residual, x, weight, bias, *window, *end)
    return torch.ops.mkldnn._convolution_pointwise.binary(x, residual, weight, bias, *window, *end)


def _add(out: Tensor, residual: Tensor, relu: bool) -> Tensor:
    """`out` is new, so the sum may take its place."""
    out = out.add_(residual)
    return out.relu_() if relu else out


class ConvolutionByProducts(torch.autograd.Function):
    """A convolution in channels-last whose weights get their gradient from one matrix product per cell of the window.

    On two AVX2 cores forward and backward took 0.7 to 0.9 of the time of PyTorch's own way in this layout, but 1.4 for
    256 to 64 channels of the first stage, which detectors do not train (`benchmarks/run.py conv`). The backward is made
    of operators that autograd records, so it can be differentiated again.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
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
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x, _, _ = torch.ops.aten.convolution_backward(
                grad, x, weight, None, *ctx.window, False, [0, 0], 1, [True, False, False]
            )
        if ctx.needs_input_grad[1]:
            # Nothing here is cast, also where autocast is on for backward alone.
            with torch.autocast(x.device.type, enabled=False):
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
    gradient = grad.new_empty(len(grad), *kernel, x.shape[-1])
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            y, left = i * dilation[0], j * dilation[1]
            seen = x[:, y : y + height : stride[0], left : left + width : stride[1]]
            gradient[:, i, j] = grad @ seen.flatten(0, 2)
    return gradient.permute(0, 3, 1, 2)


def _flops(*arguments: object, out_shape: tuple, **_: object) -> int:
    """Of oneDNN's convolutions, from shapes: the weight comes second, or third where there is a residual."""
    weight = [shape for shape in arguments[:3] if isinstance(shape, (tuple, list)) and len(shape) == 4][-1]
    return _flops_of_cudnn(None, weight, out_shape=out_shape)


def _flops_of_cudnn(_: object, weight: tuple, *_others: object, out_shape: tuple, **_more: object) -> int:
    """Likewise: there the weight is always second."""
    return 2 * math.prod(weight) * out_shape[0] * out_shape[2] * out_shape[3]


if torch.backends.mkldnn.is_available():
    operators.count_flops("mkldnn::_convolution_pointwise", _flops)
    operators.count_flops("mkldnn::_convolution_pointwise_", _flops)
operators.count_flops("aten::cudnn_convolution_relu", _flops_of_cudnn)
operators.count_flops("aten::cudnn_convolution_add_relu", _flops_of_cudnn)
