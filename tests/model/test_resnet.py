"""Folded ResNets: fused convolutions, and those whose weights get their gradient from matrix products."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18, resnet50
from torchvision.ops import FrozenBatchNorm2d

from conddetr.kernels import native
from conddetr.model import folding
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
    expected, found = F.conv2d(*leaves, *rest), ConvolutionByProducts.apply(*leaves, *rest, False)
    assert torch.equal(found, expected)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for theirs, ours in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (expected, found)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


HAS_NATIVE = pytest.mark.skipif(native.NOT_LOADED is not None, reason=str(native.NOT_LOADED))


@HAS_NATIVE
def test_gradients_of_the_native_convolution_are_those_of_pytorch():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 32, 9, 7), (64, 32, 3, 3), (64,), (2, 64, 9, 7))
    *leaves, upstream = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    expected, found = F.conv2d(*leaves, padding=1), ConvolutionByProducts.apply(*leaves, *folding.UNIT, True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for theirs, ours in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (expected, found)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("minimal", [False, pytest.param(True, marks=HAS_NATIVE)])
def test_only_what_is_asked_for_is_computed(minimal):
    x, weight = torch.randn(1, 32, 6, 6), torch.randn(32, 32, 3, 3, requires_grad=True)
    ConvolutionByProducts.apply(x, weight, torch.zeros(32), *folding.UNIT, minimal).sum().backward()
    assert x.grad is None
    assert weight.grad.shape == weight.shape


class Seen(TorchDispatchMode):
    """How many convolutions ran together with what follows them, and how many were ours."""

    fused = ours = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.fused += "_convolution_pointwise" in function.overloadpacket.__name__
        self.ours += function.overloadpacket.__name__ == "convolution_3x3"
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is without oneDNN")
@pytest.mark.parametrize("backend", ["eager", pytest.param("auto", marks=HAS_NATIVE)])
@pytest.mark.parametrize(("make", "convolutions", "ours"), [(resnet18, 20, 5), (resnet50, 53, 13)])
def test_every_stage_of_the_fused_form_is_that_of_the_plain_one(make, convolutions, ours, backend):
    """Compared after all have run: no stage may write over the one before it."""
    torch.manual_seed(0)
    body = make(weights=None, norm_layer=FrozenBatchNorm2d).eval()
    for norm in body.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            norm.weight.uniform_(0.5, 1.5)
            norm.running_mean.normal_(std=0.1)
    images = torch.randn(2, 3, 65, 97)
    with torch.no_grad(), Seen() as seen:
        found = list(folding.stages(body, folding.fold(body, None)[0], images, backend))
    assert seen.ours == (0 if backend == "eager" else ours)
    assert seen.fused == convolutions - seen.ours
    exact = copy.deepcopy(body).double()
    x = exact.maxpool(exact.relu(exact.bn1(exact.conv1(images.double()))))
    for stage, features in zip(folding.STAGES, found, strict=True):
        x = getattr(exact, stage)(x)
        torch.testing.assert_close(features.double(), x, rtol=1e-4, atol=1e-5 * x.abs().max().item())


def test_what_is_trained_is_not_fused():
    body = resnet18(weights=None, norm_layer=FrozenBatchNorm2d)
    body.conv1.requires_grad_(False)
    body.layer1.requires_grad_(False)
    with Seen() as seen:
        *_, features = folding.stages(body, folding.fold(body, None)[0], torch.randn(1, 3, 32, 32), "eager")
    # The stem and the first stage.
    assert seen.fused == 5 * torch.backends.mkldnn.is_available()
    features.sum().backward()
    assert all(p.grad is not None for p in body.layer2.parameters() if p.requires_grad)
