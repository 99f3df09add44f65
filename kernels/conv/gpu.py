"""A convolution on a GPU, with bias, residual add and ReLU in one pass by cuDNN, and its gradient.

Where cuDNN cannot fuse them, a Triton kernel adds bias and residual and applies ReLU in one pass over the map; PyTorch
would need two or three. Backward reads only the result: one kernel sums the gradients of the two uses that a block's
output has in a residual network, and zeroes them where ReLU returned zero.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conddetr.kernels import operators, paths, registry
from conddetr.kernels.conv import reference

Forward = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, tuple], Tensor]
"""Computes relu(x * weight + bias + residual) from these tensors and a window."""
CUDNN = "cuDNN, fused"
"""The path's name."""
_failures: dict[tuple, str | None] = {}
"""Device, dtype, shape of the weight, window, and whether there is a residual → why cuDNN does not fuse such a
convolution; None if a trial succeeded."""


def why_not(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool, window: tuple
) -> str | None:
    """Why these kernels cannot compute a convolution; None if they can."""
    if not relu:
        return "its kernels end in ReLU."
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "a graph of PyTorch's own operators is traced."
    # Autocast to the tensors' own dtype casts nothing.
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) != x.dtype:
        return f"autocast would cast to {torch.get_autocast_dtype(device_type)}, x is {x.dtype}."
    device, dtype = x.device, x.dtype
    for tensor in (x, weight, bias, residual):
        is_ordinary = tensor is None or type(tensor) in (Tensor, torch.nn.Parameter)
        if not is_ordinary or (tensor is not None and (tensor.device != device or tensor.dtype != dtype)):
            return f"its tensors are not all ordinary tensors of {dtype} on {device}."
    if not x.is_contiguous(memory_format=torch.channels_last) or x.numel() == 0:
        return "x is not in channels-last, or is empty."
    return None


def convolution(
    backend: str, x: Tensor, weight: Tensor, bias: Tensor | None, window: tuple, residual: Tensor | None, uses: int
) -> Tensor | tuple[Tensor, Tensor]:
    """relu(x * weight + bias + residual); `window`: stride, padding, dilation, groups. With uses 2 it is returned twice
    without a copy, and backward sums the gradients of both.
    """
    forward = _choose(backend, x, weight, window, residual is not None)
    tensors = (x, weight, bias, residual)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return ConvolutionReLU.apply(*tensors, window, uses, forward)
    out = forward(*tensors, window)
    return out if uses == 1 else (out, out)


def convolution_pair(backend: str, x: Tensor, layers: tuple[tuple[Tensor, Tensor | None, tuple], ...]) -> Tensor:
    """Two convolutions with ReLU, each a weight, a bias and a window as above; gradients are recorded."""
    (*first, window), (*second, other_window) = layers
    forwards = [_choose(backend, x, weight, window, False) for weight, _, window in layers]
    return ConvolutionPair.apply(x, *first, *second, (window, other_window), forwards)


def _choose(backend: str, x: Tensor, weight: Tensor, window: tuple, has_residual: bool) -> Forward:
    """The function that computes the convolution; notes its path."""
    refused = {}
    if backend == "auto":
        reason = _why_not_cudnn(x, weight, window, has_residual)
        refused = {} if reason is None else {CUDNN: reason}
    is_cudnn = backend == "auto" and not refused
    paths.note("convolution", CUDNN if is_cudnn else "triton", refused)
    return _by_cudnn if is_cudnn else _with_epilogue


class ConvolutionReLU(torch.autograd.Function):
    """Backward needs only the sign of the result, which the next convolution saves anyway: no other map is saved."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        window: tuple,
        uses: int,
        forward: Forward,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`forward` computes the result from the first five inputs."""
        y = forward(x, weight, bias, residual, window)
        ctx.save_for_backward(x, weight, y)
        ctx.window = window
        ctx.set_materialize_grads(False)
        return y if uses == 1 else (y, y.view_as(y))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias and residual."""
        x, weight, y = ctx.saved_tensors
        if all(grad is None for grad in grads):
            return (None,) * 7
        grad = _before_relu(grads, y)
        *gradients, grad_bias = _gradients(grad, x, weight, ctx.window, ctx.needs_input_grad[:3])
        return *gradients, grad_bias, grad if ctx.needs_input_grad[3] else None, None, None, None


class ConvolutionPair(torch.autograd.Function):
    """Two convolutions with ReLU; the map between them is not saved but recomputed in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        other_weight: Tensor,
        other_bias: Tensor | None,
        windows: tuple[tuple, tuple],
        forwards: list[Forward],
    ) -> Tensor:
        """`windows` and `forwards`: of the first and of the second convolution."""
        y = forwards[1](forwards[0](x, weight, bias, None, windows[0]), other_weight, other_bias, None, windows[1])
        ctx.save_for_backward(x, weight, bias, other_weight, y)
        ctx.windows, ctx.forward_again = windows, forwards[0]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weights and biases."""
        x, weight, bias, other_weight, y = ctx.saved_tensors
        # Autocast may be on for backward alone, but the map must equal that of forward.
        with torch.autocast(x.device.type, enabled=False):
            if _is_differentiated_again():
                middle = reference.convolution(x, weight, bias, *ctx.windows[0], None, True)
            else:
                middle = ctx.forward_again(x, weight, bias, None, ctx.windows[0])
        needs_first, needs_second = ctx.needs_input_grad[:3], ctx.needs_input_grad[3:5]
        grad = _before_relu((grad,), y)
        grad, *gradients = _gradients(grad, middle, other_weight, ctx.windows[1], (any(needs_first), *needs_second))
        if grad is None:
            return None, None, None, *gradients, None, None
        grad = _before_relu((grad,), middle)
        return *_gradients(grad, x, weight, ctx.windows[0], needs_first), *gradients, None, None


def _is_differentiated_again() -> bool:
    """Whether gradients are recorded to be differentiated again, or transformed by torch.func. Only PyTorch's own
    operators support that.
    """
    return torch.is_grad_enabled() or bool(registry.transforms())


def _before_relu(grads: tuple[Tensor | None, ...], y: Tensor) -> Tensor:
    """The gradient before the ReLU that returned y, from the gradients of y's uses, of which at least one is given."""
    present = [grad for grad in grads if grad is not None]
    if _is_differentiated_again():
        return torch.where(y.detach() <= 0, 0.0, sum(present[1:], present[0]))
    return operators.call(torch.ops.conddetr.relu_backward.default, *present, *[None] * (2 - len(present)), y)


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, window: tuple, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias of a convolution; None for those that are not wanted."""
    needs_x, needs_weight, needs_bias = wanted
    stride, padding, dilation, groups = window
    gradients = (None, None)
    if needs_x or needs_weight:
        options = (None, stride, padding, dilation, False, (0, 0), groups, (needs_x, needs_weight, False))
        gradients = torch.ops.aten.convolution_backward(grad, x, weight, *options)[:2]
    return *gradients, grad.sum((0, 2, 3)) if needs_bias else None


def _by_cudnn(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, window: tuple) -> Tensor:
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *window)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *window)


def _with_epilogue(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, window: tuple) -> Tensor:
    out = F.conv2d(x, weight, None, *window).contiguous(memory_format=torch.channels_last)
    torch.ops.conddetr.convolution_epilogue_(out, bias, residual)
    return out


def _why_not_cudnn(x: Tensor, weight: Tensor, window: tuple, has_residual: bool) -> str | None:
    """Why cuDNN does not compute everything in one pass; None if it does. Each kind of convolution is tried once."""
    if not torch.backends.cudnn.is_available() or not torch.backends.cudnn.enabled:
        return "cuDNN is unavailable or switched off."
    if torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        return "its fused operators are not guaranteed to be deterministic."
    key = (x.device, x.dtype, weight.shape, window, has_residual)
    if key not in _failures:
        if torch.cuda.is_current_stream_capturing():
            return "it was not tried before this CUDA graph was recorded."
        _failures[key] = _try(*key)
    return _failures[key]


@torch.no_grad()
def _try(device: torch.device, dtype: torch.dtype, shape: torch.Size, window: tuple, has_residual: bool) -> str | None:
    """Why cuDNN's results differ from those of PyTorch's separate operators on a small map; None if they agree.

    PyTorch's fused cuDNN operators are experimental: they fail if cuDNN has no such engine. Without a residual they add
    the memory of the result times zero, so the trial fills that memory with NaN before.
    """
    generator = torch.Generator(device).manual_seed(0)
    stride, _, dilation, groups = window
    height, width = (16 + 4 * step + gap * size for step, gap, size in zip(stride, dilation, shape[2:], strict=True))

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    x = numbers(2, shape[1] * groups, height, width).contiguous(memory_format=torch.channels_last)
    weight = (numbers(*shape) / shape[1:].numel() ** 0.5).contiguous(memory_format=torch.channels_last)
    bias = numbers(shape[0])
    with torch.autocast(device.type, enabled=False):
        plain = F.conv2d(x, weight, None, *window)
        residual = torch.empty_like(plain).normal_(generator=generator) if has_residual else None
        expected = reference.convolution(x, weight, bias, *window, residual, True)
        poison = torch.full_like(expected, torch.nan)
        del poison, plain
        try:
            actual = _by_cudnn(x, weight, bias, residual, window)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return f"it failed on this device: {str(error).splitlines()[0]}"
    error = ((actual.float() - expected.float()).abs().max() / expected.max().float()).item()
    # Sums run in another order, in float32 over TF32's products, and separate operators round three times, not once.
    allowed = max(4 * torch.finfo(dtype).eps, 2**-8)
    return (
        None
        if error <= allowed
        else f"its results differ from PyTorch's by {error:.1g} of the largest value on this device."
    )


def _in_layout_of(like: Tensor, tensor: Tensor | None) -> Tensor | None:
    if tensor is None or tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like).copy_(tensor)


def _epilogue(out: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    from conddetr.kernels.conv import triton

    triton.epilogue_(out, None if bias is None else bias.contiguous(), _in_layout_of(out, residual))


def _relu_backward(grad: Tensor, other_grad: Tensor | None, y: Tensor) -> Tensor:
    from conddetr.kernels.conv import triton

    return triton.relu_backward(_in_layout_of(y, grad), _in_layout_of(y, other_grad), y)


operators.register(
    "convolution_epilogue_",
    "(Tensor(a!) out, Tensor? bias, Tensor? residual) -> ()",
    launch=_epilogue,
    fake=lambda out, bias, residual: None,
)
operators.register(
    "relu_backward",
    "(Tensor grad, Tensor? other_grad, Tensor y) -> Tensor",
    launch=_relu_backward,
    fake=lambda grad, other_grad, y: torch.empty_like(y),
)
