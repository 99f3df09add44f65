"""The attention kernels that Triton compiles, with the settings that ship or with others."""

from dataclasses import replace

from conddetr.kernels import aot
from conddetr.kernels.attn import triton as attn
from gpu_model import machine_code
from gpu_model.figures import Kernel
from gpu_model.hot_path import Hints


def jobs(architecture: int, width: int = 32, separable: bool = True, dtype: str = "bf16") -> list[aot.Job]:
    """The attention kernels of the ahead-of-time check, of one width and form."""
    products = "half" if dtype == "bf16" else "tf32"
    found = [job for job in aot.jobs(architecture) if hasattr(attn, job.kernel) and job.dtype == dtype]

    def fits(job: aot.Job) -> bool:
        options = job.options_dict()
        if "PD" not in options:
            return True
        return options["PD"] == width and options["SEPARABLE"] == separable and job.variant.startswith(products)

    return [job for job in found if fits(job)]


def job(
    kernel: str,
    architecture: int,
    *,
    tiles: attn.Tiles | None = None,
    dropout: bool | None = None,
    width: int = 32,
    separable: bool = True,
    dtype: str = "bf16",
    options: dict[str, object] | None = None,
) -> aot.Job:
    """One kernel with other settings than those that ship.

    Args:
        kernel: its name in `kernels/attn/triton.py`.
        architecture: for example 90.
        tiles: queries, keys, warps, stages; None: as they ship.
        dropout: None: as in the ahead-of-time check.
        width: of heads: 32, 64 or 128.
        separable: spatial keys as rows and columns, with `valid_hw`; else dense ones with a mask.
        dtype: `bf16` or `fp32` (TF32).
        options: any other compile-time argument.

    Raises:
        ValueError: there is no such kernel; lists those that there are.
    """
    found = {job.kernel: job for job in jobs(architecture, width, separable, dtype)}
    if kernel not in found:
        raise ValueError(f"kernel {kernel!r}: expected one of {', '.join(found)}.")
    changed = found[kernel].options_dict()
    if tiles is not None:
        changed |= {"BLOCK_Q": tiles.queries, "BLOCK_N": tiles.keys}
        changed |= {"num_warps": tiles.warps, "num_stages": tiles.stages}
    if dropout is not None:
        changed["HAS_DROPOUT"] = dropout
    return replace(found[kernel], options=tuple((changed | (options or {})).items()))


def compiled(job: aot.Job, architecture: int) -> Kernel:
    """Compile one job; see `Kernel`."""
    built = aot.build(job, architecture)
    cubin, options = built.asm["cubin"], job.options_dict()
    [(name, usage)] = machine_code.resources(cubin).items()
    scores = scores_of(options)
    warps = built.metadata.num_warps
    return Kernel(
        name=job.kernel,
        form=form_of(options, built.metadata.num_warps, built.metadata.num_stages),
        architecture=architecture,
        function=machine_code.read(cubin)[name],
        registers=usage["REG"],
        stack=usage["STACK"],
        shared=built.metadata.shared,
        warps=warps,
        scores=scores,
        hints=Hints(has_dropout=bool(options.get("HAS_DROPOUT")), exponentials=scores / warps / 32),
    )


def scores_of(options: dict[str, object]) -> int:
    """Of a block in one trip: its tile of queries and keys, or of what else the kernel makes."""
    if "BLOCK_Q" in options:
        return options["BLOCK_Q"] * options["BLOCK_N"]
    return options["BLOCK"] * options.get("BLOCK_C", 1)


def form_of(options: dict[str, object], warps: int, stages: int) -> str:
    """`64 × 64, 4 warps, 2 stages, dropout`."""
    first, second = ("BLOCK_Q", "BLOCK_N") if "BLOCK_Q" in options else ("BLOCK", "BLOCK_C")
    tile = f"{options[first]} × {options[second]}" if second in options else f"{options[first]}"
    words = [tile, f"{warps} warps", f"{stages} stages"]
    words += [word for name, word in (("SEPARABLE", "separable"), ("HAS_DROPOUT", "dropout")) if options.get(name)]
    if options.get("SEPARABLE") is False:
        words.append("dense")
    return ", ".join(words)
