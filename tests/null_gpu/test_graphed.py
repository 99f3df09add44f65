"""CUDA graphs of modules: launches of a replay, and modules that are refused before anything is recorded."""

import copy

import pytest
import torch
from torch import nn

import conddetr
from conddetr.graphed import Graphs
from null_gpu.counts import counted


class Model(nn.Module):
    """Two layers, computed by a graph if there is one."""

    def __init__(self, inner=None):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8) if inner is None else inner
        self.graphs = Graphs()

    def compute(self, x):
        return [self.outer(self.inner(x).relu())]

    def forward(self, x):
        result = self.graphs(self, self.compute, [x])
        return self.compute(x) if result is None else result


class Waits(nn.Module):
    """A layer that reads a value on the host."""

    def forward(self, x):
        return x / x.abs().max().item()


class ReadInBackward(torch.autograd.Function):
    """Reads the gradient's sum on the host."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return grad * grad.sum().item()


class WaitsInBackward(nn.Module):
    """A layer whose backward pass reads a value on the host."""

    def forward(self, x):
        return ReadInBackward.apply(x)


def step(model, device="cuda"):
    model(torch.zeros(4, 8, device=device))[0].sum().backward()


def test_training_step_of_a_module_is_two_launches():
    model = Model().cuda()
    step(model)
    with counted() as counts:
        step(model)
    assert (counts.graph_launches, counts.waits) == (2, 0)
    # The sum and its gradient, and the addition of the gradients to those of the first step.
    assert counts.launches <= 8
    assert model.graphs.bytes > 0


def test_frozen_copy_is_one_launch():
    model = conddetr.build("conditional-detr-tiny", num_classes=3, backend="auto").cuda().eval()
    images = torch.zeros(1, 3, 128, 128, device="cuda")
    for options in ({}, {"dtype": torch.bfloat16}):
        fused = model.fused(graphs=True, **options)
        with torch.inference_mode():
            fused(images)
            with counted() as counts:
                outputs = fused(images)
        assert (counts.launches, counts.graph_launches, counts.waits) == (0, 1, 0)
        assert outputs["pred_boxes"].shape == (1, model.config.num_queries, 4)
        assert len(copy.deepcopy(fused).graphs) == 0


class LayerDrop(nn.Module):
    """A layer that is skipped at random."""

    def forward(self, x):
        return x if torch.rand(()) < 0.5 else 2 * x


@pytest.mark.parametrize(
    ("outer", "reason"),
    [
        (Waits, "the host waits for the device at "),
        (WaitsInBackward, "the host waits for the device at "),
        (LayerDrop, "the host draws random numbers"),
    ],
)
def test_module_that_cannot_be_recorded_is_refused_before(outer, reason, caplog):
    model = Model(outer()).cuda()
    for _ in range(2):
        step(model)
    assert model.graphs.refused.startswith(reason)
    assert len(model.graphs) == 0
    assert model.inner.weight.grad is not None
    # PyTorch still draws random numbers, which it would not after a failed recording.
    torch.rand(2, device="cuda")
    assert caplog.text.count("running without") == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_graphs_on_a_device_that_is_not_current():
    model = Model().to("cuda:1")
    for _ in range(2):
        step(model, "cuda:1")
    with counted() as counts:
        step(model, "cuda:1")
    assert counts.graph_launches == 2
    assert counts.launches_by_device[0] == 0


def test_replays_belong_to_one_stream(caplog):
    model = Model().cuda()
    step(model)
    with torch.cuda.stream(torch.cuda.Stream()), counted() as counts:
        step(model)
    assert counts.graph_launches == 0
    assert "they belong to another stream" in caplog.text
