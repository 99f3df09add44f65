"""Names against the verified table of the golden set; weights and models converted there and back."""

import pytest
import torch
from golden_rule import read_json
from official_contract import ConditionalDETR, Transformer, with_rule_weights

import conddetr
from conddetr import interop


def official_state(name):
    shapes = read_json(f"state_dict_{name}")["state_dict"]
    return {entry: torch.randn(shape) for entry, shape in shapes.items()}


def small_resnet_model(**options):
    """R50 with a small transformer whose outputs differ from query to query."""
    sizes = {"hidden_dim": 64, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 2, "ffn_dim": 64}
    model = conddetr.build("conditional-detr-r50", num_queries=10, num_classes=6, **{**sizes, **options}).eval()
    torch.nn.init.normal_(model.query_embed.weight)
    torch.nn.init.normal_(model.class_embed.weight)
    torch.nn.init.normal_(model.bbox_embed.layers[-1].weight, std=0.1)
    return model


def test_names_and_split_projections_match_the_verified_table():
    mapping = read_json("hf_mapping")["mapping"]
    shapes = read_json("state_dict_cdetr_r101")["state_dict"]
    for name, expected in mapping.items():
        value = torch.randn(shapes[name])
        converted = interop.to_huggingface({name: value})
        if isinstance(expected, str):
            expected = [expected]
        assert list(converted) == expected
        assert torch.equal(torch.cat(list(converted.values())), value)


@pytest.mark.parametrize("names", ["5", "4"])
@pytest.mark.parametrize("backbone", ["r50", "r101"])
def test_official_weights_are_bitwise_equal_after_a_round_trip(backbone, names):
    state = official_state(f"cdetr_{backbone}")
    back = interop.from_huggingface(interop.to_huggingface(state, names))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_foreign_names_are_refused():
    with pytest.raises(ValueError, match=r"transformer\.encoder\.layers\.0\.mystery\.weight is not a name"):
        interop.to_huggingface({"transformer.encoder.layers.0.mystery.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"model.backbone.model.embedder.weight.*ResNet of timm"):
        interop.from_huggingface({"model.backbone.model.embedder.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="names: expected '5' or '4', got '3'"):
        interop.to_huggingface({}, names="3")


@pytest.mark.parametrize("backbone", ["resnet50", "resnet18"])
def test_models_after_a_round_trip(backbone):
    pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[test])")
    pytest.importorskip("timm", reason="timm is not installed (pip install -e .[test])")
    model = small_resnet_model(backbone=backbone)
    peer, report = interop.convert_to_huggingface(model)
    assert report.differences["pred_logits"] < 1e-4 < 1 < report.magnitudes["pred_logits"]
    assert report.differences["pred_boxes"] < 1e-5
    back, report = interop.convert_from_huggingface(peer)
    assert report.differences["pred_logits"] < 1e-4
    assert back.config == model.config
    state = model.state_dict()
    assert back.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in back.state_dict().items())

    other = conddetr.build(
        "conditional-detr-r50", **{f: getattr(model.config, f) for f in ("num_queries", "num_classes")}
    )
    with pytest.raises(ValueError, match="mismatched"):
        conddetr.load_weights(other, peer.state_dict())
    with torch.no_grad():
        peer.class_labels_classifier.bias += 1
    report = interop.parity(model, peer, images=torch.randn(1, 3, 64, 64))
    assert report.differences["pred_logits"] == pytest.approx(1, abs=1e-4)
    assert report.differences["pred_boxes"] < 1e-5
    assert "pred_logits: largest difference 1.0e+00" in str(report)


def test_official_models_after_a_round_trip():
    model = ConditionalDETR(Transformer(layers=1, ffn=64), num_classes=6, num_queries=10)
    with_rule_weights(model)
    ours, report = interop.convert_from_official(model)
    assert report.differences["pred_logits"] < 1e-4 < 1 < report.magnitudes["pred_logits"]
    assert report.differences["pred_boxes"] < 1e-5
    with torch.no_grad():
        ours.class_embed.bias += 1
    assert interop.parity(model, ours).differences["pred_logits"] == pytest.approx(1, abs=1e-4)
    assert interop.convert_to_official(ours, model).differences["pred_logits"] < 1e-4
    state = ours.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"class_embed.weight: expected \(6, 256\), got \(91, 256\)"):
        interop.convert_to_official(conddetr.build("conditional-detr-r50"), model)


@pytest.mark.parametrize(("name", "value"), [("activation_function", "gelu"), ("position_embedding_type", "learned")])
def test_settings_that_change_the_outputs_are_refused(name, value):
    pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[test])")
    pytest.importorskip("timm", reason="timm is not installed (pip install -e .[test])")
    peer, _ = interop.convert_to_huggingface(small_resnet_model())
    setattr(peer.config, name, value)
    with pytest.raises(ValueError, match=f"{name}: expected .*, got {value}"):
        interop.convert_from_huggingface(peer)


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("conditional-detr-tiny", {}, "backbone: expected resnet18, resnet34, resnet50, resnet101"),
        ("conditional-detr-r18", {"backbone_norm": "train"}, "backbone_norm: expected frozen, as in transformers"),
        ("conditional-detr-r50", {"csq": "T"}, "csq: expected full"),
        ("detr-tiny", {}, "family: expected conditional-detr"),
    ],
)
def test_models_that_transformers_does_not_have_are_refused(preset, options, message):
    pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[test])")
    with pytest.raises(ValueError, match=message):
        interop.convert_to_huggingface(conddetr.build(preset, **options))
