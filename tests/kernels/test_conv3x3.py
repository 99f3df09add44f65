"""Winograd 3×3 convolution: values and gradients against float64, errors, threads, registration."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from conddetr.kernels import convolution_3x3, convolution_3x3_weight_gradient, native, registry

pytestmark = pytest.mark.skipif(native.NOT_LOADED is not None, reason=str(native.NOT_LOADED))
# (batch, in, out, height, width): one cell, less than a tile, a tile, no multiple of a tile, many tasks and channels.
SIZES = [(1, 32, 32, 1, 1), (2, 32, 64, 3, 2), (1, 64, 32, 4, 4), (2, 96, 64, 9, 13), (1, 256, 128, 22, 31)]


def make(size, dtype=torch.float64):
    batch, cin, cout, height, width = size
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, cin, height, width), (cout, cin, 3, 3), (cout,), (batch, cout, height, width))
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def all_of(x, weight, bias, grad, backend):
    """All variants of the convolution, and both gradients."""
    return {
        "plain": convolution_3x3(x, weight, backend=backend),
        "bias and ReLU": convolution_3x3(x, weight, bias, relu=True, backend=backend),
        "transposed": convolution_3x3(grad, weight, transposed=True, backend=backend),
        "of weights": convolution_3x3_weight_gradient(x, grad, backend=backend),
    }


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference_is_pytorchs_with_its_gradients(size):
    x, weight, bias, grad = make(size)
    x.requires_grad_(), weight.requires_grad_()
    out = F.conv2d(x, weight, padding=1)
    x_grad, weight_grad = torch.autograd.grad(out, (x, weight), grad)
    results = all_of(x, weight, bias, grad, "eager")
    for name, expected in (("plain", out), ("transposed", x_grad), ("of weights", weight_grad)):
        torch.testing.assert_close(results[name], expected.detach())
    torch.testing.assert_close(results["bias and ReLU"], (out + bias[:, None, None]).relu().detach())


@pytest.mark.parametrize("level", ["plain", "avx2", "avx512"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_exact_in_float64_at_every_instruction_set(size, level):
    """In float64 only wrong algebra could fail. No gradients are recorded."""
    module = importlib.import_module("conddetr._C")
    before = module.cpu_level()
    if level not in module.build_info()["cpu_levels"] or not module.use_cpu_level(level):
        pytest.skip(f"this processor has no {level}")
    tensors = make(size)
    try:
        results = all_of(*tensors, "native")
    finally:
        module.use_cpu_level(before)
    for name, expected in all_of(*tensors, "eager").items():
        torch.testing.assert_close(results[name], expected, rtol=1e-12, atol=1e-13 * size[1] * size[3] * size[4])


@pytest.mark.parametrize("size", [(2, 64, 64, 30, 40), (1, 256, 256, 25, 34), (2, 512, 512, 8, 10)], ids=str)
def test_native_error_in_float32(size):
    """The documented error, on inputs as after a ReLU, whose mean is not zero."""
    tensors = make(size, torch.float32)
    tensors[0].relu_()
    tensors[:2] = (tensor.contiguous(memory_format=torch.channels_last) for tensor in tensors[:2])
    exact = all_of(*(tensor.double() for tensor in tensors), "eager")
    plain, actual = (all_of(*tensors, backend) for backend in ("eager", "native"))
    for name, truth in exact.items():
        error, budget = ((x[name].double() - truth).square().mean().sqrt().item() for x in (actual, plain))
        # Plus two roundings of a typical output, because PyTorch sums some shapes in a better order than others.
        floor = torch.finfo(torch.float32).eps * truth.square().mean().sqrt().item()
        assert error <= (10 if name == "of weights" else 2) * budget + 2 * floor, name


def test_native_memory_formats_and_nan():
    x, weight, bias, _ = make((2, 32, 32, 6, 9), torch.float32)
    expected = convolution_3x3(x, weight, bias, backend="native")
    assert expected.is_contiguous(memory_format=torch.channels_last)
    for view in (x.contiguous(memory_format=torch.channels_last), x[:, :, :, ::2].repeat_interleave(2, 3)[..., :9]):
        out = convolution_3x3(view, weight, bias, backend="native")
        assert torch.equal(out, convolution_3x3(view.contiguous(), weight, bias, backend="native"))
    x[1, 3, 5, 8] = float("nan")
    out = convolution_3x3(x, weight, bias, relu=True, backend="native")
    assert out[1, :, 4:, 7:].isnan().all(), "ReLU keeps NaN"
    assert not out[0].isnan().any()


def test_any_number_of_threads_gives_the_same_bits():
    tensors, threads, results = make((2, 64, 96, 25, 34), torch.float32), torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(all_of(*tensors, "native"))
    finally:
        torch.set_num_threads(threads)
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name
        assert torch.equal(results[2][name], expected), name


def test_native_gradient_of_many_tiles_is_computed_in_parts():
    """There are more tiles than the kernel transforms together."""
    x, _, _, grad = make((1, 32, 512, 84, 84), torch.float32)
    expected = convolution_3x3_weight_gradient(x.double(), grad.double(), backend="eager")
    actual = convolution_3x3_weight_gradient(x, grad, backend="native")
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_operator_registration():
    x, weight, bias, grad = make((2, 32, 64, 5, 6), torch.float32)
    x, weight, grad = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight, grad))
    operators = torch.ops.conddetr_native
    torch.library.opcheck(operators.convolution_3x3.default, (x, weight, bias, False, True))
    torch.library.opcheck(operators.convolution_3x3.default, (grad, weight, None, True, False))
    torch.library.opcheck(operators.convolution_3x3_weight.default, (x, grad))


def test_auto_chooses_the_kernel_if_it_can_run():
    x, weight, bias, _ = make((2, 32, 64, 5, 6), torch.float32)
    assert torch.equal(convolution_3x3(x, weight, bias), convolution_3x3(x, weight, bias, backend="native"))
    odd = convolution_3x3(x[:, :31], weight[:, :31], bias)
    assert torch.equal(odd, F.conv2d(x[:, :31], weight[:, :31], bias, padding=1))
    assert convolution_3x3(x[:0], weight).shape == (0, 64, 5, 6)


def test_errors():
    x, weight, bias, grad = make((2, 32, 64, 5, 6), torch.float32)
    with pytest.raises(ValueError, match=r"weight: expected \[Cout, Cin, 3, 3\], got \(64, 32, 1, 1\)"):
        convolution_3x3(x, weight[:, :, :1, :1])
    with pytest.raises(ValueError, match=r"x: expected \[B, 64, H, W\] like weight, floating, got \(2, 32, 5, 6\)"):
        convolution_3x3(x, weight, transposed=True)
    with pytest.raises(ValueError, match=r"weight: expected torch.float32 on cpu like x, got torch.float64 on cpu"):
        convolution_3x3(x, weight.double())
    with pytest.raises(ValueError, match=r"bias: expected \(64,\), got \(32,\)"):
        convolution_3x3(x, weight, bias[:32])
    with pytest.raises(ValueError, match=r"grad: expected \[2, Cout, 5, 6\] like x, got \(2, 64, 4, 6\)"):
        convolution_3x3_weight_gradient(x, grad[:, :, 1:])
    with pytest.raises(registry.BackendError, match="channels in multiples of 32, and at least one cell, got 31 to 64"):
        convolution_3x3(x[:, :31], weight[:, :31], backend="native")
    with pytest.raises(registry.BackendError, match="float32"):
        convolution_3x3(x.bfloat16(), weight.bfloat16(), backend="native")
    with pytest.raises(RuntimeError, match="channels-last"):
        torch.ops.conddetr_native.convolution_3x3(x, weight, None, False, False)
