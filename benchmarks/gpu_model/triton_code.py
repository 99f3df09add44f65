"""The attention kernels that Triton compiles, with the shipped settings or with others."""

from dataclasses import replace
from math import prod

from conddetr.kernels.attn import triton as attn
from conddetr.kernels.bits import triton as bits
from gpu_model.figures import Kernel
from gpu_model.hot_path import Hints
from tools import aot

MODULES = (attn, bits)
"""Modules with the kernels."""
WORD = 32
"""Dropout decisions in one word of its kernel."""


def jobs(
    architecture: int, width: int = 32, separable: bool = True, dtype: str = "bf16", dropout: bool = True
) -> list[aot.Job]:
    """The attention kernels of the ahead-of-time check, of one width and variant, with the shipped settings."""
    products = "half" if dtype == "bf16" else "tf32"
    candidates = [job for job in aot.jobs(architecture) if job.dtype == dtype]
    candidates = [job for job in candidates if any(hasattr(module, job.kernel) for module in MODULES)]

    def fits(job: aot.Job) -> bool:
        options = job.options_dict()
        if "PD" not in options:
            return True
        return options["PD"] == width and options["SEPARABLE"] == separable and job.variant.startswith(products)

    # If settings depend on dropout and on the number of blocks, a kernel occurs several times: last with many blocks.
    candidates = sorted(filter(fits, candidates), key=lambda job: job.options_dict().get("HAS_DROPOUT") == dropout)
    chosen = {job.kernel: job for job in candidates}
    return [changed(job, dropout=dropout) if "HAS_DROPOUT" in job.options_dict() else job for job in chosen.values()]


def job(
    kernel: str,
    architecture: int,
    width: int = 32,
    separable: bool = True,
    dtype: str = "bf16",
    dropout: bool = True,
) -> aot.Job:
    """One of `jobs`.

    Raises:
        ValueError: there is no such kernel; lists the kernels.
    """
    by_kernel = {job.kernel: job for job in jobs(architecture, width, separable, dtype, dropout)}
    if kernel not in by_kernel:
        raise ValueError(f"kernel {kernel!r}: expected one of {', '.join(by_kernel)}.")
    return by_kernel[kernel]


def changed(
    job: aot.Job,
    tiles: attn.Tiles | None = None,
    dropout: bool | None = None,
    options: dict[str, object] | None = None,
) -> aot.Job:
    """The same kernel with other settings.

    Args:
        job: with the shipped settings.
        tiles: launch settings.
        dropout: whether weights are dropped.
        options: any other compile-time argument.
    """
    arguments = {**job.options_dict(), **(options or {})}
    if tiles is not None:
        arguments |= aot.attention_settings(job.kernel, tiles)
    if dropout is not None:
        arguments["HAS_DROPOUT"] = dropout
    return replace(job, options=tuple(arguments.items()))


def compiled(job: aot.Job, architecture: int) -> Kernel:
    """Compile one job."""
    return kernel_of(job.kernel, aot.build(job, architecture), job.options_dict(), architecture)


def kernel_of(name: str, built: aot.Built, options: dict[str, object], architecture: int) -> Kernel:
    """A kernel that Triton compiled with these compile-time arguments."""
    tile = tile_of(options)
    return Kernel(
        name=name,
        form=form_of(options, built.warps, built.stages),
        architecture=architecture,
        cubin=built.cubin,
        symbol=name,
        shared=built.shared,
        warps=built.warps,
        tile=tile,
        hints=Hints(exponentials=prod(tile) / built.warps / 32 if "BLOCK_Q" in options else 0.0),
    )


def tile_of(options: dict[str, object]) -> tuple[int, int]:
    """Tile of a block in one trip: queries and keys, or the two sizes of another kernel's output."""
    if "BLOCK_Q" in options:
        return options["BLOCK_Q"], options["BLOCK_N"]
    return options["BLOCK"], options.get("BLOCK_C", WORD)


def form_of(options: dict[str, object], warps: int, stages: int) -> str:
    """For example `64 × 64, 4 warps, 2 stages`."""
    return f"{' × '.join(map(str, tile_of(options)))}, {warps} warps, {stages} stages"
