"""One launch over many tensors: where they lie is in a table of addresses, what is done with each in a table of parts.

A program handles a block of one part. Where a convolution's weight [O, I, kh, kw] lies in its own order, it is turned
into channels-last on the way, and its gradient back.
"""

import functools
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from conddetr.kernels import addresses, registry
from conddetr.kernels.weights.reference import FrozenNorm, Recipe, Replicas, Shift, Weight

BLOCK = 2048
"""Elements per program."""
PARTIAL_ROWS = 16
"""Rows of partial sums that a program adds up at once; it has BLOCK / PARTIAL_ROWS columns."""
ALIGNMENT = 8
"""Elements that outputs begin at multiples of."""
MATRIX, SHIFT, PARTIALS = 0, 1, 2
"""Kinds of parts."""
ADDRESSES, FIELDS = 5, 6
"""Numbers per part in the two tables: source and the norm's four vectors; kind, offset, elements, channels, positions
of a convolution's kernel, and the bits of the norm's epsilon."""


@triton.jit
def load_part(parts, blocks):
    """Number of this program's part, its first element, and its fields."""
    part = tl.load(blocks + 2 * tl.program_id(0))
    first = tl.load(blocks + 2 * tl.program_id(0) + 1)
    record = parts + 6 * part
    kind, offset, size = tl.load(record), tl.load(record + 1), tl.load(record + 2)
    channels, positions = tl.load(record + 3), tl.load(record + 4)
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
        row = element // (channels * positions)
        place = element
        if positions > 1:
            rest = element - row * (channels * positions)
            position = rest // channels
            place = row * (channels * positions) + (rest - position * channels) * positions + position
        source = tl.load(addresses + 5 * part).to(tl.pointer_type(source_type.dtype.element_ty))
        value = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
        value *= scale_at(addresses, part, row, inside, eps)
    tl.store(out + offset + element, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def prepare_backward_kernel(
    addresses, parts, blocks, gradient_type, grad, replicas, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """grad[offset + …] = the gradient of the part, in its own order; of replicas the sum over them, in fixed order."""
    part, first, kind, offset, size, channels, positions, eps = load_part(parts, blocks)
    if kind == 2:
        column = first + tl.arange(0, BLOCK // ROWS)
        is_column = column < size
        partials = tl.load(addresses + 5 * part).to(tl.pointer_type(tl.float32))
        total = tl.zeros((ROWS, BLOCK // ROWS), tl.float32)
        for start in range(0, replicas, ROWS):
            row = start + tl.arange(0, ROWS)
            mask = (row < replicas)[:, None] & is_column[None, :]
            total += tl.load(partials + row[:, None] * size + column[None, :], mask=mask, other=0.0)
        tl.store(grad + offset + column, tl.sum(total, axis=0).to(grad.dtype.element_ty), mask=is_column)
    else:
        element = first + tl.arange(0, BLOCK)
        inside = element < size
        row = element // (channels * positions)
        place = element
        if positions > 1:
            rest = element - row * (channels * positions)
            channel = rest // positions
            place = row * (channels * positions) + (rest - channel * positions) * channels + channel
        source = tl.load(addresses + 5 * part).to(tl.pointer_type(gradient_type.dtype.element_ty))
        value = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
        value *= scale_at(addresses, part, row, inside, eps)
        tl.store(grad + offset + element, value.to(grad.dtype.element_ty), mask=inside)


def forward(recipes: list[Recipe], dtype: torch.dtype) -> list[Tensor]:
    """What `op.prepare_weights` returns, as views of one new tensor; see there."""
    fields: list[tuple[int, ...]] = []
    places: list[int] = []
    size = 0
    for recipe in recipes:
        for source, norm in _made_of(recipe):
            # The next part of a stack goes on where the one before it ended.
            fields.append(_fields(source, norm, size))
            places += _addresses(source, norm)
            size += fields[-1][2]
        size = triton.cdiv(size, ALIGNMENT) * ALIGNMENT
    first = next(tensor for recipe in recipes for tensor in _tensors(recipe))
    out = torch.empty(size, dtype=dtype, device=first.device)
    if fields:
        parts, blocks = _tables(tuple(fields), first.device)
        table = addresses.table(tuple(places), first.device)
        with torch.cuda.device_of(first):
            prepare_kernel[(len(blocks),)](table, parts, blocks, first, out, BLOCK=BLOCK)
    return _views(recipes, out)


def backward(recipes: list[Recipe], grads: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients of all parts in turn, as views of one new tensor; None where the recipe's own is None."""
    layout: list[tuple[Tensor, int] | None] = []
    fields: list[tuple[int, ...]] = []
    places: list[int] = []
    kept: list[Tensor] = []
    size = 0
    for recipe, grad in zip(recipes, grads, strict=True):
        sources = _parts_with_gradient(recipe)
        if grad is None:
            layout += [None] * len(sources)
            continue
        grad = _dense(grad, isinstance(recipe, Replicas))
        kept.append(grad)
        start = grad.data_ptr()
        norm = recipe.norm if isinstance(recipe, Weight) else None
        for source in sources:
            kind = PARTIALS if isinstance(recipe, Replicas) else MATRIX
            fields.append(_fields(source, norm, size, kind))
            places += [start, *_addresses(source, norm)[1:]]
            layout.append((source, size))
            start += source.numel() * grad.element_size()
            size += triton.cdiv(source.numel(), ALIGNMENT) * ALIGNMENT
    if not kept:
        return layout
    first = next(source for source, _ in filter(None, layout))
    flat = torch.empty(size, dtype=first.dtype, device=first.device)
    parts, blocks = _tables(tuple(fields), first.device)
    table = addresses.table(tuple(places), first.device)
    # Of replicas it is float32; the others' is the step's dtype.
    kind = next((grad for grad in kept if grad.dtype != torch.float32), kept[0])
    with torch.cuda.device_of(first):
        prepare_backward_kernel[(len(blocks),)](
            table, parts, blocks, kind, flat, registry.REPLICAS, BLOCK=BLOCK, ROWS=PARTIAL_ROWS
        )
    return [place and torch.as_strided(flat, place[0].shape, place[0].stride(), place[1]) for place in layout]


def _made_of(recipe: Recipe) -> list[tuple[Tensor | None, FrozenNorm | None]]:
    """The parts that a kernel makes the recipe's result of; replicas are no work."""
    if isinstance(recipe, Replicas):
        return []
    if isinstance(recipe, Shift):
        return [(None, recipe.norm)]
    return [(part, recipe.norm) for part in recipe.parts]


def _parts_with_gradient(recipe: Recipe) -> tuple[Tensor, ...]:
    if isinstance(recipe, Weight):
        return recipe.parts
    return () if isinstance(recipe, Shift) else (recipe.vector,)


def _tensors(recipe: Recipe) -> tuple[Tensor, ...]:
    return tuple(recipe.norm[:1]) if isinstance(recipe, Shift) else _parts_with_gradient(recipe)


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


def _fields(source: Tensor | None, norm: FrozenNorm | None, offset: int, kind: int = MATRIX) -> tuple[int, ...]:
    eps = struct.unpack("i", struct.pack("f", norm.eps))[0] if norm is not None else 0
    if source is None:
        return SHIFT, offset, norm.bias.numel(), 1, 1, eps
    positions = 1 if source.dim() < 4 or _is_channels_last(source) else source.shape[2] * source.shape[3]
    channels = source[0].numel() // positions if source.dim() > 1 else 1
    return kind, offset, source.numel(), channels, positions, eps


def _addresses(source: Tensor | None, norm: FrozenNorm | None) -> list[int]:
    vectors = [0, 0, 0, 0] if norm is None else [vector.data_ptr() for vector in norm[:4]]
    return [0 if source is None else source.data_ptr(), *vectors]


@functools.lru_cache(maxsize=16)
def _tables(fields: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The tables of parts and of blocks, of shapes alone."""
    blocks = []
    for part, (kind, _, size, *_) in enumerate(fields):
        step = BLOCK // PARTIAL_ROWS if kind == PARTIALS else BLOCK
        blocks += [(part, first) for first in range(0, size, step)]
    return tuple(torch.tensor(rows, dtype=torch.int64).to(device) for rows in (fields, blocks))


def _views(recipes: list[Recipe], out: Tensor) -> list[Tensor]:
    made = []
    offset = 0
    for recipe in recipes:
        if isinstance(recipe, Replicas):
            made.append(recipe.vector.detach().expand(registry.REPLICAS, -1))
            continue
        shape = recipe.norm.bias.shape if isinstance(recipe, Shift) else _stacked_shape(recipe.parts)
        size = shape.numel()
        view = out[offset : offset + size]
        if len(shape) == 4:
            view = view.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
        else:
            view = view.view(shape)
        made.append(view)
        offset += triton.cdiv(size, ALIGNMENT) * ALIGNMENT
    return made


def _stacked_shape(parts: tuple[Tensor, ...]) -> torch.Size:
    return torch.Size((sum(len(part) for part in parts), *parts[0].shape[1:]))
