"""Launch settings of the attention kernels, by architecture, kind of products and width of heads."""

import functools
from dataclasses import dataclass

from conddetr.kernels import registry


@dataclass(frozen=True)
class Tiles:
    """Launch settings of one kernel."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Launch:
    """Launch settings of the three kernels."""

    forward: Tiles
    backward_query: Tiles
    backward_key: Tiles


# Chosen so that nothing spills, by what the compiler reports; not yet tuned on a device. How products are formed, then
# the widest of d, ds and dv.
_LAUNCH = {
    ("half", 64): Launch(Tiles(64, 64, 8, 2), Tiles(32, 32, 4, 1), Tiles(64, 32, 8, 1)),
    ("half", 128): Launch(Tiles(64, 64, 8, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)),
    ("tf32", 64): Launch(Tiles(32, 32, 4, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 4, 1)),
    ("tf32", 128): Launch(Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(16, 32, 4, 1)),
    ("ieee", 32): Launch(Tiles(32, 32, 8, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 8, 1)),
    ("ieee", 64): Launch(Tiles(64, 32, 8, 1), Tiles(32, 64, 8, 1), Tiles(32, 32, 4, 1)),
    ("ieee", 128): Launch(Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1), Tiles(32, 16, 8, 1)),
}
# The model's own widths on tensor cores: GPUs of data centres have more registers to give to a block.
_DATACENTER = Launch(Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 3))
_OTHER = Launch(Tiles(64, 64, 4, 2), Tiles(64, 16, 4, 1), Tiles(64, 32, 8, 2))


@functools.cache
def launch_settings(architecture: int, products: str, width: int) -> Launch:
    """Launch settings by table; an architecture that is not in it takes the cautious ones.

    Args:
        architecture: compute capability, e.g. 90.
        products: `half` (bfloat16, float16), `tf32`, or `ieee` (float32 without tensor cores).
        width: the widest of d, ds and dv, up to 128.
    """
    padded = max(32, registry.next_power_of_2(width))
    if padded == 32 and products != "ieee":
        return _DATACENTER if architecture in (90, 100) else _OTHER
    return _LAUNCH[products, padded]
