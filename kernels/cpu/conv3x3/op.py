"""3×3 convolution and its gradients: the public functions, their checks, and the operators behind the kernels.

Winograd's minimal filtering, F(4×4, 3×3) (Lavin and Gray, CVPR 2016), needs a quarter of the multiplications. It is for
CPUs, where PyTorch does them all; on GPUs cuDNN chooses its algorithm. Gradients of any order are convolutions of the
same kinds.
"""

from typing import Any

import torch
from torch import Tensor

from conddetr.kernels import operators, registry
from conddetr.kernels.cpu.conv3x3 import reference

GRAIN = 32
"""The kernels need channels in multiples of it."""


def convolution_3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    relu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Convolution with a window of 3×3, one cell of padding and no stride.

    Its errors are up to twice those of PyTorch's convolution in channels-last (root mean square).

    Args:
        x: [B, Cin, H, W], floating; fastest in channels-last.
        weight: [Cout, Cin, 3, 3] of the dtype and device of x.
        bias: [Cout], likewise.
        transposed: compute the transposed convolution, which is the gradient of x: x is then [B, Cout, H, W], and the
            result has Cin channels.
        relu: apply ReLU to the result.
        backend: `auto`, `native` (on CPUs, float32, channels in multiples of 32) or `eager`.

    Returns:
        [B, Cout, H, W], in channels-last with the native kernel.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the tensor, the expected and the actual value.
        RuntimeError: the requested backend cannot run here; says why.
    """
    _check(x, weight, bias, transposed)
    if CONVOLUTION.choose(backend, x.device, x.dtype, tuple(weight.shape[:2]), x.shape).backend == "eager":
        return reference.convolution_3x3(x, weight, bias, transposed, relu)
    x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    bias = None if bias is None else bias.contiguous()
    return torch.ops.conddetr_native.convolution_3x3(x, weight, bias, transposed, relu)


def convolution_3x3_weight_gradient(x: Tensor, grad: Tensor, *, backend: str = "auto") -> Tensor:
    """The gradient of the weights of `convolution_3x3`.

    Its errors are up to ten times those of one matrix product per cell of the window (root mean square).

    Args:
        x: [B, Cin, H, W], input of the convolution.
        grad: [B, Cout, H, W] of the dtype and device of x, gradient of its result.
        backend: as in `convolution_3x3`.

    Returns:
        [Cout, Cin, 3, 3], in channels-last with the native kernel.

    Raises:
        ValueError, RuntimeError: as `convolution_3x3`.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected [B, Cin, H, W], floating, got {tuple(x.shape)} {x.dtype}.")
    if grad.dim() != 4 or (grad.shape[0], *grad.shape[2:]) != (x.shape[0], *x.shape[2:]):
        expected = f"[{x.shape[0]}, Cout, {x.shape[2]}, {x.shape[3]}]"
        raise ValueError(f"grad: expected {expected} like x, got {tuple(grad.shape)}.")
    if grad.dtype != x.dtype or grad.device != x.device:
        raise ValueError(f"grad: expected {x.dtype} on {x.device} like x, got {grad.dtype} on {grad.device}.")
    channels = (grad.shape[1], x.shape[1])
    if WEIGHT_GRADIENT.choose(backend, x.device, x.dtype, channels, x.shape).backend == "eager":
        return reference.convolution_3x3_weight_gradient(x, grad)
    x, grad = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad))
    return torch.ops.conddetr_native.convolution_3x3_weight(x, grad)


def why_not(channels: tuple[int, int], shape: torch.Size) -> str | None:
    """Why the native kernels cannot take a weight's channels, (Cout, Cin), and the shape of x; None if they can."""
    if channels[0] % GRAIN or channels[1] % GRAIN or 0 in (*channels, *shape):
        return (
            f"its kernels take channels in multiples of {GRAIN}, and at least one cell, got {channels[1]} to "
            f"{channels[0]} channels and x {tuple(shape)}."
        )
    return None


KERNELS = registry.Kernels(devices=("cpu",), dtypes=(torch.float32, torch.float64), why_not=why_not)
CONVOLUTION = registry.declare("convolution_3x3", native=KERNELS)
WEIGHT_GRADIENT = registry.declare("convolution_3x3_weight_gradient", native=KERNELS)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> None:
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(f"weight: expected [Cout, Cin, 3, 3], got {tuple(weight.shape)}.")
    inputs, outputs = (weight.shape[0], weight.shape[1]) if transposed else (weight.shape[1], weight.shape[0])
    if x.dim() != 4 or x.shape[1] != inputs or not x.is_floating_point():
        raise ValueError(f"x: expected [B, {inputs}, H, W] like weight, floating, got {tuple(x.shape)} {x.dtype}.")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            actual = f"{tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name}: expected {x.dtype} on {x.device} like x, got {actual}.")
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"bias: expected ({outputs},), got {tuple(bias.shape)}.")


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, relu: bool) -> Tensor:
    shape = (x.shape[0], weight.shape[1 if transposed else 0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake_weight(x: Tensor, grad: Tensor) -> Tensor:
    shape = (grad.shape[1], x.shape[1], 3, 3)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _convolve(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    return torch.ops.conddetr_native.convolution_3x3(x, weight, None, transposed, False)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _, ctx.transposed, relu = inputs
    ctx.save_for_backward(x, weight, output if relu else None)


def _differentiate(ops: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, out = ctx.saved_tensors
    if out is not None:
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
    grad = grad.contiguous(memory_format=torch.channels_last)
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _convolve(grad, weight, not ctx.transposed)
    if ctx.needs_input_grad[1]:
        pair = (grad, x) if ctx.transposed else (x, grad)
        grad_weight = ops.convolution_3x3_weight(*pair)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum((0, 2, 3))
    return grad_x, grad_weight, grad_bias, None, None


def _setup_weight(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_weight(ops: Any, ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of weights is linear in x and in grad."""
    x, grad = ctx.saved_tensors
    grad_x = _convolve(grad, upstream, True) if ctx.needs_input_grad[0] else None
    grad_grad = _convolve(x, upstream, False) if ctx.needs_input_grad[1] else None
    return grad_x, grad_grad


def _flops(x: tuple, weight: tuple, *_: object, **__: object) -> int:
    """From shapes: the products of a direct convolution; minimal filtering computes a quarter of them."""
    return 2 * x[0] * x[2] * x[3] * weight[0] * weight[1] * 9


def _flops_weight(x: tuple, grad: tuple, **_: object) -> int:
    return 2 * x[0] * x[2] * x[3] * x[1] * grad[1] * 9


operators.register("convolution_3x3", fake=_fake, backward=_differentiate, setup=_setup, flops=_flops)
operators.register(
    "convolution_3x3_weight",
    fake=_fake_weight,
    backward=_differentiate_weight,
    setup=_setup_weight,
    flops=_flops_weight,
)
