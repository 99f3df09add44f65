"""The few best launch settings of the attention kernels by the model of the machine, to be measured on a GPU.

Hopper is ranked by predicted clocks. For other architectures the model has no clocks: their settings are ranked by
Ampere's machine code on Hopper's units, which compares settings but predicts no times. No setting spills.
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
"""Settings of each list."""
NEAR = 1.5
"""Largest ratio to the fastest clocks at which another shape is preferred to other stages of the same shape."""
AMPERE = 80
"""Represents the other architectures."""
OTHERS = (80, 86, 89, 100, 120)
"""Architectures on which these settings may not spill or exceed shared memory."""
SMALLEST = 86
"""The other architecture with the least shared memory and the fewest warps."""
FEW = 3
"""Most blocks of a multiprocessor in lists for few blocks."""
WIDTH = 32
SHAPES = ((64, 64, 4), (64, 32, 4), (64, 16, 4), (32, 64, 4), (32, 32, 4), (32, 16, 4), (128, 64, 8), (128, 32, 8))
"""Queries, keys and warps. More warps leave a thread too few scores; fewer do not fill a warpgroup's product."""
FORMS = ((True, True), (True, False), (False, False), (False, True))
"""Whether keys are separable and dropout is on: first as in training; dense ones as in the ahead-of-time check."""


@dataclass(frozen=True)
class List:
    """One list of candidates."""

    architecture: int
    """90, or `AMPERE` for the other architectures."""
    kernel: str
    """A field of `Launch`."""
    form: Form

    @property
    def key(self) -> str:
        """Its name in the file."""
        return candidates_key(self.architecture, self.kernel, self.form)

    @property
    def has_ahead(self) -> bool:
        """Whether to try scores a tile ahead."""
        return "separable" in self.key


def lists() -> dict[str, List]:
    """All lists by key; if forms share a list, it is ranked for the first of `FORMS`."""
    by_key: dict[str, List] = {}
    for architecture, kernel, products in product((figures.TIMED, AMPERE), KERNELS, ("half", "tf32")):
        for (separable, dropout), crowded in product(FORMS, (True, False)):
            entry = List(architecture, kernel, Form(products, WIDTH, separable, dropout, crowded))
            by_key.setdefault(entry.key, entry)
    return by_key


def settings(one: List) -> Iterator[attn.Tiles]:
    """Settings to compile beside the shipped ones."""
    for (queries, keys, warps), stages in product(SHAPES, (2, 3) if one.form.products == "half" else (1, 3)):
        yield attn.Tiles(queries, keys, warps, stages)
    if one.has_ahead:
        for keys, registers in product((32, 64), (None, 96, 128)):
            yield attn.Tiles(64, keys, 4, 3, registers, ahead=True)


def shipped(one: List) -> attn.Tiles:
    """The shipped settings, for other architectures as on Ampere; sm_100's different ones are tried there anyway."""
    form = one.form
    launch = attn.launch_settings(
        one.architecture, form.products, form.width, form.separable, form.dropout, form.crowded
    )
    return getattr(launch, one.kernel)


def clocks(one: List, tiles: attn.Tiles) -> float | None:
    """Predicted clocks of a quarter of a multiprocessor for 1024 scores; None: it spills or does not compile."""
    architecture = one.architecture
    try:
        if not fits(one, tiles, (architecture,)):
            return None
        kernel = triton_code.compiled(_job(one, tiles, architecture), architecture)
        kernel_figures = figures.of(kernel, only_full=True)
        if kernel_figures.full and "few blocks" not in one.key:
            return kernel_figures.full
        smallest = architecture if architecture == figures.TIMED else SMALLEST
        blocks = figures.blocks_of(smallest, kernel_figures.warps, kernel_figures.registers, kernel_figures.shared)
        if "few blocks" in one.key:
            blocks = min(blocks, FEW)
        return partition.clocks(kernel.path.main, kernel_figures.warps, blocks) * kernel.share if blocks else None
    except (HotPathError, CompilationError, TritonError, RuntimeError):
        return None


def fits(one: List, tiles: attn.Tiles, architectures: tuple[int, ...]) -> bool:
    """Whether settings neither spill nor exceed shared memory on any of the architectures."""
    compiled = (aot.compile_job(_job(one, tiles, architecture), architecture) for architecture in architectures)
    return all(not job.stack_bytes and job.shared_kib <= aot.SHARED_LIMIT[job.architecture] for job in compiled)


def _job(one: List, tiles: attn.Tiles, architecture: int) -> aot.Job:
    dtype = "bf16" if one.form.products == "half" else "fp32"
    job = triton_code.job(
        f"{one.kernel}_kernel", architecture, WIDTH, one.form.separable, dtype, dropout=one.form.dropout
    )
    return triton_code.changed(job, tiles)


def rank(one: List) -> tuple[str, list[tuple[attn.Tiles, float]]]:
    """Key of a list, and its settings with their predicted clocks, the fastest first.

    Chosen are the shipped settings, then the fastest of each shape that is not much slower than the fastest of all,
    then others that differ only in stages or registers.
    """
    current = shipped(one)
    predicted = {tiles: clocks(one, tiles) for tiles in dict.fromkeys((current, *settings(one)))}
    ordered = sorted((tiles for tiles in predicted if predicted[tiles] is not None), key=predicted.get)
    near = [tiles for tiles in ordered if predicted[tiles] <= NEAR * predicted[ordered[0]]]
    firsts = {_shape(tiles): tiles for tiles in reversed(near)}
    likely = [tiles for tiles in near if tiles == firsts[_shape(tiles)] and _shape(tiles) != _shape(current)]
    chosen = [current]
    for tiles in dict.fromkeys((*likely, *ordered)):
        is_new = tiles != current and len(chosen) < COUNT
        if is_new and (one.architecture == figures.TIMED or fits(one, tiles, OTHERS)):
            chosen.append(tiles)
    return one.key, [(tiles, predicted[tiles]) for tiles in sorted(chosen, key=predicted.get)]


def _shape(tiles: attn.Tiles) -> tuple[int, int, int, bool]:
    return tiles.queries, tiles.keys, tiles.warps, tiles.ahead


def rank_all() -> dict[str, list[tuple[attn.Tiles, float]]]:
    """Rank every list on all cores; compiled code and simulations are cached in build/."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return dict(pool.map(rank, lists().values()))


def write(ranked: dict[str, list[tuple[attn.Tiles, float]]], path: Path = CANDIDATES) -> None:
    """Write the package's file, with one line per setting."""
    entries = []
    for key, candidates in ranked.items():
        written = [write_tiles(tiles) for tiles, _ in candidates]
        for stored in written:
            read_tiles(key.split(", ")[1], stored)
        lines = ",\n".join(f"   {json.dumps(stored)}" for stored in written)
        entries.append(f"  {json.dumps(key)}: [\n{lines}\n  ]")
    text = f'{{\n "note": {json.dumps(NOTE)},\n "settings": {{\n' + ",\n".join(entries) + "\n }\n}\n"
    path.write_text(text, encoding="utf-8")
