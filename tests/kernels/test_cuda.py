"""The CUDA kernels, on a GPU or, where there is none, unchanged under an emulator on the CPU.

tests/kernels/emulator stands in for warps, shared memory and asynchronous copies, in random order.
"""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from conddetr.kernels import conditional_attention, conditional_spatial_query, native, registry, sine_embedding
from conddetr.kernels.attn import op as attention_op
from conddetr.kernels.sine import op as sine_op

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "emulator"


@pytest.fixture(scope="module")
def library():
    """The operators of csrc/*/cuda.cu as torch.ops.conddetr_emulated, compiled again only after a change."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulator needs g++")
    sources = sorted(path for folder in (ROOT / "csrc", EMULATOR) for path in folder.rglob("*.*"))
    content = b"".join(path.read_bytes() for path in sources) + torch.__version__.encode()
    found = ROOT / "build" / f"emulator-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not found.exists():
        found.parent.mkdir(exist_ok=True)
        torch_folder = Path(torch.__file__).parent
        partial = found.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++20", "-O2", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared"]
        flags += ["-Wno-unknown-pragmas", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
        flags += [f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}", f"-I{torch_folder / 'include'}"]
        source = [str(EMULATOR / "emulator.cpp"), "-o", str(partial), f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
        run = subprocess.run([*compiler.split(), *flags, *source], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        partial.rename(found)
    torch.ops.load_library(str(found))
    for op in (attention_op, sine_op):
        op._register("conddetr_emulated")
    return torch.ops.conddetr_emulated


@pytest.fixture
def device(request, monkeypatch):
    """Where the CUDA kernels run as backend `native`: the GPU, or the CPU with their emulator."""
    if torch.cuda.is_available():
        reason = native.why_not(torch.device("cuda"), torch.float32)
        if reason is not None:
            pytest.skip(reason)
        return torch.device("cuda")
    library = request.getfixturevalue("library")
    monkeypatch.setattr(native, "why_not", lambda device, dtype: None)
    monkeypatch.setattr(registry, "operators", lambda backend: library if backend == "native" else torch.ops.conddetr)
    return torch.device("cpu")


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
    """Twice the error of plain PyTorch in the same dtype at most, both against float64."""
    leaves = [leaf.to(dtype).double() for leaf in leaves]
    exact, plain, found = (
        run(leaves, *which, device, **options)
        for which in ((torch.float64, "eager"), (dtype, "eager"), (dtype, "native"))
    )
    scale = max(truth.abs().max() for truth in exact)
    for index, (ours, theirs, truth) in enumerate(zip(found, plain, exact, strict=True)):
        # A gradient that is zero but for float64's rounding (one row: all keys share it) is held to the others' scale.
        largest = truth.abs().max() if truth.abs().max() > 1e-12 * scale else scale
        error, budget = ((x.double() - truth).abs().max() for x in (ours, theirs))
        assert error <= 2 * budget + 2 * torch.finfo(dtype).eps * largest, (index, error, budget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("queries", "height", "width", "valid"),
    [
        (1, 1, 1, None),
        (70, 9, 11, [[9, 11], [4, 9]]),
        (17, 3, 21, [[3, 17], [2, 21]]),  # octets of a tile share a row
        (5, 37, 1, [[37, 1], [0, 1]]),
        (3, 1, 70, None),
        (3, 4, 7, [[4, 0], [4, 7]]),
    ],
)
def test_separable_keys(queries, height, width, valid, dtype, device):
    valid = None if valid is None else torch.tensor(valid, dtype=torch.int32)
    check(make_leaves(queries, height, width), dtype, device, valid_hw=valid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dense", [False, True])
def test_masks_heads_and_scale(dense, dtype, device):
    mask = torch.rand(2, 5 * 13) > 0.6
    mask[1] = torch.arange(65) != 64
    check(make_leaves(7, 5, 13, heads=2, dense=dense), dtype, device, key_padding_mask=mask, scale=-0.2)


def test_scale_zero_is_the_mean(device):
    leaves = make_leaves(3, 2, 5)
    valid = torch.tensor([[2, 3], [1, 5]], dtype=torch.int32)
    out = run(leaves, torch.float32, "native", device, valid_hw=valid, scale=0.0)[0]
    grid = leaves[-1].float().unflatten(1, (2, 5))
    expected = torch.stack([grid[0, :2, :3].mean((0, 1)), grid[1, :1].mean((0, 1))])[:, None].expand_as(out)
    torch.testing.assert_close(out, expected)


def test_nothing_visible_gives_zeros(device):
    for options in (
        {"valid_hw": torch.tensor([[0, 3], [4, 0]], dtype=torch.int32)},
        {"key_padding_mask": torch.ones(2, 28, dtype=torch.bool)},
    ):
        assert not any(tensor.any() for tensor in run(make_leaves(5, 4, 7), torch.float32, "native", device, **options))


def test_valid_hw_beyond_the_grid_is_clamped(device, monkeypatch):
    """A rectangle on a GPU is not looked at before the kernel does."""
    monkeypatch.setattr(attention_op, "_check_rectangles", lambda *_: None)
    leaves = make_leaves(3, 4, 7)
    wild, tame = (torch.tensor(valid, dtype=torch.int32) for valid in ([[99, -4], [99, 1000]], [[4, 0], [4, 7]]))
    results = [run(leaves, torch.float32, "native", device, valid_hw=valid) for valid in (wild, tame)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dense", [False, True])
def test_dropout_is_that_of_triton(dense, device):
    reason = registry.why_not("triton", device, torch.float32, is_auto=False)
    if reason is not None:
        pytest.skip(reason)
    leaves = make_leaves(19, 5, 7, heads=2, dense=dense)
    options = {} if dense else {"valid_hw": torch.tensor([[5, 5], [3, 7]], dtype=torch.int32)}
    results = []
    for backend in ("native", "triton"):
        torch.manual_seed(3)
        results.append(run(leaves, torch.float32, backend, device, dropout_p=0.3, **options))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=1e-5)


def test_order_of_threads_changes_nothing(device):
    """Runs differ in which warp and lane goes first and when copies arrive: equal bits mean no race."""
    leaves = make_leaves(66, 9, 11, batch=1)
    first = run(leaves, torch.bfloat16, "native", device)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(leaves, torch.bfloat16, "native", device), strict=True))


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


def test_too_large_a_grid_is_refused(device):
    with pytest.raises(RuntimeError, match=r"a grid of 1 × 4000 needs .* use backend=\"triton\""):
        run(make_leaves(1, 1, 4000, batch=1), torch.float32, "native", device)


def test_other_widths_are_refused():
    reason = attention_op._why_not_widths("native", torch.device("cuda"), (32, 16, 32))
    assert reason == "on a GPU d, ds, dv must be 32, got (32, 16, 32) (triton takes 16 to 128)."
    assert attention_op._why_not_widths("native", torch.device("cuda"), (32, 32, 32)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "dim"), [(1, 4), (5, 20), (9, 256)])
def test_sine_embedding(count, dim, dtype, device):
    points, transform, upstream = (torch.rand(count, n).to(device, torch.bfloat16) for n in (2, dim, dim))

    def both(dtype, backend):
        p, t = points.to(dtype).requires_grad_(), transform.to(dtype).requires_grad_()
        outs = sine_embedding(p, dim, backend=backend), conditional_spatial_query(p, t, backend=backend)
        return [*(out.detach() for out in outs), *torch.autograd.grad(sum(outs), (p, t), upstream.to(dtype))]

    exact, plain, found = both(torch.float64, "eager"), both(dtype, "eager"), both(dtype, "native")
    for ours, theirs, truth in zip(found, plain, exact, strict=True):
        error, budget = ((x.double() - truth).abs().max() for x in (ours, theirs))
        assert error <= 2 * budget + 4 * torch.finfo(dtype).eps * truth.abs().max()


def test_no_points(device):
    assert sine_embedding(torch.empty(0, 2, device=device), 8, backend="native").shape == (0, 8)
