"""The benchmark of convolutions: all implementations are checked and timed, and operations are counted right."""

import argparse

import conv
import pytest


@pytest.mark.parametrize("backward", [False, True])
def test_run(backward, benchmark, monkeypatch):
    monkeypatch.setattr(conv, "copy_bandwidth", lambda: 1e9)
    problem = conv.Problem("1×1, out, residual", 2, (30, 45), backward)
    result = benchmark.pedantic(conv.run, (problem, argparse.Namespace(rounds=3, cudagraph=False)), rounds=1)
    assert list(result.seconds) == ["PyTorch", "ours, eager", "ours, auto"]
    # 2 images of 8 × 12 cells, 64 to 256 channels; both gradients are as many again.
    cells, passes = 2 * 8 * 12, 3 if backward else 1
    assert result.work.flops == passes * 2 * cells * 64 * 256
    # x, weight, bias, residual, and the result.
    assert result.work.bytes == passes * 4 * (cells * 64 + 64 * 256 + 256 + 2 * cells * 256)
