"""Loading weights: official files, our own, and those that do not fit."""

import argparse

import pytest
import torch
from golden_rule import read_json, rule_weight

import conddetr
from conddetr.engine.checkpoint import save_checkpoint
from conddetr.weights.load import start_from

CLASSES = [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}, {"id": 90, "name": "toothbrush"}]


def official_state(name):
    shapes = read_json(f"state_dict_{name}")["state_dict"]
    return {entry: rule_weight(entry, tuple(shape)) for entry, shape in shapes.items()}


@pytest.mark.parametrize(("name", "preset"), [("cdetr_r50", "conditional-detr-r50"), ("detr_r50", "detr-r50")])
def test_official_checkpoint_file(tmp_path, name, preset):
    state = official_state(name)
    counters = {"backbone.0.body.bn1.num_batches_tracked": torch.tensor(3)}
    path = tmp_path / "official.pth"
    torch.save({"model": {**state, **counters}, "args": argparse.Namespace(), "epoch": 49}, path)
    model = conddetr.build(preset)
    report = conddetr.load_weights(model, path)
    assert report.complete
    assert report.loaded == len(state)
    assert report.ignored == list(counters)
    assert all(torch.equal(value, state[entry]) for entry, value in model.state_dict().items())


def test_prefix_of_data_parallel_is_removed(tiny_model):
    state = {f"module.{name}": value + 1 for name, value in tiny_model.state_dict().items()}
    model = conddetr.build("conditional-detr-tiny", num_classes=3)
    assert conddetr.load_weights(model, state).complete
    assert torch.equal(model.class_embed.bias, tiny_model.class_embed.bias + 1)


def test_weights_of_another_preset_are_refused_and_nothing_changes():
    model = conddetr.build("conditional-detr-r50")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="look like: family detr, backbone resnet50, num_classes 91, num_queries 100"):
        conddetr.load_weights(model, official_state("detr_r50"))
    with pytest.raises(ValueError, match="look like: family conditional-detr, backbone resnet101") as caught:
        conddetr.load_weights(model, official_state("cdetr_r101"))
    assert "255 unexpected" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_not_strict_loads_fitting_tensors_and_reports_the_rest():
    source = conddetr.build("conditional-detr-tiny", num_classes=3)
    model = conddetr.build("conditional-detr-tiny", num_classes=5)
    state = {name: value for name, value in source.state_dict().items() if name != "query_embed.weight"}
    report = conddetr.load_weights(model, {**state, "extra": torch.zeros(1)}, strict=False)
    assert report.missing == ["query_embed.weight"]
    assert report.unexpected == ["extra"]
    assert report.mismatched == [
        "class_embed.weight: expected (5, 64), got (3, 64)",
        "class_embed.bias: expected (5,), got (3,)",
    ]
    assert "1 missing" in str(report)
    assert torch.equal(model.input_proj.weight, source.input_proj.weight)


def test_content_without_a_supported_state_dict_is_refused(tiny_model):
    with pytest.raises(ValueError, match="Expected a state dict"):
        conddetr.load_weights(tiny_model, {"epoch": 3})
    with pytest.raises(ValueError, match="no supported DETR or Conditional DETR"):
        conddetr.load_weights(tiny_model, {"fc.weight": torch.zeros(3)})


@pytest.mark.parametrize("classes", [CLASSES, [{**CLASSES[0], "name": "star"}, *CLASSES[1:]], CLASSES[:2]])
def test_weights_of_other_classes_are_loaded_without_the_class_head(tmp_path, tiny_model, classes):
    """Weights of three classes into models with the same classes, with three others, and with two."""
    save_checkpoint(tmp_path / "a.pt", {"model": tiny_model.state_dict(), "classes": CLASSES})
    model = conddetr.build("conditional-detr-tiny", num_classes=len(classes))
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    report = start_from(model, classes, tmp_path / "a.pt")
    is_same = classes == CLASSES
    for name, value in model.state_dict().items():
        is_head = name.startswith("class_embed.")
        expected = initial[name] if is_head and not is_same else tiny_model.state_dict()[name]
        assert torch.equal(value, expected), name
    assert report.loaded == len(initial) - (0 if is_same else 2)
    assert ("class_embed.weight: not loaded, because the classes differ" in str(report)) != is_same
    other = conddetr.build("conditional-detr-tiny", num_classes=2, num_queries=9)
    with pytest.raises(ValueError, match=r"query_embed\.weight: expected \(9, 64\), got \(25, 64\)"):
        start_from(other, classes, tmp_path / "a.pt")
