"""The benchmark times right answers only."""

import attn
import pytest
import torch

PROBLEM = attn.Problem("r50", 2, torch.float32, 0.0, padded=True, backward=False, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def tensors():
    return PROBLEM.make()


def test_every_implementation_is_right_or_refused_with_a_reason(tensors, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    runs = attn.implementations(PROBLEM, tensors)
    runs.pop("torch.compile of it")  # it would need a compiler, and minutes
    good, refused = attn.usable(runs, PROBLEM, attn.exact_output(tensors))
    assert {"official eager", "SDPA as is", "SDPA, padded values"} <= set(good)
    assert set(good) | set(refused) == set(runs)
    assert all("can not run here" in reason for name, reason in refused.items() if name.startswith(attn.OURS))


def test_a_wrong_answer_is_not_timed(tensors):
    eager = attn.implementations(PROBLEM, tensors)["official eager"]
    runs = {"official eager": eager, "wrong": lambda: eager() + 1e-3}
    with pytest.raises(SystemExit, match=r"wrong: error 1.00e-03, official eager .*: not timing a wrong answer"):
        attn.usable(runs, PROBLEM, attn.exact_output(tensors))


def test_padding_is_really_there(tensors):
    assert tensors.valid_hw.tolist() == [[25, 34], [25, 19]]
    assert int(tensors.padding.sum()) == 25 * 15
