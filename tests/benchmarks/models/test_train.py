"""The benchmark of training steps times only equal steps, and splits their time into parts."""

import argparse
import re

import pytest
import torch
from torch import nn

import conddetr
from harness.parts import NAMES, Parts
from models import train

PROBLEM = train.Problem("conditional-detr-tiny", 2, (64, 96), torch.float32)


def test_smoke(benchmark, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    options = argparse.Namespace(rounds=3, cudagraph=False)
    result = benchmark.pedantic(PROBLEM.measured, (options,), rounds=1)
    assert {"official-style eager", "ours"} <= set(result.seconds)
    assert "resnet101, which timm has" in result.refused["HuggingFace"]
    assert result.parts.keys() == result.seconds.keys()
    for name, parts in result.parts.items():
        assert tuple(parts) == NAMES
        assert all(seconds > 0 for seconds in parts.values()), name


def test_different_loss_is_not_timed():
    implementations, _ = train.implementations(PROBLEM, PROBLEM.make(), compiled=False)
    assert implementations["ours"].model.config == conddetr.build(PROBLEM.preset).config
    first = next(iter(implementations.values()))
    changed = train.plain(first.model, lambda: {k: 1.1 * v for k, v in first.losses().items()}, True, False)
    broken = train.plain(first.model, lambda: 1 / 0, True, False)
    first.model.bbox_embed.requires_grad_(False)
    fewer = train.plain(first.model, first.losses, True, False)
    refused = {}
    cases = {"first": first, "ours": changed, "broken": broken, "fewer": fewer, "again": first}
    assert list(train.alike(cases, torch.float32, refused)) == ["first", "again"]
    assert re.fullmatch(r"wrong answer: loss_\w+: expected .*, got .*", refused["ours"])
    assert refused["broken"] == "ZeroDivisionError: division by zero"
    assert re.fullmatch(r"wrong answer: expected \d+ trained parameters, got \d+", refused["fewer"])


class Clock:
    """A clock that only `sleep` advances, so that the test does not depend on the machine's load."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU parts are timed by the device")
def test_times_of_parts(monkeypatch):
    """Layers sleep in forward and backward, for times of which no two sums are equal."""
    clock = Clock()
    monkeypatch.setattr("harness.parts.time", clock)

    class Sleep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, seconds):
            ctx.seconds = seconds
            clock.sleep(seconds)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            clock.sleep(2 * ctx.seconds)
            return gradient, None

    class Layer(nn.Linear):
        seconds = 0.0

        def forward(self, x):
            return Sleep.apply(super().forward(x), self.seconds)

    modules = {name: Layer(2, 2) for name in ("backbone", "encoder", "decoder")}
    for number, module in enumerate(modules.values()):
        module.seconds = 1.0 * 3**number
    optimizer = torch.optim.SGD([p for module in modules.values() for p in module.parameters()])

    def step():
        clock.sleep(2.0)
        x = torch.ones(2)
        for module in modules.values():
            x = module(x)
        clock.sleep(100.0)
        x.sum().backward()
        clock.sleep(500.0)
        optimizer.step()

    parts = Parts(modules, optimizer)
    expected = {"backbone": 3.0, "encoder": 9.0, "decoder": 27.0, "loss": 100.0, "optimizer": 500.0, "host": 2.0}
    assert parts.time(step) == expected
    parts.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules.values())
