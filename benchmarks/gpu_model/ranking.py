"""The few launch settings of the attention kernels that the model of the machine ranks first: what a GPU then measures.

For Hopper by predicted clocks. Of other architectures no clocks are known: their settings are ranked by the machine
code for Ampere on Hopper's units, which says how settings compare and not how long they take. None spills on any.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from triton.compiler import CompilationError
from triton.runtime.errors import TritonError

from conddetr.kernels.attn import triton as attn
from conddetr.kernels.attn.triton.launch import CANDIDATES, KERNELS, Form, candidates_key, read_tiles, write_tiles
from gpu_model import figures, partition, triton_code
from gpu_model.hot_path import HotPathError
from tools import aot

NOTE = (
    "Settings that benchmarks/run.py predict --candidates ranks first by predicted clocks, the fastest first; nothing "
    "is measured. `conddetr check --tune` measures them."
)
COUNT = 4
"""Of each list."""
NEAR = 1.5
"""Times the clocks of the fastest, up to which another shape is worth more than other stages of the same one."""
AMPERE = 80
"""Stands for the others."""
OTHERS = (80, 86, 89, 100, 120)
"""On which none of the others' settings spills, or asks for more shared memory than there is."""
SMALLEST = 86
"""Of the others that with the least shared memory and the fewest warps."""
FEW = 3
"""Blocks of a multiprocessor at most, where there are few."""
WIDTH = 32
SHAPES = ((64, 64, 4), (64, 32, 4), (64, 16, 4), (32, 64, 4), (32, 32, 4), (32, 16, 4), (128, 64, 8), (128, 32, 8))
"""Queries, keys and warps. With more a thread has too few scores, with less a warpgroup's product is not full."""
FORMS = ((True, True), (True, False), (False, False), (False, True))
"""Whether keys are separable and weights dropped: first as in training, dense ones as the ahead-of-time check has them.
"""


@dataclass(frozen=True)
class List:
    """One to make."""

    architecture: int
    """90, or `AMPERE` for the others."""
    kernel: str
    """Of `Launch`."""
    form: Form

    @property
    def key(self) -> str:
        """Its name in the file."""
        return candidates_key(self.architecture, self.kernel, self.form)

    @property
    def has_ahead(self) -> bool:
        """Whether scores a tile ahead are worth a try."""
        return "separable" in self.key


def lists() -> dict[str, List]:
    """All, by name; where forms share one, it is ranked for the first of `FORMS`."""
    found: dict[str, List] = {}
    for architecture, kernel, products in product((figures.TIMED, AMPERE), KERNELS, ("half", "tf32")):
        for (separable, dropout), crowded in product(FORMS, (True, False)):
            one = List(architecture, kernel, Form(products, WIDTH, separable, dropout, crowded))
            found.setdefault(one.key, one)
    return found


def settings(one: List) -> Iterator[attn.Tiles]:
    """What is worth compiling beside what ships."""
    for (queries, keys, warps), stages in product(SHAPES, (2, 3) if one.form.products == "half" else (1, 3)):
        yield attn.Tiles(queries, keys, warps, stages)
    if one.has_ahead:
        for keys, registers in product((32, 64), (None, 96, 128)):
            yield attn.Tiles(64, keys, 4, 3, registers, ahead=True)


def shipped(one: List) -> attn.Tiles:
    """What ships, for the others as on Ampere: what differs on sm_100 is tried there first without being listed."""
    form = one.form
    launch = attn.launch_settings(
        one.architecture, form.products, form.width, form.separable, form.dropout, form.crowded
    )
    return getattr(launch, one.kernel)


def clocks(one: List, tiles: attn.Tiles) -> float | None:
    """Predicted, of a quarter of a multiprocessor for 1024 scores; None: it spills, or cannot be compiled."""
    architecture = one.architecture
    try:
        if not fits(one, tiles, (architecture,)):
            return None
        kernel = triton_code.compiled(_job(one, tiles, architecture), architecture)
        found = figures.of(kernel, only_full=True)
        if found.full and "few blocks" not in one.key:
            return found.full
        smallest = architecture if architecture == figures.TIMED else SMALLEST
        blocks = figures.blocks_of(smallest, found.warps, found.registers, found.shared)
        if "few blocks" in one.key:
            blocks = min(blocks, FEW)
        return partition.clocks(kernel.path.main, found.warps, blocks) * kernel.share if blocks else None
    except (HotPathError, CompilationError, TritonError, RuntimeError):
        return None


def fits(one: List, tiles: attn.Tiles, architectures: tuple[int, ...]) -> bool:
    """Whether settings spill nothing, and ask for no more shared memory than there is, on any of the architectures."""
    compiled = (aot.compile_job(_job(one, tiles, architecture), architecture) for architecture in architectures)
    return all(not found.stack_bytes and found.shared_kib <= aot.SHARED_LIMIT[found.architecture] for found in compiled)


def _job(one: List, tiles: attn.Tiles, architecture: int) -> aot.Job:
    dtype = "bf16" if one.form.products == "half" else "fp32"
    job = triton_code.job(
        f"{one.kernel}_kernel", architecture, WIDTH, one.form.separable, dtype, dropout=one.form.dropout
    )
    return triton_code.changed(job, tiles)


def rank(one: List) -> tuple[str, list[tuple[attn.Tiles, float]]]:
    """The name of a list, and its settings with their predicted clocks, the fastest first: what ships, then the fastest
    of each shape that is not much slower than the fastest of all, then others that differ in stages or registers alone.
    """
    today = shipped(one)
    found = {tiles: clocks(one, tiles) for tiles in dict.fromkeys((today, *settings(one)))}
    ordered = sorted((tiles for tiles in found if found[tiles] is not None), key=found.get)
    near = [tiles for tiles in ordered if found[tiles] <= NEAR * found[ordered[0]]]
    firsts = {_shape(tiles): tiles for tiles in reversed(near)}
    likely = [tiles for tiles in near if tiles == firsts[_shape(tiles)] and _shape(tiles) != _shape(today)]
    chosen = [today]
    for tiles in dict.fromkeys((*likely, *ordered)):
        is_new = tiles != today and len(chosen) < COUNT
        if is_new and (one.architecture == figures.TIMED or fits(one, tiles, OTHERS)):
            chosen.append(tiles)
    return one.key, [(tiles, found[tiles]) for tiles in sorted(chosen, key=found.get)]


def _shape(tiles: attn.Tiles) -> tuple[int, int, int, bool]:
    return tiles.queries, tiles.keys, tiles.warps, tiles.ahead


def rank_all() -> dict[str, list[tuple[attn.Tiles, float]]]:
    """Every list, on all cores; what was compiled and simulated once is kept in build/."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return dict(pool.map(rank, lists().values()))


def write(ranked: dict[str, list[tuple[attn.Tiles, float]]], path: Path = CANDIDATES) -> None:
    """The file that the package has: a line for each setting."""
    entries = []
    for key, found in ranked.items():
        written = [write_tiles(tiles) for tiles, _ in found]
        for stored in written:
            read_tiles(key.split(", ")[1], stored)
        lines = ",\n".join(f"   {json.dumps(stored)}" for stored in written)
        entries.append(f"  {json.dumps(key)}: [\n{lines}\n  ]")
    text = f'{{\n "note": {json.dumps(NOTE)},\n "settings": {{\n' + ",\n".join(entries) + "\n }\n}\n"
    path.write_text(text, encoding="utf-8")
