"""A residual branch added to its trunk, and layer norm: the public function, its checks, and the operators behind it.

Under autocast nothing is cast: all arithmetic is float32 (float64 for float64) whatever comes in.
"""

from functools import reduce
from operator import add

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from conddetr.kernels import operators, paths, registry
from conddetr.kernels.add_norm import reference
from conddetr.kernels.common.launch import REPLICAS
from conddetr.kernels.common.seed import fresh_seed

MAX_CHANNELS = 1024
"""Of the kernels: a program keeps whole rows."""
MAX_GRADIENTS = 4
"""Gradients of outputs that the backward kernel adds up itself; of more, the first are added up before."""
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

    The result comes as several tensors, one for each use, that share one memory for each dtype: their gradients are
    added up by the one backward launch, where autograd would launch a sum for each. They must not be changed in place.

    Vectors are [C], or [P, C]: replicas, of which the first row is read, all of them of one P. Their gradient is then
    [P, C] float32, and the sum of its rows is the gradient of [C]: partial sums, for whoever made the replicas to add
    up, which for [C] costs one more launch here (`common.launch.REPLICAS` is a good P).

    Args:
        branch: [..., C], floating.
        residual: the trunk, of the shape and device of branch, floating.
        weight, bias: of the norm, [C] or [P, C], floating.
        branch_bias: added to the branch before dropout, [C] or [P, C], floating.
        position: [1 or B, N, C], floating, for a branch of [B, N, C]: asks for a last output. It gets no gradient.
        dropout_p: probability, in [0, 1), that an element of the branch is dropped.
        eps: of the norm.
        trunks: how many outputs of the promoted dtype of branch and residual, at least 0.
        outs: how many outputs of the dtype of branch, at least 0.
        seed: [1] int64 on the device of branch, of what is dropped; None: drawn from torch's generator. `eager` draws
            from that in any case.
        backend: `auto`, `triton` (C up to 1024) or `eager`.

    Returns:
        `trunks` tensors of the promoted dtype, `outs` tensors of the dtype of branch, and where there is a position one
        of that dtype with the position added: all [..., C].

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
    # Compiled, sums of gradients are fused; and the class below is not what can be traced.
    trunk, out, placed = torch.ops.conddetr.add_norm(*inputs, *_wanted(branch, residual, trunks, outs), records)[:3]
    return _shared(trunk, out, placed, position, trunks, outs)


def _why_not(channels: int) -> str | None:
    return None if channels <= MAX_CHANNELS else f"its kernels take up to {MAX_CHANNELS} channels, got {channels}."


OPERATION = registry.declare("add_norm", triton=registry.Kernels(why_not=_why_not))
"""It is told the number of channels; the dtype is that of the trunk."""


def _check_tensors(
    branch: Tensor, residual: Tensor, vectors: tuple[Tensor | None, ...], position: Tensor | None, seed: Tensor | None
) -> None:
    shape = branch.shape
    if not shape or shape[-1] == 0 or not branch.is_floating_point():
        raise ValueError(f"branch: expected [..., C], floating, got {tuple(shape)} {branch.dtype}.")
    if residual.shape != shape or not residual.is_floating_point():
        expected = f"{tuple(shape)}, floating, as of branch"
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
            raise ValueError(f"{name}: expected device {device} as of branch, got {tensor.device}.")


def _check_position(branch: Tensor, position: Tensor) -> None:
    if branch.dim() != 3:
        raise ValueError(f"branch: expected [B, N, C] where there is a position, got {tuple(branch.shape)}.")
    expected = tuple(branch.shape)
    is_fitting = position.dim() == 3 and position.shape[1:] == branch.shape[1:]
    if not (is_fitting and position.shape[0] in (1, expected[0]) and position.is_floating_point()):
        found = f"{tuple(position.shape)} {position.dtype}"
        raise ValueError(f"position: expected {expected} or {(1, *expected[1:])}, floating, got {found}.")


def _check_numbers(dropout_p: float, trunks: int, outs: int, has_position: bool) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}.")
    if min(trunks, outs) < 0 or trunks + outs + has_position == 0:
        raise ValueError(f"trunks, outs: expected at least 0 each, and one output in all, got {trunks} and {outs}.")


def _wanted(branch: Tensor, residual: Tensor, trunks: int, outs: int) -> tuple[bool, bool]:
    """Which memories there are: the trunk's, and that of the outs, which is the trunk's where dtypes are equal."""
    if torch.promote_types(branch.dtype, residual.dtype) == branch.dtype:
        return trunks + outs > 0, False
    return trunks > 0, outs > 0


def _shared(
    trunk: Tensor, out: Tensor, placed: Tensor, position: Tensor | None, trunks: int, outs: int
) -> tuple[Tensor, ...]:
    """The outputs in their order."""
    found = (trunk,) * trunks + (trunk if trunk.dtype == out.dtype else out,) * outs
    return found if position is None else (*found, placed)


def _fake_forward(branch: Tensor, residual: Tensor, *inputs: object) -> tuple[Tensor, ...]:
    *_, position, _, _, _, has_trunk, has_out, saves = inputs
    dtype = torch.promote_types(branch.dtype, residual.dtype)
    wanted = ((has_trunk, dtype), (has_out, branch.dtype), (position is not None, branch.dtype), (saves, dtype))
    maps = [branch.new_empty(branch.shape if is_wanted else 0, dtype=kind) for is_wanted, kind in wanted]
    rows = branch.numel() // branch.shape[-1] if saves else 0
    return *maps, branch.new_empty(rows, dtype=torch.float32)


def _backward(*inputs: object) -> tuple[Tensor, ...]:
    from conddetr.kernels.add_norm import triton

    gradients = [grad for grad in inputs[:MAX_GRADIENTS] if grad is not None]
    return triton.backward(gradients, *inputs[MAX_GRADIENTS:])


def _fake_backward(*inputs: object) -> tuple[Tensor, ...]:
    normalized, *_, branch, residual, vectors, replicas = inputs[MAX_GRADIENTS:]
    maps = [normalized.new_empty(0 if kind is None else normalized.shape, dtype=kind) for kind in (branch, residual)]
    return *maps, normalized.new_empty((vectors, replicas, normalized.shape[-1]), dtype=torch.float32)


def _setup(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    branch, residual, weight, bias, branch_bias, _, seed, ctx.dropout_p, *_ = inputs
    ctx.dtypes = (branch.dtype, residual.dtype)
    # Shape and dtype is what their gradients need.
    ctx.vectors = [None if x is None else (x.shape, x.dtype) for x in (weight, bias, branch_bias)]
    ctx.save_for_backward(weight, seed, *output[3:])
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _differentiate(ops: object, ctx: FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of branch, residual and the three vectors, and None for all other inputs of the operator."""
    weight, seed, normalized, rstd = ctx.saved_tensors
    # Not those of outputs that nobody wanted, which are empty.
    given = [grad.contiguous() for grad in gradients if grad is not None and grad.shape == normalized.shape]
    needs, others = ctx.needs_input_grad[:5], (None,) * 7
    if not given or not any(needs):
        return (None,) * 5 + others
    excess = len(given) - MAX_GRADIENTS + 1
    if excess > 1:
        given = [reduce(add, given[:excess]), *given[excess:]]
    given += [None] * (MAX_GRADIENTS - len(given))
    branch, residual = (kind if needed else None for kind, needed in zip(ctx.dtypes, needs, strict=False))
    # Of weight and bias both, or neither: the sums cost nothing beside what is read.
    vectors = 3 if needs[4] else 2 if any(needs[2:4]) else 0
    shapes = [vector[0] for vector in ctx.vectors if vector is not None]
    replicas = next((shape[0] for shape in shapes if len(shape) == 2), min(REPLICAS, max(1, len(rstd))))
    shared = (normalized, rstd, weight, seed, ctx.dropout_p)
    backward = ops.add_norm_backward.default
    of_branch, of_residual, partials = operators.call(backward, *given, *shared, branch, residual, vectors, replicas)
    of_vectors = _of_vectors(ctx.vectors, partials, needs[2:])
    return of_branch if needs[0] else None, of_residual if needs[1] else None, *of_vectors, *others


def _of_vectors(vectors: list, partials: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Their gradients: partial sums of replicas, and of the others sums, all in one launch."""
    is_summed = any(
        needed and len(vector[0]) == 1 for vector, needed in zip(vectors, needs, strict=True) if vector is not None
    )
    sums = partials.sum(1) if is_summed else None
    found = []
    for index, (vector, needed) in enumerate(zip(vectors, needs, strict=True)):
        if not needed:
            found.append(None)
        else:
            found.append(partials[index] if len(vector[0]) == 2 else sums[index].to(vector[1]))
    return found


class AddNorm(torch.autograd.Function):
    """The operator, with outputs that share memory, which an operator's must not."""

    @staticmethod
    def forward(ctx: FunctionCtx, *inputs: object) -> tuple[Tensor, ...]:
        """The operator's inputs up to eps, trunks and outs."""
        *inputs, trunks, outs = inputs
        branch, residual, *_ = inputs
        wanted = _wanted(branch, residual, trunks, outs)
        found = operators.call(torch.ops.conddetr.add_norm.default, *inputs, *wanted, True)
        _setup(ctx, inputs, found)
        # Each use is a tensor of its own.
        trunk, out, placed = found[:3]
        return tuple(x.view_as(x) for x in _shared(trunk, out, placed, inputs[5], trunks, outs))

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """One None less than the operator has, which has one input more."""
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
