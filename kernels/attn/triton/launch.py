"""Launch settings of the attention kernels, by architecture, kind of products and width of heads."""

import functools
from dataclasses import dataclass, replace

from conddetr.kernels import registry


@dataclass(frozen=True)
class Tiles:
    """Launch settings of one kernel."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None
    """Of a thread, at most: so that as many blocks fit as the setting was chosen for. None: as the compiler likes."""
    ahead: bool = False
    """Of the forward kernel: whether it makes scores a tile ahead."""


@dataclass(frozen=True)
class Launch:
    """Launch settings of the three kernels."""

    forward: Tiles
    backward_query: Tiles
    backward_key: Tiles


# Chosen without a device: of what spills nothing, what the model of the machine predicts to be fastest
# (benchmarks/predict.py). How products are formed, then the widest of d, ds and dv.
_DATACENTER = {
    ("half", 32): Launch(Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 3)),
    ("half", 64): Launch(Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 3), Tiles(32, 64, 4, 1)),
    ("half", 128): Launch(Tiles(64, 32, 4, 1), Tiles(128, 32, 8, 1), Tiles(32, 32, 4, 2)),
    ("tf32", 32): Launch(Tiles(64, 64, 4, 3), Tiles(64, 32, 4, 3), Tiles(32, 64, 4, 3)),
    ("tf32", 64): Launch(Tiles(64, 32, 4, 1), Tiles(64, 16, 4, 1), Tiles(16, 64, 4, 1)),
    ("tf32", 128): Launch(Tiles(64, 16, 4, 1), Tiles(16, 32, 8, 1), Tiles(16, 32, 4, 1)),
}
"""GPUs of data centres from Hopper on, whose products are those of 64 rows at a time."""
_OTHER = {
    ("half", 32): Launch(Tiles(64, 32, 4, 3), Tiles(64, 16, 4, 3), Tiles(64, 64, 4, 2)),
    ("half", 64): Launch(Tiles(64, 32, 4, 3), Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 2)),
    ("half", 128): Launch(Tiles(64, 64, 8, 2), Tiles(32, 16, 4, 1), Tiles(32, 32, 4, 1)),
    ("tf32", 32): Launch(Tiles(64, 32, 4, 1), Tiles(64, 16, 4, 3), Tiles(32, 64, 4, 1)),
    ("tf32", 64): Launch(Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(16, 32, 4, 1)),
    ("tf32", 128): Launch(Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1), Tiles(16, 32, 4, 1)),
}
_AHEAD = Tiles(64, 64, 4, 3, ahead=True)
"""Forward on Hopper, with separable keys, 16-bit numbers and heads of 32: as fast as one block can be."""
_AHEAD_CROWDED = Tiles(64, 32, 4, 3, registers=96, ahead=True)
"""The same where many blocks wait: five at a time, slower each."""
_AHEAD_DROPOUT = Tiles(64, 64, 4, 3, registers=128, ahead=True)
"""With dropout: four at a time."""
_WITHOUT_TENSOR_CORES = {
    32: Launch(Tiles(64, 32, 8, 1), Tiles(64, 32, 8, 1), Tiles(32, 32, 4, 1)),
    64: Launch(Tiles(64, 32, 8, 1), Tiles(32, 32, 4, 1), Tiles(32, 64, 8, 1)),
    128: Launch(Tiles(32, 16, 8, 1), Tiles(32, 16, 8, 1), Tiles(32, 16, 8, 1)),
}


@functools.cache
def launch_settings(
    architecture: int,
    products: str,
    width: int,
    separable: bool = True,
    dropout: bool = True,
    crowded: bool = True,
) -> Launch:
    """Launch settings by table; an architecture that is not in it takes the cautious ones.

    Args:
        architecture: compute capability, e.g. 90.
        products: `half` (bfloat16, float16), `tf32`, or `ieee` (float32 without tensor cores).
        width: the widest of d, ds and dv, up to 128.
        separable: whether spatial keys are.
        dropout: whether weights are dropped.
        crowded: whether there are more than three blocks of 64 queries for each multiprocessor.
    """
    padded = max(32, registry.next_power_of_2(width))
    if products == "ieee":
        return _WITHOUT_TENSOR_CORES[padded]
    launch = (_DATACENTER if architecture in (90, 100) else _OTHER)[products, padded]
    if (architecture, products, padded, separable) == (90, "half", 32, True):
        return replace(launch, forward=_AHEAD_DROPOUT if dropout else _AHEAD_CROWDED if crowded else _AHEAD)
    return launch
