"""All attention kernels of one architecture, in the variants that the model uses and a few others."""

from collections.abc import Iterator

from gpu_model import cuda_code, figures, triton_code
from gpu_model.figures import TIMED, Kernel
from gpu_model.stored import Row

WIDTHS = (32, 64, 128)
ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def rows(architecture: int, main: bool = False) -> Iterator[Row]:
    """Rows of Triton's and CUDA's kernels.

    Args:
        architecture: one of `ARCHITECTURES`.
        main: only the kernels of training, in bfloat16 with dropout, and clocks only with all blocks.
    """
    for implementation, variant, kernel in _kernels(architecture, main or architecture != TIMED):
        yield Row(implementation, variant, figures.of(kernel, only_full=main))


def _kernels(architecture: int, main: bool) -> Iterator[tuple[str, str, Kernel]]:
    """Implementation, variant and kernel."""
    yield from _triton_kernels(architecture, main)
    for dropout in (True,) if main else (True, False):
        kernels = cuda_code.kernels(architecture, dropout)
        for name, kernel in kernels.items():
            has_variants = cuda_code.LAUNCHES[name].has_exponentials
            if main and name.replace(" ", " hopper_") in kernels:
                # The Hopper kernel replaces it on this architecture.
                continue
            if dropout or has_variants:
                yield "native", _variant(32, True, dropout) if has_variants else "", kernel


def _triton_kernels(architecture: int, main: bool) -> Iterator[tuple[str, str, Kernel]]:
    variants = [(32, True, True)]
    if not main:
        variants += [(32, True, False), (32, False, False), *((width, True, True) for width in WIDTHS[1:])]
    for width, separable, dropout in variants:
        for job in triton_code.jobs(architecture, width, separable, dropout=dropout):
            has_variants = "SEPARABLE" in job.options_dict()
            if not has_variants and (width, separable, dropout) != variants[0]:
                continue
            variant = _variant(width, separable, dropout) if has_variants else ""
            yield "triton", variant, triton_code.compiled(job, architecture)


def _variant(width: int, separable: bool, dropout: bool) -> str:
    return f"{width} channels, {'separable' if separable else 'dense'}{', dropout' if dropout else ''}"
