"""The benchmark of training steps times equal steps only, and knows where their time goes."""

import argparse
import re
import time

import pytest
import torch
import train
from parts import NAMES, Parts
from torch import nn

PROBLEM = train.Problem("conditional-detr-tiny", 2, (64, 96), torch.float32)


def test_smoke(benchmark, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    options = argparse.Namespace(rounds=3, cudagraph=False, compiled=False)
    result = benchmark.pedantic(train.run, (PROBLEM, options), rounds=1)
    assert "official-style eager" in result.seconds
    assert "resnet50 or resnet101, which timm has" in result.refused["HuggingFace"]
    assert result.parts.keys() == result.seconds.keys()
    for name, parts in result.parts.items():
        assert tuple(parts) == NAMES
        assert all(seconds > 0 for seconds in parts.values()), name


def test_another_loss_is_not_timed():
    made, _ = train.implementations(PROBLEM, PROBLEM.make(), compiled=False)
    first = next(iter(made.values()))
    other = train.plain(first.model, lambda: {k: 1.1 * v for k, v in first.losses().items()}, True, False)
    broken = train.plain(first.model, lambda: 1 / 0, True, False)
    first.model.bbox_embed.requires_grad_(False)
    fewer = train.plain(first.model, first.losses, True, False)
    refused = {}
    every = {"first": first, "ours": other, "broken": broken, "fewer": fewer, "again": first}
    assert list(train.alike(every, torch.float32, refused)) == ["first", "again"]
    assert re.fullmatch(r"wrong answer: loss_\w+ is .*, expected .*", refused["ours"])
    assert refused["broken"] == "ZeroDivisionError: division by zero"
    assert re.fullmatch(r"wrong answer: it trains \d+ parameters, expected \d+", refused["fewer"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU sleeping takes no time of the device")
def test_parts_are_told_apart():
    """Layers that sleep, forward and backward, for times of which no sum of some equals another's."""

    class Sleep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, seconds):
            ctx.seconds = seconds
            time.sleep(seconds)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            time.sleep(2 * ctx.seconds)
            return gradient, None

    class Layer(nn.Linear):
        seconds = 0.0

        def forward(self, x):
            return Sleep.apply(super().forward(x), self.seconds)

    modules = {name: Layer(2, 2) for name in ("backbone", "encoder", "decoder")}
    for number, module in enumerate(modules.values()):
        module.seconds = 0.02 * 3**number
    optimizer = torch.optim.SGD([p for module in modules.values() for p in module.parameters()])

    def step():
        time.sleep(0.05)
        x = torch.ones(2)
        for module in modules.values():
            x = module(x)
        time.sleep(0.03)
        x.sum().backward()
        optimizer.step()

    parts = Parts(modules, optimizer)
    found = parts.time(step)
    least = {"backbone": 0.06, "encoder": 0.18, "decoder": 0.54, "loss": 0.03, "optimizer": 0.0, "host": 0.05}
    for name, seconds in least.items():
        assert seconds <= found[name] < seconds + 0.05, name
    parts.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules.values())
