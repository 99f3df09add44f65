"""Convolution with bias, residual sum and ReLU: values and gradients against float64, what runs, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from conddetr.kernels import convolution, native, registry
from conddetr.kernels.conv.op import ConvolutionByProducts

HAS_NATIVE = pytest.mark.skipif(native.NOT_LOADED is not None, reason=str(native.NOT_LOADED))
HAS_ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is without oneDNN")
WINDOWS = {
    "1×1": (1, (1, 1), (0, 0), (1, 1)),
    "1×1, strided": (1, (2, 2), (0, 0), (1, 1)),
    "3×3": (3, (1, 1), (1, 1), (1, 1)),
    "3×3, strided": (3, (2, 2), (1, 1), (1, 1)),
    "3×3, dilated": (3, (1, 1), (2, 2), (2, 2)),
    "7×7, uneven": (7, (2, 1), (3, 2), (1, 1)),
}
ENDS = {"bare": (False, False), "ReLU": (False, True), "residual": (True, False), "residual, ReLU": (True, True)}


def make(window, size=(7, 9), channels=(5, 4), dtype=torch.float64):
    """x in channels-last, weight, bias, the window by name, and a residual."""
    kernel, stride, padding, dilation = window
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, channels[0], *size), (channels[1], channels[0], kernel, kernel), (channels[1],))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    residual = torch.randn(F.conv2d(*tensors, **options).shape, generator=generator, dtype=torch.float64).to(dtype)
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    return tensors, options, residual


def plain(tensors, options, residual, relu):
    out = F.conv2d(*tensors, **options)
    out = out if residual is None else out + residual
    return out.relu() if relu else out


class Seen(TorchDispatchMode):
    """Names of the convolutions that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "convolution" in function.overloadpacket.__name__:
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_values_and_gradients_of_first_and_second_order(window, end, backend):
    """32 channels, so that where there is a kernel for 3×3 it runs: `auto` takes it for float32 alone, so by name."""
    tensors, options, residual = make(window, (5, 6), (32, 32))
    residual = residual if end[0] else None
    leaves = [x.requires_grad_() for x in (*tensors, *([] if residual is None else [residual]))]
    is_ours = window == WINDOWS["3×3"] and native.NOT_LOADED is None and backend == "auto"
    found = convolution(*tensors, **options, residual=residual, relu=end[1], backend="native" if is_ours else backend)
    expected = plain(tensors, options, residual, end[1])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-11)
    first = [torch.autograd.grad(y.square().sum(), leaves, create_graph=True) for y in (found, expected)]
    second = [torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves) for gradients in first]
    for ours, theirs in (*zip(*first, strict=True), *zip(*second, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * theirs.abs().max().item())


@HAS_ONEDNN
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_inference_in_float32_runs_as_one_operator(window, end, backend):
    tensors, options, residual = make(window, channels=(32, 64), dtype=torch.float32)
    residual = residual if end[0] else None
    kept = None if residual is None else residual.clone()
    with Seen() as seen:
        found = convolution(*tensors, **options, residual=residual, relu=end[1], backend=backend)
    is_ours = backend == "auto" and window == WINDOWS["3×3"] and native.NOT_LOADED is None
    assert seen.names == ["convolution_3x3" if is_ours else "_convolution_pointwise"]
    exact = [tensor.double() for tensor in tensors]
    expected = plain(exact, options, None if residual is None else residual.double(), end[1])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert found.is_contiguous(memory_format=torch.channels_last)
    if residual is not None:
        assert torch.equal(residual, kept), "the residual was written over"
        channels_last = residual.contiguous(memory_format=torch.channels_last)
        again = convolution(*tensors, **options, residual=channels_last, overwrite=True, relu=end[1], backend=backend)
        torch.testing.assert_close(again, found)
        assert is_ours or again.data_ptr() == channels_last.data_ptr()


def test_weights_get_their_gradient_from_products_and_only_where_it_is_wanted():
    (x, weight, bias), options, _ = make(WINDOWS["3×3, strided"], dtype=torch.float32)
    out = convolution(x, weight.requires_grad_(), bias, **options)
    assert type(out.grad_fn).__name__ == "ConvolutionByProductsBackward"
    with Seen() as seen:
        out.sum().backward()
    assert seen.names == []
    assert x.grad is None
    assert weight.grad.shape == weight.shape
    alone = convolution(x.requires_grad_(), weight.detach(), bias, **options)
    assert "ByProducts" not in type(alone.grad_fn).__name__
    assert issubclass(ConvolutionByProducts, torch.autograd.Function)


def test_what_is_cast_or_has_no_values_is_pytorchs():
    tensors, options, residual = make(WINDOWS["3×3"], channels=(32, 32), dtype=torch.float32)
    expected = plain(tensors, options, residual, True)
    with torch.autocast("cpu", torch.bfloat16), Seen() as seen:
        found = convolution(*tensors, **options, residual=residual, relu=True)
    assert set(seen.names) == {"convolution"}
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0.2)
    on_meta = [tensor.to("meta") for tensor in tensors]
    assert convolution(*on_meta, **options).shape == expected.shape


def test_errors():
    tensors, options, residual = make(WINDOWS["3×3, strided"], dtype=torch.float32)
    with pytest.raises(ValueError, match=r"x: expected \[B, 5, H, W\] as of weight, floating, got \(2, 4, 7, 9\)"):
        convolution(tensors[0][:, :4], *tensors[1:])
    with pytest.raises(ValueError, match=r"weight: expected \[Cout, Cin / groups, kh, kw\], got \(4, 5, 3\)"):
        convolution(tensors[0], tensors[1][..., 0])
    with pytest.raises(ValueError, match=r"residual: expected \(2, 4, 4, 5\) as the result, got \(2, 4, 4, 1\)"):
        convolution(*tensors, **options, residual=residual[..., :1])
    with pytest.raises(ValueError, match="backend: expected one of"):
        convolution(*tensors, **options, backend="fast")


@HAS_NATIVE
def test_native_by_name_is_an_error_for_other_windows():
    tensors, options, _ = make(WINDOWS["3×3, strided"], channels=(32, 32), dtype=torch.float32)
    with pytest.raises(registry.BackendError, match=r"takes a window of 3×3, stride, padding.*take backend auto"):
        convolution(*tensors, **options, backend="native")


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("has_residual", [False, True])
def test_counters_of_flops_see_it(window, has_residual):
    tensors, options, residual = make(window, channels=(32, 64), dtype=torch.float32)
    leaf = tensors[1].clone().requires_grad_()
    counts = []
    for run in (plain, lambda x, options, residual, relu: convolution(*x, **options, residual=residual, relu=relu)):
        with FlopCounterMode(display=False) as counter:
            run(tensors, options, residual if has_residual else None, True)
            run([tensors[0], leaf, tensors[2]], options, residual if has_residual else None, True).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
