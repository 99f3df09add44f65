"""W (λ ⊙ p_s) + b, the conditional spatial query with its projection: the public function, its checks, the operators.

Kernels compute λ ⊙ p_s when the matrix product loads it, so it needs no separate launch and is not saved for backward.
Autocast changes nothing in them: all tensors have the step's dtype. Sums are float32.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from conddetr.kernels import operators, paths, registry
from conddetr.kernels.query import reference

# In float32 its matrix product would take longer than λ ⊙ p_s and cuBLAS's matrix product together.
OPERATION = registry.declare("spatial_query", triton=registry.Kernels(auto_dtypes=(torch.bfloat16, torch.float16)))


def spatial_query(transform: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor, backend: str = "auto") -> Tensor:
    """The conditional spatial query of cross-attention, projected (Conditional DETR, equation 5 and section 3.3).

    Args:
        transform: [..., Q, C] λ, floating.
        embedding: [Q, C] p_s, the embedding of the reference points, the same for all images; or [..., Q, C].
        weight: [O, C] of the projection.
        bias: [O]; or [rows, O], equal copies for each row of the result, of which the first is read. The gradient of
            each copy is then that of its row, and the caller sums them. All tensors share dtype and device.
        backend: `auto`, `triton` (one launch forward; backward one, and a product for the gradient of the weight) or
            `eager` (the product of λ and p_s, then `F.linear`), which `auto` uses in float32.

    Returns:
        [..., Q, O] of that dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the expected and the actual value.
        RuntimeError: the requested backend cannot run here; says why.
    """
    _check(transform, embedding, weight, bias)
    choice = OPERATION.choose(backend, transform.device, transform.dtype)
    paths.note("spatial_query", choice.backend, choice.refused)
    if choice.backend == "eager":
        return reference.spatial_query(transform, embedding, weight, bias if bias.dim() == 1 else bias[0])
    *images, queries, channels = transform.shape
    shape = (math.prod(images), queries)
    if embedding.dim() > 2:
        # Images with separate embeddings are equivalent to more queries of one image.
        shape = (1, math.prod(shape))
    transform, embedding = transform.reshape(*shape, channels), embedding.reshape(shape[1], channels)
    bias = bias if bias.stride(-1) == 1 else bias.contiguous()
    inputs = (transform.contiguous(), embedding.contiguous(), weight.contiguous(), bias)
    run = torch.ops.conddetr.spatial_query if torch.compiler.is_compiling() else SpatialQuery.apply
    return run(*inputs).view(*images, queries, len(weight))


def _check(transform: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor) -> None:
    shape = tuple(transform.shape)
    if len(shape) < 2 or 0 in shape[-1:] or not transform.is_floating_point():
        raise ValueError(f"transform: expected [..., Q, C], floating, got {shape} {transform.dtype}.")
    if tuple(embedding.shape) not in (shape[-2:], shape):
        raise ValueError(f"embedding: expected {shape[-2:]} or {shape}, got {tuple(embedding.shape)}.")
    if weight.dim() != 2 or weight.shape[1] != shape[-1] or len(weight) == 0:
        raise ValueError(f"weight: expected (O, {shape[-1]}), got {tuple(weight.shape)}.")
    rows = transform.shape[:-1].numel()
    expected = ((len(weight),), (rows, len(weight)))
    if tuple(bias.shape) not in expected or 0 in bias.shape[:-1]:
        raise ValueError(f"bias: expected {expected[0]} or {expected[1]}, got {tuple(bias.shape)}.")
    for name, tensor in (("embedding", embedding), ("weight", weight), ("bias", bias)):
        if tensor.dtype != transform.dtype or tensor.device != transform.device:
            required = f"{transform.dtype} on {transform.device} like transform"
            raise ValueError(f"{name}: expected {required}, got {tensor.dtype} on {tensor.device}.")


def _fake_forward(transform: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return transform.new_empty((*transform.shape[:-1], weight.shape[0]))


def _fake_backward(
    grad: Tensor, transform: Tensor, embedding: Tensor, weight: Tensor, *wanted: bool
) -> tuple[Tensor, ...]:
    images, queries, channels = transform.shape
    shapes = (transform.shape, embedding.shape, (images * queries, channels))
    return tuple(transform.new_empty(shape if needed else 0) for shape, needed in zip(shapes, wanted, strict=True))


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, bias = inputs
    ctx.bias_dim = bias.dim()
    ctx.save_for_backward(*tensors)


def _differentiate(ops: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    transform, embedding, weight = ctx.saved_tensors
    *wanted, needs_bias = ctx.needs_input_grad
    rows = grad.reshape(-1, grad.shape[-1])
    gradients: list[Tensor | None] = [None] * 3
    if any(wanted):
        backward = ops.spatial_query_backward.default
        results = operators.call(backward, grad.contiguous(), transform, embedding, weight, *wanted)
        gradients = [x if is_wanted else None for x, is_wanted in zip(results, wanted, strict=True)]
    if gradients[2] is not None:
        gradients[2] = rows.t() @ gradients[2]
    grad_bias = (rows if ctx.bias_dim == 2 else rows.sum(0)) if needs_bias else None
    return *gradients, grad_bias


class SpatialQuery(torch.autograd.Function):
    """The operator, recorded with less work for the host."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        """Takes the operator's inputs, returns its result."""
        output = operators.call(torch.ops.conddetr.spatial_query.default, *inputs)
        _setup(ctx, inputs, output)
        return output

    backward = staticmethod(partial(_differentiate, torch.ops.conddetr))


def _flops(transform: list[int], embedding: list[int], weight: list[int], *_: object, **__: object) -> int:
    """From shapes: operations of the matrix product."""
    return 2 * transform[0] * transform[1] * weight[0] * weight[1]


def _backward_flops(grad: list[int], *shapes: list[int], **_: object) -> int:
    """Operations of one of backward's two products; the other is PyTorch's."""
    return _flops(*shapes[:3])


operators.register(
    "spatial_query",
    "(Tensor transform, Tensor embedding, Tensor weight, Tensor bias) -> Tensor",
    launch=operators.launcher(__package__, "forward"),
    fake=_fake_forward,
    backward=_differentiate,
    setup=_setup,
    flops=_flops,
)
operators.register(
    "spatial_query_backward",
    "(Tensor grad, Tensor transform, Tensor embedding, Tensor weight, bool of_transform, bool of_embedding, "
    "bool of_weight) -> (Tensor, Tensor, Tensor)",
    launch=operators.launcher(__package__, "backward"),
    fake=_fake_backward,
    flops=_backward_flops,
    is_gradient=True,
)
