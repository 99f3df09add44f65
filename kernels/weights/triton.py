"""One launch over many tensors, with a table of their addresses and a table of parts that describes their processing.

A program processes a block of one part. A convolution's weight [O, I, kh, kw] in contiguous order is converted to
channels-last, and its gradient is converted back.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from conddetr.kernels import addresses, operators
from conddetr.kernels.common.launch import REPLICAS
from conddetr.kernels.common.triton import load_float, store_cast, tile
from conddetr.kernels.weights import layout
from conddetr.kernels.weights.layout import BLOCK, SUM_COLUMNS, SUM_ROWS, Forms, backward_layout, forward_layout
from conddetr.kernels.weights.reference import FrozenNorm, Recipe, Replicas, Shift

BACKWARD_SIZES = {"BLOCK": BLOCK, "SUM_ROWS": SUM_ROWS, "SUM_COLUMNS": SUM_COLUMNS}
"""Sizes of the gradient's kernel."""
PER_PART, PER_RECORD = tl.constexpr(layout.ADDRESSES), tl.constexpr(layout.FIELDS)
IS_SHIFT, HAS_FLOAT_ROWS = tl.constexpr(layout.SHIFT), tl.constexpr(layout.PARTIALS)
"""The kind of a shift, and the first kind whose gradient has rows, which are float32."""


@triton.jit
def load_part(parts, blocks):
    """Number of this program's part, its first element, and its fields."""
    part = tl.load(blocks + 2 * tl.program_id(0))
    # No parameter has 2³¹ elements, but all together may.
    first = tl.load(blocks + 2 * tl.program_id(0) + 1).to(tl.int32)
    record = parts + PER_RECORD * part
    kind, offset, size = tl.load(record), tl.load(record + 1), tl.load(record + 2).to(tl.int32)
    channels, positions = tl.load(record + 3).to(tl.int32), tl.load(record + 4).to(tl.int32)
    eps = tl.load(record + 5).to(tl.int32).to(tl.float32, bitcast=True)
    return part, first, kind, offset, size, channels, positions, eps


@triton.jit
def vector_at(addresses, entry, row, inside):
    """[BLOCK] float32 values of one of the norm's vectors."""
    vector = tl.load(addresses + entry).to(tl.pointer_type(tl.float32))
    return tl.load(vector + row, mask=inside, other=0.0)


@triton.jit
def scale_at(addresses, part, row, inside, eps):
    """[BLOCK] scale of the frozen norm, 1 without a norm."""
    scale = tl.full(row.shape, 1.0, tl.float32)
    if tl.load(addresses + PER_PART * part + 1) != 0:
        weight = vector_at(addresses, PER_PART * part + 1, row, inside)
        variance = vector_at(addresses, PER_PART * part + 4, row, inside)
        scale = weight * tl.rsqrt(variance + eps)
    return scale


@triton.jit
def turned(element, inner, outer):
    """For elements in the order [row, outer, inner]: the row, and the index in the order [row, inner, outer]."""
    row = element // (inner * outer)
    index = element
    if (inner > 1) & (outer > 1):
        offset = element - row * (inner * outer)
        i = offset // inner
        index = row * (inner * outer) + (offset - i * inner) * outer + i
    return row, index


@triton.jit
def prepare_kernel(addresses, parts, blocks, source_type, out, BLOCK: tl.constexpr):
    """out[offset + …] = the part, cast, scaled and in channels-last. `source_type`: a tensor of the sources' dtype."""
    part, first, kind, offset, size, channels, positions, eps = load_part(parts, blocks)
    element = first + tl.arange(0, BLOCK)
    inside = element < size
    if kind == IS_SHIFT:
        scale = scale_at(addresses, part, element, inside, eps)
        mean = vector_at(addresses, PER_PART * part + 3, element, inside)
        value = vector_at(addresses, PER_PART * part + 2, element, inside) - mean * scale
    else:
        row, index = turned(element, channels, positions)
        source = tl.load(addresses + PER_PART * part).to(tl.pointer_type(source_type.dtype.element_ty))
        value = load_float(source + index, inside)
        value *= scale_at(addresses, part, row, inside, eps)
    store_cast(out + offset + element, value, inside)


@triton.jit
def column_sums(source, column, is_column, rows, stride, ROWS: tl.constexpr):
    """[ROWS, columns] float32 partial sums; their sum over rows is the sum over all rows."""
    total = tl.zeros((ROWS, column.shape[0]), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        index, mask = tile(row, row < rows, column, is_column, stride)
        total += load_float(source + index, mask)
    return total


@triton.jit
def prepare_backward_kernel(
    addresses,
    parts,
    blocks,
    gradient_type,
    grad,
    BLOCK: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
):
    """grad[offset + …] = the gradient of the part, in the parameter's memory order: summed over uses, and over rows if
    it has any, in a fixed order.
    """
    part, first, kind, offset, size, channels, positions, eps = load_part(parts, blocks)
    record = parts + PER_RECORD * part
    end = part + tl.load(record + 6)
    if kind >= HAS_FLOAT_ROWS:
        rows, stride = tl.load(record + 7).to(tl.int32), tl.load(record + 8)
        column = first + tl.arange(0, SUM_COLUMNS)
        is_column = column < size
        total = tl.zeros((SUM_ROWS, SUM_COLUMNS), tl.float32)
        for use in range(part, end):
            source = tl.load(addresses + PER_PART * use)
            if kind == HAS_FLOAT_ROWS:
                partials = source.to(tl.pointer_type(tl.float32))
                total += column_sums(partials, column, is_column, rows, stride, SUM_ROWS)
            else:
                values = source.to(tl.pointer_type(gradient_type.dtype.element_ty))
                total += column_sums(values, column, is_column, rows, stride, SUM_ROWS)
        store_cast(grad + offset + column, tl.sum(total, axis=0), is_column)
    else:
        element = first + tl.arange(0, BLOCK)
        inside = element < size
        row, index = turned(element, positions, channels)
        value = tl.zeros((BLOCK,), tl.float32)
        for use in range(part, end):
            source = tl.load(addresses + PER_PART * use).to(tl.pointer_type(gradient_type.dtype.element_ty))
            value += load_float(source + index, inside)
        value *= scale_at(addresses, part, row, inside, eps)
        store_cast(grad + offset + element, value, inside)


def _norm_addresses(norm: FrozenNorm | None) -> tuple[int, int, int, int]:
    if norm is None:
        return 0, 0, 0, 0
    return norm.weight.data_ptr(), norm.bias.data_ptr(), norm.mean.data_ptr(), norm.variance.data_ptr()


def forward(
    recipes: list[Recipe], which: list[int], parameters: tuple[Tensor, ...], key: Forms, dtype: torch.dtype
) -> list[Tensor]:
    """The results of `op.prepare_weights`, as views of one new tensor.

    `recipes` has each recipe once; `which` has the number of the recipe for each result; `key` is from `forms`.
    """
    plan = forward_layout(key)
    first = parameters[0] if parameters else recipes[0].norm.bias
    width = first.element_size()
    starts = iter(plan.starts)
    read: list[Tensor] = []
    entries: list[int] = []
    for recipe in recipes:
        if type(recipe) is Replicas:
            continue
        vectors = _norm_addresses(recipe.norm)
        if type(recipe) is Shift:
            entries += (next(starts), *vectors)
        else:
            for part in recipe.parts:
                entries += (part.data_ptr() + width * next(starts), *vectors)
            read += recipe.parts
        if recipe.norm is not None:
            read += recipe.norm[:4]
    out = torch.empty(plan.size, dtype=dtype, device=first.device)
    if read:
        table = addresses.table(tuple(entries), first.device)
        torch.ops.conddetr.prepare_weights(out, read, table, *plan.on(first.device))
    return [_result(recipes[number], out, plan.places[number]) for number in which]


def _result(recipe: Recipe, out: Tensor, place: tuple | None) -> Tensor:
    return recipe.vector.detach().expand(REPLICAS, -1) if place is None else torch.as_strided(out, *place)


def backward(
    recipes: list[Recipe], parameters: tuple[Tensor, ...], key: Forms, grads: list[list[Tensor]]
) -> list[Tensor | None]:
    """Gradients of the parameters, as views of one new tensor; None for parameters whose recipes have no gradient.

    `grads`: the gradients of each recipe's uses, without None.
    """
    plan = backward_layout(key, tuple([len(uses) for uses in grads]))
    starts = iter(plan.starts)
    # They must outlive the launch.
    kept: list[Tensor] = []
    entries: list[int] = []
    for recipe, uses in zip(recipes, grads, strict=True):
        if not uses:
            continue
        is_replicas = type(recipe) is Replicas
        dense = [_dense(grad, is_replicas) for grad in uses]
        kept += dense
        vectors = _norm_addresses(None if is_replicas else recipe.norm)
        for _ in (None,) if is_replicas else recipe.parts:
            for grad in dense:
                entries += (grad.data_ptr() + grad.element_size() * next(starts), *vectors)
    if not kept:
        return plan.places
    first = parameters[0]
    # Elements that the kernel does not write have gradient 0.
    flat = (torch.empty if plan.is_whole else torch.zeros)(plan.size, dtype=first.dtype, device=first.device)
    table = addresses.table(tuple(entries), first.device)
    torch.ops.conddetr.prepare_weights_backward(flat, kept, table, *plan.on(first.device))
    return [None if place is None else torch.as_strided(flat, *place) for place in plan.places]


def _launch(out: Tensor, sources: list[Tensor], addresses: Tensor, parts: Tensor, blocks: Tensor) -> None:
    """Fill `out` according to the tables; `sources`: all tensors that they point to, of one dtype."""
    prepare_kernel[(len(blocks),)](addresses, parts, blocks, sources[0], out, BLOCK=BLOCK)


def _launch_backward(out: Tensor, grads: list[Tensor], addresses: Tensor, parts: Tensor, blocks: Tensor) -> None:
    """Fill `out` according to the tables; `grads`: all tensors that they point to, float32 for replicas, else of the
    step's dtype.
    """
    typed = next((grad for grad in grads if grad.dtype != torch.float32), grads[0])
    prepare_backward_kernel[(len(blocks),)](addresses, parts, blocks, typed, out, **BACKWARD_SIZES)


# Tensors that the tables point to are arguments too, so that memory counters see every read.
_TABLES = "Tensor addresses, Tensor parts, Tensor blocks"
operators.register("prepare_weights", f"(Tensor(a!) out, Tensor[] sources, {_TABLES}) -> ()", launch=_launch)
operators.register(
    "prepare_weights_backward", f"(Tensor(a!) out, Tensor[] grads, {_TABLES}) -> ()", launch=_launch_backward
)


def _dense(grad: Tensor, is_replicas: bool) -> Tensor:
    """A gradient in the memory order of its result."""
    if is_replicas:
        return grad.to(torch.float32).contiguous()
    return grad.contiguous(memory_format=torch.channels_last) if grad.dim() == 4 else grad.contiguous()
