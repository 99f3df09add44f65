"""Triton kernels compile without a GPU, and their machine code is as expected."""

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
    """The command's table of kernels; kernels that are defined under the interpreter cannot be compiled."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "aot", *options, "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    kernels = json.loads(out.read_text())["kernels"]
    assert all(kernel["stack_bytes"] == 0 for kernel in kernels)
    for kernel in kernels:
        uses_tensor_cores = kernel["kernel"] in PRODUCTS and "ieee" not in kernel["variant"]
        assert bool(kernel["tensor_core_instructions"]) == uses_tensor_cores, kernel
    return kernels


def test_every_kernel_for_hopper(tmp_path):
    """With the model's settings. The test below compiles all variants for all architectures."""
    kernels = compile_in_another_process(tmp_path / "table.json", "--architectures", "90", "--one-form")
    names = [kernel["kernel"] for kernel in kernels]
    sources = (ROOT / "kernels").rglob("*.py")
    assert sorted(names) == sorted(name for path in sources for name in re.findall(r"(\w+_kernel)\[", path.read_text()))
    assert {kernel["variant"] for kernel in kernels if kernel["tensor_core_instructions"]} == {
        "half, 32, separable, valid_cells, dropout",
        "half, 256 channels, 8 images",
    }


@pytest.mark.slow
def test_all_kernels_for_all_architectures(tmp_path):
    kernels = compile_in_another_process(tmp_path / "table.json")
    assert {kernel["architecture"] for kernel in kernels} == {80, 86, 89, 90, 100, 120}
    # Attention: three kernels, both variants at the model's width, one at two wider ones, times three precisions of
    # products; sums over the grid 2, dropout bits 1. Sine embedding 8, positions 2, losses, matching and errors 9,
    # convolutions 4, kernels around the products of a layer 8, weights 2, pooling 1, predicted boxes 2, the projected
    # spatial query 14. On Hopper, attention's forward pass has other settings without dropout, for few blocks and for
    # many.
    assert len(kernels) == 6 * (3 * 3 * (2 + 2) + 2 + 1 + 8 + 2 + 9 + 4 + 8 + 2 + 1 + 2 + 14) + 2
    variants = [
        kernel["variant"] for kernel in kernels if kernel["kernel"] == "forward_kernel" and kernel["dtype"] == "bf16"
    ]
    assert {name: variants.count(name) for name in variants if "32, separable" in name} == {
        "half, 32, separable, valid_cells, dropout": 6,
        "half, 32, separable, valid_cells": 1,
        "half, 32, separable, valid_cells, crowded": 1,
    }
    hopper = {
        kernel["variant"]: kernel
        for kernel in kernels
        if kernel["kernel"] == "forward_kernel" and kernel["architecture"] == 90
    }
    for variant, blocks in ((", dropout", 4), ("", 3), (", crowded", 5)):
        # Registers are allocated in units of eight, to blocks of 128 threads.
        registers = -(-hopper[f"half, 32, separable, valid_cells{variant}"]["registers"] // 8) * 8
        assert 65536 // (128 * registers) >= blocks, variant
