"""The native library and its build flags (docs/building.md)."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conddetr.kernels import native, operators, registry
from tools.aot_cuda import find_cuobjdump

ROOT = Path(__file__).parent.parent
needs_library = pytest.mark.skipif(native.NOT_LOADED is not None, reason=str(native.NOT_LOADED))


def run_setup(**environment):
    """Run setup.py with these build flags; `--version` ends it before anything is compiled."""
    command = [sys.executable, "setup.py", "-q", "--version"]
    rest = {name: value for name, value in os.environ.items() if not name.startswith(("CONDDETR_", "CUDA_", "CXX"))}
    return subprocess.run(command, cwd=ROOT, env={**rest, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"CONDDETR_CUDA": "1", "CUDA_HOME": "/nowhere"}, "CONDDETR_CUDA=1, but no CUDA toolkit was found: install"),
        ({"CONDDETR_NATIVE": "1", "CXX": "no-such-compiler"}, "CONDDETR_NATIVE=1, but no C++ compiler was found"),
        ({"CONDDETR_CUDA": "yes"}, "CONDDETR_CUDA: expected 0, 1 or nothing, got 'yes'"),
    ],
)
def test_missing_tool_of_a_requested_part_is_an_error(flags, message):
    run = run_setup(**flags)
    assert run.returncode == 1
    assert message in run.stderr


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        ({"CXX": "no-such-compiler"}, "conddetr: no C++ compiler was found, building without one; to use one, install"),
        ({"CUDA_HOME": "/nowhere", "CONDDETR_NATIVE": "0"}, ""),
    ],
)
def test_missing_tool_is_reported_in_one_line(flags, warning):
    run = run_setup(**flags)
    assert run.returncode == 0, run.stderr
    ours = [line for line in run.stderr.splitlines() if line.startswith("conddetr:")]
    assert len(ours) == bool(warning)
    assert all(line.startswith(warning) for line in ours)


def test_tables_are_installed(tmp_path):
    """Builds a copy of the files that define the package's layout."""
    source = tmp_path / "source"
    for folder in ("conddetr", "kernels"):
        (source / folder).mkdir(parents=True)
        shutil.copy(ROOT / folder / "__init__.py", source / folder)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    tables = ("measured/sm_00.json", "attn/triton/candidates.json")
    for table in tables:
        (source / "kernels" / table).parent.mkdir(parents=True)
        (source / "kernels" / table).write_text("{}")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "built")]
    environment = {**os.environ, "CONDDETR_NATIVE": "0", "CONDDETR_CUDA": "0"}
    run = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for table in tables:
        assert (tmp_path / "built" / "conddetr" / "kernels" / table).read_text() == "{}", table


@needs_library
def test_build_info():
    info = native.build_info()
    assert set(info) == {"compiler", "cuda", "architectures", "flags", "sources", "cpu_levels"}
    assert re.fullmatch("[0-9a-f]{16}", info["sources"])
    assert "-ffp-contract=fast" in info["flags"].split()
    assert info["cpu_levels"][0] == "plain"
    assert (info["cuda"] is None) == (info["architectures"] == [])


@needs_library
@pytest.mark.parametrize(
    "name",
    [
        "conditional_attention",
        "conditional_attention_backward",
        "sine_embedding",
        "sine_embedding_backward",
        "linear_assignment",
    ],
)
def test_native_and_triton_schemas_agree(name):
    native_op, triton_op = (getattr(operators.of(backend), name).default for backend in ("native", "triton"))
    assert str(native_op._schema).replace("conddetr_native::", "conddetr::") == str(triton_op._schema)


@pytest.mark.parametrize(
    ("capability", "code"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90a"),
        ((10, 0), "PTX of compute_80"),
        ((12, 0), "PTX of compute_80"),
        ((7, 5), None),
    ],
    ids=str,
)
def test_machine_code_of_the_default_build(capability, code, monkeypatch):
    """CUDA's rules: machine code runs within its major version, sm_90a only on 9.0, PTX on all newer GPUs."""
    monkeypatch.setattr(native, "_BUILT", [((8, 0), "", True), ((9, 0), "a", False)])
    assert native.machine_code(capability) == code


def test_without_ptx_newer_gpus_have_no_code(monkeypatch):
    monkeypatch.setattr(native, "_BUILT", [((8, 0), "", False), ((9, 0), "a", True)])
    assert native.machine_code((10, 0)) is None


def test_compatible_cuda_runtime_of_pytorch_is_linked():
    """PyTorch's runtime must be of the toolkit's major version and not older; otherwise ours is linked statically."""
    code = """
import setuptools, torch
setuptools.setup = lambda **_: None
import setup
for toolkit, pytorch in (("13.0", "13.0"), ("13.0", "13.2"), ("13.2", "13.0"), ("12.9", "13.0"), ("13.0", None)):
    setup.release = lambda cuda: toolkit
    torch.version.cuda = pytorch
    print("-lcudart" in setup.cuda_runtime("/nowhere"))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.split() == ["True", "True", "False", "False", "False"], run.stderr


@needs_library
def test_library_contains_what_build_info_reports():
    """cuobjdump lists the machine code and the PTX that `build_info` reports."""
    info = native.build_info()
    if info["cuda"] is None:
        pytest.skip("the native kernels were built without CUDA")
    library = importlib.import_module("conddetr._C").__file__
    listed = [
        subprocess.run([find_cuobjdump(), flag, library], capture_output=True, text=True, check=True).stdout
        for flag in ("--list-elf", "--list-ptx")
    ]
    names = {name.removesuffix("+PTX") for name in info["architectures"]}
    assert set(re.findall(r"\.sm_(\w+)\.cubin", listed[0])) == names
    with_ptx = {name.removesuffix("+PTX") for name in info["architectures"] if name.endswith("+PTX")}
    assert set(re.findall(r"\.sm_(\w+)\.ptx", listed[1])) == with_ptx


def test_request_without_the_library_names_the_reason():
    code = (
        "import torch; from conddetr.kernels import registry; cpu = torch.device('cpu')\n"
        "assert registry.OPERATIONS['sine_embedding'].choose('auto', cpu, torch.float32).backend == 'eager'\n"
        "registry.OPERATIONS['sine_embedding'].choose('native', cpu, torch.float32)"
    )
    environment = {**os.environ, "CONDDETR_NATIVE": "0"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "BackendError: backend 'native' cannot run here: the environment variable CONDDETR_NATIVE" in run.stderr


def test_dtypes_without_native_kernels():
    if native.NOT_LOADED is not None:
        pytest.skip(native.NOT_LOADED)
    with pytest.raises(RuntimeError, match="on cpu its kernels take float32, bfloat16, float64, not float16"):
        registry.OPERATIONS["sine_embedding"].choose("native", torch.device("cpu"), torch.float16)


@needs_library
def test_peak_uses_the_widest_vectors():
    library = importlib.import_module("conddetr._C")
    level, threads = library.cpu_level(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = native.peak_flops()
        library.use_cpu_level("plain")
        plain = native.peak_flops()
    finally:
        library.use_cpu_level(level)
        torch.set_num_threads(threads)
    # The vectors are two and four times as wide. A busy machine can lower a measured rate, but never raise it.
    assert 1e9 < best < 1e12
    if level != "plain":
        assert plain < 0.9 * best
