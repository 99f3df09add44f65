"""The attention kernels of csrc/, as nvcc compiles them for one architecture."""

from dataclasses import dataclass, field, replace
from math import prod

from gpu_model import machine_code
from gpu_model.figures import Kernel, UnknownKernelError
from gpu_model.hot_path import Hints
from tools import aot_cuda

OPERATIONS = ("attn", "bits")
"""Folders of csrc/."""
TILE = 64
LINES = 25 + 34
"""Rows and columns of the grid for which shared memory is given, if it depends on them."""
BYTES = 64
"""Bytes of a key or query: 32 channels of 16 bits."""


@dataclass(frozen=True)
class Launch:
    """Launch of a kernel, which its machine code does not contain: see `csrc/attn/cuda/`."""

    queries: int
    keys: int
    """Tile of a block; for other kernels, queries × keys is the size of a block's output."""
    warps: int
    unrolled: int = 1
    """Tiles in one trip of the main loop."""
    tiles: int = 0
    """Tiles of 64 queries or keys in shared memory."""
    lines: bool = False
    """Whether rows and columns of the grid are in shared memory too."""
    more: int = 0
    """Other bytes in shared memory."""
    hints: Hints = field(default_factory=Hints)
    """Without exponentials and dropout, which `kernel` adds."""
    has_exponentials: bool = True

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.tiles * TILE * BYTES + self.lines * LINES * BYTES + self.more


LAUNCHES = {
    "attn forward_kernel": Launch(TILE, TILE, 4, tiles=8, lines=True),
    "attn hopper_forward_kernel": Launch(TILE, TILE, 4, unrolled=2, tiles=8, lines=True),
    "attn backward_query_kernel": Launch(TILE, TILE, 4, tiles=9, lines=True),
    "attn hopper_backward_query_kernel": Launch(TILE, TILE, 4, unrolled=2, tiles=9, lines=True),
    "attn backward_key_kernel": Launch(TILE, TILE, 4, tiles=9, more=2 * TILE * 16),
    "attn hopper_backward_key_kernel": Launch(TILE, TILE, 4, unrolled=2, tiles=9, more=2 * TILE * 16),
    # Four times eight keys of 32 channels per warp.
    "attn backward_lines_kernel": Launch(4 * 32, 32, 4, hints=Hints(seeks=("LDG",)), has_exponentials=False),
    # Each thread makes a word of 32 weights.
    "bits fill_kernel": Launch(256, 32, 8, has_exponentials=False),
}
"""Operation and kernel → its launch, for 16-bit numbers and separable keys."""


def kernels(architecture: int, dropout: bool) -> dict[str, Kernel]:
    """The kernels in `LAUNCHES`, for bfloat16 and separable keys; compiled for one architecture.

    Raises:
        UnknownKernelError: a kernel is not in `LAUNCHES`.
    """
    target = aot_cuda.HOPPER if architecture == 90 else str(architecture)
    by_name = {}
    for source in aot_cuda.sources():
        if source.parent.name not in OPERATIONS:
            continue
        cubin, _ = aot_cuda.build(source, target)
        variants = ("bf16 separable", "bf16", "", *["bf16 separable dropout"] * dropout)
        # A kernel with a separate variant for dropout occurs twice, that variant last.
        for symbol in sorted(machine_code.resources(cubin), key=lambda symbol: "dropout" in aot_cuda.readable(symbol)):
            name, variant = name_of(symbol)
            if (architecture == 90 or "hopper" not in name) and variant in variants:
                by_name[name] = kernel(symbol, cubin, architecture, dropout)
    return by_name


def name_of(symbol: str) -> tuple[str, str]:
    """Kernel and variant of a symbol, for example `attn hopper_forward_kernel` and `bf16 separable dropout`."""
    operation, name, *variant = aot_cuda.readable(symbol).split()
    return f"{operation} {name}", " ".join(variant)


def kernel(symbol: str, cubin: bytes, architecture: int, dropout: bool) -> Kernel:
    """One kernel of `kernels`.

    Args:
        symbol: its name in the machine code.
        cubin: the machine code.
        architecture: for example 90.
        dropout: whether it reads the bits of dropout.

    Raises:
        UnknownKernelError: the kernel is not in `LAUNCHES`.
    """
    name, _ = name_of(symbol)
    if name not in LAUNCHES:
        raise UnknownKernelError(f"{name}: LAUNCHES in gpu_model/cuda_code.py lacks its tile and warps.")
    launch = LAUNCHES[name]
    tile, hints = (launch.queries, launch.keys), launch.hints
    if launch.has_exponentials:
        # Loads of bytes belong to a mask, which separable keys do not have. Other loads are dropout's words, whose bits
        # PRMT expands to bytes.
        numbers = prod(tile) * launch.unrolled / launch.warps / 32
        hints = replace(hints, exponentials=numbers, avoids=(*hints.avoids, "LDG.E.U8"))
        hints = replace(hints, seeks=(*hints.seeks, "LDG", "PRMT")) if dropout else hints
    form = f"{launch.queries} × {launch.keys}, {launch.warps} warps"
    return Kernel(name, form, architecture, cubin, symbol, launch.shared, launch.warps, tile, hints, launch.unrolled)
