"""One launch over many tensors: where they lie is in a table of addresses, what is done with each in a table of parts.

A program handles a block of one part. Where a convolution's weight [O, I, kh, kw] lies in its own order, it is turned
into channels-last on the way, and its gradient back.
"""

import functools
import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from conddetr.kernels import addresses, registry
from conddetr.kernels.weights.reference import FrozenNorm, Recipe, Replicas, Shift

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


class _Work:
    """The tables of one launch, part by part."""

    def __init__(self) -> None:
        self.fields: list[tuple[int, ...]] = []
        self.addresses: list[int] = []

    def add(self, piece: "_Piece", kind: int, address: int, offset: int) -> None:
        """A part that lies at an address; `offset`: of its result, in elements."""
        eps = 0 if piece.norm is None else struct.unpack("i", struct.pack("f", piece.norm.eps))[0]
        self.fields.append((kind, offset, piece.size, piece.channels, piece.positions, eps))
        vectors = [0, 0, 0, 0] if piece.norm is None else [vector.data_ptr() for vector in piece.norm[:4]]
        self.addresses += [address, *vectors]

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Of addresses, parts and blocks."""
        table, fields = addresses.table(tuple(self.addresses), device), tuple(self.fields)
        if addresses.is_capturing(device):
            return table, *(addresses.place(rows, device) for rows in _layout(fields))
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        return table, *_placed_layout(fields, device, stream)


class _Piece(NamedTuple):
    """Rows of one parameter, as the kernels see them."""

    source: Tensor | None
    """None: the norm's shift."""
    norm: FrozenNorm | None
    start: int
    """First element."""
    size: int
    channels: int
    positions: int
    """Of a convolution's kernel; 1 where the order of memory stays as it is."""

    def address(self) -> int:
        return 0 if self.source is None else self.source.data_ptr() + self.start * self.source.element_size()


def forward(recipes: list[Recipe], dtype: torch.dtype) -> list[Tensor]:
    """What `op.prepare_weights` returns, as views of one new tensor; see there."""
    work = _Work()
    shapes: list[tuple[torch.Size, int]] = []
    size = 0
    for recipe in recipes:
        start = size
        if not isinstance(recipe, Replicas):
            for piece in _pieces(recipe):
                # The next part of a stack goes on where the one before it ended.
                work.add(piece, MATRIX if piece.source is not None else SHIFT, piece.address(), size)
                size += piece.size
        shapes.append((_shape(recipe), start))
        size = triton.cdiv(size, ALIGNMENT) * ALIGNMENT
    first = _first(recipes)
    out = torch.empty(size, dtype=dtype, device=first.device)
    if work.fields:
        sources = [tensor for recipe in recipes for tensor in _read(recipe)]
        with torch.cuda.device_of(first):
            torch.ops.conddetr.prepare_weights(out, sources, *work.tables(first.device))
    return [_view(recipe, out, *place) for recipe, place in zip(recipes, shapes, strict=True)]


def backward(recipes: list[Recipe], grads: list[Tensor | None]) -> dict[int, Tensor]:
    """Gradients of parameters by `id`, as views of one new tensor; of those whose recipes have none it has none."""
    work = _Work()
    places: dict[int, tuple[Tensor, int]] = {}
    size = written = 0
    # They must outlive the launch.
    kept: list[Tensor] = []
    for recipe, grad in zip(recipes, grads, strict=True):
        if grad is None:
            continue
        is_replicas = isinstance(recipe, Replicas)
        kept.append(_dense(grad, is_replicas))
        address = kept[-1].data_ptr()
        for piece in _pieces(recipe):
            if id(piece.source) not in places:
                places[id(piece.source)] = (piece.source, size)
                size += triton.cdiv(piece.source.numel(), ALIGNMENT) * ALIGNMENT
            offset = places[id(piece.source)][1] + piece.start
            work.add(piece, PARTIALS if is_replicas else MATRIX, address, offset)
            address += piece.size * kept[-1].element_size()
            written += piece.size
    if not kept:
        return {}
    first = _first(recipes)
    # Rows that nobody wrote have no influence.
    is_whole = written == sum(source.numel() for source, _ in places.values())
    flat = (torch.empty if is_whole else torch.zeros)(size, dtype=first.dtype, device=first.device)
    with torch.cuda.device_of(first):
        torch.ops.conddetr.prepare_weights_backward(flat, kept, *work.tables(first.device))
    return {key: torch.as_strided(flat, x.shape, x.stride(), offset) for key, (x, offset) in places.items()}


# What the tables point to is an argument all the same, so that counters of memory see what is read.
@torch.library.custom_op("conddetr::prepare_weights", mutates_args=("out",))
def launch(out: Tensor, sources: list[Tensor], addresses: Tensor, parts: Tensor, blocks: Tensor) -> None:
    """Fill `out` by the tables; `sources` is all that they point to, of one dtype."""
    prepare_kernel[(len(blocks),)](addresses, parts, blocks, sources[0], out, BLOCK=BLOCK)


@torch.library.custom_op("conddetr::prepare_weights_backward", mutates_args=("out",))
def launch_backward(out: Tensor, grads: list[Tensor], addresses: Tensor, parts: Tensor, blocks: Tensor) -> None:
    """Fill `out` by the tables; `grads` is all that they point to: of replicas float32, else of the step's dtype."""
    kind = next((grad for grad in grads if grad.dtype != torch.float32), grads[0])
    sizes = {"BLOCK": BLOCK, "ROWS": PARTIAL_ROWS}
    prepare_backward_kernel[(len(blocks),)](addresses, parts, blocks, kind, out, registry.REPLICAS, **sizes)


def _read(recipe: Recipe) -> list[Tensor]:
    """What a kernel reads to make a recipe's result."""
    if isinstance(recipe, Replicas):
        return []
    norm = [] if recipe.norm is None else list(recipe.norm[:4])
    return norm if isinstance(recipe, Shift) else [*recipe.parts, *norm]


def _pieces(recipe: Recipe) -> list[_Piece]:
    """What a kernel walks over."""
    if isinstance(recipe, Shift):
        return [_Piece(None, recipe.norm, 0, recipe.norm.bias.numel(), 1, 1)]
    if isinstance(recipe, Replicas):
        return [_Piece(recipe.vector, None, 0, recipe.vector.numel(), 1, 1)]
    pieces = []
    for source in recipe.parts:
        row = source[0].numel()
        first, end = recipe.rows or (0, len(source))
        is_turned = source.dim() == 4 and not _is_channels_last(source)
        positions = source.shape[2] * source.shape[3] if is_turned else 1
        pieces.append(_Piece(source, recipe.norm, first * row, (end - first) * row, row // positions, positions))
    return pieces


def _first(recipes: list[Recipe]) -> Tensor:
    """Any parameter: all share a dtype and a device."""
    [piece, *_] = _pieces(recipes[0])
    return piece.norm.bias if piece.source is None else piece.source


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


@functools.lru_cache(maxsize=16)
def _layout(fields: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor]:
    """The tables of parts and of blocks, of shapes alone."""
    blocks = []
    for part, (kind, _, size, *_) in enumerate(fields):
        step = BLOCK // PARTIAL_ROWS if kind == PARTIALS else BLOCK
        blocks += [(part, first) for first in range(0, size, step)]
    return tuple(torch.tensor(rows, dtype=torch.int64) for rows in (fields, blocks))


# By stream, since only there the copies are known to be done.
@functools.lru_cache(maxsize=16)
def _placed_layout(fields: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> tuple[Tensor, ...]:
    return tuple(addresses.place(rows, device) for rows in _layout(fields))


def _shape(recipe: Recipe) -> torch.Size:
    if isinstance(recipe, Shift):
        return recipe.norm.bias.shape
    if isinstance(recipe, Replicas):
        return torch.Size((registry.REPLICAS, len(recipe.vector)))
    first, end = recipe.rows or (0, sum(len(part) for part in recipe.parts))
    return torch.Size((end - first, *recipe.parts[0].shape[1:]))


def _view(recipe: Recipe, out: Tensor, shape: torch.Size, offset: int) -> Tensor:
    """A recipe's result, within the tensor that holds them all."""
    if isinstance(recipe, Replicas):
        return recipe.vector.detach().expand(shape)
    view = out[offset : offset + shape.numel()]
    if len(shape) == 4:
        return view.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
    return view.view(shape)
