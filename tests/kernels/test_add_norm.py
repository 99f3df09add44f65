"""Fused bias, dropout, residual add and layer norm: values, gradients, dropped elements, partial sums."""

import pytest
import torch
import torch.nn.functional as F
from philox import is_kept

from conddetr.kernels import add_norm, registry

pytestmark = [pytest.mark.gpu, pytest.mark.compares_numbers]
NAMES = ("branch", "residual", "weight", "bias", "branch_bias")
DTYPES = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]
"""Dtypes of branch and residual; training uses the first pair."""
SEED = 2**31 - 5


def case(shape, dtypes, device):
    """Random inputs by name, and positions that all images share."""
    made = {name: torch.randn(shape if index < 2 else shape[-1:]) for index, name in enumerate(NAMES)}
    made["weight"] += 1
    all_dtypes = (*dtypes, torch.float32, torch.float32, torch.float32)
    tensors = {name: x.to(device, dtype) for (name, x), dtype in zip(made.items(), all_dtypes, strict=True)}
    return tensors, torch.randn(1, *shape[1:], device=device, dtype=dtypes[0])


def formula(tensors, position, kept, p, trunks, outs):
    """The operation in plain PyTorch, in float64 or the dtypes of training, with given kept elements."""
    branch, residual, weight, bias, branch_bias = tensors.values()
    added = (branch + branch_bias).to(branch.dtype) * kept / (1 - p)
    z = residual + added.to(branch.dtype)
    y = F.layer_norm(z, weight.shape, weight.to(z.dtype), bias.to(z.dtype))
    out = y.to(branch.dtype)
    return *[y] * trunks, *[out] * outs, out + position


def gradients_of(outputs, leaves, upstream):
    slopes = [slope.to(x.device, x.dtype) for x, slope in zip(outputs, upstream, strict=True)]
    return torch.autograd.grad(outputs, leaves, slopes)


def leaves_of(tensors, dtype=None):
    return {name: x.to(dtype or x.dtype).detach().requires_grad_() for name, x in tensors.items()}


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "p"), [((1, 1, 1), 0.0), ((3, 11, 33), 0.3), ((2, 13, 256), 0.1)])
def test_kernels_match_float64(shape, p, dtypes, device):
    """The dropout mask is Philox as published, in forward and backward."""
    tensors, position = case(shape, dtypes, device)
    kept = is_kept(SEED, shape[0] * shape[1], shape[2], p).view(shape).to(device)
    upstream = torch.randn(4, *shape).bfloat16().double()  # exact in all dtypes

    def run(function, dtype=None):
        leaves = leaves_of(tensors, dtype)
        outputs = function(leaves, position.to(dtype or position.dtype))
        return *(x.detach() for x in outputs), *gradients_of(outputs, tuple(leaves.values()), upstream)

    def ours(leaves, position):
        branch, residual, weight, bias, branch_bias = leaves.values()
        seed = torch.tensor([SEED], device=device)
        settings = {"dropout_p": p, "trunks": 2, "seed": seed, "backend": "triton"}
        return add_norm(branch, residual, weight, bias, branch_bias=branch_bias, position=position, **settings)

    def plain(leaves, position):
        return formula(leaves, position, kept, p, 2, 1)

    exact, reference, actual = run(plain, torch.float64), run(plain), run(ours)
    names = ("trunk", "trunk", "out", "placed", *NAMES)
    for name, truth, rounded, x in zip(names, exact, reference, actual, strict=True):
        assert x.dtype == rounded.dtype, name
        error, budget = ((value.double() - truth).abs().max().item() for value in (x, rounded))
        assert error <= 2 * budget + 4 * torch.finfo(x.dtype).eps * truth.abs().max().item(), name


@pytest.mark.parametrize(("rows", "replicas"), [(3, 5), (45, 2), (45, 1), (0, 3)])
def test_replicas_get_partial_sums(rows, replicas, device):
    """With more programs than rows, and with more rows than all programs process in one pass."""
    tensors, _ = case((rows, 256), DTYPES[0], device)
    upstream = torch.randn(2, rows, 256)

    def run(expand):
        leaves = leaves_of(tensors)
        inputs = {name: expand(x) if x.dim() == 1 else x for name, x in leaves.items()}
        branch, residual, *vectors = inputs.values()
        outputs = add_norm(branch, residual, *vectors[:2], branch_bias=vectors[2], backend="triton")
        return gradients_of(outputs, tuple(inputs.values()), upstream)

    replicated = run(lambda x: x.detach().expand(replicas, -1).requires_grad_())
    again = run(lambda x: x.detach().expand(replicas, -1).requires_grad_())
    for name, expected, partials, same in zip(NAMES, run(lambda x: x), replicated, again, strict=True):
        assert torch.equal(partials, same), "the same bits every time"
        if name in NAMES[:2]:
            assert torch.equal(partials, expected)
            continue
        assert partials.dtype == torch.float32
        assert partials.shape == (replicas, 256)
        assert partials.is_contiguous()
        assert (partials[max(1, rows) :] == 0).all(), "rows of programs that process nothing"
        torch.testing.assert_close(partials.sum(0), expected, atol=1e-5, rtol=1e-5)


def test_share_dropped_and_repeatability(device):
    """With a branch of ones and no residual, dropped elements are the least of their row."""
    p, shape = 0.25, (40, 256)
    ones, zeros = torch.ones(shape, device=device), torch.zeros(shape, device=device)
    vectors = torch.ones(256, device=device), torch.zeros(256, device=device)
    masks = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        (out,) = add_norm(ones, zeros, *vectors, dropout_p=p, outs=0, backend="triton")
        masks.append(out > 0)
    assert torch.equal(masks[0], masks[2])
    # Five standard deviations of a binomial share.
    count = masks[0].numel()
    assert abs((~masks[0]).double().mean().item() - p) < 5 * (p * (1 - p) / count) ** 0.5
    both = (~masks[0] & ~masks[1]).double().mean().item()
    assert abs(both - p * p) < 5 * (p * p * (1 - p * p) / count) ** 0.5, "two calls are independent"


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2]], ids=str)
def test_outputs_share_memory_and_gradients_may_be_missing(dtypes, device):
    tensors, position = case((2, 3, 20), dtypes, device)
    leaves = leaves_of(tensors)
    branch, residual, *vectors = leaves.values()
    outputs = add_norm(branch, residual, *vectors[:2], position=position, trunks=3, outs=3, backend="triton")
    assert [x.dtype for x in outputs] == [dtypes[1]] * 3 + [dtypes[0]] * 4
    assert len({x.data_ptr() for x in outputs}) == (3 if dtypes[0] != dtypes[1] else 2)
    assert len({id(x) for x in outputs}) == 7
    torch.testing.assert_close(outputs[3], outputs[0].to(dtypes[0]), atol=0, rtol=torch.finfo(dtypes[0]).eps)
    inputs = (branch, residual, *vectors[:2])
    together = torch.autograd.grad(sum(x.float().square().sum() for x in outputs), inputs, retain_graph=True)
    each = [torch.autograd.grad(x.float().square().sum(), inputs, retain_graph=True) for x in outputs]
    for total, *parts in zip(together, *each, strict=True):
        tolerance = 4 * torch.finfo(total.dtype).eps * sum(part.abs().max().item() for part in parts)
        torch.testing.assert_close(total, sum(parts), atol=tolerance, rtol=0)


@pytest.mark.parametrize("needed", [("branch",), ("residual",), ("weight",), ("branch_bias",)])
def test_frozen_inputs_get_no_gradient(needed, device):
    tensors, _ = case((4, 20), DTYPES[2], device)
    gradients = []
    for backend in ("triton", "eager"):
        leaves = {name: x.clone().requires_grad_(name in needed) for name, x in tensors.items()}
        branch, residual, *vectors = leaves.values()
        out = add_norm(branch, residual, *vectors[:2], branch_bias=vectors[2], outs=0, backend=backend)[0]
        out.pow(3).sum().backward()
        gradients.append([x.grad for x in leaves.values()])
    for name, ours, reference in zip(NAMES, *gradients, strict=True):
        assert (ours is not None) == (name in needed)
        if ours is not None:
            torch.testing.assert_close(ours, reference, atol=1e-4, rtol=1e-4)


def test_without_gradients_and_with_any_strides(device):
    tensors, position = case((4, 3, 20), DTYPES[0], device)
    branch, residual, weight, bias, branch_bias = tensors.values()
    settings = {"branch_bias": branch_bias, "outs": 2, "backend": "triton"}
    expected = add_norm(branch, residual, weight, bias, position=position, **settings)
    transposed = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (branch, residual)]
    wide = [torch.stack([x, x], 1)[:, 0] for x in (weight, bias)]
    per_image = position.expand(4, -1, -1)
    for actual in (
        add_norm(*transposed, *wide, position=per_image, **settings),
        add_norm(branch, residual.clone().requires_grad_(), weight, bias, position=position, **settings),
    ):
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    saved = torch.ops.conddetr.add_norm(branch, residual, weight, bias, None, None, None, 0.0, 1e-5, True, False, False)
    assert [x.numel() for x in saved] == [240, 0, 0, 0, 0], "no unused output is written"


def test_reference_is_pytorchs(device):
    tensors, position = case((2, 3, 20), (torch.float32, torch.float32), device)
    branch, residual, weight, bias, branch_bias = tensors.values()
    torch.manual_seed(3)
    settings = {"branch_bias": branch_bias, "position": position, "dropout_p": 0.4, "eps": 0.1, "backend": "eager"}
    actual = add_norm(branch, residual, weight.expand(3, -1), bias, trunks=1, outs=2, **settings)
    torch.manual_seed(3)
    y = F.layer_norm(residual + F.dropout(branch + branch_bias, 0.4), (20,), weight, bias, 0.1)
    for x, expected in zip(actual, (y, y, y, y + position), strict=True):
        assert torch.equal(x, expected)


def test_operator_registration(device):
    tensors, position = case((2, 3, 9), DTYPES[2], device)
    inputs = leaves_of(tensors).values()
    rest = (torch.tensor([1], device=device), 0.5, 1e-5, True, False, True)
    torch.library.opcheck(torch.ops.conddetr.add_norm.default, (*inputs, position, *rest))


def test_compiles_without_a_graph_break(device):
    tensors, position = case((2, 3, 20), DTYPES[0], device)
    upstream = torch.randn(5, 2, 3, 20)

    def run(function):
        leaves = leaves_of(tensors)
        replicas = [leaves[name].detach().expand(2, -1).requires_grad_() for name in NAMES[2:]]
        inputs = (leaves["branch"], leaves["residual"], *replicas)
        outputs = function(*inputs)
        return *outputs, *gradients_of(outputs, inputs, upstream)

    def call(branch, residual, weight, bias, branch_bias):
        settings = {"branch_bias": branch_bias, "position": position, "backend": "triton"}
        return add_norm(branch, residual, weight, bias, trunks=2, outs=2, **settings)

    compiled = run(torch.compile(call, backend="aot_eager", fullgraph=True))
    for actual, expected in zip(compiled, run(call), strict=True):
        # Gradients are summed one by one, with a rounding each time.
        torch.testing.assert_close(actual, expected, atol=0.1, rtol=0.02)


def test_errors(device):
    x, vector = torch.zeros(2, 3, 4), torch.zeros(4)
    valid = (x, x, vector, vector)
    with pytest.raises(ValueError, match=r"residual: expected \(2, 3, 4\), floating, like branch, got \(3, 4\)"):
        add_norm(x, x[0], vector, vector)
    with pytest.raises(ValueError, match=r"weight: expected \(4,\) or \(P, 4\), floating, got \(3,\) torch.float32"):
        add_norm(x, x, vector[:3], vector)
    with pytest.raises(ValueError, match=r"bias: expected 2 replicas, got 3"):
        add_norm(x, x, vector.expand(2, -1), vector.expand(3, -1))
    with pytest.raises(ValueError, match=r"position: expected \(2, 3, 4\) or \(1, 3, 4\), floating, got \(3, 4\)"):
        add_norm(*valid, position=x[0])
    with pytest.raises(ValueError, match=r"seed: expected \(1,\) torch.int64, got \(\) torch.int64"):
        add_norm(*valid, seed=torch.tensor(1))
    with pytest.raises(ValueError, match=r"dropout_p: expected a probability in \[0, 1\), got 1.0"):
        add_norm(*valid, dropout_p=1.0)
    with pytest.raises(ValueError, match="trunks, outs: expected at least 0 each, and one output in all, got 0 and 0"):
        add_norm(*valid, trunks=0, outs=0)
    with pytest.raises(registry.BackendError, match="no kernels of this backend"):
        add_norm(*valid, backend="native")
    wide, vector = torch.zeros(2, 1025, device=device), torch.ones(1025, device=device)
    with pytest.raises(registry.BackendError, match="up to 1024 channels, got 1025"):
        add_norm(wide, wide, vector, vector, backend="triton")
    assert len(add_norm(wide, wide, vector, vector)) == 2, "auto falls back to PyTorch"
