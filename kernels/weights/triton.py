"""One launch over many tensors: where they lie is in a table of addresses, what is done with each in a table of parts.

A program handles a block of one part. Where a convolution's weight [O, I, kh, kw] lies in its own order, it is turned
into channels-last on the way, and its gradient back.
"""

import functools
import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from conddetr.kernels import addresses, operators, registry
from conddetr.kernels.common.triton import load_float, store_cast, tile
from conddetr.kernels.weights.reference import FrozenNorm, Recipe, Replicas, Shift

BLOCK = 2048
"""Elements per program."""
SUM_ROWS, SUM_COLUMNS = 128, 32
"""What a program adds up at once of the rows of a vector's gradient: many, for they come one block after the other."""
BACKWARD_SIZES = {"BLOCK": BLOCK, "SUM_ROWS": SUM_ROWS, "SUM_COLUMNS": SUM_COLUMNS}
"""Of the gradient's kernel."""
ALIGNMENT = 8
"""Elements that outputs begin at multiples of."""
MATRIX, SHIFT, PARTIALS, ROWS = 0, 1, 2, 3
"""Kinds of parts; the gradient of the last two has rows to be added up, in float32 or in the step's dtype."""
ADDRESSES, FIELDS = 5, 9
"""Numbers per part in the two tables: source and the norm's four vectors; kind, offset, elements, channels, positions
of a convolution's kernel, the bits of the norm's epsilon, how many parts from this one on are added up, and of each the
rows to be added up and the elements from one to the next."""


@triton.jit
def load_part(parts, blocks):
    """Number of this program's part, its first element, and its fields."""
    part = tl.load(blocks + 2 * tl.program_id(0))
    # No parameter has 2³¹ elements; all of them together may.
    first = tl.load(blocks + 2 * tl.program_id(0) + 1).to(tl.int32)
    record = parts + 9 * part
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
    """[BLOCK] scale of the frozen norm, 1 where there is none."""
    scale = tl.full(row.shape, 1.0, tl.float32)
    if tl.load(addresses + 5 * part + 1) != 0:
        weight = vector_at(addresses, 5 * part + 1, row, inside)
        variance = vector_at(addresses, 5 * part + 4, row, inside)
        scale = weight * tl.rsqrt(variance + eps)
    return scale


@triton.jit
def turned(element, inner, outer):
    """Of elements in an order [row, outer, inner]: the row, and the place in the order [row, inner, outer]."""
    row = element // (inner * outer)
    place = element
    if (inner > 1) & (outer > 1):
        rest = element - row * (inner * outer)
        i = rest // inner
        place = row * (inner * outer) + (rest - i * inner) * outer + i
    return row, place


@triton.jit
def prepare_kernel(addresses, parts, blocks, source_type, out, BLOCK: tl.constexpr):
    """out[offset + …] = the part, cast, scaled and in channels-last. `source_type`: a tensor of the sources' dtype."""
    part, first, kind, offset, size, channels, positions, eps = load_part(parts, blocks)
    element = first + tl.arange(0, BLOCK)
    inside = element < size
    if kind == 1:
        scale = scale_at(addresses, part, element, inside, eps)
        mean = vector_at(addresses, 5 * part + 3, element, inside)
        value = vector_at(addresses, 5 * part + 2, element, inside) - mean * scale
    else:
        row, place = turned(element, channels, positions)
        source = tl.load(addresses + 5 * part).to(tl.pointer_type(source_type.dtype.element_ty))
        value = load_float(source + place, inside)
        value *= scale_at(addresses, part, row, inside, eps)
    store_cast(out + offset + element, value, inside)


@triton.jit
def column_sums(source, column, is_column, rows, stride, ROWS: tl.constexpr):
    """[ROWS, columns] float32, whose sums over rows are those of all rows."""
    total = tl.zeros((ROWS, column.shape[0]), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        place, mask = tile(row, row < rows, column, is_column, stride)
        total += load_float(source + place, mask)
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
    """grad[offset + …] = the gradient of the part, in its own order: summed over uses, and over rows where there are
    any, in fixed order.
    """
    part, first, kind, offset, size, channels, positions, eps = load_part(parts, blocks)
    record = parts + 9 * part
    end = part + tl.load(record + 6)
    if kind >= 2:
        rows, stride = tl.load(record + 7).to(tl.int32), tl.load(record + 8)
        column = first + tl.arange(0, SUM_COLUMNS)
        is_column = column < size
        total = tl.zeros((SUM_ROWS, SUM_COLUMNS), tl.float32)
        for use in range(part, end):
            source = tl.load(addresses + 5 * use)
            if kind == 2:
                partials = source.to(tl.pointer_type(tl.float32))
                total += column_sums(partials, column, is_column, rows, stride, SUM_ROWS)
            else:
                values = source.to(tl.pointer_type(gradient_type.dtype.element_ty))
                total += column_sums(values, column, is_column, rows, stride, SUM_ROWS)
        store_cast(grad + offset + column, tl.sum(total, axis=0), is_column)
    else:
        element = first + tl.arange(0, BLOCK)
        inside = element < size
        row, place = turned(element, positions, channels)
        value = tl.zeros((BLOCK,), tl.float32)
        for use in range(part, end):
            source = tl.load(addresses + 5 * use).to(tl.pointer_type(gradient_type.dtype.element_ty))
            value += load_float(source + place, inside)
        value *= scale_at(addresses, part, row, inside, eps)
        store_cast(grad + offset + element, value, inside)


@dataclass(frozen=True, eq=False)
class Layout:
    """What is the same for all parameters of the same shapes, wherever they lie."""

    size: int
    """Elements of the tensor that holds all results."""
    is_whole: bool
    """Whether every element of it is written that a result has."""
    places: list[tuple[tuple[int, ...], tuple[int, ...], int] | None]
    """Shape, strides and offset of each result in that tensor; None: there is none, or it lies elsewhere."""
    starts: list[int]
    """Of each part the first element that is read."""
    tables: tuple[Tensor, Tensor]
    """Of parts and of blocks."""

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The tables on a device."""
        if addresses.is_capturing(device):
            return tuple(addresses.place(table, device) for table in self.tables)
        return _placed(self, device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)


# By stream, since only there the copies are known to be done.
@functools.lru_cache(maxsize=16)
def _placed(layout: Layout, device: torch.device, stream: int) -> tuple[Tensor, ...]:
    return tuple(addresses.place(table, device) for table in layout.tables)


class Forms(NamedTuple):
    """Recipes without their tensors."""

    recipes: tuple[tuple, ...]
    """Kind, and of a matrix the numbers of its sources, its rows, its norm's epsilon, and its copies; of a shift its
    length, and epsilon; of replicas the number of the vector."""
    sources: tuple[tuple[torch.Size, tuple[int, ...]], ...]
    """Shape and strides of each parameter."""


def forms(recipes: list[Recipe], parameters: tuple[Tensor, ...]) -> Forms:
    """What layouts depend on; `parameters`: all that the recipes name, each once."""
    numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
    wanted = []
    for recipe in recipes:
        kind = type(recipe)
        if kind is Replicas:
            wanted.append((PARTIALS, numbers[id(recipe.vector)]))
        elif kind is Shift:
            wanted.append((SHIFT, recipe.norm.bias.shape[0], recipe.norm.eps))
        else:
            sources = tuple([numbers[id(part)] for part in recipe.parts])
            eps = None if recipe.norm is None else recipe.norm.eps
            wanted.append((MATRIX if recipe.copies is None else ROWS, sources, recipe.rows, eps, recipe.copies))
    return Forms(tuple(wanted), tuple([(x.shape, x.stride()) for x in parameters]))


class _Piece(NamedTuple):
    """Rows of one parameter, as the kernels see them."""

    source: int | None
    """Its number; None: the norm's shift."""
    start: int
    """First element."""
    size: int
    channels: int = 1
    positions: int = 1
    """Of a convolution's kernel; 1 where the order of memory stays as it is."""
    eps: float | None = None
    rows: int = 0
    """Of its gradient; 0: the gradient is no sum over rows."""
    stride: int = 0
    """Elements from one row to the next."""

    def fields(self, kind: int, offset: int, uses: int = 1) -> tuple[int, ...]:
        """Its row in the table of parts; `offset`: of its result."""
        eps = 0 if self.eps is None else struct.unpack("i", struct.pack("f", self.eps))[0]
        return kind, offset, self.size, self.channels, self.positions, eps, uses, self.rows, self.stride


def _pieces(recipe: tuple, sources: tuple) -> list[_Piece]:
    """What a kernel walks over."""
    kind, which, *options = recipe
    if kind == SHIFT:
        return [_Piece(None, 0, which, eps=options[0])]
    if kind == PARTIALS:
        length = sources[which][0].numel()
        return [_Piece(which, 0, length, rows=registry.REPLICAS, stride=length)]
    rows, eps, copies = options
    pieces = []
    for number in which:
        shape, strides = sources[number]
        row = shape[1:].numel()
        first, end = rows or (0, shape[0])
        if copies is not None:
            stride = end - first if rows else sum(sources[other][0][0] for other in which)
            pieces.append(_Piece(number, first, end - first, rows=copies, stride=stride))
            continue
        is_turned = len(shape) == 4 and not _lies_in_channels_last(shape, strides)
        positions = shape[2] * shape[3] if is_turned else 1
        pieces.append(_Piece(number, first * row, (end - first) * row, row // positions, positions, eps))
    return pieces


def _lies_in_channels_last(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    return torch.empty_strided(shape, strides, device="meta").is_contiguous(memory_format=torch.channels_last)


def _place(recipe: tuple, sources: tuple, offset: int) -> tuple | None:
    """Shape, strides and offset of a recipe's result; replicas are views of their vector."""
    kind, which, *options = recipe
    if kind == PARTIALS:
        return None
    if kind == SHIFT:
        return (which,), (1,), offset
    rows, _, copies = options
    first, end = rows or (0, sum(sources[number][0][0] for number in which))
    if kind == ROWS:
        return (copies, end - first), (0, 1), offset
    shape = (end - first, *sources[which[0]][0][1:])
    order = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return shape, torch.empty(shape, device="meta", memory_format=order).stride(), offset


@functools.lru_cache(maxsize=16)
def _layout(of: Forms) -> Layout:
    """Forward."""
    fields, starts, places = [], [], []
    size = 0
    for recipe in of.recipes:
        places.append(_place(recipe, of.sources, size))
        if recipe[0] == PARTIALS:
            continue
        for piece in _pieces(recipe, of.sources):
            # The next part of a stack goes on where the one before it ended.
            fields.append(piece.fields(recipe[0], size))
            starts.append(piece.start)
            size += piece.size
        size = _aligned(size)
    return Layout(size, True, places, starts, _tables(fields))


@functools.lru_cache(maxsize=16)
def _backward_layout(of: Forms, uses: tuple[int, ...]) -> Layout:
    """Backward: results are the gradients of parameters, sources those of the recipes' results, `uses` of each."""
    fields, starts, places = [], [], [None] * len(of.sources)
    size = written = wanted = 0
    for recipe, count in zip(of.recipes, uses, strict=True):
        start = 0
        for piece in _pieces(recipe, of.sources) if count else ():
            shape, strides = of.sources[piece.source]
            if places[piece.source] is None:
                places[piece.source] = (tuple(shape), strides, size)
                size += _aligned(shape.numel())
                wanted += shape.numel()
            # Only the first has blocks, and adds the others.
            offset = places[piece.source][2] + piece.start
            fields += [piece.fields(recipe[0], offset, count - use) for use in range(count)]
            starts += [start] * count
            start += piece.size
            written += piece.size
    return Layout(size, written == wanted, places, starts, _tables(fields))


def _aligned(size: int) -> int:
    return registry.cdiv(size, ALIGNMENT) * ALIGNMENT


def _tables(fields: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """The tables of parts and of blocks, on the host."""
    blocks = []
    part = 0
    # What takes longest begins first.
    while part < len(fields):
        _, _, size, *_, uses, rows, _ = fields[part]
        blocks += [(part, first) for first in range(0, size, SUM_COLUMNS if rows else BLOCK)]
        part += uses
    blocks.sort(key=lambda block: -fields[block[0]][7])
    return tuple(torch.tensor(rows, dtype=torch.int64) for rows in (fields, blocks))


def _addresses_of(norm: FrozenNorm | None) -> tuple[int, int, int, int]:
    if norm is None:
        return 0, 0, 0, 0
    return norm.weight.data_ptr(), norm.bias.data_ptr(), norm.mean.data_ptr(), norm.variance.data_ptr()


def forward(
    recipes: list[Recipe], which: list[int], parameters: tuple[Tensor, ...], of: Forms, dtype: torch.dtype
) -> list[Tensor]:
    """What `op.prepare_weights` returns, as views of one new tensor: `recipes` are there once, `which` are the numbers
    of those that are wanted; see there and at `forms`.
    """
    layout = _layout(of)
    first = parameters[0] if parameters else recipes[0].norm.bias
    width = first.element_size()
    starts = iter(layout.starts)
    read: list[Tensor] = []
    lie: list[int] = []
    for recipe in recipes:
        if type(recipe) is Replicas:
            continue
        vectors = _addresses_of(recipe.norm)
        if type(recipe) is Shift:
            lie += (next(starts), *vectors)
        else:
            for part in recipe.parts:
                lie += (part.data_ptr() + width * next(starts), *vectors)
            read += recipe.parts
        if recipe.norm is not None:
            read += recipe.norm[:4]
    out = torch.empty(layout.size, dtype=dtype, device=first.device)
    if read:
        table = addresses.table(tuple(lie), first.device)
        torch.ops.conddetr.prepare_weights(out, read, table, *layout.on(first.device))
    return [_result(recipes[number], out, layout.places[number]) for number in which]


def _result(recipe: Recipe, out: Tensor, place: tuple | None) -> Tensor:
    return recipe.vector.detach().expand(registry.REPLICAS, -1) if place is None else torch.as_strided(out, *place)


def backward(
    recipes: list[Recipe], parameters: tuple[Tensor, ...], of: Forms, grads: list[list[Tensor]]
) -> list[Tensor | None]:
    """Gradients of the parameters, as views of one new tensor; None of those whose recipes have none.

    `grads`: of each recipe those that there are.
    """
    layout = _backward_layout(of, tuple([len(uses) for uses in grads]))
    starts = iter(layout.starts)
    # They must outlive the launch.
    kept: list[Tensor] = []
    lie: list[int] = []
    for recipe, uses in zip(recipes, grads, strict=True):
        if not uses:
            continue
        is_replicas = type(recipe) is Replicas
        dense = [_dense(grad, is_replicas) for grad in uses]
        kept += dense
        vectors = _addresses_of(None if is_replicas else recipe.norm)
        for _ in (None,) if is_replicas else recipe.parts:
            for grad in dense:
                lie += (grad.data_ptr() + grad.element_size() * next(starts), *vectors)
    if not kept:
        return layout.places
    first = parameters[0]
    # Rows that nobody wrote have no influence.
    flat = (torch.empty if layout.is_whole else torch.zeros)(layout.size, dtype=first.dtype, device=first.device)
    table = addresses.table(tuple(lie), first.device)
    torch.ops.conddetr.prepare_weights_backward(flat, kept, table, *layout.on(first.device))
    return [None if place is None else torch.as_strided(flat, *place) for place in layout.places]


def _launch(out: Tensor, sources: list[Tensor], addresses: Tensor, parts: Tensor, blocks: Tensor) -> None:
    """Fill `out` by the tables; `sources` is all that they point to, of one dtype."""
    prepare_kernel[(len(blocks),)](addresses, parts, blocks, sources[0], out, BLOCK=BLOCK)


def _launch_backward(out: Tensor, grads: list[Tensor], addresses: Tensor, parts: Tensor, blocks: Tensor) -> None:
    """Fill `out` by the tables; `grads` is all that they point to: of replicas float32, else of the step's dtype."""
    kind = next((grad for grad in grads if grad.dtype != torch.float32), grads[0])
    prepare_backward_kernel[(len(blocks),)](addresses, parts, blocks, kind, out, **BACKWARD_SIZES)


# What the tables point to is an argument all the same, so that counters of memory see what is read.
_TABLES = "Tensor addresses, Tensor parts, Tensor blocks"
operators.register("prepare_weights", f"(Tensor(a!) out, Tensor[] sources, {_TABLES}) -> ()", launch=_launch)
operators.register(
    "prepare_weights_backward", f"(Tensor(a!) out, Tensor[] grads, {_TABLES}) -> ()", launch=_launch_backward
)


def _is_channels_last(source: Tensor) -> bool:
    return source.dim() == 4 and source.is_contiguous(memory_format=torch.channels_last)


def is_dense(source: Tensor) -> bool:
    """Whether a parameter lies without gaps in one of the two orders that the kernels know."""
    return source.is_contiguous() or _is_channels_last(source)


def _dense(grad: Tensor, is_replicas: bool) -> Tensor:
    """A gradient in the order in which the result was made."""
    if is_replicas:
        return grad.to(torch.float32).contiguous()
    return grad.contiguous(memory_format=torch.channels_last) if grad.dim() == 4 else grad.contiguous()
