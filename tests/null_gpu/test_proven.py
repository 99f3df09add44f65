"""What a model runs on a GPU whose kernels are proven, and on one where nothing is."""

import proven
import pytest
import torch
from announced_paths import announced_and_recorded
from torch.utils.checkpoint import checkpoint

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


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_checkpoint_computes_the_backbone_again_by_what_computed_it(backend):
    """Autograd's own thread does not know that it is within the model."""
    model = conddetr.build("conditional-detr-r50", encoder_layers=1, decoder_layers=1, backend=backend).cuda()
    body = model.backbone[0].body
    call = body.forward
    body.forward = lambda images: checkpoint(call, images, use_reentrant=False)
    found = []
    with records.pretend(None):
        with conddetr.record_paths() as paths:
            boxes = model(torch.zeros(1, 3, 64, 64, device="cuda"))["pred_boxes"]
            found.append({name: dict(paths[name]) for name in ("backbone", "convolution") if name in paths})
        with conddetr.record_paths() as paths:
            boxes.sum().backward()
            found.append({name: dict(paths[name]) for name in ("backbone", "convolution") if name in paths})
    assert found[0] == found[1]
    assert ("modules" in found[0]["backbone"]) == (backend == "auto")


KINDS = [
    ("conditional-detr-r50", "bfloat16", {}),
    ("conditional-detr-tiny", "float32", {"hidden_dim": 16, "num_heads": 2}),
    ("detr-r50", "float32", {}),
]
"""Preset, precision, options; heads of 8 channels are for no kernel."""


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize(("preset", "precision", "options"), KINDS)
@pytest.mark.parametrize(
    ("backend", "refused"),
    [
        ("auto", None),
        ("auto", {}),
        ("auto", {"conditional_attention": "it is slow.", "convolution": "it is slow."}),
        ("auto", {"focal_loss": "it is wrong.", "matched_box_loss": "it is wrong.", "linear_assignment": "it is."}),
        ("auto", {"prepare_weights": "it is wrong."}),
        ("triton", None),
        ("eager", {}),
    ],
)
def test_what_is_said_is_what_runs(backend, refused, preset, precision, options, trains):
    if backend == "triton" and options:
        pytest.skip("it is an error there")
    record = None if refused is None else proven.everything(torch.device("cuda"), **refused)
    with records.pretend(record):
        said, ran = announced_and_recorded(preset, "cuda", precision, trains=trains, backend=backend, **options)
    assert said == ran
