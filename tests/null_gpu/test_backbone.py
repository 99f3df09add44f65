"""Launches of a ResNet: one per convolution, with bias, residual add and ReLU; the host never waits."""

import pytest
import torch
from torchvision.models import resnet18, resnet50
from torchvision.ops import FrozenBatchNorm2d

import conddetr
from conddetr.kernels.conv import gpu
from conddetr.model import resnet
from conddetr.model.backbone.resnet import ResNetBody
from conddetr.model.fused import fused_copy
from null_gpu.counts import counted

CONVOLUTIONS, SHORTCUTS = 53, 4
RELU = CONVOLUTIONS - SHORTCUTS
TRAINED = 42
"""Convolutions of the last three stages; 39 of them end in ReLU."""
STRIDED = 3
"""Residual blocks of these stages that reduce the resolution."""


@pytest.fixture(autouse=True)
def _any_algorithm(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)


def make_folded(body, dtype):
    """Folded weights as leaves; the stem and the first stage are frozen."""
    table = {}

    def folded(conv, norm):
        if conv not in table:
            with torch.no_grad():
                table[conv] = [x.to(dtype) for x in resnet.fold(conv, norm)]
            table[conv][0].requires_grad_(conv.weight.requires_grad)
        return table[conv]

    return folded


def make_body(make=resnet50):
    body = make(weights=None, norm_layer=FrozenBatchNorm2d).cuda().requires_grad_(False)
    for stage in (body.layer2, body.layer3, body.layer4):
        stage.requires_grad_()
    return body


def count(body, folded):
    """Counts of forward and backward, and the paths, after a pass in which each kind of convolution was tried."""
    images = torch.zeros(2, 3, 64, 96, device="cuda")
    list(resnet.stages(body, images, "triton", folded))
    with counted() as forward, conddetr.record_paths() as paths:
        *_, features = resnet.stages(body, images, "triton", folded)
    upstream = torch.zeros_like(features)
    with counted() as backward:
        features.backward(upstream)
    assert forward.waits == backward.waits == forward.from_device == 0
    return forward, backward, paths


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_training_launches_one_kernel_per_convolution(dtype, monkeypatch):
    monkeypatch.setattr(resnet, "KEPT", 0)
    body = make_body()
    forward, backward, paths = count(body, make_folded(body, dtype))
    assert paths["convolution"] == {gpu.CUDNN: RELU, "eager": SHORTCUTS}
    # The images' copy, the pooling, and the sums of the shortcuts' biases.
    assert forward.launches == CONVOLUTIONS + 3
    # The first block's input needs no gradient: two convolutions less. Before each stride a map is computed again.
    assert backward.launches == TRAINED + (TRAINED - 2) + STRIDED + backward.kernels["relu_backward_kernel"]
    assert backward.kernels["relu_backward_kernel"] == TRAINED - 3


def test_blocks_of_two_convolutions_launch_one_kernel_each_too():
    """ResNet-18: 20 convolutions, 3 shortcuts; 15 convolutions train, 12 of them end in ReLU."""
    forward, backward, paths = count(make_body(resnet18), None)
    assert paths["convolution"] == {gpu.CUDNN: 17, "eager": 3}
    assert set(paths["backbone"]) == {"norms folded in the graph"}
    assert forward.kernels["cudnn"] == 20
    assert backward.kernels["relu_backward_kernel"] == 12
    copied, report = fused_copy(ResNetBody("resnet18", False, "triton").cuda())
    assert not report.left
    images = torch.zeros(1, 3, 64, 96, device="cuda")
    with torch.inference_mode():
        copied(images)
        with counted() as counts:
            copied(images)
    # The images' copy and the pooling.
    assert (counts.waits, counts.launches) == (0, 20 + 2)


def test_without_cudnns_fusion_there_is_one_more_pass(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    body = make_body()
    forward, _, paths = count(body, make_folded(body, torch.bfloat16))
    assert paths["convolution"] == {"triton": RELU, "eager": SHORTCUTS}
    assert forward.kernels["epilogue_kernel"] == RELU
    assert forward.launches == CONVOLUTIONS + 3 + RELU


def test_weights_are_folded_in_the_dtype_of_autocast():
    body = make_body()
    with torch.autocast("cuda", torch.bfloat16):
        forward, backward, paths = count(body, None)
    assert paths["convolution"] == {gpu.CUDNN: RELU, "eager": SHORTCUTS}
    assert forward.kernels["cudnn"] == CONVOLUTIONS
    assert backward.kernels["relu_backward_kernel"] == TRAINED - 3
    assert {p.grad.dtype for p in body.layer3.parameters()} == {torch.float32}


@pytest.mark.parametrize("variant", ["a dtype of its own", "moved", "autocast"])
def test_frozen_copy_casts_no_weights(variant):
    body = ResNetBody("resnet18", False, "triton")
    copied, _ = fused_copy(body, torch.bfloat16 if variant != "moved" else None)
    copied = copied.cuda() if variant != "moved" else copied.to("cuda", torch.bfloat16)
    images = torch.zeros(1, 3, 64, 96, device="cuda", dtype=torch.bfloat16 if variant == "moved" else torch.float32)
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=variant == "autocast"):
        for _ in range(2):
            with counted() as counts:
                copied(images)
    assert counts.waits == 0
    # 20 convolutions, the images' copy and the pooling.
    assert counts.launches == 20 + 2


def test_graph_records_paths_tried_before_it():
    x = torch.zeros(1, 32, 8, 8, device="cuda").contiguous(memory_format=torch.channels_last)
    weight, bias = torch.zeros(24, 32, 1, 1, device="cuda"), torch.zeros(24, device="cuda")
    for path, reason in (("triton", "not tried before"), (gpu.CUDNN, None)):
        graph = torch.cuda.CUDAGraph()
        with conddetr.record_paths() as paths, counted() as counts, torch.cuda.graph(graph):
            conddetr.kernels.convolution(x, weight, bias, relu=True)
        assert paths["convolution"] == {path: 1}
        assert reason is None or reason in paths.reasons["convolution"][gpu.CUDNN]
        assert counts.refused_in_capture == 0
        conddetr.kernels.convolution(x, weight, bias, relu=True)
