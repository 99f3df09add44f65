"""Launch settings of the attention kernels, by architecture, kind of products and width of heads.

`conddetr check --tune` measures the candidates of `candidates.json` on a GPU; its record overrides the tables here.
"""

import contextlib
import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from conddetr.kernels import records
from conddetr.kernels.common.launch import next_power_of_2

CANDIDATES = Path(__file__).with_name("candidates.json")
"""Candidate settings for heads of 32, ranked and written by `benchmarks/run.py predict --candidates`. They are
predicted; none of them is measured.
"""
KERNELS = ("forward", "backward_query", "backward_key")
"""The fields of `Launch`."""
ALLOWED = {
    "queries": (16, 32, 64, 128),
    "keys": (16, 32, 64),
    "warps": (1, 2, 4, 8),
    "stages": (1, 2, 3, 4),
    "registers": (None, *range(32, 256, 8)),
    "ahead": (False, True),
}
"""Allowed values of the fields of `Tiles` in a file. The words of dropout's bits end at a whole tile of 64 keys."""


@dataclass(frozen=True)
class Tiles:
    """Launch settings of one kernel."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None
    """Limit per thread, so that as many blocks fit as the setting assumes. None: the compiler decides."""
    ahead: bool = False
    """For the forward kernel: whether it computes scores a tile ahead."""

    def described(self) -> str:
        """Readable text, e.g. `64×32, 4 warps, 3 stages, ahead`."""
        parts = [f"{self.queries}×{self.keys}", f"{self.warps} warps", f"{self.stages} stage{'s' * (self.stages > 1)}"]
        parts += [] if self.registers is None else [f"{self.registers} registers"]
        return ", ".join([*parts, *["ahead"] * self.ahead])


@dataclass(frozen=True)
class Launch:
    """Launch settings of the three kernels."""

    forward: Tiles
    backward_query: Tiles
    backward_key: Tiles


@dataclass(frozen=True)
class Form:
    """Properties that settings depend on besides the architecture; fields as in `launch_settings`."""

    products: str
    width: int
    separable: bool
    dropout: bool
    crowded: bool

    @property
    def padded(self) -> int:
        """The width that settings are chosen for."""
        return max(32, next_power_of_2(self.width))

    def key(self, kernel: str) -> str:
        """The name of a kernel's settings in a record: `attention forward, half, 32 channels, separable, dropout`."""
        return f"attention {kernel}, {self.described()}"

    def described(self) -> str:
        """Readable text, different for each form."""
        parts = [self.products, f"{self.padded} channels", "separable" if self.separable else "dense"]
        return ", ".join([*parts, *["dropout"] * self.dropout, *["crowded"] * self.crowded])


# Chosen without a device: the settings without spills that the model of the machine predicts to be fastest
# (benchmarks/run.py predict). Keys: how products are formed, and the widest of d, ds and dv.
_DATACENTER = {
    ("half", 32): Launch(Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 3)),
    ("half", 64): Launch(Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 3), Tiles(32, 64, 4, 1)),
    ("half", 128): Launch(Tiles(64, 32, 4, 1), Tiles(128, 32, 8, 1), Tiles(32, 32, 4, 2)),
    ("tf32", 32): Launch(Tiles(64, 64, 4, 3), Tiles(64, 32, 4, 3), Tiles(32, 64, 4, 3)),
    ("tf32", 64): Launch(Tiles(64, 32, 4, 1), Tiles(64, 16, 4, 1), Tiles(16, 64, 4, 1)),
    ("tf32", 128): Launch(Tiles(64, 16, 4, 1), Tiles(16, 32, 8, 1), Tiles(16, 32, 4, 1)),
}
"""Data-centre GPUs from Hopper on, whose products take 64 rows at a time."""
_OTHER = {
    ("half", 32): Launch(Tiles(64, 32, 4, 3), Tiles(64, 16, 4, 3), Tiles(64, 64, 4, 2)),
    ("half", 64): Launch(Tiles(64, 32, 4, 3), Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 2)),
    ("half", 128): Launch(Tiles(64, 64, 8, 2), Tiles(32, 16, 4, 1), Tiles(32, 32, 4, 1)),
    ("tf32", 32): Launch(Tiles(64, 32, 4, 1), Tiles(64, 16, 4, 3), Tiles(32, 64, 4, 1)),
    ("tf32", 64): Launch(Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(16, 32, 4, 1)),
    ("tf32", 128): Launch(Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1), Tiles(16, 32, 4, 1)),
}
_AHEAD = Tiles(64, 64, 4, 3, ahead=True)
"""Forward on Hopper, with separable keys, 16-bit numbers and heads of 32: the fastest setting for a single block."""
_AHEAD_CROWDED = Tiles(64, 32, 4, 3, registers=96, ahead=True)
"""The same if many blocks wait: five run at a time, each slower."""
_AHEAD_DROPOUT = Tiles(64, 64, 4, 3, registers=128, ahead=True)
"""The same with dropout: four run at a time."""
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
    """Launch settings from the tables; unlisted architectures get the cautious ones.

    Args:
        architecture: compute capability, e.g. 90.
        products: `half` (bfloat16, float16), `tf32`, or `ieee` (float32 without tensor cores).
        width: the widest of d, ds and dv, up to 128.
        separable: whether spatial keys are separable.
        dropout: whether weights are dropped.
        crowded: whether there are more than three blocks of 64 queries for each multiprocessor.
    """
    padded = Form(products, width, separable, dropout, crowded).padded
    if products == "ieee":
        return _WITHOUT_TENSOR_CORES[padded]
    launch = (_DATACENTER if architecture in (90, 100) else _OTHER)[products, padded]
    if (architecture, products, padded, separable) == (90, "half", 32, True):
        return replace(launch, forward=_AHEAD_DROPOUT if dropout else _AHEAD_CROWDED if crowded else _AHEAD)
    return launch


@records.remembered
def tuned_on(
    device: torch.device, products: str, width: int, separable: bool, dropout: bool, crowded: bool
) -> dict[str, Tiles]:
    """Kernel → tuned settings from a device's record, which override `launch_settings`; arguments as there."""
    record = records.load(device)
    form = Form(products, width, separable, dropout, crowded)
    return {} if record is None else read_tuned(record.tuned, form)


def read_tuned(tuned: Mapping[str, Any], form: Form) -> dict[str, Tiles]:
    """Kernel → its settings in a record; invalid ones are left out."""
    settings = {}
    for kernel in KERNELS:
        with contextlib.suppress(ValueError):
            settings[kernel] = read_tiles(kernel, tuned.get(form.key(kernel)))
    return settings


def write_tiles(tiles: Tiles) -> dict[str, Any]:
    """Settings for JSON: the values that differ from the defaults."""
    defaults = {field.name: field.default for field in fields(Tiles)}
    return {name: value for name, value in asdict(tiles).items() if value != defaults[name]}


def read_tiles(kernel: str, stored: Any) -> Tiles:
    """The settings of one of `KERNELS` from JSON.

    Raises:
        ValueError: they are invalid; names the kernel and the field.
    """
    names = [field.name for field in fields(Tiles)]
    if not isinstance(stored, dict) or not set(names[:4]) <= stored.keys() <= set(names):
        raise ValueError(f"{kernel}: expected {', '.join(names)} (the first four are required), got {stored!r}.")
    tiles = Tiles(**stored)
    for name, value in asdict(tiles).items():
        # Types are compared too, because True == 1.
        if [type(value), value] not in [[type(allowed), allowed] for allowed in ALLOWED[name]]:
            raise ValueError(f"{kernel}: {name}: expected one of {', '.join(map(str, ALLOWED[name]))}, got {value!r}.")
    if tiles.ahead and kernel != "forward":
        raise ValueError(f"{kernel}: ahead: only the forward kernel computes scores ahead.")
    return tiles


def candidates(architecture: int, kernel: str, form: Form) -> list[Tiles]:
    """The settings that the model of the machine ranks first, for heads of 32. They include the shipped ones, except on
    sm_100, which shares its list with other architectures and its shipped settings with Hopper.

    Args:
        architecture: as in `launch_settings`.
        kernel: one of `KERNELS`.
        form: with products `half` or `tf32`.
    """
    table = json.loads(CANDIDATES.read_text(encoding="utf-8"))["settings"]
    return [read_tiles(kernel, stored) for stored in table[candidates_key(architecture, kernel, form)]]


def candidates_key(architecture: int, kernel: str, form: Form) -> str:
    """The name of a list in `candidates.json`. It includes the form only if the shipped settings depend on it."""
    name = f"{'Hopper' if architecture == 90 else 'other'}, {kernel}, {form.products}"
    if (architecture, kernel, form.products, form.separable) != (90, "forward", "half", True):
        return name
    return f"{name}, separable, {'dropout' if form.dropout else 'crowded' if form.crowded else 'few blocks'}"
