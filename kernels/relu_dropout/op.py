"""ReLU and dropout after a bias: the public function, its checks, and the operator behind the kernels.

On GPUs PyTorch needs three launches for bias, ReLU and dropout, and three for their gradients; the kernels need one
each way. On CPUs the native dropout applies ReLU too (`cpu/dropout`).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from conddetr.kernels import operators, paths, registry
from conddetr.kernels.common.launch import REPLICAS
from conddetr.kernels.common.seed import fresh_seed
from conddetr.kernels.cpu.dropout import op as dropout
from conddetr.kernels.relu_dropout import reference

OPERATION = registry.declare("relu_dropout", triton=registry.Kernels(), native=dropout.NATIVE)


def relu_dropout(
    x: Tensor, p: float, backend: str = "auto", bias: Tensor | None = None, seed: Tensor | None = None
) -> Tensor:
    """ReLU and dropout in one pass over memory, as in a feed-forward network; backward reads only the result.

    Args:
        x: [..., C], floating; without a bias any shape.
        p: probability, in [0, 1), that an element is dropped; 0: only ReLU.
        backend: `auto`, `triton` (on GPUs), `native` (on CPUs) or `eager`.
        bias: added to x first, on GPUs by the same kernel: [C], or [P, C] replicas, floating, whose gradient is then
            partial sums (as in `add_norm`).
        seed: [1] int64 on the device of x, dropout's seed; None: sampled from torch's generator. `eager` always samples
            from that generator.

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError: p is out of range, x is not floating, or the bias or seed does not fit.
        RuntimeError: the requested backend cannot run here; says why.
    """
    dropout.check_dropped(x, p)
    _check_others(x, bias, seed)
    if p == 0 and bias is None:
        return x.relu()
    choice = OPERATION.choose(backend, x.device, x.dtype)
    paths.note("relu_dropout", choice.backend, choice.refused)
    if choice.backend == "triton":
        seed = fresh_seed(x.device) if seed is None and p > 0 else seed
        bias = bias if bias is None or bias.stride(-1) == 1 else bias.contiguous()
        inputs = (x.contiguous(), bias, seed, p)
        if torch.compiler.is_compiling():
            return torch.ops.conddetr.relu_dropout(*inputs)
        return ReLUDropout.apply(*inputs)
    if bias is not None and bias.dim() == 2:
        bias = bias[0]
    if choice.backend == "eager":
        return reference.relu_dropout(x, p, bias)
    if bias is not None:
        x = (x + bias).to(x.dtype)
    if p == 0:
        return x.relu()
    return dropout.drop(x.contiguous(), None, fresh_seed(x.device) if seed is None else seed, p, relu=True)


def _check_others(x: Tensor, bias: Tensor | None, seed: Tensor | None) -> None:
    if bias is not None:
        channels = x.shape[-1] if x.dim() else "C"
        if bias.dim() not in (1, 2) or bias.shape[-1] != channels or 0 in bias.shape or not bias.is_floating_point():
            expected = f"({channels},) or (P, {channels}), floating"
            raise ValueError(f"bias: expected {expected}, got {tuple(bias.shape)} {bias.dtype}.")
    if seed is not None and (tuple(seed.shape) != (1,) or seed.dtype != torch.int64):
        raise ValueError(f"seed: expected (1,) torch.int64, got {tuple(seed.shape)} {seed.dtype}.")
    device = x.device
    for name, tensor in (("bias", bias), ("seed", seed)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: expected device {device} like x, got {tensor.device}.")


def _fake_forward(x: Tensor, bias: Tensor | None, seed: Tensor | None, p: float) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(grad: Tensor, out: Tensor, p: float, replicas: int) -> tuple[Tensor, Tensor]:
    channels = out.shape[-1] if out.dim() else 1
    return torch.empty_like(out), out.new_empty((replicas, channels), dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, bias, _, ctx.p = inputs
    # Its gradient needs shape and dtype only.
    ctx.bias = None if bias is None else (bias.shape, bias.dtype)
    ctx.save_for_backward(output)


def _differentiate(ops: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (output,) = ctx.saved_tensors
    backward = ops.relu_dropout_backward.default
    if not ctx.needs_input_grad[1]:
        grad_x, _ = operators.call(backward, grad.contiguous(), output, ctx.p, 0)
        return grad_x, None, None, None
    shape, dtype = ctx.bias
    rows = output.numel() // output.shape[-1]
    replicas = shape[0] if len(shape) == 2 else min(REPLICAS, max(1, rows))
    grad_x, partial = operators.call(backward, grad.contiguous(), output, ctx.p, replicas)
    return grad_x, partial if len(shape) == 2 else partial.sum(0).to(dtype), None, None


class ReLUDropout(torch.autograd.Function):
    """The operator, recorded with less work for the host."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Takes the operator's inputs, returns its result."""
        output = operators.call(torch.ops.conddetr.relu_dropout.default, *inputs)
        _setup(ctx, inputs, output)
        return output

    backward = staticmethod(partial(_differentiate, torch.ops.conddetr))


operators.register(
    "relu_dropout",
    "(Tensor x, Tensor? bias, Tensor? seed, float p) -> Tensor",
    launch=operators.launcher(__package__, "forward"),
    fake=_fake_forward,
    backward=_differentiate,
    setup=_setup,
)
operators.register(
    "relu_dropout_backward",
    "(Tensor grad, Tensor out, float p, SymInt replicas) -> (Tensor, Tensor)",
    launch=operators.launcher(__package__, "backward"),
    fake=_fake_backward,
    is_gradient=True,
)
