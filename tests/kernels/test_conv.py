"""Convolution with bias, residual add and ReLU: values and gradients against float64, the kernels that run, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from conddetr import record_paths
from conddetr.kernels import convolution, convolution_pair, native, registry
from conddetr.kernels.conv import Layer, gpu
from conddetr.kernels.conv.pytorch import ConvolutionByProducts

HAS_NATIVE = pytest.mark.skipif(native.NOT_LOADED is not None, reason=str(native.NOT_LOADED))
HAS_ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
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
    """Records the names of the convolutions that ran."""

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
    """With 32 channels the 3×3 kernel runs if it is built; by name, because `auto` chooses it only for float32."""
    tensors, options, residual = make(window, (5, 6), (32, 32))
    residual = residual if end[0] else None
    leaves = [x.requires_grad_() for x in (*tensors, *([] if residual is None else [residual]))]
    is_ours = window == WINDOWS["3×3"] and native.NOT_LOADED is None and backend == "auto"
    actual = convolution(*tensors, **options, residual=residual, relu=end[1], backend="native" if is_ours else backend)
    expected = plain(tensors, options, residual, end[1])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-11)
    first = [torch.autograd.grad(y.square().sum(), leaves, create_graph=True) for y in (actual, expected)]
    second = [torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves) for gradients in first]
    for ours, reference in (*zip(*first, strict=True), *zip(*second, strict=True)):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10 * reference.abs().max().item())


@HAS_ONEDNN
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_inference_in_float32_runs_as_one_operator(window, end, backend):
    tensors, options, residual = make(window, channels=(32, 64), dtype=torch.float32)
    residual = residual if end[0] else None
    kept = None if residual is None else residual.clone()
    with Seen() as seen:
        out = convolution(*tensors, **options, residual=residual, relu=end[1], backend=backend)
    is_ours = backend == "auto" and window == WINDOWS["3×3"] and native.NOT_LOADED is None
    assert seen.names == ["convolution_3x3" if is_ours else "_convolution_pointwise"]
    exact = [tensor.double() for tensor in tensors]
    expected = plain(exact, options, None if residual is None else residual.double(), end[1])
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    assert out.is_contiguous(memory_format=torch.channels_last)
    if residual is not None:
        assert torch.equal(residual, kept), "the residual was overwritten"
        channels_last = residual.contiguous(memory_format=torch.channels_last)
        again = convolution(*tensors, **options, residual=channels_last, overwrite=True, relu=end[1], backend=backend)
        torch.testing.assert_close(again, out)
        assert is_ours or again.data_ptr() == channels_last.data_ptr()


def test_weight_gradients_are_products_and_computed_only_if_needed():
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


def test_autocast_and_meta_tensors_run_on_pytorch():
    tensors, options, residual = make(WINDOWS["3×3"], channels=(32, 32), dtype=torch.float32)
    expected = plain(tensors, options, residual, True)
    with torch.autocast("cpu", torch.bfloat16), Seen() as seen:
        out = convolution(*tensors, **options, residual=residual, relu=True)
    assert set(seen.names) == {"convolution"}
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=0.2)
    on_meta = [tensor.to("meta") for tensor in tensors]
    assert convolution(*on_meta, **options).shape == expected.shape


def test_errors():
    tensors, options, residual = make(WINDOWS["3×3, strided"], dtype=torch.float32)
    with pytest.raises(ValueError, match=r"x: expected \[B, 5, H, W\] like weight, floating, got \(2, 4, 7, 9\)"):
        convolution(tensors[0][:, :4], *tensors[1:])
    with pytest.raises(ValueError, match=r"weight: expected \[Cout, Cin / groups, kh, kw\], got \(4, 5, 3\)"):
        convolution(tensors[0], tensors[1][..., 0])
    with pytest.raises(ValueError, match=r"residual: expected \(2, 4, 4, 5\) like the result, got \(2, 4, 4, 1\)"):
        convolution(*tensors, **options, residual=residual[..., :1])
    with pytest.raises(ValueError, match=r"bias: expected \(4,\) like weight, got \(1,\)"):
        convolution(*tensors[:2], tensors[2][:1], **options)
    with pytest.raises(ValueError, match="uses: expected 1 or 2, got 3"):
        convolution(*tensors, **options, uses=3)
    with pytest.raises(ValueError, match="backend: expected one of"):
        convolution(*tensors, **options, backend="fast")


@HAS_NATIVE
def test_native_by_name_raises_for_other_windows():
    tensors, options, _ = make(WINDOWS["3×3, strided"], channels=(32, 32), dtype=torch.float32)
    with pytest.raises(registry.BackendError, match=r"takes a window of 3×3, stride, padding.*use backend auto"):
        convolution(*tensors, **options, backend="native")


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("has_residual", [False, True])
def test_flop_counters_include_it(window, has_residual):
    tensors, options, residual = make(window, channels=(32, 64), dtype=torch.float32)
    leaf = tensors[1].clone().requires_grad_()
    counts = []
    for run in (plain, lambda x, options, residual, relu: convolution(*x, **options, residual=residual, relu=relu)):
        with FlopCounterMode(display=False) as counter:
            run(tensors, options, residual if has_residual else None, True)
            run([tensors[0], leaf, tensors[2]], options, residual if has_residual else None, True).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def on(device, window, dtype=torch.float32, size=(7, 9)):
    """Like `make`, on a device and all in channels-last, for backend `triton`."""
    tensors, options, residual = make(window, size, dtype=dtype)
    tensors = [x.to(device) for x in tensors]
    tensors[1] = tensors[1].contiguous(memory_format=torch.channels_last)
    return tensors, options, residual.to(device).contiguous(memory_format=torch.channels_last)


def results(run, tensors, options, residual, upstream):
    """The result of `run` and the gradients of all tensors, given an upstream gradient for each use."""
    leaves = [x.detach().clone().requires_grad_() for x in (*tensors, residual) if x is not None]
    out = run(leaves[:3], options, leaves[3] if residual is not None else None)
    outs = out if isinstance(out, tuple) else (out,) * len(upstream)
    assert all(torch.equal(x, outs[0]) for x in outs)
    return [outs[0].detach(), *torch.autograd.grad(outs, leaves, [grad.to(outs[0].dtype) for grad in upstream])]


@pytest.mark.gpu
@pytest.mark.compares_numbers
@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("window", ["1×1", "3×3, strided", "7×7, uneven"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_errs_no_more_than_pytorch(dtype, window, has_residual, uses, device):
    """Against float64, with odd sizes: no count is a multiple of a tile, and the maps need several blocks."""
    tensors, options, residual = on(device, WINDOWS[window], dtype, (31, 33))
    residual = residual if has_residual else None
    upstream = [torch.randn_like(F.conv2d(*tensors, **options)) for _ in range(uses)]
    arguments = {"relu": True, "uses": uses, "backend": "triton"}
    actual = results(
        lambda x, o, r: convolution(*x, **o, residual=r, **arguments), tensors, options, residual, upstream
    )
    in_torch = results(lambda *x: plain(*x, True), tensors, options, residual, upstream)
    # The same signs for all: near zero, where rounding decides the sign, gradients differ by their whole size.
    sign = (actual[0] > 0).double()
    exact = [None if x is None else x.double() for x in (*tensors, residual)]
    expected = results(lambda x, o, r: sign * plain(x, o, r, False), exact[:3], options, exact[3], upstream)
    for ours, reference, truth in zip(actual, in_torch, expected, strict=True):
        scale = truth.abs().max()
        error, allowed = ((x.double() - truth).abs().max() / scale for x in (ours, reference))
        assert error <= 2 * allowed + torch.finfo(dtype).eps
        assert ours.dtype == dtype


@pytest.mark.gpu
@pytest.mark.compares_numbers
def test_triton_has_second_derivatives(device):
    tensors, options, residual = on(device, WINDOWS["3×3, strided"])
    second = []
    for run, dtype in ((convolution, torch.float32), (None, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (*tensors, residual)]
        if run is None:
            outs = (plain(leaves[:3], options, leaves[3], True),) * 2
        else:
            outs = run(*leaves[:3], **options, residual=leaves[3], relu=True, uses=2, backend="triton")
        first = torch.autograd.grad((outs[0] * outs[1]).square().sum(), leaves, create_graph=True)
        second.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves))
    for ours, reference in zip(*second, strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=1e-5 * reference.abs().max().item())


@pytest.mark.gpu
@pytest.mark.compares_numbers
def test_triton_accepts_gradients_of_any_layout_and_of_a_single_use(device):
    tensors, options, residual = on(device, WINDOWS["3×3"])
    leaves = [x.requires_grad_() for x in (*tensors, residual.contiguous())]
    first, second = convolution(*tensors, **options, residual=leaves[3], relu=True, uses=2, backend="triton")
    expected = plain(tensors, options, leaves[3], True)
    assert first.data_ptr() == second.data_ptr()
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    rows = torch.randn(first.shape, device=device)
    several = torch.stack([rows, -rows])
    wanted = torch.autograd.grad(expected, leaves, several, retain_graph=True, is_grads_batched=True)
    batched = torch.autograd.grad(first, leaves, several, retain_graph=True, is_grads_batched=True)
    for ours, truth in zip(batched, wanted, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)
    for upstream in (rows, rows[:, :1].expand_as(rows)):
        wanted = torch.autograd.grad(expected, leaves, upstream, retain_graph=True)
        for out in (first, second):
            for ours, truth in zip(torch.autograd.grad(out, leaves, upstream, retain_graph=True), wanted, strict=True):
                torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_triton_computes_only_the_needed_gradients(device):
    (x, weight, bias), options, residual = on(device, WINDOWS["3×3"])
    arguments = {**options, "relu": True, "backend": "triton"}
    assert convolution(x, weight, bias, residual=residual, **arguments).grad_fn is None
    with torch.no_grad():
        assert convolution(x.requires_grad_(), weight, bias, **arguments).grad_fn is None
    x = x.detach()
    alone = convolution(x, weight, bias, residual=residual.requires_grad_(), **arguments)
    with Seen() as seen:
        alone.sum().backward()
    assert seen.names == []
    out = convolution(x, weight.requires_grad_(), bias, **arguments)
    with Masks() as masks:
        out.sum().backward()
    assert masks.seen == [[False, True, False]]
    assert bias.grad is x.grad is None


class Masks(TorchDispatchMode):
    """Records which gradients of input, weight and bias were computed."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.seen.append(list(args[-1]))
        return function(*args, **(kwargs or {}))


@pytest.mark.gpu
@pytest.mark.compares_numbers
def test_triton_keeps_nan(device):
    (x, weight, bias), options, _ = on(device, WINDOWS["1×1"])
    x[0, :, 2, 3] = torch.nan
    out = convolution(x.requires_grad_(), weight, bias, **options, relu=True, backend="triton")
    assert out.isnan().nonzero()[:, [0, 2, 3]].unique(dim=0).tolist() == [[0, 2, 3]]


@pytest.mark.gpu
@pytest.mark.compares_numbers
def test_operator_registration(device):
    (x, *_), _, _ = on(device, WINDOWS["1×1"])
    with torch.no_grad():
        torch.library.opcheck(torch.ops.conddetr.relu_backward, (x, None, x.clone()))
        torch.library.opcheck(torch.ops.conddetr.relu_backward, (x, x + 1, x.clone()))
        torch.library.opcheck(torch.ops.conddetr.convolution_epilogue_, (x.clone(), x[0, :, 0, 0], x + 1))


def pair_of_layers(device):
    """Channels-last x, the tensors of a 1×1 and a strided convolution, and the window of the second."""
    (x, weight, bias), _, _ = on(device, WINDOWS["1×1"])
    (_, second, other_bias), options, _ = on(device, (3, (2, 2), (1, 1), (1, 1)))
    return [
        x,
        weight,
        bias,
        second[:, : len(weight)].contiguous(memory_format=torch.channels_last),
        other_bias,
    ], options


def run_pair(tensors, options, backend):
    return convolution_pair(tensors[0], Layer(*tensors[1:3]), Layer(*tensors[3:], **options), backend=backend)


def plain_pair(tensors, options):
    return plain([plain(tensors[:3], {}, None, True), *tensors[3:]], options, None, True)


def gradients_of_both_orders(out, leaves):
    first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True, retain_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves, retain_graph=True)
    return *torch.autograd.grad(out.square().sum(), leaves), *first, *second


@pytest.mark.gpu
@pytest.mark.compares_numbers
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_pair_has_the_gradients_of_both_convolutions(backend, device):
    tensors, options = pair_of_layers(device)
    tensors = [x.requires_grad_() for x in tensors]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    out, expected = run_pair(tensors, options, backend), plain_pair(exact, options)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    actual = gradients_of_both_orders(out, tensors)
    for ours, reference in zip(actual, gradients_of_both_orders(expected, exact), strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=1e-5 * reference.abs().max().item())


@pytest.mark.gpu
@pytest.mark.compares_numbers
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_autocast_only_in_backward_changes_nothing(backend, device):
    tensors, options = pair_of_layers(device)
    tensors = [x.requires_grad_() for x in tensors]
    expected = torch.autograd.grad(run_pair(tensors, options, backend).sum(), tensors)
    out = run_pair(tensors, options, backend).sum()
    with torch.autocast(device.type, torch.bfloat16):
        actual = torch.autograd.grad(out, tensors)
    for ours, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.compares_numbers
def test_pair_computes_only_the_needed_gradients(device):
    tensors, options = pair_of_layers(device)
    expected = torch.autograd.grad(plain_pair([x.requires_grad_() for x in tensors], options).sum(), tensors)
    for wanted, masks in (((4,), []), ((3, 4), [[False, True, False]]), ((1,), [[True, False, False]])):
        leaves = [x.detach().requires_grad_(index in wanted) for index, x in enumerate(tensors)]
        with Masks() as computed:
            run_pair(leaves, options, "triton").sum().backward()
        assert computed.seen[: len(masks)] == masks
        for index, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (index in wanted)
            if index in wanted:
                torch.testing.assert_close(leaf.grad, expected[index], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_pair_saves_no_intermediate_map(device):
    tensors, options = pair_of_layers(device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        out = run_pair([tensors[0], *(x.requires_grad_() for x in tensors[1:])], options, "triton")
    intermediate = (*tensors[0].shape[:1], len(tensors[1]), *tensors[0].shape[2:])
    assert intermediate not in kept
    assert sorted(kept) == sorted([tensors[0].shape, *(x.shape for x in tensors[1:4]), out.shape])


def test_errors_of_a_pair():
    (x, weight, bias, second, other_bias), options = pair_of_layers("cpu")
    weight.requires_grad_()
    for backend in ("auto", "triton"):
        with pytest.raises(ValueError, match=r"x: expected \[B, 3, H, W\] like weight, floating"):
            convolution_pair(x, Layer(weight, bias), Layer(second[:, :3], other_bias, **options), backend=backend)
        with pytest.raises(ValueError, match=r"bias: expected \(4,\) like weight, got \(1,\)"):
            convolution_pair(x, Layer(weight, bias[:1]), Layer(second, other_bias, **options), backend=backend)
    with pytest.raises(registry.BackendError, match=r"not all ordinary tensors of torch\.float32"):
        convolution_pair(x, Layer(weight, bias), Layer(second.double(), None, **options), backend="triton")


def test_triton_by_name_raises_with_the_reason():
    tensors, options, _ = on("cpu", WINDOWS["1×1"])
    cases = {
        "its kernels end in ReLU": (tensors, {}),
        "its kernels take float32": ([x.double() for x in tensors], {"relu": True}),
        "not all ordinary tensors of torch.float32": ([*tensors[:2], tensors[2].double()], {"relu": True}),
        "x is not in channels-last": ([tensors[0].contiguous(), *tensors[1:]], {"relu": True}),
    }
    for reason, (inputs, arguments) in cases.items():
        with pytest.raises(registry.BackendError, match=f"backend 'triton' cannot run here: .*{reason}"):
            convolution(*inputs, **options, **arguments, backend="triton")
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(registry.BackendError, match=r"autocast would cast to torch\.bfloat16, x is torch\.float32"),
    ):
        convolution(*tensors, **options, relu=True, backend="triton")
    with torch.autocast("cpu", torch.bfloat16):
        halves = [x.bfloat16() for x in tensors]
        assert convolution(*halves, **options, relu=True, backend="triton").dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_two_uses_are_one_result_for_all_backends(backend):
    tensors, options, residual = make(WINDOWS["3×3"], channels=(32, 32), dtype=torch.float32)
    with record_paths() as paths:
        first, second = convolution(*tensors, **options, residual=residual, relu=True, uses=2, backend=backend)
    assert first is second
    assert sum(paths["convolution"].values()) == 1


def stand_in(x, weight, bias, *window):
    return F.conv2d(x, weight, bias, *window).relu()


def stand_in_with_sum(x, weight, z, alpha, bias, *window):
    return (F.conv2d(x, weight, bias, *window) + alpha * z).relu()


@pytest.fixture
def cudnn(monkeypatch):
    """Stand-ins for cuDNN's operators."""
    monkeypatch.setattr(torch, "cudnn_convolution_relu", stand_in)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", stand_in_with_sum)


def fails(*_):
    raise RuntimeError("no engine\nat line 3")


FORM = (torch.Size((16, 4, 3, 3)), ((2, 2), (1, 1), (1, 1), 2))
BROKEN = {
    "it failed on this device: no engine$": fails,
    r"differ from PyTorch's by 0\.\d+ of the largest value": lambda x, weight, bias, *window: stand_in(
        x, weight, None, *window
    ),
    "differ from PyTorch's by nan": lambda *x: stand_in(*x) + 0 * torch.nan,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trial_of_cudnn_reports_wrong_results(dtype, cudnn, monkeypatch):
    for has_residual in (False, True):
        assert gpu._try(torch.device("cpu"), dtype, *FORM, has_residual) is None
    for reason, broken in BROKEN.items():
        monkeypatch.setattr(torch, "cudnn_convolution_relu", broken)
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(gpu._try(torch.device("cpu"), dtype, *FORM, False))
    sound = stand_in_with_sum
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", lambda x, w, z, *rest: sound(x, w, 0.9 * z, *rest))
    assert "differ" in gpu._try(torch.device("cpu"), dtype, *FORM, True)


def test_cudnn_is_not_used_if_results_must_be_deterministic(monkeypatch):
    x = torch.zeros(1, 8, 4, 4)
    form = (torch.zeros(16, 4, 3, 3), FORM[1], False)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "_failures", {(x.device, x.dtype, *FORM, False): None})
    # The fixtures demand deterministic results.
    assert "deterministic" in gpu._why_not_cudnn(x, *form)
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    assert gpu._why_not_cudnn(x, *form) is None
    monkeypatch.setattr(gpu, "_failures", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "not tried before this CUDA graph" in gpu._why_not_cudnn(x, *form)


@pytest.mark.parametrize("has_residual", [False, True])
def test_gradients_of_cudnn_are_those_of_plain_pytorch(has_residual, cudnn):
    tensors, options, residual = on("cpu", WINDOWS["3×3, strided"])
    residual = residual if has_residual else None
    upstream = [torch.randn_like(F.conv2d(*tensors, **options)) for _ in range(2)]
    window = (*options.values(), 1)

    def by_cudnn(x, options, residual):
        return gpu.ConvolutionReLU.apply(*x, residual, window, 2, gpu._by_cudnn)

    actual = results(by_cudnn, tensors, options, residual, upstream)
    expected = results(lambda *x: plain(*x, True), tensors, options, residual, upstream)
    for ours, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)
