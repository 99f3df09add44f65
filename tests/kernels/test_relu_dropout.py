"""ReLU and dropout after a bias: the Triton kernels, and the bias in all implementations."""

import pytest
import torch
import torch.nn.functional as F
from philox import is_kept

from conddetr.kernels import registry, relu_dropout

pytestmark = [pytest.mark.gpu, pytest.mark.compares_numbers]
SEED = 12345


def implementations(device):
    return [x for x in registry.BACKENDS if registry.why_not(x, device, torch.float32) is None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "p"), [((1,), 0.5), ((3, 7, 33), 0.3), ((10, 300), 0.0)])
def test_kernels_match_float64(shape, p, dtype, device):
    """The dropout mask is Philox as published; backward reads it from the output."""
    x, bias = torch.randn(shape, device=device).to(dtype), torch.randn(shape[-1], device=device)
    upstream = torch.randn(shape, device=device).to(dtype)
    kept = is_kept(SEED, x.numel() // shape[-1], shape[-1], p).view(shape).to(device)
    seed = torch.tensor([SEED], device=device)

    def run(function, dtype):
        leaves = x.to(dtype).requires_grad_(), bias.to(torch.promote_types(dtype, bias.dtype)).requires_grad_()
        out = function(*leaves).to(dtype)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))

    def plain(x, bias):
        return (x + bias).to(x.dtype).relu() * kept / (1 - p)

    exact, reference = run(plain, torch.float64), run(plain, dtype)
    actual = run(lambda x, bias: relu_dropout(x, p, "triton", bias, seed), dtype)
    for truth, rounded, ours in zip(exact, reference, actual, strict=True):
        assert ours.dtype == rounded.dtype
        error, budget = ((value.double() - truth).abs().max().item() for value in (ours, rounded))
        assert error <= 2 * budget + 4 * torch.finfo(ours.dtype).eps * truth.abs().max().item()


@pytest.mark.parametrize(("rows", "replicas"), [(3, 5), (45, 2), (0, 3)])
def test_replicas_get_partial_sums(rows, replicas, device):
    """With more programs than rows, and more rows than all programs process in one pass; two blocks of columns."""
    x = torch.randn(rows, 300, device=device)
    bias, seed = torch.randn(300, device=device), torch.tensor([SEED], device=device)
    upstream = torch.randn(rows, 300, device=device)

    def run(bias):
        return torch.autograd.grad(relu_dropout(x, 0.3, "triton", bias, seed), bias, upstream)[0]

    expected = run(bias.clone().requires_grad_())
    partials, again = (run(bias.expand(replicas, -1).requires_grad_()) for _ in range(2))
    assert torch.equal(partials, again), "the same bits every time"
    assert partials.shape == (replicas, 300)
    assert partials.dtype == torch.float32
    assert partials.is_contiguous()
    assert (partials[max(1, rows) :] == 0).all(), "rows of programs that process nothing"
    torch.testing.assert_close(partials.sum(0), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_all_implementations_support_a_bias(p, device):
    """A bias [C] and its replicas; kept elements are the same in every implementation."""
    x, bias = torch.randn(4, 30, device=device), torch.randn(30, device=device)
    kept = F.relu(x + bias) / (1 - p)
    for backend in implementations(device):
        if backend == "native" and device.type == "cuda":
            continue
        for vector in (bias, bias.expand(3, -1)):
            vector = vector.detach().requires_grad_()
            out = relu_dropout(x, p, backend, vector)
            assert 0 < (out > 0).sum() <= (kept > 0).sum()
            torch.testing.assert_close(out, torch.where(out > 0, kept, 0))
            out.sum().backward()
            gradient = vector.grad if vector.dim() == 1 else vector.grad.sum(0)
            torch.testing.assert_close(gradient, (out > 0).sum(0) / (1 - p))


def test_share_dropped_and_repeatability(device):
    p, ones = 0.25, torch.ones(25, 400, device=device)
    masks = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        masks.append(relu_dropout(ones, p, "triton") == 0)
    assert torch.equal(masks[0], masks[2])
    # Five standard deviations of a binomial share.
    count = ones.numel()
    assert abs(masks[0].double().mean().item() - p) < 5 * (p * (1 - p) / count) ** 0.5
    both = (masks[0] & masks[1]).double().mean().item()
    assert abs(both - p * p) < 5 * (p * p * (1 - p * p) / count) ** 0.5, "two calls are independent"


def test_strides_scalars_and_non_finite_values(device):
    x, bias = torch.randn(5, 4, 8, device=device), torch.randn(2, 8, device=device)
    seed = torch.tensor([SEED], device=device)
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.stack([bias, bias], -1)[..., 0]
    assert torch.equal(relu_dropout(transposed, 0.5, "triton", wide, seed), relu_dropout(x, 0.5, "triton", bias, seed))
    scalar = torch.tensor(2.0, device=device, requires_grad=True)
    out = relu_dropout(scalar, 0.5, "triton", seed=seed)
    out.backward()
    assert (out.item(), scalar.grad.item()) in ((0, 0), (4, 2))
    non_finite = torch.tensor([float("nan"), float("inf"), -float("inf")], device=device).repeat(30, 1)
    dropped = relu_dropout(non_finite, 0.3, "triton")
    assert (dropped[:, 0].isnan() | (dropped[:, 0] == 0)).all()
    assert dropped[:, 0].isnan().any()
    assert ((dropped[:, 1] == float("inf")) | (dropped[:, 1] == 0)).all(), "a dropped infinity is zero"
    assert (dropped[:, 2] == 0).all()


def test_operator_registration(device):
    x, bias = (torch.randn(shape, device=device, requires_grad=True) for shape in ((3, 9), (2, 9)))
    torch.library.opcheck(torch.ops.conddetr.relu_dropout.default, (x, bias, torch.tensor([1], device=device), 0.3))


def test_compiles_without_a_graph_break(device):
    x, bias = torch.randn(3, 9, device=device), torch.randn(9, device=device, requires_grad=True)
    seed = torch.tensor([SEED], device=device)

    def call(x, bias):
        return relu_dropout(x, 0.3, "triton", bias, seed)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    results = [(out, *torch.autograd.grad(out.sum(), bias)) for out in (call(x, bias), compiled(x, bias))]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_errors():
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"bias: expected \(4,\) or \(P, 4\), floating, got \(3,\) torch.float32"):
        relu_dropout(x, 0.1, bias=torch.zeros(3))
    with pytest.raises(ValueError, match=r"seed: expected \(1,\) torch.int64, got \(2,\) torch.int64"):
        relu_dropout(x, 0.1, seed=torch.tensor([1, 2]))
