"""Builds the null GPU, and returns the environment in which a program uses it."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from null_gpu import stubs

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "null_gpu"
IS_RUNNING = os.environ.get("NULL_GPU") == "1"
"""Whether this process has null GPUs."""


def why_not() -> str | None:
    """The reason why it cannot be built here, or None."""
    if importlib.util.find_spec("torch") is None or not (_torch_libraries() / "libtorch_cuda.so").exists():
        return "a null GPU needs a PyTorch that was built for CUDA"
    if _toolkit() is None:
        return "a null GPU needs the headers of the CUDA toolkit (CUDA_HOME)"
    missing = [program for program in ("cc", "nm") if shutil.which(program) is None]
    return f"a null GPU needs {' and '.join(missing)} (Debian: apt install gcc)" if missing else None


def environment(devices: int = 1) -> dict[str, str]:
    """The environment of a program with this many null GPUs.

    Raises:
        RuntimeError: it cannot be built here; the message is the reason.
    """
    folder = _library().parent
    before = {name: os.environ.get(name, "") for name in ("LD_PRELOAD", "LD_LIBRARY_PATH")}
    return {
        **os.environ,
        "NULL_GPU": "1",
        "NULL_GPU_DEVICES": str(devices),
        # It has the driver's name, so that a later load of libcuda.so.1 returns this library, with the same counts.
        "LD_PRELOAD": ":".join(filter(None, (str(folder / "libcuda.so.1"), before["LD_PRELOAD"]))),
        "LD_LIBRARY_PATH": ":".join(filter(None, (str(folder), before["LD_LIBRARY_PATH"]))),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_INTERPRET": "0",
        # cuDNN's attention finds no plan without a GPU; PyTorch then prefers its other kernels.
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
    }


def _torch_libraries() -> Path:
    return Path(importlib.util.find_spec("torch").submodule_search_locations[0]) / "lib"


def _toolkit() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, or the usual folder; None if it has no headers."""
    folder = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    return folder if (folder / "include" / "cuda_runtime_api.h").exists() else None


@cache
def _library() -> Path:
    """The shared library, compiled again only if its sources or PyTorch changed."""
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    sources = sorted(HERE.glob("*.c"))
    parts = [*sources, HERE / "null_gpu.h", HERE / "stubs.py", HERE / "build.py"]
    parts.append(_torch_libraries().parent / "version.py")
    key = hashlib.sha256(b"".join(path.read_bytes() for path in parts)).hexdigest()[:16]
    library = BUILD / key / "libcuda.so.1"
    if not library.exists():
        partial = BUILD / f"{key}-{os.getpid()}"
        partial.mkdir(parents=True, exist_ok=True)
        stub_source = partial / "stubs.c"
        stub_source.write_text(stubs.source(_torch_libraries()))
        # The prototypes are the toolkit's, so that a wrong one does not compile. -w: stubs and unused arguments warn.
        command = ["cc", "-std=gnu17", "-O1", "-w", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1", f"-I{HERE}"]
        command += [f"-I{_toolkit() / 'include'}", *map(str, sources), str(stub_source)]
        run = subprocess.run([*command, "-o", str(partial / library.name), "-ldl"], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"the null GPU does not compile:\n{run.stderr}")
        library.parent.mkdir(exist_ok=True)
        # Atomic, because another process may be building it too.
        (partial / library.name).replace(library)
        shutil.rmtree(partial)
    return library
