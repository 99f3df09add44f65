"""Compile every CUDA source of csrc/ for every architecture, without a GPU, and check the machine code.

    python benchmarks/run.py aot_cuda [--architectures 80 90a] [--out table.json]

Needs nvcc and a source checkout; cuobjdump comes from the triton package. Results are cached in build/.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from base64 import b64decode, b64encode
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch

from harness.command import command
from tools.cached import ROOT, cached

ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
# The same as in setup.py, which cannot be imported.
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", "-DUSE_CUDA")
FLAGS += ("-DTORCH_TARGET_VERSION=0x020b000000000000",)
REGISTER_LIMIT = 255
HOPPER = "90a"
"""Architecture of kernels with `hopper` in their names. For others these kernels are empty."""
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Compiled:
    """Figures of one compiled kernel."""

    kernel: str
    architecture: str
    registers: int
    stack_bytes: int
    spilled_bytes: int
    local_instructions: int
    tensor_core_instructions: int
    serialized: bool = False
    """Whether the compiler makes each asynchronous product wait for the previous one."""


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, else on the path; None if there is none."""
    home = os.environ.get("CUDA_HOME")
    return str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")


def find_cuobjdump() -> Path:
    """The disassembler of the triton package.

    Raises:
        ImportError: the package is not installed.
    """
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def sources() -> list[Path]:
    """All files csrc/*/cuda.cu."""
    return sorted((ROOT / "csrc").glob("*/cuda.cu"))


def compile_source(source: Path, architecture: str) -> list[Compiled]:
    """Every kernel of one source for one architecture.

    Raises:
        RuntimeError: the source does not compile; with the compiler's messages.
    """
    cubin, messages = build(source, architecture)

    def read_now() -> list[dict]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            return [asdict(kernel) for kernel in read(messages, Path(file.name), architecture)]

    depends_on = [Path(__file__), sha256(cubin).hexdigest(), messages, architecture]
    return [Compiled(**kernel) for kernel in cached("aot_cuda", depends_on, read_now)]


def build(source: Path, architecture: str) -> tuple[bytes, str]:
    """The machine code of one source for one architecture, and the compiler's messages.

    Raises:
        RuntimeError: the source does not compile; with the compiler's messages.
    """
    command = [find_nvcc(), *FLAGS, f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-cubin"]
    command += [f"-I{ROOT / 'csrc'}", f"-I{Path(torch.__file__).parent / 'include'}", str(source)]

    def build_now() -> dict[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernels.cubin"
            run = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(f"{source} does not compile for sm_{architecture}:\n{run.stderr}")
            return {"cubin": b64encode(cubin.read_bytes()).decode(), "messages": run.stdout + run.stderr}

    headers = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cu"))
    built = cached("cubin", [*headers, nvcc_version(), torch.__version__, *command], build_now)
    return b64decode(built["cubin"]), built["messages"]


@cache
def nvcc_version() -> str:
    """Output of `nvcc --version`."""
    return subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout


def read(messages: str, cubin: Path, architecture: str) -> list[Compiled]:
    """The compiler's figures and the machine code, kernel by kernel."""
    command = [find_cuobjdump(), "-sass", str(cubin)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", listing, re.DOTALL))
    serialized = " ".join(re.findall(r".*wgmma.mma_async instructions are serialized.*", messages))
    kernels = []
    for entry in ENTRY.finditer(messages):
        kernel = readable(entry["name"])
        is_hopper = "hopper" in kernel
        if is_hopper and architecture != HOPPER:
            continue
        products = r"\bHGMMA\b" if is_hopper else r"\bHMMA\b"
        kernels.append(
            Compiled(
                kernel=kernel,
                architecture=architecture,
                registers=int(entry["registers"]),
                stack_bytes=int(entry["stack"]),
                spilled_bytes=int(entry["stores"]) + int(entry["loads"]),
                local_instructions=len(re.findall(r"\b(?:LDL|STL)\b", code[entry["name"]])),
                tensor_core_instructions=len(re.findall(products, code[entry["name"]])),
                serialized=entry["name"] in serialized,
            )
        )
    return kernels


def readable(name: str) -> str:
    """Short form of a mangled kernel name: `attn hopper_forward_kernel bf16 separable dropout`."""
    mangled = r"conddetr\d+([a-z_]+)\d+([a-z_]+_kernel)(?:I(13__nv_bfloat16|6__half|f)((?:Lb[01]E)*)E)?"
    operation, kernel, number, switches = re.search(mangled, name).groups()
    words = [operation, kernel, {"13__nv_bfloat16": "bf16", "6__half": "fp16", "f": "fp32"}.get(number, "")]
    values = [int(value) for value in re.findall("[01]", switches or "")]
    words += [names[value] for names, value in zip((("dense", "separable"), ("", "dropout")), values, strict=False)]
    return " ".join(filter(None, words))


def problems(compiled: Compiled) -> list[str]:
    """Defects of a compiled kernel; empty if there are none."""
    wrong = []
    if compiled.stack_bytes or compiled.spilled_bytes or compiled.local_instructions:
        local = f"{compiled.stack_bytes} bytes of stack, {compiled.spilled_bytes} spilled"
        wrong.append(f"{local}, {compiled.local_instructions} local memory instructions")
    if compiled.registers > REGISTER_LIMIT:
        wrong.append(f"{compiled.registers} registers, the limit is {REGISTER_LIMIT}")
    is_product = compiled.kernel.startswith("attn") and "lines" not in compiled.kernel
    if is_product and "fp32" not in compiled.kernel and not compiled.tensor_core_instructions:
        wrong.append("no tensor core instruction")
    if compiled.serialized:
        wrong.append("asynchronous products are serialized")
    return wrong


def compile_all(architectures: tuple[str, ...] = ARCHITECTURES) -> list[Compiled]:
    """Every source for every architecture, on all cores."""
    work = [(source, architecture) for source in sources() for architecture in architectures]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [kernel for kernels in pool.map(compile_source, *zip(*work, strict=True)) for kernel in kernels]


def main(words: list[str]) -> int:
    """Compile, print the table, write it if requested; the exit status is 1 if a kernel has a defect."""
    from rich.console import Console
    from rich.table import Table

    parser = command("aot_cuda", __doc__)
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, metavar="SM", help="default: all")
    parser.add_argument("--out", type=Path, help="write the table there, as JSON")
    options = parser.parse_args(words)
    if find_nvcc() is None:
        parser.error("nvcc was not found: install the CUDA toolkit or set CUDA_HOME")
    compiled = compile_all(tuple(options.architectures))
    table = Table(title="csrc/*/cuda.cu")
    for name in ("kernel", "sm", "registers", "stack", "spilled", "local", "tensor core", "serialized", ""):
        table.add_column(name)
    for kernel in compiled:
        table.add_row(*map(str, asdict(kernel).values()), "; ".join(problems(kernel)))
    Console(width=150).print(table)
    if options.out:
        options.out.write_text(json.dumps([asdict(kernel) for kernel in compiled], indent=1) + "\n")
    return int(any(problems(kernel) for kernel in compiled))
