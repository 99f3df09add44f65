"""Conditional attention: the public function, and the operator behind the kernels.

Autocast changes nothing here: all five tensors share one dtype, which the result has too. Sums are float32.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from conddetr.kernels import operators, paths, registry
from conddetr.kernels.attn import reference
from conddetr.kernels.attn.checks import check_padding, check_seed, check_tensors
from conddetr.kernels.attn.inputs import SCHEMA, Inputs, bits_shape
from conddetr.kernels.bits import drawn_probability, dropout_bits
from conddetr.kernels.common.seed import fresh_seed


def conditional_attention(
    q_content: Tensor,
    q_spatial: Tensor,
    k_content: Tensor,
    k_spatial: Tensor | tuple[Tensor, Tensor],
    v: Tensor,
    *,
    valid_cells: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention whose score is a content product plus a spatial product, per head (Conditional DETR, section 3.2).

    softmax(scale · (q_content·k_content + q_spatial·k_spatial)) v

    Args:
        q_content: [B, Q, h, d] content query.
        q_spatial: [B, Q, h, ds] conditional spatial query.
        k_content: [B, N, h, d] content key.
        k_spatial: [B, N, h, ds] spatial key; or separable, over a grid of N = H·W keys in row-major order:
            (rows [B, H, h, ds], columns [B, W, h, ds]), meaning rows[y] + columns[x]. Rows or columns [1, ...] serve
            every image.
        v: [B, N, h, dv] value. All floating tensors share one dtype and device.
        valid_cells: [B, 2] int32 valid height and width of each image's grid; needs separable keys, whose shape
            defines the grid. On a CPU, values beyond the grid raise an error. On a GPU they are clamped, because
            reading them would block the host; torch.compile and torch.func have no values to read and clamp too.
        key_padding_mask: [B, N] bool, True = padding; instead of `valid_cells`.
        scale: default (d + ds) ** -0.5.
        dropout_p: probability, in [0, 1), that an attention weight is dropped. Kernels round it to a multiple of 2⁻¹⁶
            (`dropout_bits`) and scale the kept weights by the rounded value. The bits, one for each weight, are saved
            for backward.
        seed: [1] int64, dropout's seed; with the same seed every backend drops the same weights. None: the next number
            of torch's generator, which is one more launch; `eager` then uses PyTorch's dropout.
        backend: `auto`, `triton` (d, ds and dv from 16 to 128), `native` (on a GPU: all of them 32) or `eager`.

    Returns:
        [B, Q, h, dv]; zeros for an image whose keys are all padding.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the tensor, the expected and the actual value.
        RuntimeError: the requested backend cannot run here; says why.
    """
    rows, columns = k_spatial if isinstance(k_spatial, (tuple, list)) else (k_spatial, None)
    check_tensors(q_content, q_spatial, k_content, rows, columns, v)
    check_padding(q_content, k_content, columns, valid_cells, key_padding_mask)
    check_seed(seed, q_content)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a value in [0, 1), got {dropout_p}.")
    if scale is None:
        scale = (q_content.shape[-1] + q_spatial.shape[-1]) ** -0.5
    widths = (q_content.shape[-1], q_spatial.shape[-1], v.shape[-1])
    choice = OPERATION.choose(backend, v.device, v.dtype, v.device, v.shape, widths)
    paths.note("conditional_attention", choice.backend, choice.refused)
    if columns is not None and (choice.backend != "triton" or rows.shape[0] != columns.shape[0]):
        rows, columns = (part.expand(v.shape[0], -1, -1, -1) for part in (rows, columns))
    keep = None
    if dropout_p > 0 and not (choice.backend == "eager" and seed is None):
        keep, dropout_p = _keep(q_content, v, seed, dropout_p, choice.backend)
    if choice.backend == "eager":
        kept = None if keep is None else reference.kept_weights(keep, valid_cells, *_grid(rows, columns))
        if columns is not None:
            if valid_cells is not None:
                key_padding_mask = reference.rectangle_padding(valid_cells, rows.shape[1], columns.shape[1])
            rows = reference.dense_spatial_keys(rows, columns)
        return reference.conditional_attention(
            q_content, q_spatial, k_content, rows, v, key_padding_mask, scale, dropout_p, kept
        )
    tensors = (q_content, q_spatial, k_content, rows, columns, v)
    tensors = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]
    masks = [x if x is None else x.contiguous() for x in (valid_cells, key_padding_mask)]
    inputs = Inputs(*tensors, *masks, keep, scale, dropout_p)
    if choice.backend == "triton" and not torch.compiler.is_compiling():
        return ConditionalAttention.apply(*inputs)
    return operators.of(choice.backend).conditional_attention(*inputs)[0]


def _keep(q_content: Tensor, v: Tensor, seed: Tensor | None, dropout_p: float, backend: str) -> tuple[Tensor, float]:
    """Dropout's bits, int32 with shape `bits_shape`, and the actual probability, as rounded."""
    if seed is None:
        seed = fresh_seed(v.device)
    batch, queries, heads, _ = q_content.shape
    shape = bits_shape(batch, heads, queries, v.shape[1])
    return dropout_bits(seed, shape, dropout_p, backend), drawn_probability(dropout_p)


def _grid(rows: Tensor, columns: Tensor | None) -> tuple[int, int]:
    """Height and width of the grid of keys; dense keys are one row."""
    return (1, rows.shape[1]) if columns is None else (rows.shape[1], columns.shape[1])


def _why_not_triton(device: torch.device, shape: Sequence[int], widths: tuple[int, int, int]) -> str | None:
    if not all(16 <= width <= 128 for width in widths):
        return f"d, ds, dv must be from 16 to 128, got {widths}."
    return _why_not_many(device, shape)


def _why_not_native(device: torch.device, shape: Sequence[int], widths: tuple[int, int, int]) -> str | None:
    if device.type == "cuda" and widths != (32, 32, 32):
        return f"on a GPU d, ds, dv must be 32, got {widths} (triton takes 16 to 128)."
    return _why_not_many(device, shape)


def _why_not_many(device: torch.device, shape: Sequence[int]) -> str | None:
    """A GPU's launch grid limits images and heads."""
    batch, _, heads, _ = shape
    if device.type == "cpu" or max(batch, heads) < 65536:
        return None
    return f"on a GPU images and heads must be fewer than 65536, got {batch} and {heads}."


OPERATION = registry.declare(
    "conditional_attention",
    triton=registry.Kernels(why_not=_why_not_triton),
    native=registry.Kernels(why_not=_why_not_native),
)
"""`why_not` takes the device and the shape of the values, and d, ds and dv."""
SELF_ATTENTION = registry.declare("self_attention", native=registry.Kernels(devices=("cpu",)))
"""Self-attention without spatial parts. On CPUs the native kernels compute it as conditional attention, because PyTorch
has no fused attention with dropout there.
"""


def _forward(*inputs: object) -> tuple[Tensor, Tensor]:
    from conddetr.kernels.attn import triton

    return triton.forward(triton.Inputs(*inputs))


def _backward(*inputs: object) -> tuple[Tensor, ...]:
    from conddetr.kernels.attn import triton

    *inputs, grad, out, lse = inputs
    return triton.backward(triton.Inputs(*inputs), grad, out, lse)


def _fake_forward(*inputs: object) -> tuple[Tensor, Tensor]:
    given = Inputs(*inputs)
    batch, queries, heads, _ = given.sizes
    sums = torch.float64 if given.v.dtype == torch.float64 else torch.float32
    out = given.v.new_empty((batch, queries, heads, given.v.shape[-1]))
    return out, given.v.new_empty((batch, heads, queries), dtype=sums)


def _fake_backward(*inputs: object) -> tuple[Tensor, ...]:
    *inputs, _, _, _ = inputs
    given = Inputs(*inputs)
    return tuple(given.v.new_empty(0) if x is None else x.new_empty(x.shape) for x in given.floating)


def _flops(*inputs: object, **_: object) -> int:
    """From shapes: the products of every query with every key, for content, spatial part and value. This is as many as
    plain PyTorch computes, even if keys are separable or padding.
    """
    given = Inputs(*inputs)
    batch, queries, heads, content = given.q_content
    return 2 * batch * heads * queries * given.k_content[1] * (content + given.q_spatial[-1] + given.v[-1])


def _backward_flops(*inputs: object, **_: object) -> int:
    *inputs, _, _, _ = inputs
    return 2 * _flops(*inputs)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.dropout_p = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ops: Any, ctx: Any, grad: Tensor, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """Gradients of the operator's inputs, from the gradient of its first result."""
    *tensors, out, lse = ctx.saved_tensors
    given = Inputs(*tensors, ctx.scale, ctx.dropout_p)
    backward = ops.conditional_attention_backward.default
    q_content, q_spatial, k_content, k_spatial, columns, v = operators.call(backward, *given, grad, out, lse)
    columns = None if given.columns is None else columns
    return q_content, q_spatial, k_content, k_spatial, columns, v, None, None, None, None, None


class ConditionalAttention(torch.autograd.Function):
    """Triton's operator, recorded with less work for the host."""

    @staticmethod
    def forward(ctx: Any, *inputs: object) -> Tensor:
        """Takes the operator's inputs, returns its first result."""
        out, lse = operators.call(torch.ops.conddetr.conditional_attention.default, *inputs)
        *tensors, ctx.scale, ctx.dropout_p = inputs
        ctx.save_for_backward(*tensors, out, lse)
        return out

    backward = staticmethod(partial(_differentiate, torch.ops.conddetr))


operators.register(
    "conditional_attention",
    f"({SCHEMA}) -> (Tensor out, Tensor lse)",
    launch=_forward,
    fake=_fake_forward,
    backward=_differentiate,
    setup=_setup,
    flops=_flops,
)
operators.register(
    "conditional_attention_backward",
    f"({SCHEMA}, Tensor grad, Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    launch=_backward,
    fake=_fake_backward,
    flops=_backward_flops,
    is_gradient=True,
)
