"""CUDA sources compile without a GPU, and their machine code is as expected."""

from itertools import product

import pytest

from tools import aot_cuda

OTHERS = [name for name in aot_cuda.ARCHITECTURES if name != aot_cuda.HOPPER]


@pytest.fixture(scope="module", params=[aot_cuda.HOPPER, *(pytest.param(x, marks=pytest.mark.slow) for x in OTHERS)])
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def compiled(architecture):
    pytest.importorskip("triton", reason="cuobjdump comes with the package triton, which is not installed")
    if aot_cuda.find_nvcc() is None:
        pytest.skip("nvcc was not found: install the CUDA toolkit or set CUDA_HOME")
    return aot_cuda.compile_all((architecture,))


def test_no_kernel_has_defects(compiled):
    wrong = [f"{kernel.kernel} for sm_{kernel.architecture}: {aot_cuda.problems(kernel)}" for kernel in compiled]
    assert not [line for line in wrong if not line.endswith("[]")]


def test_every_kernel_is_compiled_once(compiled, architecture):
    expected = {"bits fill_kernel"}
    for dtype in ("bf16", "fp16", "fp32"):
        expected |= {f"sine {kernel} {dtype}" for kernel in ("forward_kernel", "backward_kernel")}
        expected.add(f"attn backward_lines_kernel {dtype}")
        for kernel in ("forward_kernel", "backward_query_kernel", "backward_key_kernel"):
            expected |= {f"attn {kernel} {dtype} {form}" for form in ("dense", "separable")}
    if architecture == aot_cuda.HOPPER:
        forms = list(product(("bf16", "fp16"), ("dense", "separable")))
        for kernel in ("forward_kernel", "backward_query_kernel", "backward_key_kernel"):
            expected |= {f"attn hopper_{kernel} {dtype} {form}" for dtype, form in forms}
        expected |= {f"attn hopper_forward_kernel {dtype} {form} dropout" for dtype, form in forms}
    assert sorted(kernel.kernel for kernel in compiled) == sorted(expected)


def test_blocks_of_hopper_kernels_fit_a_multiprocessor(compiled, architecture):
    """As many blocks of 128 threads as each kernel was written for."""
    blocks = {"hopper_forward_kernel": 4, "hopper_backward_query_kernel": 3, "hopper_backward_key_kernel": 2}
    registers = {kernel.kernel: kernel.registers for kernel in compiled if "hopper" in kernel.kernel}
    assert bool(registers) == (architecture == aot_cuda.HOPPER)
    for name, count in registers.items():
        assert 128 * blocks[name.split()[1]] * count <= 64 * 1024, name


def test_defects_are_detected():
    good = aot_cuda.Compiled("attn forward_kernel bf16 dense", "80", 168, 0, 0, 0, 96)
    assert not aot_cuda.problems(good)
    spilled = aot_cuda.Compiled("attn forward_kernel bf16 dense", "80", 168, 16, 24, 4, 0)
    assert aot_cuda.problems(spilled) == [
        "16 bytes of stack, 24 spilled, 4 local memory instructions",
        "no tensor core instruction",
    ]
    serialized = aot_cuda.Compiled("attn hopper_forward_kernel bf16 dense", "90a", 120, 0, 0, 0, 8, serialized=True)
    assert aot_cuda.problems(serialized) == ["asynchronous products are serialized"]
