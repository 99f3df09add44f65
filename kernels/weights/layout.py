"""Where the weights of a step lie in one memory, and the tables that tell the kernels: all that is the same for the
same shapes.
"""

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
"""What a program adds up at once of the rows of a vector's gradient: many, for they come one block after the other."""
ALIGNMENT = 8
"""Elements that outputs begin at multiples of."""
MATRIX, SHIFT, PARTIALS, ROWS = 0, 1, 2, 3
"""Kinds of parts; the gradient of the last two has rows to be added up, in float32 or in the step's dtype."""
ADDRESSES, FIELDS = 5, 9
"""Numbers per part in the two tables: source and the norm's four vectors; kind, offset, elements, channels, positions
of a convolution's kernel, the bits of the norm's epsilon, how many parts from this one on are added up, and of each the
rows to be added up and the elements from one to the next."""


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
        return [_Piece(which, 0, length, rows=REPLICAS, stride=length)]
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
def forward_layout(of: Forms) -> Layout:
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
def backward_layout(of: Forms, uses: tuple[int, ...]) -> Layout:
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
    return cdiv(size, ALIGNMENT) * ALIGNMENT


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


def _is_channels_last(source: Tensor) -> bool:
    return source.dim() == 4 and source.is_contiguous(memory_format=torch.channels_last)


def is_dense(source: Tensor) -> bool:
    """Whether a parameter lies without gaps in one of the two orders that the kernels know."""
    return source.is_contiguous() or _is_channels_last(source)
