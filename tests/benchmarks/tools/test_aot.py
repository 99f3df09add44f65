"""Kernels compile without a GPU, and the machine code is what it should be."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ATTENTION = ("forward_kernel", "backward_query_kernel", "backward_key_kernel")
PRODUCTS = (*ATTENTION, "spatial_query_kernel", "spatial_query_backward_kernel")


def compile_in_another_process(out, *options):
    """The table of the command line, by kernel; kernels defined under the interpreter cannot be compiled."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "aot", *options, "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    kernels = json.loads(out.read_text())["kernels"]
    assert all(found["stack_bytes"] == 0 for found in kernels)
    for found in kernels:
        uses_tensor_cores = found["kernel"] in PRODUCTS and "ieee" not in found["variant"]
        assert bool(found["tensor_core_instructions"]) == uses_tensor_cores, found
    return kernels


def test_every_kernel_for_hopper(tmp_path):
    """With the settings of the model; in all forms and for all architectures by the test below."""
    kernels = compile_in_another_process(tmp_path / "table.json", "--architectures", "90", "--one-form")
    names = [found["kernel"] for found in kernels]
    sources = (ROOT / "kernels").rglob("*.py")
    assert sorted(names) == sorted(name for path in sources for name in re.findall(r"(\w+_kernel)\[", path.read_text()))
    assert {found["variant"] for found in kernels if found["tensor_core_instructions"]} == {
        "half, 32, separable, valid_cells, dropout",
        "half, 256 channels, 8 images",
    }


@pytest.mark.slow
def test_all_kernels_for_all_architectures(tmp_path):
    kernels = compile_in_another_process(tmp_path / "table.json")
    assert {found["architecture"] for found in kernels} == {80, 86, 89, 90, 100, 120}
    # Attention: three kernels, both forms at the widths of the model, one at two wider ones, times three ways to form
    # products; sums over the grid 2, bits of dropout 1. Sine embedding 8, positions 2, losses, matching and errors 9,
    # convolutions 4, what stands beside the products of a layer 8, weights 2, pooling 1, predicted boxes 2, the
    # projected spatial query 14. On Hopper attention's forward pass has other settings without dropout, with few blocks
    # and with many.
    assert len(kernels) == 6 * (3 * 3 * (2 + 2) + 2 + 1 + 8 + 2 + 9 + 4 + 8 + 2 + 1 + 2 + 14) + 2
    alone = [found["variant"] for found in kernels if found["kernel"] == "forward_kernel" and found["dtype"] == "bf16"]
    assert {name: alone.count(name) for name in alone if "32, separable" in name} == {
        "half, 32, separable, valid_cells, dropout": 6,
        "half, 32, separable, valid_cells": 1,
        "half, 32, separable, valid_cells, crowded": 1,
    }
    hopper = {
        found["variant"]: found
        for found in kernels
        if found["kernel"] == "forward_kernel" and found["architecture"] == 90
    }
    for form, blocks in ((", dropout", 4), ("", 3), (", crowded", 5)):
        # Registers are given eight at a time, to blocks of 128 threads.
        registers = -(-hopper[f"half, 32, separable, valid_cells{form}"]["registers"] // 8) * 8
        assert 65536 // (128 * registers) >= blocks, form
