"""A residual branch added to its trunk, and layer norm: the public function, its checks, and the operators behind it.

Autocast changes nothing here: all arithmetic is float32, or float64 for float64 inputs.
"""

from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from conddetr.kernels import operators, paths, registry
from conddetr.kernels.add_norm import reference
from conddetr.kernels.common.launch import REPLICAS
from conddetr.kernels.common.seed import fresh_seed

MAX_CHANNELS = 1024
"""Limit of the kernels, because a program holds whole rows."""
MAX_GRADIENTS = 4
"""Output gradients that the backward kernel sums. If there are more, the first ones are summed before the launch."""
_VECTORS = ("weight", "bias", "branch_bias")
_OTHERS = ("residual", *_VECTORS, "position", "seed")


def add_norm(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    branch_bias: Tensor | None = None,
    position: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    trunks: int = 1,
    outs: int = 1,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """layer_norm(residual + dropout(branch + branch_bias)), one launch forward and one backward.

    The result is one tensor for each use. Tensors of one dtype share memory, so they must not be changed in place. The
    backward launch sums their gradients; autograd would launch one sum for each.

    Vectors are [C], or replicas [P, C] with the same P for all. Only the first row of replicas is read. Their gradient
    is [P, C] float32: partial sums, whose rows the caller sums to the gradient of [C]. For vectors [C] that sum costs
    one more launch here. `common.launch.REPLICAS` is a good P.

    Args:
        branch: [..., C], floating.
        residual: the trunk, of the shape and device of branch, floating.
        weight, bias: of the layer norm, [C] or [P, C], floating.
        branch_bias: added to the branch before dropout, [C] or [P, C], floating.
        position: [1 or B, N, C], floating, for a branch of [B, N, C]: adds a last output. It gets no gradient.
        dropout_p: probability, in [0, 1), that an element of the branch is dropped.
        eps: of the layer norm.
        trunks: number of outputs in the promoted dtype of branch and residual, at least 0.
        outs: number of outputs in the dtype of branch, at least 0.
        seed: [1] int64 on the device of branch, dropout's seed; None: sampled from torch's generator. `eager` always
            samples from that generator.
        backend: `auto`, `triton` (C up to 1024) or `eager`.

    Returns:
        `trunks` tensors of the promoted dtype, `outs` tensors of the dtype of branch and, with a position, one of that
        dtype with the position added. All are [..., C].

    Raises:
        ValueError: shapes, dtypes, devices or numbers do not fit; names the expected and the actual value.
        RuntimeError: the requested backend cannot run here; says why.
    """
    vectors = (weight, bias, branch_bias)
    _check_tensors(branch, residual, vectors, position, seed)
    _check_numbers(dropout_p, trunks, outs, position is not None)
    dtype = torch.promote_types(branch.dtype, residual.dtype)
    choice = OPERATION.choose(backend, branch.device, dtype, branch.shape[-1])
    paths.note("add_norm", choice.backend, choice.refused)
    if choice.backend == "eager":
        vectors = [x if x is None or x.dim() == 1 else x[0] for x in vectors]
        position = None if position is None else position.detach()
        return reference.add_norm(branch, residual, *vectors, position, dropout_p, eps, trunks, outs)
    vectors = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in vectors]
    position = None if position is None else position.detach().contiguous()
    if dropout_p > 0 and seed is None:
        seed = fresh_seed(branch.device)
    inputs = (branch.contiguous(), residual.contiguous(), *vectors, position, seed, dropout_p, eps)
    records = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:5])
    if records and not torch.compiler.is_compiling():
        return AddNorm.apply(*inputs, trunks, outs)
    # torch.compile fuses sums of gradients, and it cannot trace the class below.
    trunk, out, placed = torch.ops.conddetr.add_norm(*inputs, *_wanted(branch, residual, trunks, outs), records)[:3]
    return _shared(trunk, out, placed, position, trunks, outs)


def _why_not(channels: int) -> str | None:
    return None if channels <= MAX_CHANNELS else f"its kernels take up to {MAX_CHANNELS} channels, got {channels}."


OPERATION = registry.declare("add_norm", triton=registry.Kernels(why_not=_why_not))
"""`why_not` takes the number of channels; the dtype is the trunk's."""


def _check_tensors(
    branch: Tensor, residual: Tensor, vectors: tuple[Tensor | None, ...], position: Tensor | None, seed: Tensor | None
) -> None:
    shape = branch.shape
    if not shape or shape[-1] == 0 or not branch.is_floating_point():
        raise ValueError(f"branch: expected [..., C], floating, got {tuple(shape)} {branch.dtype}.")
    if residual.shape != shape or not residual.is_floating_point():
        expected = f"{tuple(shape)}, floating, like branch"
        raise ValueError(f"residual: expected {expected}, got {tuple(residual.shape)} {residual.dtype}.")
    channels = shape[-1]
    replicas = None
    for name, tensor in zip(_VECTORS, vectors, strict=True):
        if tensor is None:
            continue
        *rows, width = tensor.shape or (0,)
        if len(rows) > 1 or width != channels or not tensor.is_floating_point():
            expected = f"({channels},) or (P, {channels}), floating"
            raise ValueError(f"{name}: expected {expected}, got {tuple(tensor.shape)} {tensor.dtype}.")
        if rows:
            replicas = rows[0] if replicas is None else replicas
            if rows[0] != replicas or replicas == 0:
                raise ValueError(f"{name}: expected {replicas or 'at least 1'} replicas, got {rows[0]}.")
    if position is not None:
        _check_position(branch, position)
    if seed is not None and (seed.shape != (1,) or seed.dtype != torch.int64):
        raise ValueError(f"seed: expected (1,) torch.int64, got {tuple(seed.shape)} {seed.dtype}.")
    device = branch.device
    for name, tensor in zip(_OTHERS, (residual, *vectors, position, seed), strict=True):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: expected device {device} like branch, got {tensor.device}.")


def _check_position(branch: Tensor, position: Tensor) -> None:
    if branch.dim() != 3:
        raise ValueError(f"branch: expected [B, N, C] with a position, got {tuple(branch.shape)}.")
    expected = tuple(branch.shape)
    is_fitting = position.dim() == 3 and position.shape[1:] == branch.shape[1:]
    if not (is_fitting and position.shape[0] in (1, expected[0]) and position.is_floating_point()):
        actual = f"{tuple(position.shape)} {position.dtype}"
        raise ValueError(f"position: expected {expected} or {(1, *expected[1:])}, floating, got {actual}.")


def _check_numbers(dropout_p: float, trunks: int, outs: int, has_position: bool) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}.")
    if min(trunks, outs) < 0 or trunks + outs + has_position == 0:
        raise ValueError(f"trunks, outs: expected at least 0 each, and one output in all, got {trunks} and {outs}.")


def _wanted(branch: Tensor, residual: Tensor, trunks: int, outs: int) -> tuple[bool, bool]:
    """Whether trunks and outs need memory; the outs share the trunks' if dtypes are equal."""
    if torch.promote_types(branch.dtype, residual.dtype) == branch.dtype:
        return trunks + outs > 0, False
    return trunks > 0, outs > 0


def _shared(
    trunk: Tensor, out: Tensor, placed: Tensor, position: Tensor | None, trunks: int, outs: int
) -> tuple[Tensor, ...]:
    """The outputs in order: trunks, outs, and the one with the position."""
    outputs = (trunk,) * trunks + (trunk if trunk.dtype == out.dtype else out,) * outs
    return outputs if position is None else (*outputs, placed)


def _fake_forward(branch: Tensor, residual: Tensor, *inputs: object) -> tuple[Tensor, ...]:
    *_, position, _, _, _, has_trunk, has_out, saves = inputs
    dtype = torch.promote_types(branch.dtype, residual.dtype)
    wanted = ((has_trunk, dtype), (has_out, branch.dtype), (position is not None, branch.dtype), (saves, dtype))
    maps = [branch.new_empty(branch.shape if is_wanted else 0, dtype=map_dtype) for is_wanted, map_dtype in wanted]
    rows = branch.numel() // branch.shape[-1] if saves else 0
    return *maps, branch.new_empty(rows, dtype=torch.float32)


def _backward(*inputs: object) -> tuple[Tensor, ...]:
    from conddetr.kernels.add_norm import triton

    gradients = [grad for grad in inputs[:MAX_GRADIENTS] if grad is not None]
    return triton.backward(gradients, *inputs[MAX_GRADIENTS:])


def _fake_backward(*inputs: object) -> tuple[Tensor, ...]:
    normalized, *_, branch, residual, vectors, replicas = inputs[MAX_GRADIENTS:]
    maps = [normalized.new_empty(0 if dtype is None else normalized.shape, dtype=dtype) for dtype in (branch, residual)]
    return *maps, normalized.new_empty((vectors, replicas, normalized.shape[-1]), dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    branch, residual, weight, bias, branch_bias, _, seed, ctx.dropout_p, *_ = inputs
    ctx.dtypes = (branch.dtype, residual.dtype)
    # Their gradients need shape and dtype only.
    ctx.vectors = [None if x is None else (x.shape, x.dtype) for x in (weight, bias, branch_bias)]
    ctx.save_for_backward(weight, seed, *output[3:])
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _differentiate(ops: Any, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of branch, residual and the three vectors; None for all other inputs of the operator."""
    weight, seed, normalized, rstd = ctx.saved_tensors
    # Without gradients of outputs that were not requested: those are empty.
    grads = [grad.contiguous() for grad in gradients if grad is not None and grad.shape == normalized.shape]
    needs, others = ctx.needs_input_grad[:5], (None,) * 7
    if not grads or not any(needs):
        return (None,) * 5 + others
    excess = len(grads) - MAX_GRADIENTS + 1
    if excess > 1:
        grads = [reduce(add, grads[:excess]), *grads[excess:]]
    grads += [None] * (MAX_GRADIENTS - len(grads))
    branch, residual = (dtype if needed else None for dtype, needed in zip(ctx.dtypes, needs, strict=False))
    # Weight and bias both, or neither: their sums cost nothing compared with the reads.
    vectors = 3 if needs[4] else 2 if any(needs[2:4]) else 0
    shapes = [vector[0] for vector in ctx.vectors if vector is not None]
    replicas = next((shape[0] for shape in shapes if len(shape) == 2), min(REPLICAS, max(1, len(rstd))))
    saved = (normalized, rstd, weight, seed, ctx.dropout_p)
    backward = ops.add_norm_backward.default
    grad_branch, grad_residual, partials = operators.call(backward, *grads, *saved, branch, residual, vectors, replicas)
    grad_vectors = _vector_gradients(ctx.vectors, partials, needs[2:])
    return grad_branch if needs[0] else None, grad_residual if needs[1] else None, *grad_vectors, *others


def _vector_gradients(vectors: list, partials: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Gradients of the vectors: partial sums for replicas; for the others full sums, all in one launch."""
    is_summed = any(
        needed and len(vector[0]) == 1 for vector, needed in zip(vectors, needs, strict=True) if vector is not None
    )
    sums = partials.sum(1) if is_summed else None
    gradients = []
    for index, (vector, needed) in enumerate(zip(vectors, needs, strict=True)):
        if not needed:
            gradients.append(None)
        else:
            gradients.append(partials[index] if len(vector[0]) == 2 else sums[index].to(vector[1]))
    return gradients


class AddNorm(torch.autograd.Function):
    """The operator with outputs that share memory, which PyTorch forbids for an operator itself."""

    @staticmethod
    def forward(ctx: Any, *inputs: object) -> tuple[Tensor, ...]:
        """Takes the operator's inputs up to eps, then trunks and outs."""
        *inputs, trunks, outs = inputs
        branch, residual, *_ = inputs
        wanted = _wanted(branch, residual, trunks, outs)
        results = operators.call(torch.ops.conddetr.add_norm.default, *inputs, *wanted, True)
        _setup(ctx, inputs, results)
        # A separate tensor for each use.
        trunk, out, placed = results[:3]
        return tuple(x.view_as(x) for x in _shared(trunk, out, placed, inputs[5], trunks, outs))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns one None fewer than the operator's backward, because the operator has one more input."""
        return _differentiate(torch.ops.conddetr, ctx, *gradients)[:-1]


_INPUTS = (
    "Tensor branch, Tensor residual, Tensor weight, Tensor bias, Tensor? branch_bias, Tensor? position, Tensor? seed, "
    "float dropout_p, float eps, bool has_trunk, bool has_out, bool saves"
)
_OUTPUTS = "(Tensor trunk, Tensor out, Tensor placed, Tensor normalized, Tensor rstd)"
_GRADIENTS = (
    "Tensor grad_0, Tensor? grad_1, Tensor? grad_2, Tensor? grad_3, Tensor normalized, Tensor rstd, Tensor weight, "
    "Tensor? seed, float dropout_p, ScalarType? branch, ScalarType? residual, int vectors, SymInt replicas"
)
operators.register(
    "add_norm",
    f"({_INPUTS}) -> {_OUTPUTS}",
    launch=operators.launcher(__package__, "forward"),
    fake=_fake_forward,
    backward=lambda ops, ctx, *gradients: _differentiate(ops, ctx, *gradients[:3]),
    setup=_setup,
)
operators.register(
    "add_norm_backward",
    f"({_GRADIENTS}) -> (Tensor, Tensor, Tensor)",
    launch=_backward,
    fake=_fake_backward,
    is_gradient=True,
)
