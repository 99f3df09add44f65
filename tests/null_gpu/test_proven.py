"""What a model runs on a GPU whose kernels are proven, and on one where nothing is."""

import proven
import pytest
import torch

import conddetr
from conddetr.kernels import records

OURS = ("add_norm", "conditional_attention", "prepare_weights", "relu_dropout", "sine_embedding")


def paths_of(backend: str) -> dict:
    model = conddetr.build("conditional-detr-r50", encoder_layers=1, decoder_layers=2, backend=backend).cuda()
    with conddetr.record_paths() as found, torch.autocast("cuda", torch.bfloat16):
        model(torch.zeros(1, 3, 128, 160, device="cuda"))
    return found


def test_auto_is_plain_modules_where_nothing_is_proven():
    with records.pretend(None):
        found = paths_of("auto")
    assert set(found["backbone"]) == {"modules"}
    assert {path for name in OURS for path in found.get(name, {})} == {"eager"}
    assert "conddetr check" in found.reasons["conditional_attention"]["triton"]


@pytest.mark.parametrize(("backend", "is_proven"), [("auto", True), ("triton", False)])
def test_kernels_run_where_they_are_proven_or_asked_for_by_name(backend, is_proven):
    device = torch.device("cuda")
    with records.pretend(proven.everything(device) if is_proven else None):
        found = paths_of(backend)
    assert set(found["backbone"]) == {"norms folded before"}
    assert all(set(found[name]) == {"triton"} for name in OURS)


def test_what_is_refused_alone_is_pytorchs():
    device = torch.device("cuda")
    with records.pretend(proven.everything(device, add_norm="its numbers are wrong.")):
        found = paths_of("auto")
    assert set(found["add_norm"]) == {"eager"}
    assert found.reasons["add_norm"]["triton"] == "its numbers are wrong."
    assert all(set(found[name]) == {"triton"} for name in OURS if name != "add_norm")
