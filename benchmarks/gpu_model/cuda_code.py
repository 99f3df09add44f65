"""The attention kernels of csrc/, as nvcc compiles them for one architecture."""

from collections.abc import Callable
from dataclasses import dataclass

from conddetr.kernels import aot_cuda
from gpu_model import machine_code
from gpu_model.figures import Kernel
from gpu_model.hot_path import Hints

TILE = 64
TILE_BYTES = TILE * 32 * 2
GRID = (25, 34)
"""Height and width of the grid of keys by which shared memory is told where it depends on that."""


@dataclass(frozen=True)
class Launch:
    """What the machine code of a kernel does not tell: see `csrc/attn/cuda.cu`."""

    scores: int
    """Of a block in one trip of the main loop."""
    warps: int
    shared: Callable[[int, int], int]
    """Height and width of the grid → bytes."""
    rare_inside: tuple[str, ...] = ()
    """As in `Hints`."""


def table_bytes(height: int, width: int, has_sums: bool) -> int:
    """Of the parts of scores by rows and columns: 64 queries and 4 more, float32."""
    return (height * (2 if has_sums else 1) + -(-width // 8) * 8) * (TILE + 4) * 4


LAUNCHES = {
    "forward_kernel": Launch(TILE**2, 4, lambda h, w: 5 * TILE_BYTES + table_bytes(h, w, False)),
    "hopper_forward_kernel": Launch(2 * TILE**2, 8, lambda h, w: 10 * TILE_BYTES + (h + w) * 64),
    # A sum over a column is stored where the column ends.
    "backward_query_kernel": Launch(
        TILE**2, 4, lambda h, w: 6 * TILE_BYTES + table_bytes(h, w, True), rare_inside=("STS",)
    ),
    "backward_key_kernel": Launch(TILE**2, 4, lambda h, w: 9 * TILE_BYTES + 2 * TILE * 16),
    "backward_table_kernel": Launch(TILE**2, 4, lambda h, w: 2 * TILE_BYTES),
    # A thread makes a word of 64 weights, eight in a trip.
    "keep_kernel": Launch(256 * 8, 8, lambda h, w: 0),
}
"""Kernel → its launch, for 16-bit numbers and separable keys."""


def kernels(architecture: int, dropout: bool, grid: tuple[int, int] = GRID) -> dict[str, Kernel]:
    """The kernels in `LAUNCHES`, for bfloat16 and separable keys; compiled for one architecture.

    Raises:
        KeyError: csrc/attn has a kernel that `LAUNCHES` does not know.
    """
    target = aot_cuda.HOPPER if architecture == 90 else str(architecture)
    [source] = [path for path in aot_cuda.sources() if path.parent.name == "attn"]
    cubin, _ = aot_cuda.build(source, target)
    found = {}
    for mangled, usage in machine_code.resources(cubin).items():
        _, name, *form = aot_cuda.readable(mangled).split()
        is_wanted = form in (["bf16", "separable"], ["bf16"], [])
        if is_wanted and (architecture == 90 or not name.startswith("hopper")):
            found[name] = _kernel(name, mangled, cubin, usage, architecture, dropout, grid)
    return found


def _kernel(
    name: str,
    mangled: str,
    cubin: bytes,
    usage: dict[str, int],
    architecture: int,
    dropout: bool,
    grid: tuple[int, int],
) -> Kernel:
    launch = LAUNCHES[name]
    has_exponentials = name not in ("backward_table_kernel", "keep_kernel")
    scores_of_warp = launch.scores / launch.warps
    return Kernel(
        name=name,
        form=f"CUDA, {launch.warps} warps" + (", dropout" if dropout and has_exponentials else ""),
        architecture=architecture,
        function=machine_code.read(cubin, mangled)[mangled],
        registers=usage["REG"],
        stack=usage["STACK"],
        shared=launch.shared(*grid),
        warps=launch.warps,
        scores=launch.scores,
        hints=Hints(dropout, scores_of_warp / 32 if has_exponentials else 0.0, rare_inside=launch.rare_inside),
    )
