"""The benchmark of residual and norm: right answers only are timed, and bytes are counted right."""

import argparse

import torch

from ops import add_norm


def test_smoke(benchmark, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(add_norm, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    problem, options = add_norm.Problem(2, 50, torch.bfloat16), argparse.Namespace(rounds=3, cudagraph=False)
    result = benchmark.pedantic(add_norm.run, (problem, options), rounds=1)
    assert {"eager", "torch.compile of it"} <= set(result.seconds)
    # Inputs of 2 and 4 bytes, twice; outputs of 4, 2 and 2 and their gradients; gradients of the inputs.
    assert result.work.bytes == (2 * 6 + 2 * 8 + 6) * 2 * 50 * 256
