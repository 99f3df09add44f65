"""Losses against the official numbers, against formulas, and on bad input."""

import math

import pytest
import torch
from golden_rule import read_arrays, read_json
from torchvision.ops import sigmoid_focal_loss

import conddetr


@pytest.mark.parametrize(
    ("case", "unit", "preset"),
    [
        ("p5_cdetr", "criterion_cdetr", "conditional-detr-r50"),
        ("p5_detr", "criterion_detr", "detr-r50"),
    ],
)
def test_official_losses_and_gradients(case, unit, preset):
    info, golden = read_json(case)["units"][unit], read_arrays(case)
    names = ("logits", "boxes", "aux_logits", "aux_boxes")
    leaves = {name: golden[f"{unit}/{name}"].clone().requires_grad_() for name in names}
    outputs = {
        "pred_logits": leaves["logits"],
        "pred_boxes": leaves["boxes"],
        "aux_outputs": [{"pred_logits": leaves["aux_logits"], "pred_boxes": leaves["aux_boxes"]}],
    }
    labels, boxes = (golden[f"{unit}/tgt_{key}_cat"].split(info["num_targets"]) for key in ("labels", "boxes"))
    targets = [{"labels": a, "boxes": b} for a, b in zip(labels, boxes, strict=True)]
    losses = conddetr.build_criterion(conddetr.config.resolve(preset))(outputs, targets)
    total = losses.pop("loss")
    assert total.item() == pytest.approx(info["total"], rel=1e-5)
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(info["losses"], rel=1e-5)
    total.backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, golden[f"{unit}/grad_{name}"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("key", "alpha", "boxes"), [("alpha-1_nb7", -1.0, 7.0), ("alpha.25_nb1", 0.25, 1.0)])
def test_focal_loss_of_torchvision_is_the_official_one(key, alpha, boxes):
    """The library function that the criterion uses, against the official values."""
    golden, info = read_arrays("p5_cdetr"), read_json("p5_cdetr")["units"]["focal"]
    logits = golden["focal/logits"].clone().requires_grad_()
    mean = sigmoid_focal_loss(logits, golden["focal/targets"], alpha).mean(1).sum() / boxes
    name = f"alpha={alpha},num_boxes={boxes}"
    assert mean.item() == pytest.approx(info[name], rel=1e-5)
    mean.backward()
    torch.testing.assert_close(logits.grad, golden[f"focal/grad_{key}"], atol=1e-6, rtol=1e-5)


def outputs(layers=2, batch=2, queries=6, classes=4, dtype=torch.float32):
    made = [
        {
            "pred_logits": torch.randn(batch, queries, classes).to(dtype).requires_grad_(),
            "pred_boxes": torch.rand(batch, queries, 4).to(dtype).requires_grad_(),
        }
        for _ in range(layers)
    ]
    return {**made[-1], "aux_outputs": made[:-1]}


def target(*labels):
    return {"labels": torch.tensor(labels, dtype=torch.int64), "boxes": torch.rand(len(labels), 4) * 0.4 + 0.3}


def criterion(preset="conditional-detr-tiny"):
    return conddetr.build_criterion(conddetr.config.resolve(preset, num_classes=4))


def test_total_is_the_weighted_sum():
    losses = criterion()(outputs(3), [target(0, 1), target(2)])
    weights = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    suffixes = ("", "_0", "_1")
    expected = sum(w * losses[name + suffix] for name, w in weights.items() for suffix in suffixes)
    torch.testing.assert_close(losses["loss"], expected)
    logs = {"class_error"} | {f"cardinality_error{suffix}" for suffix in suffixes}
    assert set(losses) == {"loss"} | logs | {name + suffix for name in weights for suffix in suffixes}


def test_focal_loss_by_the_formula():
    out = outputs(1, batch=1, queries=3)
    loss = criterion()(out, [{"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}])["loss_ce"]
    expected = 0.0
    for x in out["pred_logits"].flatten().tolist():
        p = 1 / (1 + math.exp(-x))
        expected += -0.75 * p**2 * math.log(1 - p)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_no_objects_at_all():
    out = outputs()
    losses = criterion()(out, [target(), target()])
    assert losses["class_error"].item() == 100
    assert losses["loss_bbox"].item() == losses["loss_giou"].item() == 0
    losses["loss"].backward()
    assert torch.isfinite(out["pred_logits"].grad).all()


def test_more_objects_than_queries():
    out = outputs(queries=3)
    losses = criterion()(out, [target(0, 1, 2, 3, 0), target(1)])
    assert torch.isfinite(losses["loss"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", ["conditional-detr-tiny", "detr-tiny"])
def test_half_precision_inputs_are_computed_in_float32(dtype, preset):
    classes = 5 if preset.startswith("detr") else 4
    out = outputs(classes=classes, dtype=dtype)
    with torch.no_grad():
        out["pred_logits"][0, 0, 0] = torch.finfo(dtype).max
        out["pred_logits"][0, 1, 0] = -torch.finfo(dtype).max
        out["pred_boxes"][0, 2] = 0.0
    losses = criterion(preset)(out, [target(0, 1), target(2)])
    assert all(value.dtype == torch.float32 for value in losses.values())
    losses["loss"].backward()
    assert torch.isfinite(losses["loss_ce_0"] + losses["loss_giou"])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([target(0)], "targets: expected 2, one per image, got 1"),
        ([target(0), target(4)], r"targets\[1\]\['labels'\]: expected values in \[0, 4\), got 4…4"),
        ([target(-1), target(0)], r"targets\[0\]\['labels'\]: expected values in \[0, 4\), got -1…-1"),
        ([{**target(0), "labels": torch.tensor([0.0])}, target(0)], r"expected \[n\] int64, got \(1,\) torch.float32"),
        ([{**target(0), "boxes": torch.rand(2, 4)}, target(0)], r"expected shape \(1, 4\), got \(2, 4\)"),
        (
            [{**target(0), "boxes": torch.tensor([[0.1, float("nan"), 0.2, 0.2]])}, target(0)],
            r"targets\[0\]\['boxes'\]: expected finite",
        ),
        ([target(0), {**target(0), "boxes": torch.tensor([[0.5, 0.5, -0.2, 0.2]])}], r"targets\[1\]\['boxes'\]"),
    ],
)
def test_bad_targets_are_named(targets, message):
    with pytest.raises(ValueError, match=message):
        criterion()(outputs(), targets)
