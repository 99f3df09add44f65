"""The benchmark of attention times only correct answers, and counts their work."""

import importlib.util
import sys
import types
import typing

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import FlexKernelOptions

from harness import rates
from harness.benchmark import arguments, failures
from harness.check import usable
from harness.refusals import OURS
from harness.result import Result
from ops import attn

COMPILED = ("torch.compile of it", "FlexAttention", "FlexAttention, FLASH")
"""Left out: each needs a compiler and takes seconds."""


def problem(**changes):
    options = {"grid": "r50", "batch": 2, "dtype": torch.float32, "dropout": 0.0, "padded": True, "backward": False}
    return attn.Problem(**{**options, **changes})


def checked(runs, tensors, is_random=False):
    return usable(runs, problem().answer, problem().exact(tensors), is_random)


@pytest.mark.parametrize("backward", [False, True])
def test_every_implementation_is_correct_or_refused_with_a_reason(backward, benchmark, known_rates):
    case = problem(backward=backward)
    tensors = case.make()
    runs = {name: run for name, run in case.implementations(tensors).items() if name not in COMPILED}
    good, refused = checked(runs, tensors)
    assert {"official eager", "SDPA"} <= set(good)
    assert set(good) | set(refused) == set(runs)
    assert all("cannot run here" in reason for name, reason in refused.items() if name.startswith(OURS))
    benchmark.pedantic(good["SDPA"], rounds=3)


@pytest.mark.parametrize("spoiled", ["out", "k_content", "k_spatial"])
def test_wrong_answer_is_not_timed(spoiled):
    tensors = problem(backward=True).make()
    eager = problem().implementations(tensors)["official eager"]

    def wrong():
        outputs = eager()
        return {name: tensor + 1e-3 if name == spoiled else tensor for name, tensor in outputs.items()}

    good, refused = checked({"official eager": eager, "ours": wrong, "peer": wrong}, tensors)
    assert set(good) == {"official eager"}
    assert all(reason.startswith("wrong answer: error of ") for reason in refused.values())
    # A peer may be wrong; a wrong answer of ours is reported.
    [failure] = failures([Result("one", {}, refused=refused)])
    assert failure.startswith("one: ours: wrong answer: error of ")


def test_missing_dropout_is_not_timed():
    tensors = problem().make()
    runs = {f"p = {p}": problem(dropout=p).implementations(tensors)["official eager"] for p in (0.1, 0.0)}
    assert checked(runs, tensors, is_random=True)[1]["p = 0.0"].startswith("wrong answer: error of out ")
    runs = {name: problem(dropout=0.1).implementations(tensors)[name] for name in ("official eager", "SDPA")}
    assert set(checked(runs, tensors, is_random=True)[0]) == set(runs)


def test_flex_attention_is_refused_with_dropout():
    tensors = problem().make()
    runs = {"FlexAttention": problem(dropout=0.1).implementations(tensors)["FlexAttention"]}
    assert checked(runs, tensors, is_random=True)[1] == {
        "FlexAttention": "FlexAttention has no dropout on the weights."
    }


def by_sequence(query, key, value, query_starts, key_starts, longest_query, longest_key):
    """The result of `varlen_attn`, one image after the other."""
    outputs = []
    for image in range(len(query_starts) - 1):
        queries, keys = (slice(*starts[image : image + 2].tolist()) for starts in (query_starts, key_starts))
        assert queries.stop - queries.start <= longest_query
        assert keys.stop - keys.start <= longest_key
        parts = (x[taken].transpose(0, 1) for x, taken in ((query, queries), (key, keys), (value, keys)))
        outputs.append(F.scaled_dot_product_attention(*parts).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("padded", [False, True])
def test_packed_keys_give_the_same_result(padded):
    case = problem(padded=padded, backward=True)
    tensors = case.make()
    runs = {"official eager": case.implementations(tensors)["official eager"]}
    for name, pad_values in (("packed", False), ("packed, padded values", True)):
        attend = attn.packed(case, tensors, by_sequence, pad_values)
        runs[name] = attn.Implementation(attend, tensors)
    assert checked(runs, tensors)[1] == {}
    layout = attn.Layout.of(case)
    assert layout.key_starts.tolist() == [0, 25 * 34, 25 * 34 + 25 * (19 if padded else 34)]
    with pytest.raises(NotImplementedError, match="no dropout"):
        attn.packed(problem(dropout=0.1), tensors, by_sequence)()


@pytest.mark.parametrize("padded", [False, True])
def test_flash_attention_4_is_called_with_its_arguments(padded, monkeypatch):
    """Its package needs a GPU; a stand-in with its arguments computes on the CPU."""

    def flash_attn_func(q, k, v):
        assert not padded
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2), None

    def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        assert padded
        return by_sequence(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), None

    case = problem(padded=padded)
    tensors = case.make()
    peer = attn.Implementation(attn.flash_attention_4(case, tensors), tensors)
    runs = {"official eager": case.implementations(tensors)["official eager"], "FlashAttention-4": peer}
    if importlib.util.find_spec("flash_attn") is None:
        reason = "not installed (pip install flash-attn-4): No module named 'flash_attn'"
        assert checked(runs, tensors)[1] == {"FlashAttention-4": reason}
    functions = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        module = types.ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    assert checked(runs, tensors)[1] == {}


def test_pytorch_has_the_flash_backend_of_flex_attention():
    assert "FLASH" in typing.get_args(typing.get_type_hints(FlexKernelOptions)["BACKEND"])


def test_padded_problem_has_padding():
    tensors = problem().make()
    assert tensors.valid_cells.tolist() == [[25, 34], [25, 19]]
    assert int(tensors.padding.sum()) == 25 * 15


def test_work_of_the_design_notes(monkeypatch):
    """H100: about 18 µs of exponentials and 14 µs of bytes at 3 TB/s; padding is not work."""
    monkeypatch.setattr(rates, "exponential_rate", lambda: 132 * 16 * 1.755e9)
    monkeypatch.setattr(rates, "copy_bandwidth", lambda: 3e12)
    monkeypatch.setattr(rates, "product_rate", lambda dtype: 1e15)
    size = {"batch": 32, "dtype": torch.bfloat16}
    full = problem(padded=False, **size).work()
    assert full.floor == full.floors["exponentials"] == pytest.approx(17.6e-6, rel=0.01)
    assert full.floors["bytes"] == pytest.approx(14.5e-6, rel=0.01)
    assert full.flops == 2 * 96 * 32 * 8 * 300 * 25 * 34
    padded = problem(**size).work()
    assert padded.flops / full.flops == pytest.approx((1 + 19 / 34 + 21 / 25 + 26 / 34) / 4)


def test_most_important_problems_come_first():
    options = gpu_options()
    problems = attn.Problem.asked_for(options)
    assert len(problems) == len(set(problems)) == 2 * 2 * (4 + 3 * 8)
    assert problems[:4] == [
        problem(batch=8, dtype=torch.bfloat16, dropout=p, padded=padded, backward=p > 0)
        for p in (0.0, 0.1)
        for padded in (False, True)
    ]


def gpu_options():
    parser = arguments("attn", attn.__doc__, 1.0)
    options = parser.parse_args([])
    options.grids, options.batch, options.dtypes = ["r50", "dc5"], [8, 32, 1, 2], ["bfloat16", "float32"]
    options.dropout, options.backward = [0.0, 0.1], None
    return options
