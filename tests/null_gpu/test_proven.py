"""Backends of a model on a GPU with proven kernels, and on a GPU without."""

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
    with conddetr.record_paths() as paths, torch.autocast("cuda", torch.bfloat16):
        model(torch.zeros(1, 3, 128, 160, device="cuda"))
    return paths


def test_auto_runs_plain_modules_if_nothing_is_proven():
    with records.pretend(None):
        paths = paths_of("auto")
    assert set(paths["backbone"]) == {"modules"}
    assert {path for name in OURS for path in paths.get(name, {})} == {"eager"}
    assert "conddetr check" in paths.reasons["conditional_attention"]["triton"]


@pytest.mark.parametrize(("backend", "is_proven"), [("auto", True), ("triton", False)])
def test_kernels_run_if_proven_or_requested_by_name(backend, is_proven):
    device = torch.device("cuda")
    with records.pretend(proven.everything(device) if is_proven else None):
        paths = paths_of(backend)
    assert set(paths["backbone"]) == {"norms folded before"}
    assert all(set(paths[name]) == {"triton"} for name in OURS)


def test_only_a_refused_operation_falls_back_to_pytorch():
    device = torch.device("cuda")
    with records.pretend(proven.everything(device, add_norm="its numbers are wrong.")):
        paths = paths_of("auto")
    assert set(paths["add_norm"]) == {"eager"}
    assert paths.reasons["add_norm"]["triton"] == "its numbers are wrong."
    assert all(set(paths[name]) == {"triton"} for name in OURS if name != "add_norm")


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_checkpoint_recomputes_the_backbone_on_the_same_path(backend):
    """Although autograd's thread does not have the model's context."""
    model = conddetr.build("conditional-detr-r50", encoder_layers=1, decoder_layers=1, backend=backend).cuda()
    body = model.backbone[0].body
    call = body.forward
    body.forward = lambda images: checkpoint(call, images, use_reentrant=False)
    recorded = []
    with records.pretend(None):
        with conddetr.record_paths() as paths:
            boxes = model(torch.zeros(1, 3, 64, 64, device="cuda"))["pred_boxes"]
            recorded.append({name: dict(paths[name]) for name in ("backbone", "convolution") if name in paths})
        with conddetr.record_paths() as paths:
            boxes.sum().backward()
            recorded.append({name: dict(paths[name]) for name in ("backbone", "convolution") if name in paths})
    assert recorded[0] == recorded[1]
    assert ("modules" in recorded[0]["backbone"]) == (backend == "auto")


MODELS = [
    ("conditional-detr-r18", "bfloat16", {}),
    ("conditional-detr-tiny", "float32", {"hidden_dim": 16, "num_heads": 2}),
    ("detr-r18", "float32", {}),
]
"""Preset, precision, options; no kernel supports heads of 8 channels."""


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize(("preset", "precision", "options"), MODELS)
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
def test_announced_backends_are_those_that_run(backend, refused, preset, precision, options, trains):
    if backend == "triton" and options:
        pytest.skip("the backend raises an error for these options")
    record = None if refused is None else proven.everything(torch.device("cuda"), **refused)
    with records.pretend(record):
        announced, recorded = announced_and_recorded(
            preset, "cuda", precision, trains=trains, backend=backend, **options
        )
    assert announced == recorded
