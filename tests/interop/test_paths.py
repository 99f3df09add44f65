"""The code paths that accelerated models ran, for each model and backend."""

import pytest
import torch
from official_contract import ConditionalDETR, SetCriterion, Transformer

import conddetr
from conddetr.kernels import native

pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[test])")
pytest.importorskip("timm", reason="timm is not installed (pip install -e .[test])")

from small_huggingface import small_batch, small_dab, small_model
from transformers.models.conditional_detr import modeling_conditional_detr as modeling

IS_OLD = hasattr(modeling, "DetrAttention")
TIMM = {"use_timm_backbone": True, "backbone": "resnet18", "backbone_config": None}
SDPA = {"PyTorch's scaled_dot_product_attention"}
OURS = {"conditional_attention"}
DENSE = {"conditional_attention, dense spatial keys"}
SHIPPED = {"transformers' own"}
OFFICIAL = {"the official code"}
BACKBONE = {"norms folded in the graph"}
each_backend = pytest.mark.parametrize(
    "backend",
    ["eager", pytest.param("native", marks=pytest.mark.skipif(native.NOT_LOADED is not None, reason="not built"))],
)


def record(model, **options):
    """Name of each part and operation → the paths that computed it; in inference, without a loss."""
    inputs = {name: value for name, value in small_batch().items() if name != "labels"}
    with torch.no_grad(), conddetr.record_paths() as paths:
        model(**inputs, **options)
    return {name: set(counts) for name, counts in paths.items()}


@each_backend
def test_conditional_detr(backend):
    model = small_model(**TIMM, attn_implementation="eager")
    conddetr.accelerate(model, backend)
    paths = record(model)
    assert paths.pop("convolution")
    if IS_OLD:
        expected = {"self-attention": SDPA if backend == "eager" else OURS}
    else:  # transformers' own attention runs if no kernel does
        expected = {"encoder": {"modules"}} | ({} if backend == "eager" else {"self-attention": OURS})
    expected |= {"backbone": BACKBONE, "decoder": {"sine embedding and λ ⊙ p_s once"}, "cross-attention": DENSE}
    assert paths == expected | {"conditional_attention": {backend}, "sine_embedding": {backend}}

    paths = record(model, output_attentions=True)
    assert paths["cross-attention"] == paths["decoder"] == SHIPPED
    model.model.backbone.register_forward_hook(lambda *_: None)
    assert record(model)["backbone"] == BACKBONE
    bodies = [m for m in model.modules() if type(m).__name__ == "FeatureListNet"]
    bodies[0].register_forward_hook(lambda *_: None)
    assert record(model)["backbone"] == SHIPPED


@each_backend
def test_dab_detr(backend):
    model = small_dab(**TIMM)
    report = conddetr.accelerate(model, backend)
    assert "backbone" in [part.name for part in report.replaced]
    paths = record(model)
    assert paths.pop("convolution")
    assert paths == {
        "backbone": BACKBONE,
        "self-attention": SDPA if backend == "eager" else OURS,
        "cross-attention": DENSE,
        "conditional_attention": {backend},
    }
    paths = record(model, output_attentions=True)
    assert paths["cross-attention"] == paths["self-attention"] == SHIPPED
    model.model.backbone.conv_encoder.model.register_forward_hook(lambda *_: None)
    report = conddetr.accelerate(model, backend)
    assert ("backbone", "it has hooks") in [(part.name, part.note) for part in report.left]
    assert record(model)["backbone"] == SHIPPED


@each_backend
@pytest.mark.skipif(IS_OLD, reason="transformers before 5 has no choice of attention")
def test_attention_implementation(backend):
    conddetr.register_attention(backend)
    model = small_model()
    model.set_attn_implementation("conddetr")
    assert record(model) == {
        "self-attention": SDPA if backend == "eager" else OURS,
        "cross-attention": OURS,
        "conditional_attention": {backend},
    }
    assert record(model, output_attentions=True) == {
        name: {"plain PyTorch, for attention maps"} for name in ("self-attention", "cross-attention")
    }


@each_backend
def test_official_code(backend):
    model = ConditionalDETR(Transformer(layers=2, ffn=64), num_classes=5, num_queries=12).eval()
    conddetr.accelerate(model, backend)
    criterion = SetCriterion(num_classes=5)
    conddetr.accelerate(criterion, "eager")
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]
    images = [torch.randn(3, 64, 96)]
    with torch.no_grad(), conddetr.record_paths() as paths:
        criterion(model(images), targets)
    assert set(paths["backbone"]) == BACKBONE
    assert set(paths["conditional_attention"]) == {backend}
    assert set(paths["matching_cost"]) == {"eager"}
    assert set(paths["transformer"]) == {"ours"}

    model.transformer.encoder.layers[0].register_forward_hook(lambda *_: None)
    criterion.matcher.register_forward_hook(lambda *_: None)
    with torch.no_grad(), conddetr.record_paths() as paths:
        criterion(model(images), targets)
    assert set(paths["transformer"]) == set(paths["loss"]) == OFFICIAL
    assert "conditional_attention" not in paths
