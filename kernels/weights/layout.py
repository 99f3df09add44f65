"""Layout of a step's weights in one memory, and its tables for the kernels. Equal shapes have equal layouts."""

import functools
import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from conddetr.kernels import addresses
from conddetr.kernels.common.launch import REPLICAS, cdiv
from conddetr.kernels.weights.reference import Recipe, Replicas, Shift

BLOCK = 2048
"""Elements per program."""
SUM_ROWS, SUM_COLUMNS = 128, 32
"""Block of a vector's gradient that a program sums at once. It has many rows, because blocks run one after another."""
ALIGNMENT = 8
"""Outputs begin at multiples of this many elements."""
MATRIX, SHIFT, PARTIALS, ROWS = 0, 1, 2, 3
"""Kinds of parts; gradients of the last two have rows to be summed, in float32 or in the step's dtype."""
ADDRESSES, FIELDS = 5, 9
"""Numbers per part in the two tables. Addresses: source and the norm's four vectors. Fields: kind, offset, elements,
channels, positions of a convolution's kernel, bits of the norm's epsilon, number of parts from this one on that are
summed, and for each of them the number of rows to be summed and the elements from one row to the next."""


@dataclass(frozen=True, eq=False)
class Layout:
    """The layout of parameters of given shapes, independent of their addresses."""

    size: int
    """Elements of the tensor that holds all results."""
    is_whole: bool
    """Whether every element of every result is written."""
    places: list[tuple[tuple[int, ...], tuple[int, ...], int] | None]
    """Shape, strides and offset of each result in that tensor; None: no result, or a result outside of it."""
    starts: list[int]
    """The first element of each part that is read."""
    tables: tuple[Tensor, Tensor]
    """The tables of parts and of blocks."""

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The tables on a device."""
        if addresses.is_capturing(device):
            return tuple(addresses.place(table, device) for table in self.tables)
        return _placed(self, device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)


# Cached per stream, where the copies are known to be complete.
@functools.lru_cache(maxsize=16)
def _placed(layout: Layout, device: torch.device, stream: int) -> tuple[Tensor, ...]:
    return tuple(addresses.place(table, device) for table in layout.tables)


class Forms(NamedTuple):
    """Recipes without their tensors."""

    recipes: tuple[tuple, ...]
    """The kind, followed for a matrix by the numbers of its sources, its rows, its norm's epsilon and its copies; for a
    shift by its length and epsilon; for replicas by the number of the vector."""
    sources: tuple[tuple[torch.Size, tuple[int, ...]], ...]
    """Shape and strides of each parameter."""


def forms(recipes: list[Recipe], parameters: tuple[Tensor, ...]) -> Forms:
    """The key of a layout; `parameters`: all parameters of the recipes, each once."""
    numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
    entries = []
    for recipe in recipes:
        kind = type(recipe)
        if kind is Replicas:
            entries.append((PARTIALS, numbers[id(recipe.vector)]))
        elif kind is Shift:
            entries.append((SHIFT, recipe.norm.bias.shape[0], recipe.norm.eps))
        else:
            sources = tuple([numbers[id(part)] for part in recipe.parts])
            eps = None if recipe.norm is None else recipe.norm.eps
            entries.append((MATRIX if recipe.copies is None else ROWS, sources, recipe.rows, eps, recipe.copies))
    return Forms(tuple(entries), tuple([(x.shape, x.stride()) for x in parameters]))


class _Piece(NamedTuple):
    """Rows of one parameter, as the kernels read them."""

    source: int | None
    """Number of the parameter; None: the norm's shift."""
    start: int
    """First element."""
    size: int
    channels: int = 1
    positions: int = 1
    """Positions of a convolution's kernel; 1 if the memory order does not change."""
    eps: float | None = None
    rows: int = 0
    """Rows of its gradient; 0: the gradient is no sum over rows."""
    stride: int = 0
    """Elements from one row to the next."""

    def fields(self, kind: int, offset: int, uses: int = 1) -> tuple[int, ...]:
        """The row of this piece in the table of parts; `offset`: of its result."""
        eps = 0 if self.eps is None else struct.unpack("i", struct.pack("f", self.eps))[0]
        return kind, offset, self.size, self.channels, self.positions, eps, uses, self.rows, self.stride


def _pieces(recipe: tuple, sources: tuple) -> list[_Piece]:
    """The pieces of a recipe that a kernel processes."""
    kind, which, *options = recipe
    if kind == SHIFT:
        return [_Piece(None, 0, which, eps=options[0])]
    if kind == PARTIALS:
        length = sources[which][0].numel()
        return [_Piece(which, 0, length, rows=REPLICAS, stride=length)]
    rows, eps, copies = options
    pieces = []
    for number in which:
        shape, strides = sources[number]
        row = shape[1:].numel()
        first, end = rows or (0, shape[0])
        if copies is not None:
            stride = end - first if rows else sum(sources[source][0][0] for source in which)
            pieces.append(_Piece(number, first, end - first, rows=copies, stride=stride))
            continue
        is_permuted = len(shape) == 4 and not _lies_in_channels_last(shape, strides)
        positions = shape[2] * shape[3] if is_permuted else 1
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
def forward_layout(key: Forms) -> Layout:
    """Layout of the forward pass: results are those of the recipes, sources the parameters."""
    fields, starts, places = [], [], []
    size = 0
    for recipe in key.recipes:
        places.append(_place(recipe, key.sources, size))
        if recipe[0] == PARTIALS:
            continue
        for piece in _pieces(recipe, key.sources):
            # The next part of a stack begins where the previous one ends.
            fields.append(piece.fields(recipe[0], size))
            starts.append(piece.start)
            size += piece.size
        size = _aligned(size)
    return Layout(size, True, places, starts, _tables(fields))


@functools.lru_cache(maxsize=16)
def backward_layout(key: Forms, uses: tuple[int, ...]) -> Layout:
    """Layout of the backward pass: results are the gradients of parameters, sources the gradients of the recipes'
    results, with `uses` of each.
    """
    fields, starts, places = [], [], [None] * len(key.sources)
    size = written = needed = 0
    for recipe, count in zip(key.recipes, uses, strict=True):
        start = 0
        for piece in _pieces(recipe, key.sources) if count else ():
            shape, strides = key.sources[piece.source]
            if places[piece.source] is None:
                places[piece.source] = (tuple(shape), strides, size)
                size += _aligned(shape.numel())
                needed += shape.numel()
            # Only the first part has blocks; it adds the others.
            offset = places[piece.source][2] + piece.start
            fields += [piece.fields(recipe[0], offset, count - use) for use in range(count)]
            starts += [start] * count
            start += piece.size
            written += piece.size
    return Layout(size, written == needed, places, starts, _tables(fields))


def _aligned(size: int) -> int:
    return cdiv(size, ALIGNMENT) * ALIGNMENT


def _tables(fields: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """The tables of parts and of blocks, on the host."""
    blocks = []
    part = 0
    # The parts that take longest begin first.
    while part < len(fields):
        _, _, size, *_, uses, rows, _ = fields[part]
        blocks += [(part, first) for first in range(0, size, SUM_COLUMNS if rows else BLOCK)]
        part += uses
    blocks.sort(key=lambda block: -fields[block[0]][7])
    return tuple(torch.tensor(rows, dtype=torch.int64) for rows in (fields, blocks))


def _is_channels_last(source: Tensor) -> bool:
    return source.dim() == 4 and source.is_contiguous(memory_format=torch.channels_last)


def is_dense(source: Tensor) -> bool:
    """Whether a parameter is stored without gaps in one of the two memory orders of the kernels."""
    return source.is_contiguous() or _is_channels_last(source)
