"""Compile every Triton kernel ahead of time for every architecture, without a GPU, and check the machine code.

    python benchmarks/run.py aot [--architectures 80 90] [--one-form] [--out table.json]

The compiler and cuobjdump come from the triton package. Results are cached in build/.
"""

import json
import re
import subprocess
import tempfile
from base64 import b64decode, b64encode
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from conddetr.kernels import registry
from conddetr.kernels.add_norm import triton as add_norm
from conddetr.kernels.add_norm.op import MAX_CHANNELS
from conddetr.kernels.attn import triton as attn
from conddetr.kernels.attn.triton.tiles import Operands, Rows
from conddetr.kernels.bits import triton as bits
from conddetr.kernels.boxes import triton as boxes
from conddetr.kernels.common import triton as common
from conddetr.kernels.conv import triton as conv
from conddetr.kernels.cost import triton as cost
from conddetr.kernels.errors import triton as errors
from conddetr.kernels.focal import triton as focal
from conddetr.kernels.match import triton as match
from conddetr.kernels.pool import triton as pool
from conddetr.kernels.position import triton as position
from conddetr.kernels.prediction import triton as prediction
from conddetr.kernels.query import triton as query
from conddetr.kernels.relu_dropout import triton as dropout
from conddetr.kernels.sine import triton as sine
from conddetr.kernels.weights import triton as weights
from harness.command import command
from tools.aot_cuda import find_cuobjdump
from tools.cached import cached

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that one block may use (CUDA programming guide, compute capabilities)."""

TENSOR_CORE = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
"""Tensor core products in PTX: of Ampere, Ada and consumer Blackwell; of Hopper; of Blackwell."""

PRODUCTS = (
    "forward_kernel",
    "backward_query_kernel",
    "backward_key_kernel",
    "spatial_query_kernel",
    "spatial_query_backward_kernel",
)
"""Kernels with tensor core products."""

MODULES = (
    add_norm,
    attn,
    boxes,
    conv,
    cost,
    dropout,
    bits,
    errors,
    focal,
    match,
    pool,
    position,
    prediction,
    sine,
    query,
    weights,
)
"""Modules with the kernels."""


@dataclass(frozen=True)
class Job:
    """One kernel with its compile-time arguments."""

    kernel: str
    variant: str
    dtype: str
    options: tuple[tuple[str, object], ...]

    def options_dict(self) -> dict[str, object]:
        """The compile-time arguments and launch settings."""
        return dict(self.options)


@dataclass(frozen=True)
class Compiled:
    """Figures of one compiled job."""

    kernel: str
    variant: str
    dtype: str
    architecture: int
    registers: int
    stack_bytes: int
    """Local memory of spilled registers and indexed arrays."""
    shared_kib: float
    tensor_core_instructions: int
    """In PTX; the assembler translates each to one instruction."""


def jobs(architecture: int) -> Iterator[Job]:
    """Every kernel with the settings for an architecture: all variants at the model's widths, one at wider ones.

    float16 compiles to the same instructions as bfloat16 and is left out.
    """
    for products, dtype in (("half", "bf16"), ("tf32", "fp32"), ("ieee", "fp32")):
        for width in (32, 64, 128):
            for is_separable in (True, False) if width == 32 else (True,):
                yield from _attention_jobs(architecture, products, dtype, width, is_separable)
    yield Job("dropout_bits_kernel", "", "bf16", tuple(bits.SETTINGS.items()))
    for dtype in ("bf16", "fp32"):
        yield Job("backward_grid_kernel", "", dtype, tuple(attn.GRID_TILE.items()))
    for kernel in ("embed_kernel", "embed_backward_kernel"):
        for dtype in ("bf16", "fp32"):
            for variant, transform in (("embedding", False), ("λ ⊙ p_s", True)):
                options = {**sine.launch(256), "HAS_TRANSFORM": transform}
                yield Job(kernel, variant, dtype, tuple(options.items()))
    yield from spatial_query_jobs()
    for variant, has_valid in (("padding", True), ("no padding", False)):
        options = {**position.launch(256, 67), "HAS_VALID": has_valid}
        yield Job("position_kernel", variant, "bf16", tuple(options.items()))
    yield from convolution_jobs()
    yield from residual_jobs()
    yield from weight_jobs()
    yield from loss_jobs()


def spatial_query_jobs() -> Iterator[Job]:
    """The projected spatial query, for every number of images with separate tiles."""
    variants = [("half", "bf16", images) for images in (8, 1, 2, 4, 32)] + [("tf32", "fp32", 8), ("ieee", "fp32", 8)]
    gradients = dict.fromkeys(("OF_TRANSFORM", "OF_EMBEDDING", "OF_WEIGHT"), True)
    for products, dtype, images in variants:
        sizes = {"CHANNELS": 256, "OUTPUTS": 256, "PRECISION": "tf32" if products == "tf32" else "ieee"}
        for kernel, backward, more in (
            ("spatial_query_kernel", False, {}),
            ("spatial_query_backward_kernel", True, gradients),
        ):
            launch = query.launch(images, torch.float32 if dtype == "fp32" else torch.bfloat16, backward)
            options = {**sizes, **more, **launch}
            yield Job(kernel, f"{products}, 256 channels, {images} images", dtype, tuple(options.items()))


def residual_jobs() -> Iterator[Job]:
    """The kernels around the products of a transformer layer, with dropout, at the model's widths and the widest."""
    for dtype, channels in (("bf16", 256), ("fp32", MAX_CHANNELS)):
        outputs = dict.fromkeys(("HAS_BIAS", "HAS_POSITION", "HAS_DROPOUT", "HAS_TRUNK", "HAS_OUT", "SAVES"), True)
        options = {**add_norm.launch(channels, add_norm.FORWARD_ELEMENTS), **outputs}
        yield Job("add_norm_kernel", f"{channels} channels", dtype, tuple(options.items()))
        switches = {"GRADIENTS": 4, "HAS_DROPOUT": True, "HAS_BRANCH": True, "HAS_RESIDUAL": True, "VECTORS": 3}
        options = {**add_norm.launch(channels, add_norm.BACKWARD_ELEMENTS), **switches}
        yield Job("add_norm_backward_kernel", f"{channels} channels", dtype, tuple(options.items()))
    for dtype in ("bf16", "fp32"):
        for kernel, switches in (
            ("relu_dropout_kernel", ("HAS_BIAS", "HAS_DROPOUT")),
            ("relu_dropout_backward_kernel", ("HAS_BIAS",)),
        ):
            options = {**dropout.launch(2048), **dict.fromkeys(switches, True)}
            yield Job(kernel, "2048 channels", dtype, tuple(options.items()))


def weight_jobs() -> Iterator[Job]:
    """The kernels that prepare the weights of a step, and their backward."""
    yield Job("prepare_kernel", "", "bf16", (("BLOCK", weights.BLOCK),))
    yield Job("prepare_backward_kernel", "", "bf16", tuple(weights.BACKWARD_SIZES.items()))


def convolution_jobs() -> Iterator[Job]:
    """The kernels around a convolution of 256 channels, and pooling."""
    sizes = {"UNIT": conv.UNIT, "BLOCK": conv.BLOCK}
    for variant, residual in (("residual", True), ("", False)):
        options = {"HAS_SHIFT": True, "HAS_ADDEND": residual, "CHANNELS": 256, **sizes}
        yield Job("epilogue_kernel", variant, "bf16", tuple(options.items()))
    for variant, twice in (("used twice", True), ("", False)):
        yield Job("relu_backward_kernel", variant, "bf16", tuple({"HAS_OTHER": twice, **sizes}.items()))
    yield Job("max_pool_kernel", "64 channels", "bf16", (("CHANNELS", 64), ("BLOCK", pool.BLOCK)))


def loss_jobs() -> Iterator[Job]:
    """The kernels of the training loss, for 91 classes and 300 queries."""
    for kernel in ("focal_kernel", "focal_backward_kernel"):
        yield Job(kernel, "91 classes", "bf16", (*focal.launch(91).items(), ("HAS_LABELS", True)))
    yield Job("count_errors_kernel", "91 classes", "bf16", tuple(focal.launch(91).items()))
    yield Job("sum_errors_kernel", "", "fp32", (("BLOCK", errors.BLOCK),))
    for variant, softmax in (("focal", False), ("softmax", True)):
        tiles = {"SOFTMAX": softmax, "BLOCK_N": cost.BLOCK_N, "BLOCK_Q": cost.BLOCK_Q}
        yield Job("cost_kernel", variant, "fp32", tuple(tiles.items()))
    for kernel in ("box_loss_kernel", "box_loss_backward_kernel"):
        yield Job(kernel, "", "fp32", (("BLOCK", boxes.BLOCK),))
    for kernel in ("predict_kernel", "predict_backward_kernel"):
        yield Job(kernel, "", "fp32", (("ROWS", prediction.ROWS), ("BLOCK", prediction.BLOCK)))
    yield Job("match_kernel", "300 queries", "fp32", tuple(match.launch(300).items()))


def jobs_in_one_form(architecture: int) -> Iterator[Job]:
    """The first of `jobs` of every kernel: the model's width and variant, in bfloat16 if the kernel supports it."""
    seen = set()
    for job in jobs(architecture):
        if job.kernel not in seen:
            seen.add(job.kernel)
            yield job


def _attention_jobs(architecture: int, products: str, dtype: str, width: int, is_separable: bool) -> Iterator[Job]:
    launch = attn.launch_settings(architecture, products, width, is_separable, dropout=is_separable)
    tiles = {
        "forward_kernel": launch.forward,
        "backward_query_kernel": launch.backward_query,
        "backward_key_kernel": launch.backward_key,
    }
    keys = "separable, valid_cells" if is_separable else "dense, mask"
    for kernel, tile in tiles.items():
        dropout = ", dropout" * is_separable
        options = _attention_options(kernel, tile, products, width, is_separable, is_separable)
        yield Job(kernel, f"{products}, {width}, {keys}{dropout}", dtype, options)
    for crowded in (False, True):
        without = attn.launch_settings(architecture, products, width, is_separable, False, crowded).forward
        if without != launch.forward:
            options = _attention_options("forward_kernel", without, products, width, is_separable, False)
            yield Job("forward_kernel", f"{products}, {width}, {keys}{', crowded' * crowded}", dtype, options)


def _attention_options(
    kernel: str, tile: attn.Tiles, products: str, width: int, is_separable: bool, has_dropout: bool
) -> tuple[tuple[str, object], ...]:
    return (
        *dict.fromkeys(("D", "DS", "DV", "PD", "PDS", "PDV"), width).items(),
        ("SEPARABLE", is_separable),
        ("HAS_VALID", is_separable),
        ("HAS_PADDING", not is_separable),
        ("HAS_DROPOUT", has_dropout),
        ("OFFSET", tl.int32),
        ("PRECISION", "tf32" if products == "tf32" else "ieee"),
        *attention_settings(kernel, tile).items(),
        ("enable_fp_fusion", True),
    )


def attention_settings(kernel: str, tile: attn.Tiles) -> dict[str, object]:
    """Launch settings as compile-time arguments."""
    settings = {"BLOCK_Q": tile.queries, "BLOCK_N": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}
    settings |= {"AHEAD": tile.ahead} if kernel == "forward_kernel" else {}
    return {**settings, "maxnreg": tile.registers}


def compile_job(job: Job, architecture: int) -> Compiled:
    """Compile one job for one architecture and read its machine code."""
    return Compiled(**cached("aot", _depends_on(job, architecture), lambda: asdict(_compile_now(job, architecture))))


def _depends_on(job: Job, architecture: int) -> list[Path | str]:
    folders = [Path(module.__file__).parent for module in (*MODULES, common)]
    sources = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    return [*sources, Path(registry.__file__), Path(__file__), triton.__version__, repr(job), str(architecture)]


def _compile_now(job: Job, architecture: int) -> Compiled:
    built = build(job, architecture)
    usage = _resource_usage(built.cubin)
    return Compiled(
        kernel=job.kernel,
        variant=job.variant,
        dtype=job.dtype,
        architecture=architecture,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack_bytes=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared_kib=built.shared / 1024,
        tensor_core_instructions=built.tensor_core_instructions,
    )


@dataclass(frozen=True)
class Built:
    """The machine code of one job, and the figures that its launch needs."""

    cubin: bytes
    shared: int
    """Bytes."""
    warps: int
    stages: int
    tensor_core_instructions: int
    """In PTX."""


def build(job: Job, architecture: int) -> Built:
    """Compile one job for one architecture."""

    def build_now() -> dict[str, object]:
        compiled = _triton_compile(job, architecture)
        products = len(TENSOR_CORE.findall(compiled.asm["ptx"]))
        metadata = compiled.metadata
        stored = Built(compiled.asm["cubin"], metadata.shared, metadata.num_warps, metadata.num_stages, products)
        return {**asdict(stored), "cubin": b64encode(stored.cubin).decode()}

    stored = cached("cubin", _depends_on(job, architecture), build_now)
    return Built(**{**stored, "cubin": b64decode(stored["cubin"])})


def _triton_compile(job: Job, architecture: int) -> CompiledKernel:
    function = next(getattr(module, job.kernel) for module in MODULES if hasattr(module, job.kernel))
    options = job.options_dict()
    compiler = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
    launch = {name: options.pop(name) for name in compiler if name in options}
    source = ASTSource(function, *_arguments(function.arg_names, job.dtype, options))
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch)


def _arguments(names: list[str], dtype: str, options: dict[str, object]) -> tuple[dict, dict, dict]:
    """Types of the arguments, values of compile-time arguments, and attributes of the others.

    Tensors are 16-byte aligned and the strides of the model's tensors are multiples of 16.
    """
    aligned = [["tt.divisibility", 16]]
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        if name == "tensors":
            signature[name] = _operands(dtype, options["SEPARABLE"])
            for field, rows in enumerate(signature[name]):
                if rows == "constexpr":
                    constants[(index, field)] = None
                else:
                    attributes.update({(index, field, part): aligned for part in range(len(rows))})
            continue
        kind = signature[name] = _kind(name, dtype, options)
        if kind == "constexpr":
            constants[name] = options.get(name)
        elif kind.startswith("*") or name.startswith("stride"):
            attributes[(index,)] = aligned
    return signature, constants, attributes


def _operands(dtype: str, is_separable: bool) -> Operands:
    """Types of attention's tensors."""
    rows = Rows(f"*{dtype}", "i32", "i32", "i32")
    return Operands(rows, rows, rows, rows, rows if is_separable else "constexpr", rows)


_KINDS = {
    "*fp32": ("lse", "statistics", "partial", "partials", "grad_loss", "log_total", "cost", "residual", "weight",
              "bias", "branch_bias", "trunk", "normalized", "rstd", "grad_0", "grad_residual", "errors"),
    "*i32": ("valid_cells", "counts", "valid_cells", "keep", "words"),
    "*i64": ("seed_pointer", "target", "labels", "assignment", "addresses", "parts", "blocks"),
    "*i1": ("padding", "is_padding"),
    "fp32": ("scale", "log2_scale", "dropout_p", "eps", "log2_temperature", "alpha", "gamma", "present", "absent",
             "kept_factor", "class_weight", "bbox_weight", "giou_weight", "scale_y", "scale_x"),
    "i32": ("queries", "keys", "heads", "height", "width", "count", "rows", "predictions", "capacity", "batch",
            "classes", "images", "channels", "layers", "position_rows", "replicas", "units",
            "out_height", "out_width", "numbers", "threshold", "padded"),
}  # fmt: skip
_NEEDS = {"valid_cells": "HAS_VALID", "padding": "HAS_PADDING", "keep": "HAS_DROPOUT", "seed_pointer": "HAS_DROPOUT",
          "columns": "SEPARABLE", "transform": "HAS_TRANSFORM", "grad_transform": "HAS_TRANSFORM",
          "log_total": "SOFTMAX", "shift": "HAS_SHIFT", "addend": "HAS_ADDEND", "other_grad": "HAS_OTHER"}  # fmt: skip


def _kind(name: str, dtype: str, options: dict[str, object]) -> str:
    """The type of an argument, by its name."""
    if name in options or (name in _NEEDS and not options.get(_NEEDS[name], True)):
        return "constexpr"
    if name.startswith("stride"):
        return "i32"
    return next((kind for kind, names in _KINDS.items() if name in names), f"*{dtype}")


def _resource_usage(cubin: bytes) -> str:
    """Registers and stack of a compiled kernel, as cuobjdump prints them; disassembly takes 200 times as long."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [find_cuobjdump(), "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_all(architectures: tuple[int, ...] = ARCHITECTURES, one_form: bool = False) -> list[Compiled]:
    """Every job for every architecture, on all cores; with `one_form` one variant per kernel, on one core."""
    chosen = jobs_in_one_form if one_form else jobs
    work = [(job, architecture) for architecture in architectures for job in chosen(architecture)]
    if one_form:
        # For few jobs, starting processes would take longer.
        return [compile_job(*job) for job in work]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_job, *zip(*work, strict=True)))


def problems(compiled: Compiled) -> list[str]:
    """Defects of a compiled kernel; empty if there are none."""
    wrong = []
    if compiled.stack_bytes:
        wrong.append(f"{compiled.stack_bytes} bytes of stack")
    if compiled.shared_kib > SHARED_LIMIT[compiled.architecture]:
        wrong.append(
            f"{compiled.shared_kib:.0f} KiB of shared memory, the limit is {SHARED_LIMIT[compiled.architecture]}"
        )
    is_product = compiled.kernel in PRODUCTS and "ieee" not in compiled.variant
    if is_product and not compiled.tensor_core_instructions:
        wrong.append("no tensor core instruction")
    return wrong


def main(words: list[str]) -> int:
    """Compile, print the table, write it if requested; the exit status is 1 if a kernel has a defect."""
    from rich.console import Console
    from rich.table import Table

    parser = command("aot", __doc__)
    parser.add_argument(
        "--architectures", nargs="+", type=int, choices=ARCHITECTURES, default=ARCHITECTURES, help="default: all"
    )
    parser.add_argument("--one-form", action="store_true", help="each kernel once, as the model uses it in bfloat16")
    parser.add_argument("--out", type=Path, help="write the table there, as JSON")
    options = parser.parse_args(words)
    compiled = compile_all(tuple(options.architectures), options.one_form)
    table = Table(title=f"Triton {triton.__version__}")
    for name in ("kernel", "variant", "dtype", "sm", "registers", "stack", "shared KiB", "tensor core", ""):
        table.add_column(name)
    for kernel in compiled:
        cells = [f"{value:.1f}" if isinstance(value, float) else str(value) for value in asdict(kernel).values()]
        table.add_row(*cells, "; ".join(problems(kernel)))
    Console(width=150).print(table)
    if options.out:
        content = {"triton": triton.__version__, "kernels": [asdict(kernel) for kernel in compiled]}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    return int(any(problems(kernel) for kernel in compiled))
