"""The attention kernels of csrc/, as nvcc compiles them for one architecture."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from conddetr.kernels import aot_cuda
from gpu_model import machine_code
from gpu_model.figures import Kernel
from gpu_model.hot_path import Hints

OPERATIONS = ("attn", "dropout_bits")
"""Folders of csrc/."""
TILE = 64
TILE_BYTES = TILE * 32 * 2
GRID = (25, 34)
"""Height and width of the grid of keys by which shared memory is told where it depends on that."""


@dataclass(frozen=True)
class Launch:
    """What the machine code of a kernel does not tell: see `csrc/attn/cuda.cu`."""

    queries: int
    keys: int
    """Of the tile of a block in one trip of the main loop, or what else it makes: their product."""
    warps: int
    shared: Callable[[int, int], int]
    """Height and width of the grid → bytes."""
    avoids_inside: tuple[str, ...] = ()
    seeks: tuple[str, ...] = ("LDGSTS", "STS")
    """Both as in `Hints`."""
    has_exponentials: bool = True


def table_bytes(height: int, width: int, has_sums: bool) -> int:
    """Of the parts of scores by rows and columns: 64 queries and 4 more, float32."""
    return (height * (2 if has_sums else 1) + -(-width // 8) * 8) * (TILE + 4) * 4


LAUNCHES = {
    "attn forward_kernel": Launch(TILE, TILE, 4, lambda h, w: 5 * TILE_BYTES + table_bytes(h, w, False)),
    "attn hopper_forward_kernel": Launch(2 * TILE, TILE, 8, lambda h, w: 10 * TILE_BYTES + (h + w) * 64),
    # A sum over a column is stored where the column ends.
    "attn backward_query_kernel": Launch(
        TILE, TILE, 4, lambda h, w: 6 * TILE_BYTES + table_bytes(h, w, True), avoids_inside=("STS",)
    ),
    "attn backward_key_kernel": Launch(TILE, TILE, 4, lambda h, w: 9 * TILE_BYTES + 2 * TILE * 16),
    "attn backward_table_kernel": Launch(
        TILE, TILE, 4, lambda h, w: 2 * TILE_BYTES, seeks=("LDG",), has_exponentials=False
    ),
    # A thread makes a word of 64 weights, eight in a trip. Some lane of a warp nearly always needs a third call of
    # Philox, whose products are of 64 bits.
    "attn keep_kernel": Launch(256, 8, 8, lambda h, w: 0, seeks=("IMAD.WIDE",), has_exponentials=False),
}
"""Operation and kernel → its launch, for 16-bit numbers and separable keys."""


def kernels(architecture: int, dropout: bool, grid: tuple[int, int] = GRID) -> dict[str, Kernel]:
    """The kernels in `LAUNCHES`, for bfloat16 and separable keys; compiled for one architecture.

    Raises:
        KeyError: there is a kernel that `LAUNCHES` does not know.
    """
    target = aot_cuda.HOPPER if architecture == 90 else str(architecture)
    found = {}
    for source in aot_cuda.sources():
        if source.parent.name not in OPERATIONS:
            continue
        cubin, _ = aot_cuda.build(source, target)
        for symbol in machine_code.resources(cubin):
            name, form = name_of(symbol)
            is_here = architecture == 90 or "hopper" not in name
            if is_here and form in ("bf16 separable", "bf16", ""):
                found[name] = kernel(symbol, cubin, architecture, dropout, LAUNCHES[name].shared(*grid))
    return found


def name_of(symbol: str) -> tuple[str, str]:
    """`attn forward_kernel` and `bf16 separable` of a name in the machine code."""
    operation, name, *form = aot_cuda.readable(symbol).split()
    return f"{operation} {name}", " ".join(form)


def kernel(symbol: str, cubin: bytes, architecture: int, dropout: bool, shared: int) -> Kernel:
    """One of them.

    Args:
        symbol: its name in the machine code.
        cubin: the machine code.
        architecture: for example 90.
        dropout: whether it reads which weights are kept.
        shared: bytes of dynamic shared memory.
    """
    name, _ = name_of(symbol)
    launch = LAUNCHES[name]
    tile = launch.queries, launch.keys
    reads_words = dropout and launch.has_exponentials
    hints = Hints(
        exponentials=prod(tile) / launch.warps / 32 if launch.has_exponentials else 0.0,
        seeks=(*launch.seeks, "LDG") if reads_words else launch.seeks,
        # Of a mask that separable keys do not have.
        avoids=("LDG.E.U8",),
        avoids_inside=launch.avoids_inside,
    )
    form = f"{launch.queries} × {launch.keys}, {launch.warps} warps"
    return Kernel(name, form, architecture, cubin, symbol, shared, launch.warps, tile, hints)
