"""Sine embedding: against the official numbers and a formula written from the paper."""

import math

import pytest
import torch
from golden_rule import read_arrays

from conddetr.kernels import conditional_spatial_query, sine_embedding


def test_official_embedding():
    golden = read_arrays("p5_cdetr")
    torch.testing.assert_close(sine_embedding(golden["sine/pos"]), golden["sine/embed"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dim", [4, 64, 256])
def test_against_the_formula(dim):
    points = torch.rand(7, 2, dtype=torch.float64)
    found = sine_embedding(points, dim)
    for row, (x, y) in zip(found, points.tolist(), strict=True):
        expected = []
        for coordinate in (y, x):
            for pair in range(dim // 4):
                phase = 2 * math.pi * coordinate / 10000 ** (2 * pair / (dim // 2))
                expected += [math.sin(phase), math.cos(phase)]
        # The table of divisors is float32, as in the official code.
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)


def test_spatial_query_is_the_product_and_has_gradients():
    points = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    transform = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    expected = transform * sine_embedding(points, 8)
    torch.testing.assert_close(conditional_spatial_query(points, transform), expected)
    assert torch.autograd.gradcheck(conditional_spatial_query, (points, transform))


def test_errors():
    with pytest.raises(ValueError, match=r"points: expected shape \[..., 2\], got \(4, 3\)"):
        sine_embedding(torch.rand(4, 3))
    with pytest.raises(ValueError, match="dim: expected a positive multiple of 4, got 6"):
        sine_embedding(torch.rand(4, 2), 6)
