"""The benchmark of the assignment times optimal matchings only."""

import argparse
from concurrent.futures import ThreadPoolExecutor

import match
import torch


def test_smoke(benchmark, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    options = argparse.Namespace(rounds=3, cudagraph=False)
    with ThreadPoolExecutor(2) as threads:
        result = benchmark.pedantic(match.run, (match.Problem(3, 1), options, threads), rounds=1)
    assert {"scipy", "scipy, 2 threads", "ours, eager"} <= set(result.seconds)
    assert {len(samples) for samples in result.seconds.values()} == {3}


def test_totals_know_what_a_matching_is():
    cost = torch.tensor([[[[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]]])
    for right in ({"query": torch.tensor([[[2, 0]]])}, {"object": torch.tensor([[[1, -1, 0]]])}):
        assert match.totals(cost, right).tolist() == [[12.0]]
    for wrong in ({"query": torch.tensor([[[2, 2]]])}, {"object": torch.tensor([[[1, -1, -1]]])}):
        assert match.totals(cost, wrong).isnan().all()
    assert match.totals(cost, {"object": torch.tensor([[[1, 1, 0]]])}).isnan().all()
