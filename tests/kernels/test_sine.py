"""Sine embedding: against the official values and the paper's formula, and the kernels against the reference."""

import math

import pytest
import torch
from golden_rule import read_arrays

from conddetr.kernels import conditional_spatial_query, native, operators, registry, sine_embedding

pytestmark = [pytest.mark.gpu, pytest.mark.compares_numbers]


def test_official_embedding(backend, device):
    golden = read_arrays("p5_cdetr")
    for name in ("eager", backend):
        embedding = sine_embedding(golden["sine/pos"].to(device), backend=name)
        torch.testing.assert_close(embedding.cpu(), golden["sine/embed"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("dim", [4, 64, 256])
def test_against_the_formula(dim):
    points = torch.rand(7, 2, dtype=torch.float64)
    embedding = sine_embedding(points, dim, backend="eager")
    for row, (x, y) in zip(embedding, points.tolist(), strict=True):
        expected = []
        for coordinate in (y, x):
            for pair in range(dim // 4):
                phase = 2 * math.pi * coordinate / 10000 ** (2 * pair / (dim // 2))
                expected += [math.sin(phase), math.cos(phase)]
        # The table of divisors is float32, as in the official code.
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "dim"), [((1,), 4), ((3, 5), 20), ((2, 33), 256)])
def test_kernels_match_the_reference(shape, dim, dtype, backend, device):
    reason = registry.why_not(backend, device, dtype)
    if reason is not None:
        pytest.skip(reason)
    points, transform = torch.rand(*shape, 2), torch.randn(*shape, dim)
    upstream = torch.randn(*shape, dim)

    def run(backend, dtype):
        p, t = (x.to(device, dtype).requires_grad_() for x in (points.to(test_dtype), transform.to(test_dtype)))
        embedding, query = sine_embedding(p, dim, backend=backend), conditional_spatial_query(p, t, backend=backend)
        total = embedding + query
        return embedding.detach(), query.detach(), *torch.autograd.grad(total, (p, t), upstream.to(device, dtype))

    test_dtype = dtype
    exact, plain, actual = run("eager", torch.float64), run("eager", dtype), run(backend, dtype)
    for ours, reference, truth in zip(actual, plain, exact, strict=True):
        assert ours.dtype == dtype
        error, budget = ((x.double() - truth).abs().max().item() for x in (ours, reference))
        assert error <= 2 * budget + 4 * torch.finfo(dtype).eps * truth.abs().max().item()


def test_points_far_outside_stay_exact(backend, device):
    """Angles are reduced in full turns, so a point at 1000 loses precision only by its own rounding."""
    points = torch.tensor([[1000.25, -7.5], [-3.0, 12.125]], device=device)
    embedding = sine_embedding(points, 8, backend=backend)
    exact = sine_embedding(points.double(), 8, backend="eager")
    torch.testing.assert_close(embedding.double(), exact, atol=5e-4, rtol=0)


def test_spatial_query_broadcasts(backend, device):
    points = torch.rand(3, 2, device=device, requires_grad=True)
    transform = torch.randn(2, 3, 8, device=device, requires_grad=True)
    query = conditional_spatial_query(points, transform, backend=backend)
    torch.testing.assert_close(query, transform * sine_embedding(points, 8, backend="eager"))
    query.sum().backward()
    assert points.grad.shape == (3, 2)


@pytest.mark.parametrize("name", ["eager", "native"])
def test_gradients_in_float64(name):
    if name == "native" and native.NOT_LOADED:
        pytest.skip(native.NOT_LOADED)
    points = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    transform = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: conditional_spatial_query(*x, backend=name), (points, transform))
    assert torch.autograd.gradcheck(lambda x: sine_embedding(x, 8, backend=name), (points,))


@pytest.mark.parametrize("has_transform", [False, True])
def test_operator_registration(has_transform, backend, device):
    points = torch.rand(5, 2, device=device, requires_grad=True)
    transform = torch.randn(5, 8, device=device, requires_grad=True) if has_transform else None
    operator = operators.of(backend).sine_embedding.default
    torch.library.opcheck(operator, (points, transform, 8, 10000.0))


def test_no_points(backend, device):
    assert sine_embedding(torch.empty(0, 2, device=device), 8, backend=backend).shape == (0, 8)


def test_errors(device):
    with pytest.raises(ValueError, match=r"points: expected shape \[..., 2\], got \(4, 3\)"):
        sine_embedding(torch.rand(4, 3))
    with pytest.raises(ValueError, match="dim: expected a positive multiple of 4, got 6"):
        sine_embedding(torch.rand(4, 2), 6)
    with pytest.raises(ValueError, match=r"points: expected a floating dtype, got torch.int64"):
        sine_embedding(torch.zeros(4, 2, dtype=torch.int64))
