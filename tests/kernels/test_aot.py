"""Every kernel compiles for every architecture without a GPU, and the machine code is what it should be."""

import json
import os
import subprocess
import sys

import pytest


def test_all_kernels_for_all_architectures(tmp_path):
    pytest.importorskip("triton", reason="the package triton is not installed")
    out = tmp_path / "table.json"
    # A process of its own: kernels defined under the interpreter can not be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "conddetr.kernels.aot", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    kernels = json.loads(out.read_text())["kernels"]
    assert {found["architecture"] for found in kernels} == {80, 86, 89, 90, 100, 120}
    # Attention: three kernels, both forms at the widths of the model, one at two wider ones, times three ways to form
    # products. Sine embedding 8, losses and matching 7.
    assert len(kernels) == 6 * (3 * 3 * (2 + 2) + 8 + 7)
    assert all(found["stack_bytes"] == found["local_instructions"] == 0 for found in kernels)
    for found in kernels:
        is_attention = found["kernel"] in ("forward_kernel", "backward_query_kernel", "backward_key_kernel")
        uses_tensor_cores = is_attention and "ieee" not in found["variant"]
        assert bool(found["tensor_core_instructions"]) == uses_tensor_cores, found
