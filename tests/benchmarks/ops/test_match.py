"""The benchmark of the assignment times only optimal matchings."""

import sys

import torch

from harness import machine
from ops import match


def test_smoke(benchmark, options, quick):
    result = benchmark.pedantic(match.Problem(3, 1).measured, (options,), rounds=1)
    assert {"scipy", f"scipy, {match.THREADS} threads", "ours, eager"} <= set(result.seconds)
    assert {len(samples) for samples in result.seconds.values()} == {3}


def test_torch_linear_assignment_is_a_peer_if_installed(tmp_path, monkeypatch, options):
    """A stand-in with its one function: costs [B, workers, tasks] → task of each worker [B, workers]."""
    lines = (
        "import torch",
        "from scipy.optimize import linear_sum_assignment",
        "def batch_linear_assignment(cost):",
        "    return torch.stack([torch.from_numpy(linear_sum_assignment(c)[1]) for c in cost.cpu()]).to(cost.device)",
    )
    (tmp_path / "torch_linear_assignment.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_linear_assignment", raising=False)
    monkeypatch.setattr(match.registry, "BACKENDS", ("eager",))
    result = match.Problem(3, 1).measured(options)
    monkeypatch.delitem(sys.modules, "torch_linear_assignment")
    assert "torch-linear-assignment" in result.seconds
    assert "torch-linear-assignment" in machine.environment()


def test_totals_are_nan_for_invalid_matchings():
    cost = torch.tensor([[[[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]]])
    for right in ({"query": torch.tensor([[[2, 0]]])}, {"object": torch.tensor([[[1, -1, 0]]])}):
        assert match.totals(cost, right).tolist() == [[12.0]]
    for wrong in ({"query": torch.tensor([[[2, 2]]])}, {"object": torch.tensor([[[1, -1, -1]]])}):
        assert match.totals(cost, wrong).isnan().all()
    assert match.totals(cost, {"object": torch.tensor([[[1, 1, 0]]])}).isnan().all()
