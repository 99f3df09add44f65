"""Convolutions whose weights get their gradient from matrix products."""

import pytest
import torch
import torch.nn.functional as F

from conddetr.model.folding import ConvolutionByProducts

WINDOWS = {
    "1×1": (1, (1, 1), (0, 0), (1, 1)),
    "1×1, strided": (1, (2, 2), (0, 0), (1, 1)),
    "3×3": (3, (1, 1), (1, 1), (1, 1)),
    "3×3, strided": (3, (2, 2), (1, 1), (1, 1)),
    "3×3, dilated": (3, (1, 1), (2, 2), (2, 2)),
    "7×7, uneven": (7, (2, 1), (3, 2), (1, 1)),
}


@pytest.mark.parametrize("size", [(7, 9), (8, 12)], ids=str)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_gradients_are_those_of_pytorch(window, size):
    kernel, *rest = window
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, *size), (4, 5, kernel, kernel), (4,))
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    leaves = [x.to(memory_format=torch.channels_last), weight, bias]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    expected, found = F.conv2d(*leaves, *rest), ConvolutionByProducts.apply(*leaves, *rest)
    assert torch.equal(found, expected)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for theirs, ours in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (expected, found)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_only_what_is_asked_for_is_computed():
    x, weight = torch.randn(1, 3, 6, 6), torch.randn(4, 3, 3, 3, requires_grad=True)
    window = ((1, 1), (1, 1), (1, 1))
    ConvolutionByProducts.apply(x, weight, torch.zeros(4), *window).sum().backward()
    assert x.grad is None
    assert weight.grad.shape == weight.shape
