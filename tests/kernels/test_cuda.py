"""The CUDA kernels, on a GPU or, without one, unchanged under an emulator on the CPU.

tests/kernels/emulator emulates warps, shared memory, asynchronous copies and Hopper's products, in random order.
"""

import hashlib
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from conddetr.kernels import (
    conditional_attention,
    conditional_spatial_query,
    native,
    operators,
    registry,
    sine_embedding,
)
from conddetr.kernels.attn import checks as attention_checks
from conddetr.kernels.attn import dense_spatial_keys, rectangle_padding
from conddetr.kernels.attn import op as attention_op

pytestmark = [pytest.mark.gpu, pytest.mark.compares_numbers]

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "emulator"


@pytest.fixture(scope="module")
def library():
    """The operators of csrc/*/cuda.cu as torch.ops.conddetr_emulated, recompiled only after a change."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulator needs g++")
    sources = sorted(path for folder in (ROOT / "csrc", EMULATOR) for path in folder.rglob("*.*"))
    content = b"".join(path.read_bytes() for path in sources) + torch.__version__.encode()
    built = ROOT / "build" / f"emulator-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not built.exists():
        built.parent.mkdir(exist_ok=True)
        torch_folder = Path(torch.__file__).parent
        partial = built.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++20", "-O2", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared"]
        flags += ["-fvisibility=hidden", "-Wno-unknown-pragmas", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
        flags += [f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}", f"-I{torch_folder / 'include'}"]
        source = [str(EMULATOR / "emulator.cpp"), "-o", str(partial), f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
        run = subprocess.run([*compiler.split(), *flags, *source], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        partial.rename(built)
    torch.ops.load_library(str(built))
    for name in ("conditional_attention", "sine_embedding"):
        operators.describe("conddetr_emulated", name)
        operators.describe("conddetr_emulated", f"{name}_backward")
    operators.describe("conddetr_emulated", "dropout_bits")
    return torch.ops.conddetr_emulated


@pytest.fixture
def device(request, monkeypatch):
    """The device on which the CUDA kernels run as backend `native`: the GPU, or the CPU with their emulator."""
    if torch.cuda.is_available():
        reason = native.why_not(torch.device("cuda"), torch.float32)
        if reason is not None:
            pytest.skip(reason)
        return torch.device("cuda")
    library = request.getfixturevalue("library")
    monkeypatch.setattr(native, "why_not", lambda device, dtype: None)
    monkeypatch.setattr(operators, "of", lambda backend: library if backend == "native" else torch.ops.conddetr)
    return torch.device("cpu")


@pytest.fixture
def kernel(request, device, monkeypatch):
    """The forward kernel for 16-bit dtypes: `generic`, or `hopper`, which the emulator always supports."""
    is_hopper = device.type == "cpu" or torch.cuda.get_device_capability()[0] == 9
    if request.param == "hopper" and not is_hopper:
        pytest.skip("this GPU is not a Hopper")
    monkeypatch.setenv("CONDDETR_HOPPER", str(int(request.param == "hopper")))
    return request.param


FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
KERNELS = [(FLOAT, "generic"), (BFLOAT, "generic"), (BFLOAT, "hopper")]


def make_leaves(queries, height, width, batch=2, heads=1, dense=False):
    """q_content, q_spatial, k_content, rows, columns (or dense spatial keys), v in float64."""
    keys = height * width
    items = [queries, queries, keys, *([keys] if dense else [height, width]), keys]
    return [torch.randn(batch, n, heads, 32, dtype=torch.float64) for n in items]


def run(leaves, dtype, backend, device, **options):
    """Output and all gradients."""
    leaves = [leaf.to(device, dtype).requires_grad_() for leaf in leaves]
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    q_content, q_spatial, k_content, *spatial, v = leaves
    spatial = tuple(spatial) if len(spatial) == 2 else spatial[0]
    out = conditional_attention(q_content, q_spatial, k_content, spatial, v, backend=backend, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    upstream = upstream.to(torch.bfloat16).to(device, dtype)
    return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, leaves, upstream))]


def check(leaves, dtype, device, **options):
    """Check that errors are at most twice those of plain PyTorch in the same dtype, both against float64."""
    leaves = [leaf.to(dtype).double() for leaf in leaves]
    exact, plain, actual = (
        run(leaves, *mode, device, **options)
        for mode in ((torch.float64, "eager"), (dtype, "eager"), (dtype, "native"))
    )
    scale = max(truth.abs().max() for truth in exact)
    for index, (ours, reference, truth) in enumerate(zip(actual, plain, exact, strict=True)):
        # A gradient that is zero up to float64's rounding is measured on the scale of the others. This occurs with one
        # row, which all keys share.
        largest = truth.abs().max() if truth.abs().max() > 1e-12 * scale else scale
        error, budget = ((x.double() - truth).abs().max() for x in (ours, reference))
        assert error <= 2 * budget + 2 * torch.finfo(dtype).eps * largest, (index, error, budget)


@pytest.mark.parametrize(("dtype", "kernel"), KERNELS, indirect=["kernel"])
@pytest.mark.parametrize(
    ("queries", "height", "width", "valid"),
    [
        (1, 1, 1, None),
        (70, 9, 11, [[9, 11], [4, 9]]),
        (130, 10, 16, [[10, 16], [8, 8]]),  # full tiles, and queries in a second block
        (17, 3, 21, [[3, 17], [2, 21]]),  # groups of eight keys of a tile share a row
        (5, 37, 1, [[37, 1], [0, 1]]),
        (3, 1, 70, None),
        (3, 4, 7, [[4, 0], [4, 7]]),
    ],
)
def test_separable_keys(queries, height, width, valid, dtype, kernel, device):
    valid = None if valid is None else torch.tensor(valid, dtype=torch.int32)
    check(make_leaves(queries, height, width), dtype, device, valid_cells=valid)


@pytest.mark.parametrize(("dtype", "kernel"), [*KERNELS, (HALF, "generic"), (HALF, "hopper")], indirect=["kernel"])
@pytest.mark.parametrize("dense", [False, True])
def test_masks_heads_and_scale(dense, dtype, kernel, device):
    mask = torch.rand(2, 5 * 13) > 0.6
    mask[1] = torch.arange(65) != 64
    check(make_leaves(7, 5, 13, heads=2, dense=dense), dtype, device, key_padding_mask=mask, scale=-0.2)


@pytest.mark.parametrize(("dtype", "kernel"), KERNELS, indirect=["kernel"])
def test_scale_zero_is_the_mean(dtype, kernel, device):
    leaves = make_leaves(3, 2, 5)
    valid = torch.tensor([[2, 3], [1, 5]], dtype=torch.int32)
    out = run(leaves, dtype, "native", device, valid_cells=valid, scale=0.0)[0]
    grid = leaves[-1].to(dtype).float().unflatten(1, (2, 5))
    expected = torch.stack([grid[0, :2, :3].mean((0, 1)), grid[1, :1].mean((0, 1))])[:, None].expand_as(out)
    torch.testing.assert_close(out, expected.to(dtype))


@pytest.mark.parametrize(("dtype", "kernel"), KERNELS, indirect=["kernel"])
def test_image_without_a_valid_key_gives_zeros(dtype, kernel, device):
    for options in (
        {"valid_cells": torch.tensor([[0, 3], [4, 0]], dtype=torch.int32)},
        {"key_padding_mask": torch.ones(2, 28, dtype=torch.bool)},
    ):
        assert not any(tensor.any() for tensor in run(make_leaves(5, 4, 7), dtype, "native", device, **options))


@pytest.mark.parametrize(("dtype", "kernel"), KERNELS, indirect=["kernel"])
def test_valid_cells_beyond_the_grid_are_clamped(dtype, kernel, device, monkeypatch):
    """The host does not check rectangles on a GPU, so the kernel clamps them."""
    monkeypatch.setattr(attention_checks, "check_rectangles", lambda *_: None)
    leaves = make_leaves(3, 4, 7)
    beyond, clamped = (torch.tensor(valid, dtype=torch.int32) for valid in ([[99, -4], [99, 1000]], [[4, 0], [4, 7]]))
    results = [run(leaves, dtype, "native", device, valid_cells=valid) for valid in (beyond, clamped)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dense", [False, True])
def test_dropout_equals_that_of_triton(dense, device):
    reason = registry.why_not("triton", device, torch.float32)
    if reason is not None:
        pytest.skip(reason)
    leaves = make_leaves(19, 5, 7, heads=2, dense=dense)
    options = {} if dense else {"valid_cells": torch.tensor([[5, 5], [3, 7]], dtype=torch.int32)}
    results = []
    for backend in ("native", "triton"):
        torch.manual_seed(3)
        results.append(run(leaves, torch.float32, backend, device, dropout_p=0.3, **options))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["generic", "hopper"], indirect=True)
def test_gradients_overflow_float16_at_the_same_elements_as_in_triton(kernel, device):
    reason = registry.why_not("triton", device, torch.float16)
    if reason is not None:
        pytest.skip(reason)
    leaves = make_leaves(19, 5, 7, heads=2)
    # Only some gradients of one image overflow.
    leaves[-1][0] *= 30000
    actual, expected = (run(leaves, torch.float16, backend, device) for backend in ("native", "triton"))
    for ours, reference in zip(actual, expected, strict=True):
        # Close to the largest number, rounding decides.
        is_near = ((reference.abs() > 6e4) & reference.isfinite()) | ((ours.abs() > 6e4) & ours.isfinite())
        assert torch.equal((ours.isfinite() | is_near), (reference.isfinite() | is_near))
        torch.testing.assert_close(ours[1], reference[1], atol=2e-3, rtol=2e-2)
    assert any((~x.isfinite()).any() and x[0].isfinite().any() for x in expected)


def unpacked(keep, valid, height, width):
    """[B, heads, Q, N] bool: bit j of word w belongs to ordinal 32 w + j of the valid rectangle; False outside."""
    bits = (keep[..., None] >> torch.arange(32) & 1).bool().transpose(2, 3).flatten(3)
    kept = torch.zeros(*bits.shape[:3], height, width, dtype=torch.bool)
    for image, (valid_height, valid_width) in enumerate(valid):
        rectangle = bits[image, ..., : valid_height * valid_width].unflatten(-1, (valid_height, valid_width))
        kept[image, ..., :valid_height, :valid_width] = rectangle
    return kept.flatten(3)


@pytest.mark.parametrize(("dtype", "kernel"), KERNELS, indirect=["kernel"])
@pytest.mark.parametrize("dense", [False, True])
def test_dropout_bits(dense, dtype, kernel, device):
    """Forward and backward drop exactly the weights whose bit is not set."""
    height, width = (1, 143) if dense else (11, 13)
    valid = [[height, width], [height, width] if dense else [9, 11]]
    leaves = [leaf.to(dtype).double() for leaf in make_leaves(70, height, width, heads=2, dense=dense)]
    keep = torch.randint(-(2**31), 2**31, (2, 2, 6, 70), dtype=torch.int32)
    kept, upstream = unpacked(keep, valid, height, width), torch.randn(2, 70, 2, 32).to(dtype)
    valid_cells = None if dense else torch.tensor(valid, dtype=torch.int32)

    def plain(q_content, q_spatial, k_content, *spatial, v):
        dense_keys = spatial[0] if dense else dense_spatial_keys(*spatial)
        pairs = ((q_content, k_content), (q_spatial, dense_keys))
        scores = sum(torch.einsum("bqhd,bnhd->bhqn", query, key) for query, key in pairs) / 8
        if not dense:
            scores = scores.masked_fill(rectangle_padding(valid_cells, height, width)[:, None, None], -torch.inf)
        return torch.einsum("bhqn,bnhd->bqhd", scores.softmax(-1) * kept / 0.75, v)

    def native_op(*tensors, v):
        tensors = [*tensors, None] if dense else tensors
        masks = [None if mask is None else mask.to(device) for mask in (valid_cells, None, keep)]
        return operators.of("native").conditional_attention(*tensors, v, *masks, 1 / 8, 0.25)[0]

    def both(attend, dtype, device="cpu"):
        parts = [leaf.to(device, dtype).requires_grad_() for leaf in leaves]
        out = attend(*parts[:-1], v=parts[-1])
        return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, parts, upstream.to(device, dtype)))]

    exact, rounded, actual = both(plain, torch.float64), both(plain, dtype), both(native_op, dtype, device)
    for ours, reference, truth in zip(actual, rounded, exact, strict=True):
        error, budget = ((x.double() - truth).abs().max() for x in (ours, reference))
        assert error <= 2 * budget + 2 * torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("kernel", ["generic", "hopper"], indirect=True)
def test_order_of_threads_changes_nothing(kernel, device):
    """Runs differ in the order of warps and lanes and in the time at which copies arrive; equal bits mean no race."""
    leaves = make_leaves(66, 9, 11, batch=1)
    first = run(leaves, torch.bfloat16, "native", device)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(leaves, torch.bfloat16, "native", device), strict=True))


def lse_of(leaves, dtype, valid=None, padding=None, scale=64**-0.5):
    """log2 of the sum of exp(scores) by plain PyTorch, [B, heads, Q]."""
    q_content, q_spatial, k_content, *spatial, _ = (leaf.to(dtype) for leaf in leaves)
    if len(spatial) == 2 and valid is not None:
        padding = rectangle_padding(valid, spatial[0].shape[1], spatial[1].shape[1])
    dense = dense_spatial_keys(*spatial) if len(spatial) == 2 else spatial[0]
    pairs = ((q_content, k_content), (q_spatial, dense))
    scores = scale * sum(torch.einsum("bqhd,bnhd->bhqn", query, key) for query, key in pairs)
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None], -torch.inf)
    return scores.logsumexp(-1) / math.log(2)


def forward(leaves, dtype, device, valid=None, padding=None, scale=64**-0.5, dropout_p=0.0):
    """Output and lse of the native operator itself."""
    tensors = [leaf.to(device, dtype) for leaf in leaves]
    if len(tensors) == 5:
        tensors.insert(4, None)
    words = (tensors[0].shape[0], tensors[0].shape[2], -(-tensors[2].shape[1] // 64) * 2, tensors[0].shape[1])
    generator = torch.Generator().manual_seed(7)
    keep = torch.randint(-(2**31), 2**31, words, dtype=torch.int32, generator=generator) if dropout_p else None
    masks = [mask if mask is None else mask.to(device) for mask in (valid, padding, keep)]
    outputs = operators.of("native").conditional_attention(*tensors, *masks, scale, dropout_p)
    return [tensor.cpu() for tensor in outputs]


@pytest.mark.parametrize(("dtype", "kernel"), [*KERNELS, (HALF, "hopper")], indirect=["kernel"])
@pytest.mark.parametrize("dense", [False, True])
def test_lse(dense, dtype, kernel, device):
    leaves = [leaf.to(dtype).double() for leaf in make_leaves(67, 7, 13, heads=2, dense=dense)]
    options = {"padding": torch.rand(2, 91) > 0.7}
    if not dense:
        options = {"valid": torch.tensor([[7, 12], [3, 13]], dtype=torch.int32), "scale": -0.3}
    exact, plain = (lse_of(leaves, precision, **options) for precision in (torch.float64, dtype))
    error, budget = ((x.double() - exact).abs().max() for x in (forward(leaves, dtype, device, **options)[1], plain))
    assert error <= 2 * budget + 4 * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("dense", [False, True])
def test_dropout_on_hopper_equals_that_of_the_generic_kernel(dense, device, monkeypatch):
    """If a channel's values are one for a single key and zero for the others, its output is that key's weight."""
    if device.type == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("this GPU is not a Hopper")
    leaves = make_leaves(70, 5, 13, heads=2, dense=dense)
    valid = None if dense else torch.tensor([[5, 13], [3, 12]], dtype=torch.int32)
    for first in range(0, 65, 32):
        keys = torch.arange(first, min(first + 32, 65))
        leaves[-1] = torch.zeros_like(leaves[-1])
        leaves[-1][:, keys, :, keys - first] = 1
        kept = []
        for allowed in "01":
            monkeypatch.setenv("CONDDETR_HOPPER", allowed)
            kept.append(forward(leaves, BFLOAT, device, valid, dropout_p=0.3)[0] != 0)
        assert torch.equal(*kept)
        assert 0.1 < kept[0][..., : len(keys)].float().mean() < 0.9


def test_strided_and_unaligned_inputs(device):
    leaves = [leaf.to(device, torch.float32) for leaf in make_leaves(9, 3, 5, heads=2)]
    unaligned = torch.zeros(leaves[2].numel() + 1, device=device)[1:].view_as(leaves[2]).copy_(leaves[2])
    strided = [
        torch.cat([leaves[0], leaves[0]], -1)[..., :32],
        leaves[1].transpose(1, 2).contiguous().transpose(1, 2),
        unaligned,
        leaves[3].transpose(2, 3).contiguous().transpose(2, 3),
        leaves[4][:1].expand(2, -1, -1, -1),
        torch.nn.functional.pad(leaves[5], (0, 1))[..., :32],
    ]

    def forward(leaves):
        return conditional_attention(*leaves[:3], tuple(leaves[3:5]), leaves[5], backend="native")

    assert torch.equal(forward(strided), forward([leaf.contiguous().clone() for leaf in strided]))


def test_too_large_grid_is_refused(device):
    with pytest.raises(RuntimeError, match=r"a grid of 1 × 4000 needs .* use backend=\"triton\""):
        run(make_leaves(1, 1, 4000, batch=1), torch.float32, "native", device)


def test_other_widths_are_refused():
    device_and_shape = torch.device("cuda"), (1, 1, 1, 32)
    reason = attention_op.OPERATION.kernels["native"].why_not(*device_and_shape, (32, 16, 32))
    assert reason == "on a GPU d, ds, dv must be 32, got (32, 16, 32) (triton takes 16 to 128)."
    assert attention_op.OPERATION.kernels["native"].why_not(*device_and_shape, (32, 32, 32)) is None


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_too_many_images_or_heads_for_a_launch_are_refused(backend):
    """Images and heads are dimensions of a launch, which are limited to 65535 blocks."""

    def why_not(device: str, batch: int, heads: int) -> str | None:
        shape = (batch, 1, heads, 32)
        return attention_op.OPERATION.kernels[backend].why_not(torch.device(device), shape, (32, 32, 32))

    assert why_not("cuda", 65535, 65535) is None
    assert why_not("cpu", 65536, 1) is None
    for batch, heads in ((65536, 8), (1, 65536)):
        reason = f"on a GPU images and heads must be fewer than 65536, got {batch} and {heads}."
        assert why_not("cuda", batch, heads) == reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "dim"), [(1, 4), (5, 20), (9, 256)])
def test_sine_embedding(count, dim, dtype, device):
    points, transform, upstream = (torch.rand(count, n).to(device, torch.bfloat16) for n in (2, dim, dim))

    def both(dtype, backend):
        p, t = points.to(dtype).requires_grad_(), transform.to(dtype).requires_grad_()
        outs = sine_embedding(p, dim, backend=backend), conditional_spatial_query(p, t, backend=backend)
        return [*(out.detach() for out in outs), *torch.autograd.grad(sum(outs), (p, t), upstream.to(dtype))]

    exact, plain, actual = both(torch.float64, "eager"), both(dtype, "eager"), both(dtype, "native")
    for ours, reference, truth in zip(actual, plain, exact, strict=True):
        error, budget = ((x.double() - truth).abs().max() for x in (ours, reference))
        assert error <= 2 * budget + 4 * torch.finfo(dtype).eps * truth.abs().max()


def test_no_points(device):
    assert sine_embedding(torch.empty(0, 2, device=device), 8, backend="native").shape == (0, 8)
