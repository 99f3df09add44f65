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
"""Rows and columns of the grid by which shared memory is told where it depends on that."""
BYTES = 64
"""Of a key or query: 32 channels of 16 bits."""


@dataclass(frozen=True)
class Launch:
    """What the machine code of a kernel does not tell: see `csrc/attn/cuda/`. Whole problems tell their bytes."""

    queries: int
    keys: int
    """Of a block's tile, or what else it makes: their product."""
    warps: int
    unrolled: int = 1
    """Tiles in one trip of the main loop."""
    tiles: int = 0
    """Of 64 queries or keys, in shared memory."""
    lines: bool = False
    """Whether rows and columns of the grid are there too."""
    more: int = 0
    """Other bytes there."""
    hints: Hints = field(default_factory=Hints)
    """Exponentials, and what dropout adds, come from the rest."""
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
    # Four times eight keys of 32 channels for each warp.
    "attn backward_lines_kernel": Launch(4 * 32, 32, 4, hints=Hints(seeks=("LDG",)), has_exponentials=False),
    # A thread makes a word of 32 weights.
    "bits fill_kernel": Launch(256, 32, 8, has_exponentials=False),
}
"""Operation and kernel → its launch, for 16-bit numbers and separable keys."""


def kernels(architecture: int, dropout: bool) -> dict[str, Kernel]:
    """The kernels in `LAUNCHES`, for bfloat16 and separable keys; compiled for one architecture.

    Raises:
        UnknownKernelError: there is a kernel that `LAUNCHES` does not know.
    """
    target = aot_cuda.HOPPER if architecture == 90 else str(architecture)
    found = {}
    for source in aot_cuda.sources():
        if source.parent.name not in OPERATIONS:
            continue
        cubin, _ = aot_cuda.build(source, target)
        forms = ("bf16 separable", "bf16", "", *["bf16 separable dropout"] * dropout)
        # A kernel that has a form of its own with dropout comes twice, that one last.
        for symbol in sorted(machine_code.resources(cubin), key=lambda symbol: "dropout" in aot_cuda.readable(symbol)):
            name, form = name_of(symbol)
            if (architecture == 90 or "hopper" not in name) and form in forms:
                found[name] = kernel(symbol, cubin, architecture, dropout)
    return found


def name_of(symbol: str) -> tuple[str, str]:
    """`attn hopper_forward_kernel` and `bf16 separable dropout` of a name in the machine code."""
    operation, name, *form = aot_cuda.readable(symbol).split()
    return f"{operation} {name}", " ".join(form)


def kernel(symbol: str, cubin: bytes, architecture: int, dropout: bool) -> Kernel:
    """One of them.

    Args:
        symbol: its name in the machine code.
        cubin: the machine code.
        architecture: for example 90.
        dropout: whether it reads which weights are kept.

    Raises:
        UnknownKernelError: `LAUNCHES` does not know it.
    """
    name, _ = name_of(symbol)
    if name not in LAUNCHES:
        raise UnknownKernelError(f"{name}: LAUNCHES in gpu_model/cuda_code.py does not know its tile and warps.")
    launch = LAUNCHES[name]
    tile, hints = (launch.queries, launch.keys), launch.hints
    if launch.has_exponentials:
        # A load of bytes is one of a mask, which separable keys do not have; other loads are those of dropout's words,
        # whose bits PRMT makes bytes of.
        numbers = prod(tile) * launch.unrolled / launch.warps / 32
        hints = replace(hints, exponentials=numbers, avoids=(*hints.avoids, "LDG.E.U8"))
        hints = replace(hints, seeks=(*hints.seeks, "LDG", "PRMT")) if dropout else hints
    form = f"{launch.queries} × {launch.keys}, {launch.warps} warps"
    return Kernel(name, form, architecture, cubin, symbol, launch.shared, launch.warps, tile, hints, launch.unrolled)
