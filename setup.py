"""Maps the two source trees onto one package and builds `conddetr._C`, the native kernels. Flags: docs/building.md.

`kernels/` is installed as `conddetr.kernels`: a top-level `kernels` would collide with the package of that name on
PyPI. All other metadata is in pyproject.toml.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
# Vector code needs no errno and no traps. Infinities, NaN and the order of sums stay as they are.
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
# Declares the stable ABI's function for the current stream.
NVCC_FLAGS += ["-DUSE_CUDA"]
# The stable ABI of this release: one binary for it and all later ones.
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
# `csrc/*/kernels.cpp` are compiled once for each level; one is chosen at run time.
LEVELS = {"plain": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma"]
    LEVELS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
    # GCC 12 warns about its own headers.
    LEVELS["avx512"] += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]


def is_wanted(variable: str, tool: str, path: str | None, remedy: str) -> bool:
    """Whether to build a part: by the environment variable if it is set, else by whether its tool was found."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{variable}: expected 0, 1 or nothing, got {value!r} (docs/building.md).")
    if value == "1" and not path:
        raise SystemExit(f"{variable}=1, but no {tool} was found: {remedy}.")
    if value == "" and not path:
        print(f"conddetr: no {tool} was found, building without one; to use one, {remedy}.", file=sys.stderr)
    return value != "0" and path is not None


def find_compiler() -> str | None:
    """The C++ compiler: CXX, or the first of the usual names that exists."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((name for name in names if shutil.which(name.split()[0])), None)


def find_cuda() -> str | None:
    """The folder of the CUDA toolkit: CUDA_HOME if it is set, else the folder of nvcc on the path, or the usual one."""
    named, nvcc = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    folders = [named] if named else [nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    # A script called nvcc may be outside the toolkit, with no headers beside it.
    parts = ("bin/nvcc", "include/cuda_runtime.h")
    return next((str(f) for f in folders if f and all((Path(f) / part).exists() for part in parts)), None)


def jobs() -> int:
    """Number of parallel compilers: MAX_JOBS, or one per core and per 2 GiB of free memory, whichever is less."""
    if os.environ.get("MAX_JOBS"):
        return int(os.environ["MAX_JOBS"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    meminfo = Path("/proc/meminfo")
    free = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return max(1, min(cores, int(free[1]) >> 21)) if free else cores


class BuildNative(build_ext):
    """Compiles with ninja: in parallel, with separate flags for some files, and only files that changed."""

    def build_extension(self, extension: Extension) -> None:
        """Build one shared library from all sources."""
        import ninja

        library = Path(self.get_ext_fullpath(extension.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        # Not setuptools' temporary folder, so that a second build uses the objects of the first.
        kind = "sanitized" if os.environ.get("CONDDETR_SANITIZE") else "native"
        folder = ROOT / "build" / f"{kind}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        write_plan(folder, [ROOT / source for source in extension.sources], library)
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), "-j", str(jobs())]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise SystemExit(
                "conddetr: the native kernels did not compile, see above. CONDDETR_CUDA=0 builds without the CUDA "
                "part, CONDDETR_NATIVE=0 without any native kernels (docs/building.md)."
            )


def write_plan(folder: Path, sources: list[Path], library: Path) -> None:
    """Write build.ninja (each source with its flags, then the link) and build_info.h (the data of `build_info()`)."""
    import pybind11
    import torch
    from ninja.ninja_syntax import Writer

    cuda = find_cuda() if any(source.suffix == ".cu" for source in sources) else None
    architectures = cuda_architectures() if cuda else []
    sanitize = os.environ.get("CONDDETR_SANITIZE")
    checks = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-g", "-O1"] if sanitize else []
    torch_folder = Path(torch.__file__).parent
    include = [f"-I{path}" for path in (ROOT / "csrc", folder)]
    # -isystem: our warnings do not apply to the headers of other projects. pybind11's come before PyTorch's copy of
    # them, which does not allow the stable ABI.
    others = (pybind11.get_include(), torch_folder / "include", sysconfig.get_path("include"))
    include += [f"-isystem {path}" for path in others]
    link = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    link += [f"-L{cuda}/lib64", "-ltorch_cuda", *cuda_runtime(cuda)] if cuda else []
    write_build_info(folder / "build_info.h", cuda, architectures, checks)
    with (folder / "build.ninja").open("w") as file:
        plan = Writer(file, width=120)
        plan.variable("flags", [*DEFINES, *include])
        compile_cxx = [find_compiler(), "-MMD -MF $out.d $flags", *CXX_FLAGS, *checks, "$level -c $in -o $out"]
        plan.rule("cxx", " ".join(compile_cxx), depfile="$out.d", deps="gcc", description="compiling $out")
        gencode = [flag for name in architectures for flag in code_for(name)]
        nvcc = [f"{cuda}/bin/nvcc", "-MMD -MF $out.d $flags", *NVCC_FLAGS, *gencode, "-c $in -o $out"]
        plan.rule("nvcc", " ".join(nvcc), depfile="$out.d", deps="gcc", description="compiling $out")
        plan.rule("link", " ".join([find_compiler(), "-shared", *checks, "$in -o $out", *link]))
        objects = []
        for source in sources:
            name = "-".join(source.relative_to(ROOT / "csrc").with_suffix("").parts)
            if source.suffix == ".cu":
                objects += plan.build(f"{name}.cu.o", "nvcc", str(source))
                continue
            for level, flags in LEVELS.items() if source.name == "kernels.cpp" else [("", [])]:
                chosen = [f"-DCONDDETR_LEVEL={level}", *flags] if level else []
                out = f"{name}-{level}.o" if level else f"{name}.o"
                objects += plan.build(out, "cxx", str(source), variables={"level": chosen})
        plan.build(str(library), "link", objects)


def cuda_architectures() -> list[str]:
    """GPU architectures to build for, as nvcc names them; +PTX adds all newer architectures."""
    value = os.environ.get("CONDDETR_CUDA_ARCHS") or "80+PTX;90a"
    names = value.split(";")
    wrong = [name for name in names if not re.fullmatch(r"\d{2,}[af]?(\+PTX)?", name)]
    if wrong:
        raise SystemExit(f"CONDDETR_CUDA_ARCHS: expected names like 80+PTX;90a, got {wrong[0]!r} (docs/building.md).")
    return names


def code_for(architecture: str) -> list[str]:
    """nvcc's flags for an architecture: machine code and, if the name ends in +PTX, PTX for newer GPUs."""
    name, _, ptx = architecture.partition("+")
    kinds = [f"sm_{name}", *[f"compute_{name}"] * bool(ptx)]
    return [f"-gencode=arch=compute_{name},code={kind}" for kind in kinds]


def cuda_runtime(cuda: str) -> list[str]:
    """The linker's flags for CUDA's runtime: the library that PyTorch has loaded, one for the whole process.

    A runtime of another major release, or one older than the toolkit, may lack functions that nvcc calls. The extension
    then links its own runtime statically. The path is for a PyTorch of another release that is installed later.
    """
    import torch

    built, loaded = ([int(part) for part in name.split(".")[:2]] for name in (release(cuda), torch.version.cuda or "0"))
    if built[0] == loaded[0] and built <= loaded:
        return ["-lcudart", f"-Wl,-rpath,{cuda}/lib64"]
    return ["-lcudart_static", "-ldl", "-lrt"]


def release(cuda: str) -> str:
    """The release of a CUDA toolkit, as its compiler prints it, for example 13.0."""
    text = subprocess.run([f"{cuda}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    return re.search(r"release (\S+),", text)[1]


def write_build_info(path: Path, cuda: str | None, architectures: list[str], checks: list[str]) -> None:
    """Write build_info.h only if it changed, so that no file is compiled again without need."""
    version = subprocess.run([*find_compiler().split(), "--version"], capture_output=True, text=True).stdout
    values = {
        "COMPILER": version.splitlines()[0] if version else "unknown",
        "CUDA": release(cuda) if cuda else "",
        "ARCHITECTURES": " ".join(architectures),
        "FLAGS": " ".join([*CXX_FLAGS, *checks]),
        "SOURCES": hash_of_sources(),
        "LEVELS": ";".join(LEVELS),
    }
    text = "".join(f'#define CONDDETR_{name} "{value}"\n' for name, value in values.items())
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def hash_of_sources() -> str:
    """Hash of all code in `csrc/`. It does not depend on the folder, whose name libraries contain."""
    digest = hashlib.sha256()
    for path in sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu", ".cuh", ".h")):
        content = path.read_bytes()
        # With its length, so that two different lists of files never give the same bytes.
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def native_extension() -> list[Extension]:
    """The extension; empty without a compiler or if it is switched off."""
    if not is_wanted("CONDDETR_NATIVE", "C++ compiler", find_compiler(), "install g++ (Debian: apt install g++)"):
        return []
    files = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.*"))
    sources = [str(path) for path in files if path.suffix == ".cpp"]
    if is_wanted("CONDDETR_CUDA", "CUDA toolkit", find_cuda(), "install CUDA 12.8 or newer, or set CUDA_HOME"):
        # First, because ninja starts them in this order and one of them takes as long as many others.
        sources = [str(path) for path in files if path.suffix == ".cu"] + sources
    headers = [str(path) for path in files if path.suffix in (".h", ".cu", ".cuh")]
    return [Extension("conddetr._C", sources, depends=headers)]


detector_packages = find_packages(include=["conddetr", "conddetr.*"])
kernel_packages = ["conddetr.kernels"] + [f"conddetr.kernels.{name}" for name in find_packages("kernels")]

setup(
    packages=detector_packages + kernel_packages,
    package_dir={"conddetr": "conddetr", "conddetr.kernels": "kernels"},
    package_data={
        "conddetr": ["py.typed"],
        "conddetr.kernels": ["measured/*.json", "attn/triton/*.json"],
        "conddetr.viz.report": ["*.css", "*.html", "*.js"],
    },
    ext_modules=native_extension(),
    cmdclass={"build_ext": BuildNative},
)
