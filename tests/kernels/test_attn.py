"""Conditional attention: the reference against a loop from the paper, the kernels against the reference.

Error budget of a kernel: twice the error of the plain implementation in the same dtype, both against float64. Errors
are root mean squares, because the ratio of two largest errors varies by chance.
"""

import math

import numpy as np
import pytest
import torch
from golden_rule import read_arrays
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from conddetr.kernels import conditional_attention, drawn_probability, dropout_bits, native, operators, registry
from conddetr.kernels.attn import op
from conddetr.kernels.attn.reference import attention_weights, dense_spatial_keys, rectangle_padding

pytestmark = [pytest.mark.gpu, pytest.mark.compares_numbers]

NAMES = ("q_content", "q_spatial", "k_content", "rows", "columns", "v")


def skip_unless_runs(backend, device, dtype=torch.float32):
    reason = registry.why_not(backend, device, dtype)
    if reason is not None:
        pytest.skip(reason)


class Case:
    """Random inputs of one shape, in float64; `to` returns leaves in another dtype."""

    def __init__(self, queries=5, height=4, width=7, content=32, spatial=32, value=32, batch=2, heads=2, dense=False):
        self.dense, self.height, self.width = dense, height, width
        keys = height * width
        sizes = [(queries, content), (queries, spatial), (keys, content), (height, spatial), (width, spatial)]
        sizes.append((keys, value))
        self.tensors = [torch.randn(batch, n, heads, d, dtype=torch.float64) for n, d in sizes]
        self.upstream = torch.randn(batch, queries, heads, value, dtype=torch.float64)

    def to(self, device, dtype):
        """Leaves q_content, q_spatial, k_content, spatial keys (one or two), v."""
        tensors = [tensor.to(device, dtype) for tensor in self.tensors]
        if self.dense:
            tensors[3:5] = [dense_spatial_keys(*self.tensors[3:5]).to(device, dtype)]
        return [tensor.requires_grad_() for tensor in tensors]

    def run(self, device, dtype, backend, **options):
        """Output and all gradients."""
        leaves = self.to(device, dtype)
        out = attend(leaves, backend, **options)
        gradients = torch.autograd.grad(out, leaves, self.upstream.to(device, dtype))
        return out.detach(), *gradients


def attend(leaves, backend="eager", **options):
    q_content, q_spatial, k_content, *spatial, v = leaves
    spatial = spatial[0] if len(spatial) == 1 else tuple(spatial)
    widths = (q_content.shape[-1], q_spatial.shape[-1], v.shape[-1])
    reason = (
        op.OPERATION.why_not(backend, v.device, v.dtype, v.device, v.shape, widths) if backend == "native" else None
    )
    if reason is not None:
        pytest.skip(reason)
    return conditional_attention(q_content, q_spatial, k_content, spatial, v, backend=backend, **options)


def assert_within_budget(actual, plain, exact):
    largest = max(truth.abs().max().item() for truth in exact)
    for index, (ours, reference, truth) in enumerate(zip(actual, plain, exact, strict=True)):
        assert ours.dtype == reference.dtype
        assert ours.shape == truth.shape
        error, budget = ((x.double() - truth).square().mean().sqrt().item() for x in (ours, reference))
        # A gradient that is zero up to rounding is measured on the scale of the others. This occurs with one key or one
        # row, since a constant added to all scores changes no weight.
        size = truth.abs().max().item()
        floor = 2 * torch.finfo(ours.dtype).eps * (size if size > 1e-12 * largest else largest)
        assert error <= 2 * budget + floor, (index, error, budget)


def padding_options(padding, case, device):
    if padding == "none":
        return {}
    valid = torch.tensor([[case.height, max(1, case.width - 2)], [(case.height + 1) // 2, case.width]])
    if padding == "valid_cells":
        return {"valid_cells": valid.to(device, torch.int32)}
    scattered = torch.rand(2, case.height * case.width) > 0.6
    return {"key_padding_mask": (scattered | rectangle_padding(valid, case.height, case.width)).to(device)}


SHAPES = {
    "one of everything": {"queries": 1, "height": 1, "width": 1},
    "odd widths": {"content": 20, "spatial": 24, "value": 40},
    "one row": {"queries": 3, "height": 1, "width": 70, "content": 16, "value": 16},
    "one column": {"queries": 67, "height": 37, "width": 1},
    "more than one tile": {"queries": 70, "height": 9, "width": 11, "content": 32, "value": 32, "heads": 1},
    "widest": {"queries": 20, "height": 8, "width": 9, "content": 128, "spatial": 128, "value": 128, "heads": 1},
}  # fmt: skip


@pytest.mark.parametrize("padding", ["none", "valid_cells", "mask"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_match_the_reference(shape, padding, backend, device):
    case = Case(**SHAPES[shape])
    options = padding_options(padding, case, device)
    exact = case.run(device, torch.float64, "eager", **options)
    plain = case.run(device, torch.float32, "eager", **options)
    assert_within_budget(case.run(device, torch.float32, backend, **options), plain, exact)


@pytest.fixture
def triton_of_hopper(device, monkeypatch):
    """Triton's kernels with Hopper's settings for heads of 32 in 16-bit dtypes, which compute scores one tile ahead."""
    triton_attn = pytest.importorskip("conddetr.kernels.attn.triton", reason="the package triton is not installed")
    skip_unless_runs("triton", device)
    if device.type == "cuda":
        pytest.skip("a GPU uses its own settings")

    def settings(architecture, products, width, separable, dropout, crowded):
        # Tiles of 32 keys without dropout, as with many blocks; tiles of 64 with dropout.
        launch = launch_settings(90, "half", 32, separable, dropout, crowded=True)
        assert launch.forward.ahead
        return launch

    launch_settings = triton_attn.launch_settings
    monkeypatch.setattr(triton_attn, "launch_settings", settings)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("padding", ["none", "valid_cells", "mask"])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (9, 15)], ids=lambda size: f"{size[0]}×{size[1]}")
def test_scores_one_tile_ahead(size, padding, dropout_p, triton_of_hopper, device):
    """Fewer keys than a tile, a whole number of tiles, and a partial last tile."""
    case = Case(height=size[0], width=size[1], heads=1)
    options = padding_options(padding, case, device)
    options |= {"dropout_p": dropout_p, "seed": torch.tensor([3], device=device)} if dropout_p else {}
    exact = case.run(device, torch.float64, "eager", **options)
    plain = case.run(device, torch.float32, "eager", **options)
    assert_within_budget(case.run(device, torch.float32, "triton", **options), plain, exact)


def test_scores_one_tile_ahead_ignore_padding(triton_of_hopper, device):
    case = Case(queries=5, height=9, width=15)
    valid = torch.tensor([[7, 8], [0, 15]], dtype=torch.int32, device=device)
    leaves = case.to(device, torch.float32)
    expected = attend(leaves, "eager", valid_cells=valid)
    for index in (2, 5):
        leaves[index] = leaves[index].detach().masked_fill(rectangle_padding(valid, 9, 15)[..., None, None], math.nan)
    torch.testing.assert_close(attend(leaves, "triton", valid_cells=valid), expected)
    assert (expected[1] == 0).all()


@pytest.mark.parametrize("padding", ["none", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dense", [False, True])
def test_dtypes_and_dense_keys(dtype, dense, padding, backend, device):
    case = Case(queries=20, height=5, width=13, content=32, spatial=32, value=32, dense=dense)
    skip_unless_runs(backend, device, dtype)
    options = padding_options(padding, case, device)
    exact = case.run(device, torch.float64, "eager", **options)
    plain = case.run(device, dtype, "eager", **options)
    assert_within_budget(case.run(device, dtype, backend, **options), plain, exact)


def test_scale(backend, device):
    case = Case()
    exact = case.run(device, torch.float64, "eager", scale=0.3)
    plain = case.run(device, torch.float32, "eager", scale=0.3)
    assert_within_budget(case.run(device, torch.float32, backend, scale=0.3), plain, exact)


def test_golden_cross_attention(backend, device):
    golden = read_arrays("p1")
    names = ("ca3_q_content_q20", "sine_proj_l3_q20", "ca3_k_content", "ca3_k_pos", "ca3_v")
    leaves = [golden[name].unflatten(-1, (8, 32)).to(device).requires_grad_() for name in names]
    out = attend(leaves, backend, key_padding_mask=golden["mask"].flatten(1).to(device))
    torch.testing.assert_close(out.flatten(-2).cpu(), golden["ca3_pre_out_proj_q20"], atol=1e-5, rtol=0)
    gradient = torch.randn(2, 20, 256, generator=torch.Generator().manual_seed(7)).to(device)
    grads = [g.cpu() for g in torch.autograd.grad(out.flatten(-2), leaves, gradient)]
    for actual, name in (
        (torch.cat(grads[:2], -1), "ca3_bwd_dquery"),
        (torch.cat(grads[2:4], -1), "ca3_bwd_dkey"),
        (grads[4], "ca3_bwd_dvalue"),
    ):
        torch.testing.assert_close(actual.flatten(-2), golden[name], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["eager", "triton", "native"])
@pytest.mark.parametrize("padding", ["valid_cells", "mask"])
def test_image_without_a_valid_key_gives_zeros_and_zero_gradients(name, padding, device):
    skip_unless_runs(name, device)
    case = Case()
    options = {"valid_cells": torch.tensor([[0, 3], [4, 7]], dtype=torch.int32, device=device)}
    if padding == "mask":
        options = {"key_padding_mask": torch.tensor([[True] * 28, [False] * 28], device=device)}
    for tensor in case.run(device, torch.float32, name, **options):
        assert (tensor[0] == 0).all()
        assert torch.isfinite(tensor).all()
        assert (tensor[1] != 0).any()


@pytest.mark.parametrize("name", ["eager", "triton", "native"])
def test_unchecked_valid_cells_beyond_the_grid_are_clamped(name, device, monkeypatch):
    skip_unless_runs(name, device)
    monkeypatch.setattr("conddetr.kernels.attn.checks.check_rectangles", lambda *rectangles: None)
    case = Case()
    beyond = torch.tensor([[99, -4], [99, 1000]], dtype=torch.int32, device=device)
    clamped = torch.tensor([[4, 0], [4, 7]], dtype=torch.int32, device=device)
    for a, b in zip(*(case.run(device, torch.float32, name, valid_cells=v) for v in (beyond, clamped)), strict=True):
        assert torch.equal(a, b)


def test_strided_inputs(backend, device):
    """Slices of one packed projection, keys in another memory order, a transposed last dimension."""
    case = Case(queries=9)
    packed = [tensor.detach() for tensor in case.to(device, torch.float32)]
    strided = [
        torch.cat([packed[0], packed[0]], -1)[..., :32],
        packed[1].transpose(1, 2).contiguous().transpose(1, 2),
        packed[2].transpose(0, 1).contiguous().transpose(0, 1),
        packed[3].transpose(2, 3).contiguous().transpose(2, 3),
        packed[4][:1].expand(2, -1, -1, -1),
        packed[5].repeat(1, 2, 1, 1)[:, ::2],
    ]
    contiguous = [tensor.contiguous() for tensor in strided]
    assert torch.equal(attend(strided, backend), attend(contiguous, backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["eager", "triton", "native"])
@pytest.mark.parametrize("shared", [(3,), (3, 4)], ids=["rows", "rows and columns"])
def test_spatial_keys_shared_by_all_images(shared, name, dtype, device):
    """All images share one image's rows or columns, which receive the sum of their gradients."""
    skip_unless_runs(name, device, dtype)
    case = Case(queries=9, height=5, width=6, batch=3, heads=3)
    valid = torch.tensor([[5, 4], [0, 6], [2, 6]], dtype=torch.int32, device=device)
    runs = []
    for precision, run in ((torch.float64, "eager"), (dtype, "eager"), (dtype, name)):
        leaves = [
            leaf.detach()[:1].clone().requires_grad_() if index in shared else leaf
            for index, leaf in enumerate(case.to(device, precision))
        ]
        out = attend(leaves, run, valid_cells=valid)
        runs.append((out.detach(), *torch.autograd.grad(out, leaves, case.upstream.to(device, precision))))
    exact, plain, actual = runs
    assert_within_budget(actual, plain, exact)


def test_gradients_of_padding_are_zero_even_if_others_are_nan(backend, device):
    case = Case(queries=40, height=7, width=9)
    valid = torch.tensor([[5, 6], [7, 2]], dtype=torch.int32, device=device)
    leaves, upstream = case.to(device, torch.float32), case.upstream.to(device, torch.float32)
    upstream[:, 3] = math.nan
    gradients = torch.autograd.grad(attend(leaves, backend, valid_cells=valid), leaves, upstream)
    padding = rectangle_padding(valid, 7, 9)
    for index in (2, 5):
        assert (gradients[index][padding] == 0).all()
        assert gradients[index][~padding].isnan().any()


def test_seed_determines_dropout(backend, device):
    case = Case(queries=40, height=6, width=9)
    seeds = torch.tensor([5, 6, 5], device=device)
    before = torch.get_rng_state()
    runs = [case.run(device, torch.float32, backend, dropout_p=0.3, seed=seed) for seed in seeds.split(1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))


def test_repeats_are_bitwise_equal(backend, device):
    case = Case(queries=40, height=6, width=9)
    valid = torch.tensor([[5, 9], [6, 4]], dtype=torch.int32, device=device)
    runs = []
    for _ in range(5):
        torch.manual_seed(3)
        runs.append(case.run(device, torch.float32, backend, valid_cells=valid, dropout_p=0.2))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_offsets_beyond_two_to_the_31(dimension, device):
    """Images, keys and heads lie far apart in memory; on a CPU the pages between them are never touched."""
    case = Case(queries=3, height=2, width=3, batch=3, heads=3)
    expected = case.run(device, torch.float16, "triton")
    leaves = case.to(device, torch.float16)
    for index in (2, 5):
        keys = leaves[index].detach()
        strides = list(keys.stride())
        # The offset of this dimension's last index exceeds 2³¹ elements, its stride does not.
        strides[dimension] = 2**31 // (keys.shape[dimension] - 1) + 16
        count = sum((n - 1) * stride for n, stride in zip(keys.shape, strides, strict=True)) + 1
        on_host = device.type == "cpu"
        memory = torch.from_numpy(np.zeros(count, np.float16)) if on_host else keys.new_zeros(count)
        leaves[index] = memory.as_strided(keys.shape, strides).copy_(keys).requires_grad_()
    out = attend(leaves, "triton")
    gradients = torch.autograd.grad(out, leaves, case.upstream.to(device, torch.float16))
    assert all(torch.equal(a, b) for a, b in zip((out.detach(), *gradients), expected, strict=True))


def dropped_weights(backend, case, device, p, seed):
    """The weights after dropout. The values are an identity matrix, so out[q, n] is weight n."""
    leaves = case.to(device, torch.float32)
    keys = case.height * case.width
    leaves[-1] = torch.eye(keys, device=device)[None, :, None].repeat(2, 1, 2, 1)
    torch.manual_seed(seed)
    return attend(leaves, backend, dropout_p=p)


@pytest.mark.parametrize("name", ["eager", "triton", "native"])
def test_dropout_drops_weights_and_scales_the_rest(name, device):
    skip_unless_runs(name, device)
    case = Case(queries=300, height=8, width=8)
    kept = dropped_weights(name, case, device, 0.0, 0)
    dropped = dropped_weights(name, case, device, 0.25, 0)
    survived = dropped != 0
    # 76,800 independent samples: five standard deviations are 0.008; per query and key, 0.13 with 300 samples.
    assert survived.double().mean().item() == pytest.approx(0.75, abs=0.008)
    assert ((survived.double().mean(dim=1) - 0.75).abs() < 0.14).all()
    torch.testing.assert_close(dropped[survived], kept[survived] / 0.75)
    assert torch.equal(dropped, dropped_weights(name, case, device, 0.25, 0))
    assert not torch.equal(dropped, dropped_weights(name, case, device, 0.25, 1))
    neighbours = survived[:, 1:] == survived[:, :-1]
    assert neighbours.double().mean().item() == pytest.approx(0.75**2 + 0.25**2, abs=0.01)


def test_backward_uses_the_mask_of_forward(backend, device):
    case, p = Case(queries=20, height=5, width=6, value=30), 0.3
    mask = (dropped_weights(backend, case, device, p, seed=5) != 0).permute(0, 2, 1, 3)

    def exact(dtype):
        leaves = case.to(device, dtype)
        query, key = torch.cat(leaves[:2], -1), torch.cat([leaves[2], dense_spatial_keys(*leaves[3:5])], -1)
        weights = attention_weights(query, key, None, 64**-0.5) * mask / (1 - drawn_probability(p))
        out = torch.einsum("bhqn,bnhd->bqhd", weights, leaves[-1])
        return out.detach(), *torch.autograd.grad(out, leaves, case.upstream.to(device, dtype))

    torch.manual_seed(5)
    actual = case.run(device, torch.float32, backend, dropout_p=p)
    assert_within_budget(actual, exact(torch.float32), exact(torch.float64))


@pytest.mark.parametrize("padding", ["none", "valid_cells", "mask"])
@pytest.mark.parametrize("name", ["triton", "native"])
def test_every_backend_drops_the_same_weights(name, padding, device):
    """The seed is the same; all backends count keys in the same way with any padding."""
    skip_unless_runs(name, device)
    case = Case(queries=50, height=7, width=13, value=91, heads=1)
    leaves = case.to(device, torch.float32)
    leaves[-1] = torch.eye(91, device=device)[None, :, None].repeat(2, 1, 1, 1)
    options = {**padding_options(padding, case, device), "dropout_p": 0.3, "seed": torch.tensor([2], device=device)}
    actual, expected = (attend(leaves, backend, **options) for backend in (name, "eager"))
    assert torch.equal(actual != 0, expected != 0)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    visible = attend(leaves, "eager", **padding_options(padding, case, device)) != 0
    assert 0.65 < (actual != 0).double().sum() / visible.double().sum() < 0.75


@pytest.fixture
def restored_cpu():
    """Restores the number of threads and the instruction set."""
    if native.NOT_LOADED is not None:
        pytest.skip(native.NOT_LOADED)
    from conddetr import _C

    threads, level = torch.get_num_threads(), _C.cpu_level()
    yield _C
    torch.set_num_threads(threads)
    _C.use_cpu_level(level)


def test_any_number_of_threads_gives_the_same_bits(restored_cpu):
    case = Case(queries=301, height=9, width=37, batch=1)
    options = {"valid_cells": torch.tensor([[8, 35]], dtype=torch.int32), "dropout_p": 0.1}
    runs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        runs.append(case.run("cpu", torch.float32, "native", **options))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("level", ["plain", "avx2"])
def test_every_instruction_set_matches_the_reference(level, shape, restored_cpu):
    if level not in native.build_info()["cpu_levels"] or not restored_cpu.use_cpu_level(level):
        pytest.skip(f"this processor has no {level}")
    case = Case(**SHAPES[shape])
    options = padding_options("valid_cells", case, "cpu")
    exact = case.run("cpu", torch.float64, "eager", **options)
    plain = case.run("cpu", torch.float32, "eager", **options)
    assert_within_budget(case.run("cpu", torch.float32, "native", **options), plain, exact)
    for actual, truth in zip(case.run("cpu", torch.float64, "native", **options), exact, strict=True):
        torch.testing.assert_close(actual, truth, atol=1e-13, rtol=1e-12)


def kept_weights(keep, options, case):
    """[B, h, Q, N] float64: 1 if the bit of `keep` is set for the key; keys are counted in the valid rectangle."""
    batch, keys = len(keep), case.height * case.width
    ordinals = torch.arange(keys).expand(batch, -1)
    if "valid_cells" in options:
        visible = ~rectangle_padding(options["valid_cells"], case.height, case.width)
        ordinals = (visible.cumsum(-1) - 1).where(visible, 0)
    index = (ordinals // 32)[:, None, :, None].expand(-1, keep.shape[1], -1, keep.shape[3])
    bits = keep.gather(2, index) >> (ordinals % 32)[:, None, :, None]
    return (bits & 1).transpose(2, 3).double()


@pytest.mark.parametrize("padding", ["none", "valid_cells", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", ["plain", "avx2", "avx512"])
def test_every_instruction_set_follows_the_dropout_bits(level, dtype, padding, restored_cpu):
    if level not in native.build_info()["cpu_levels"] or not restored_cpu.use_cpu_level(level):
        pytest.skip(f"this processor has no {level}")
    case, p = Case(queries=50, height=9, width=37), 0.25
    options = padding_options(padding, case, "cpu")
    words = 2 * -(-case.height * case.width // 64)
    keep = torch.randint(-(2**31), 2**31, (2, 2, words, 50)).int()
    mask = kept_weights(keep, options, case) / (1 - p)

    def plain(dtype):
        leaves = case.to("cpu", dtype)
        hidden = options.get("key_padding_mask")
        if "valid_cells" in options:
            hidden = rectangle_padding(options["valid_cells"], case.height, case.width)
        query, key = torch.cat(leaves[:2], -1), torch.cat([leaves[2], dense_spatial_keys(*leaves[3:5])], -1)
        weights = attention_weights(query, key, hidden, 0.1) * mask.to(dtype)
        out = torch.einsum("bhqn,bnhd->bqhd", weights, leaves[-1])
        return out.detach(), *torch.autograd.grad(out, leaves, case.upstream.to(dtype))

    leaves = case.to("cpu", dtype)
    inputs = (*leaves, options.get("valid_cells"), options.get("key_padding_mask"), keep, 0.1, p)
    out, _ = operators.of("native").conditional_attention(*inputs)
    actual = (out.detach(), *torch.autograd.grad(out, leaves, case.upstream.to(dtype)))
    if dtype == torch.float32:
        assert_within_budget(actual, plain(dtype), plain(torch.float64))
    for ours, truth in zip(actual, plain(dtype), strict=True) if dtype == torch.float64 else ():
        torch.testing.assert_close(ours, truth, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("level", ["plain", "avx2", "avx512"])
def test_native_exponential(level, restored_cpu):
    """The stated error bound of weights 2^x. With identity values the output is the weights; key 0 has x = 0."""
    if level not in native.build_info()["cpu_levels"] or not restored_cpu.use_cpu_level(level):
        pytest.skip(f"this processor has no {level}")
    x = torch.cat([torch.zeros(1), -torch.rand(3000) * 100])
    ones, zeros, keys = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.arange(3001)
    outputs = []
    for part in keys.split(1001):
        values = torch.zeros(3001, 1001)
        values[part, torch.arange(len(part))] = 1
        leaves = (ones, zeros, x[None, :, None, None], torch.zeros(1, 3001, 1, 1), values[None, :, None, : len(part)])
        outputs.append(attend(leaves, "native", scale=math.log(2)).flatten())
    weights = torch.cat(outputs).double()
    error = weights / weights[0] / 2 ** x.double() - 1
    # The bound of 2e-7 covers all roundings; each of the two weights is rounded once more.
    assert error.abs().max().item() < 2e-7 + 2 * 6e-8


@pytest.mark.parametrize("dense", [False, True])
def test_native_sums_over_many_keys(dense):
    """The grid of DC5, where one long sum would be less accurate than PyTorch's blocked sums."""
    skip_unless_runs("native", torch.device("cpu"))
    case = Case(queries=300, height=50, width=67, content=32, spatial=32, value=32, batch=1, heads=2, dense=dense)
    exact, plain = (case.run("cpu", dtype, "eager") for dtype in (torch.float64, torch.float32))
    assert_within_budget(case.run("cpu", torch.float32, "native"), plain, exact)


def test_scores_that_rise_late_or_overflow(restored_cpu):
    """The online softmax takes its reference from the first keys; far larger scores must still give correct weights."""
    case = Case(queries=20, height=1, width=300, content=16, spatial=16, value=16, dense=True)
    leaves = [leaf.detach() for leaf in case.to("cpu", torch.float32)]
    leaves[2][:, 150:200] *= 60
    leaves[2][:, 250:] *= 400
    exact = attend([leaf.double() for leaf in leaves])
    score = torch.einsum("bqhd,bnhd->bhqn", leaves[0], leaves[2]).abs().max() * 32**-0.5
    # The rounding of a score is an error of its weight.
    assert (attend(leaves, "native") - exact).abs().max() <= torch.finfo(torch.float32).eps * score * leaves[-1].max()
    leaves[0][0, 3] = math.nan
    out = attend(leaves, "native")
    assert out[0, 3].isnan().all()
    assert out[0, 4:].isfinite().all()


def test_checkpointing_repeats_the_dropout(backend, device):
    case = Case(queries=20)

    def gradients(run):
        leaves = case.to(device, torch.float32)
        torch.manual_seed(1)
        return torch.autograd.grad(run(*leaves).square().sum(), leaves)

    def attention(*leaves):
        return attend(leaves, backend, dropout_p=0.3)

    plain = gradients(attention)
    again = gradients(lambda *leaves: checkpoint(attention, *leaves, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("variant", ["separable", "dense", "dropout"])
def test_operator_registration(variant, backend, device):
    leaves = Case(dense=variant == "dense").to(device, torch.float32)
    if variant == "dense":
        leaves.insert(4, None)
    valid = None if variant == "dense" else torch.tensor([[3, 5], [4, 7]], dtype=torch.int32, device=device)
    keep = dropout_bits(torch.tensor([7], device=device), (2, 2, 2, 5), 0.1) if variant == "dropout" else None
    arguments = (*leaves, valid, None, keep, 0.2, 0.1 if variant == "dropout" else 0.0)
    torch.library.opcheck(operators.of(backend).conditional_attention.default, arguments)


def test_compiles_without_a_graph_break(backend, device):
    leaves = Case().to(device, torch.float32)
    valid = torch.tensor([[3, 5], [4, 7]], dtype=torch.int32, device=device)

    def attention(*leaves):
        return attend(leaves, backend, valid_cells=valid) * 2

    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), attention(*leaves))


@pytest.mark.parametrize("dense", [False, True])
def test_flops_are_counted_as_in_plain_pytorch(dense, backend, device):
    case = Case(content=32, spatial=32, value=32, dense=dense)
    counts = []
    for name in ("eager", backend):
        leaves = case.to(device, torch.float32)
        with FlopCounterMode(display=False) as counter:
            out = attend(leaves, name)
            forward = counter.get_total_flops()
            torch.autograd.grad(out, leaves, case.upstream.to(device, torch.float32))
        counts.append((forward, counter.get_total_flops()))
    # Two images, two heads, 5 queries, 28 keys, 96 channels.
    assert counts[0] == counts[1] == (2 * 2 * 2 * 5 * 28 * 96, 3 * 2 * 2 * 2 * 5 * 28 * 96)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_replays_in_a_cuda_graph(device):
    """After one capture, new inputs give their own result, and every replay samples new dropout."""
    case, new_case = Case(queries=20), Case(queries=20)
    leaves, upstream = case.to(device, torch.float16), case.upstream.to(device, torch.float16)
    kept = torch.zeros((), device=device)

    def step():
        out = attend(leaves, "triton")
        dropped = attend(leaves, "triton", dropout_p=0.5)
        kept.copy_(dropped.sum())
        return out, *torch.autograd.grad(out, leaves, upstream)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = step()
    with torch.no_grad():
        for leaf, new in zip(leaves, new_case.to(device, torch.float16), strict=True):
            leaf.copy_(new)
    sums = []
    for _ in range(3):
        graph.replay()
        sums.append(kept.item())
    assert len(set(sums)) == 3
    new_case.upstream = case.upstream
    assert all(torch.equal(a, b) for a, b in zip(actual, new_case.run(device, torch.float16, "triton"), strict=True))


def loop(q_content, q_spatial, k_content, k_spatial, v, padding, scale):
    """Attention one weight at a time: softmax over the valid keys of the sum of two products."""
    out = torch.zeros(*q_content.shape[:3], v.shape[-1], dtype=v.dtype)
    for b, q, h in torch.cartesian_prod(*(torch.arange(n) for n in q_content.shape[:3])).tolist():
        valid = [n for n in range(v.shape[1]) if not padding[b, n]]
        scores = [q_content[b, q, h] @ k_content[b, n, h] + q_spatial[b, q, h] @ k_spatial[b, n, h] for n in valid]
        exponentials = [math.exp(scale * float(score)) for score in scores]
        for n, exponential in zip(valid, exponentials, strict=True):
            out[b, q, h] += exponential / sum(exponentials) * v[b, n, h]
    return out


@pytest.mark.parametrize("scale", [None, 0.3])
def test_reference_against_a_loop(scale):
    case = Case(height=1, width=5, dense=True)
    leaves = [leaf.detach() for leaf in case.to("cpu", torch.float64)]
    padding = torch.tensor([[False] * 5, [False, True, False, True, True]])
    expected = loop(*leaves, padding, scale or 64**-0.5)
    actual = attend(leaves, key_padding_mask=padding, scale=scale)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["eager", "native"])
@pytest.mark.parametrize("variant", ["separable", "mask", "dense", "dropout"])
def test_gradients_in_float64(variant, name):
    """Against finite differences; `native` has a float64 instantiation for this."""
    skip_unless_runs(name, torch.device("cpu"), torch.float64)
    leaves = Case(queries=2, height=2, width=3, content=3, spatial=2, value=4, heads=1, dense=variant == "dense")
    options = {"valid_cells": torch.tensor([[2, 2], [1, 3]], dtype=torch.int32)} if variant == "separable" else {}
    if variant == "mask":
        options = {"key_padding_mask": torch.tensor([[True, False, False, True, False, False], [False] * 6])}

    def attention(*leaves):
        torch.manual_seed(5)
        return attend(leaves, name, dropout_p=0.3 if variant == "dropout" else 0.0, **options)

    assert torch.autograd.gradcheck(attention, leaves.to("cpu", torch.float64))


def test_separable_keys_are_the_sum_of_rows_and_columns():
    rows, columns = torch.randn(2, 3, 1, 4), torch.randn(2, 5, 1, 4)
    dense = dense_spatial_keys(rows, columns)
    for y in range(3):
        for x in range(5):
            assert torch.equal(dense[:, 5 * y + x], rows[:, y] + columns[:, x])
    padding = rectangle_padding(torch.tensor([[2, 5], [3, 1]]), 3, 5)
    assert padding.tolist() == [[False] * 10 + [True] * 5, ([False] + [True] * 4) * 3]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q_content", (2, 5, 32), r"q_content: expected \[B, Q, h, d\], got shape \(2, 5, 32\)"),
        ("q_spatial", (2, 4, 2, 32), r"q_spatial: expected shape \(2, 5, 2, 32\), got \(2, 4, 2, 32\)"),
        ("k_content", (2, 28, 2, 33), r"k_content: expected shape \(2, 28, 2, 32\), got \(2, 28, 2, 33\)"),
        ("rows", (2, 4, 1, 32), r"rows of k_spatial: expected shape \(2, 4, 2, 32\), got \(2, 4, 1, 32\)"),
        ("columns", (2, 8, 2, 32), "k_spatial: expected rows × columns = 28 keys, got 4 × 8"),
        ("v", (2, 28, 1, 32), r"v: expected shape \(2, 28, 2, 32\), got \(2, 28, 1, 32\)"),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    leaves = Case().to("cpu", torch.float32)
    leaves[NAMES.index(name)] = torch.randn(shape)
    with pytest.raises(ValueError, match=message):
        attend(leaves)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": 1.0}, r"dropout_p: expected a value in \[0, 1\), got 1.0"),
        ({"key_padding_mask": torch.zeros(2, 27, dtype=torch.bool)}, r"key_padding_mask: expected shape \(2, 28\)"),
        ({"key_padding_mask": torch.zeros(2, 28)}, "key_padding_mask: expected dtype torch.bool, got torch.float32"),
        ({"valid_cells": torch.ones(2, 2)}, "valid_cells: expected dtype torch.int32, got torch.float32"),
        ({"valid_cells": torch.ones(3, 2, dtype=torch.int32)}, r"valid_cells: expected shape \(2, 2\), got \(3, 2\)"),
        (
            {"valid_cells": torch.tensor([[4, 7], [5, 7]], dtype=torch.int32)},
            r"valid_cells\[1\]: expected from 0 × 0 to the grid's 4 × 7, got 5 × 7",
        ),
        (
            {"valid_cells": torch.tensor([[-1, 7], [4, 7]], dtype=torch.int32)},
            r"valid_cells\[0\]: expected from 0 × 0 to the grid's 4 × 7, got -1 × 7",
        ),
        (
            {
                "valid_cells": torch.ones(2, 2, dtype=torch.int32),
                "key_padding_mask": torch.zeros(2, 28, dtype=torch.bool),
            },
            "expected at most one of them, got both",
        ),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, r"seed: expected shape \(1,\) and dtype torch.int64, got \(2,\)"),
        ({"seed": torch.zeros(1)}, "seed: expected shape .* got .* torch.float32"),
        ({"backend": "magic"}, "backend: expected one of auto, triton, native, eager, got 'magic'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        attend(Case().to("cpu", torch.float32), **{"backend": "eager", **options})


def test_each_of_pytorchs_switches_enables_tf32():
    from conddetr.kernels.common.triton import precision

    v = torch.empty(1, device="meta")
    assert precision(v) == "ieee"
    torch.set_float32_matmul_precision("high")
    assert precision(v) == "tf32"
    torch.set_float32_matmul_precision("highest")
    assert precision(v) == "ieee"
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert precision(v) == "tf32"
    torch.backends.cuda.matmul.fp32_precision = before


def test_wrong_dtypes_and_widths_are_named(device):
    leaves = Case().to(device, torch.float32)
    with pytest.raises(ValueError, match=r"v: expected dtype torch.float32 like q_content, got torch.float64"):
        attend([*leaves[:5], leaves[5].double()])
    with pytest.raises(RuntimeError, match=r"d, ds, dv must be from 16 to 128, got \(8, 32, 32\)"):
        attend(Case(content=8).to(device, torch.float32), "triton")
    with pytest.raises(RuntimeError, match=r"take float32, float16 and bfloat16, not torch.float64"):
        attend(Case().to(device, torch.float64), "triton")
    valid = torch.ones(2, 2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="valid_cells: needs separable k_spatial"):
        attend(Case(dense=True).to(device, torch.float32), valid_cells=valid)
