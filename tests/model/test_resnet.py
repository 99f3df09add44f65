"""ResNets whose norms are folded within the graph: the numbers of the modules, and parts that are called as modules."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18, resnet50
from torchvision.ops import FrozenBatchNorm2d

from conddetr import record_paths
from conddetr.kernels import convolution, native
from conddetr.model import resnet

HAS_NATIVE = pytest.mark.skipif(native.NOT_LOADED is not None, reason=str(native.NOT_LOADED))
HAS_ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is without oneDNN")


class ConvolutionCounts(TorchDispatchMode):
    """Counts convolutions that were fused with the following operations, that were ours, and that were bare."""

    fused = ours = bare = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.fused += "_convolution_pointwise" in name
        self.ours += name == "convolution_3x3"
        self.bare += name == "convolution"
        return function(*args, **(kwargs or {}))


def make_body(make=resnet18):
    torch.manual_seed(0)
    body = make(weights=None, norm_layer=FrozenBatchNorm2d).eval()
    for norm in body.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            norm.weight.uniform_(0.5, 1.5)
            norm.running_mean.normal_(std=0.1)
    return body


def plain_stages(body, images):
    """The stages as the official code computes them."""
    x, maps = body.maxpool(body.relu(body.bn1(body.conv1(images)))), []
    for stage in resnet.STAGES:
        x = getattr(body, stage)(x)
        maps.append(x)
    return maps


@HAS_ONEDNN
@pytest.mark.parametrize("backend", ["eager", pytest.param("auto", marks=HAS_NATIVE)])
@pytest.mark.parametrize(("make", "convolutions", "ours"), [(resnet18, 20, 13), (resnet50, 53, 13)])
def test_every_fused_stage_equals_the_plain_stage(make, convolutions, ours, backend):
    """All stages are compared at the end: no stage may overwrite the previous one's output."""
    body, images = make_body(make), torch.randn(2, 3, 65, 97)
    with torch.no_grad(), ConvolutionCounts() as counts:
        maps = list(resnet.stages(body, images, backend))
    assert counts.ours == (0 if backend == "eager" else ours)
    assert counts.fused == convolutions - counts.ours
    assert counts.bare == 0
    for x, features in zip(plain_stages(copy.deepcopy(body).double(), images.double()), maps, strict=True):
        torch.testing.assert_close(features.double(), x, rtol=1e-4, atol=1e-5 * x.abs().max().item())


@HAS_ONEDNN
def test_trained_convolutions_are_not_fused_with_following_operations():
    body = make_body()
    body.conv1.requires_grad_(False)
    body.layer1.requires_grad_(False)
    with ConvolutionCounts() as counts:
        *_, features = resnet.stages(body, torch.randn(1, 3, 32, 32), "eager")
    # The stem and the first stage.
    assert counts.fused == 5
    features.sum().backward()
    assert all(p.grad is not None for p in body.layer2.parameters() if p.requires_grad)


# Hooked part → number of the 20 convolutions that then run bare.
HOOKED = {"conv1": 1, "bn1": 1, "relu": 1, "maxpool": 0, "layer2": 5, "layer3.1": 2, "layer4.0.conv2": 3}


@HAS_ONEDNN
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("name", HOOKED)
def test_hooked_parts_are_called_and_others_stay_fused(name, register):
    body, images, calls = make_body(), torch.randn(1, 3, 64, 64), []
    with torch.no_grad():
        expected = plain_stages(body, images)
        handle = getattr(body.get_submodule(name), register)(lambda module, *_: calls.append(module))
        with ConvolutionCounts() as counts:
            maps = list(resnet.stages(body, images, "auto"))
        assert calls
        assert all(module is body.get_submodule(name) for module in calls)
        assert (counts.bare, counts.fused + counts.ours) == (HOOKED[name], 20 - HOOKED[name])
        for ours, plain in zip(maps, expected, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
        handle.remove()
        with ConvolutionCounts() as counts:
            list(resnet.stages(body, images, "auto"))
        assert counts.bare == 0, "expected the part to be fused again without its hook"


def test_global_hooks_see_all_modules():
    body, seen = make_body(), set()
    handle = register_module_forward_hook(lambda module, *_: seen.add(id(module)))
    try:
        with torch.no_grad():
            list(resnet.stages(body, torch.randn(1, 3, 64, 64), "auto"))
    finally:
        handle.remove()
    rest = (body, body.avgpool, body.fc)
    assert seen == {id(module) for module in body.modules()} - {id(module) for module in rest}


def test_backward_hooks_see_gradients():
    body, seen = make_body(), []
    body.layer3[0].register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].shape))
    *_, features = resnet.stages(body, torch.randn(1, 3, 64, 64), "auto")
    features.sum().backward()
    assert seen == [(1, 256, 4, 4)]


def test_outputs_seen_by_a_hook_are_not_overwritten():
    body, outputs = make_body(), []
    body.layer1[0].register_forward_hook(lambda module, inputs, output: outputs.append((output, output.clone())))
    with torch.no_grad():
        list(resnet.stages(body, torch.randn(1, 3, 64, 64), "auto"))
    assert torch.equal(*outputs[0])


class Doubled(nn.Module):
    """A wrapper, like an adapter, or a parametrization."""

    def __init__(self, inner=None):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * (x if self.inner is None else self.inner(x))


def wrap(body):
    body.layer3[0].conv1 = Doubled(body.layer3[0].conv1)


def parametrise(body):
    parametrize.register_parametrization(body.layer2[1].conv1, "weight", Doubled())


def replace_forward(body):
    inner = body.layer4[1].forward
    body.layer4[1].forward = lambda x: 2 * inner(x)


def replace_block(body):
    body.layer1[1] = Doubled(body.layer1[1])


def replace_norm(body):
    body.bn1 = nn.GroupNorm(2, 64)


def replace_activation(body):
    body.layer2[0].relu = nn.GELU()


CHANGES = {
    wrap: "layer3.0",
    parametrise: "layer2.1",
    replace_forward: "layer4.1",
    replace_block: "layer1.1",
    replace_norm: "conv1",
    replace_activation: "layer2.0",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_parts_that_are_not_plain_modules_are_called(change):
    body, images = make_body(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = plain_stages(body, images)[-1]
        change(body)
        *_, expected = plain_stages(body, images)
        *_, features = resnet.stages(body, images, "auto")
    assert not torch.allclose(before, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    reasons = resnet.survey(body)
    assert len(reasons) == 9
    assert [name for name, reason in reasons.items() if reason is not None] == [CHANGES[change]]


def test_weights_changed_without_autograd_take_effect():
    """Through `.data` and through a NumPy view, which do not raise a tensor's version."""
    body, images = make_body().requires_grad_(False), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = list(resnet.stages(body, images, "auto"))[-1].clone()
        body.conv1.weight.data.mul_(0.9)
        body.layer2[0].conv1.weight.numpy()[...] *= 1.1
        body.layer3[0].bn1.running_var.data.add_(0.5)
        *_, features = resnet.stages(body, images, "auto")
        *_, expected = plain_stages(body, images)
    assert not torch.allclose(features, before, rtol=1e-3)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def fold_all(body, dtype):
    """Convolution → its folded weight and bias as leaves, and a function that looks them up."""
    pairs = [(body.conv1, body.bn1)]
    for block in (block for name in resnet.STAGES for block in getattr(body, name)):
        pairs += resnet.conv_norm_pairs(block) + ([] if block.downsample is None else [tuple(block.downsample)])
    with torch.no_grad():
        table = {conv: [x.to(dtype) for x in resnet.fold(conv, norm)] for conv, norm in pairs}
    for conv, (weight, _) in table.items():
        weight.requires_grad_(conv.weight.requires_grad)
    return table, lambda conv, norm: table[conv]


def relative_errors(tensors, exact):
    return [((x.double() - y).abs().max() / y.abs().max()).item() for x, y in zip(tensors, exact, strict=True)]


@pytest.mark.parametrize("make", [resnet18, resnet50])
def test_prefolded_weights_give_the_numbers_of_the_modules(make):
    body, images = make_body(make), torch.randn(1, 3, 33, 41)
    exact = plain_stages(copy.deepcopy(body).double(), images.double())
    with torch.no_grad(), record_paths() as paths:
        for dtype in (torch.float32, torch.bfloat16):
            maps = list(resnet.stages(body, images, "auto", fold_all(body, dtype)[1]))
            assert {x.dtype for x in maps} == {dtype}
            by_modules = relative_errors(plain_stages(copy.deepcopy(body).to(dtype), images.to(dtype)), exact)
            for error, allowed in zip(relative_errors(maps, exact), by_modules, strict=True):
                assert error <= 2 * allowed
    blocks = sum(len(getattr(body, name)) for name in resnet.STAGES)
    assert paths["backbone"] == {"norms folded before": 2 * (1 + blocks)}


def with_triton(*tensors, relu=False, backend="auto", **options):
    """As on a GPU: convolutions that end with ReLU run on our kernels."""
    return convolution(*tensors, relu=relu, backend="triton" if relu else "eager", **options)


@pytest.mark.parametrize("hooked", [None, "layer3.0", "layer4"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_prefolded_weights_get_their_gradients(backend, hooked, monkeypatch):
    """A folded weight's gradient, multiplied by the norm's scale, is the gradient of the convolution's weight."""
    if backend == "triton":
        monkeypatch.setattr(resnet, "convolution", with_triton)
    body, images, calls = make_body(), torch.randn(2, 3, 33, 24), []
    body.conv1.requires_grad_(False)
    body.layer1.requires_grad_(False)
    if hooked is not None:
        body.get_submodule(hooked).register_forward_hook(lambda module, inputs, _: calls.append(type(inputs[0])))
    table, folded = fold_all(body, torch.float32)
    maps = list(resnet.stages(body, images, "auto", folded))
    upstream = [torch.randn_like(x) for x in maps]
    trained = maps[1:], upstream[1:]
    torch.autograd.backward(*trained)
    assert calls == [torch.Tensor] * (hooked is not None)
    assert maps[0].grad_fn is None
    reference = copy.deepcopy(body).double()
    torch.autograd.backward(plain_stages(reference, images.double())[1:], [x.double() for x in trained[1]])
    exact = dict(reference.named_modules())
    for name, module in body.named_modules():
        if module not in table:
            continue
        weight, expected = table[module][0], exact[name].weight.grad
        if hooked is not None and name.startswith(hooked):
            assert weight.grad is None
            gradient = module.weight.grad
        elif expected is None:
            assert weight.grad is None
            continue
        else:
            norm = body.get_submodule(name.replace("conv", "bn").replace("downsample.0", "downsample.1"))
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            gradient = weight.grad * scale[:, None, None, None]
        torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
