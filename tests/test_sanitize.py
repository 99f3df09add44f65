"""The command for compute-sanitizer, and verdicts on its output, with lines from its manual."""

import re
from pathlib import Path

import pytest
import sanitize

from conddetr.kernels import native


@pytest.mark.parametrize(
    ("status", "output", "is_fine", "expected"),
    [
        (0, "5 passed\n========= ERROR SUMMARY: 0 errors", True, "ERROR SUMMARY: 0 errors"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed", True, "RACECHECK SUMMARY: 0 hazards"),
        (86, "========= Invalid __global__ write of size 4 bytes", False, "Invalid __global__ write"),
        (86, "========= Error: Device not supported.\n========= error 999 on cuMemAlloc", True, "not checked"),
        (1, "1 failed\n========= ERROR SUMMARY: 0 errors", False, "1 failed"),
        (0, "5 passed", False, "failed with status 0"),
    ],
)
def test_verdict(status, output, is_fine, expected):
    verdict = sanitize.verdict(status, output)
    assert verdict[0] is is_fine
    assert expected in verdict[1]


def test_late_tool_is_killed_with_all_its_processes(tmp_path):
    """The tool hangs in a child of its child, as pytest under compute-sanitizer could."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        "#!/bin/sh\ntrap '' INT\n"
        f'echo "$@" > {tmp_path}/arguments\n'
        f"sh -c 'setsid sleep 600 & echo $! > {tmp_path}/pid; wait'\n"
    )
    program.chmod(0o755)
    is_fine, text = sanitize.check(str(program), 2, "memcheck")
    assert is_fine
    assert text == "not finished in 2 s: these kernels are not checked (--seconds raises the limit)"
    process = Path("/proc") / (tmp_path / "pid").read_text().strip()
    assert not process.exists() or ") Z " in (process / "stat").read_text()
    arguments = (tmp_path / "arguments").read_text()
    assert arguments.startswith("--tool memcheck --error-exitcode 86 --kernel-name kns=")
    assert " --kernel-name kns=match_kernel " in arguments


def test_all_our_kernels_are_checked():
    """Both the kernels compiled ahead of time and those of the built library, which contains their mangled names."""
    aot = pytest.importorskip("tools.aot", reason="the package triton is not installed")
    names = sanitize.kernels()
    assert {job.kernel for job in aot.jobs(90)} <= names
    if native.NOT_LOADED is not None or native.build_info()["cuda"] is None:
        pytest.skip("CUDA kernels are not built here")
    import conddetr._C

    library = Path(conddetr._C.__file__).read_bytes()
    built = {name.decode() for name in re.findall(rb"_ZN8conddetr\w*?\d([a-z_]+_kernel)[IE]", library)}
    assert {"forward_kernel", "hopper_forward_kernel"} <= built <= names
