"""Code that avoids transformers' waits for a GPU gives the same numbers; tested as if the host would wait."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[test])")

from small_huggingface import batch, run, small_model
from transformers.models.conditional_detr import modeling_conditional_detr as modeling

import conddetr

if not hasattr(modeling, "ConditionalDetrDecoderCrossAttention"):
    pytest.skip("the encoder of transformers before 5 is not replaced", allow_module_level=True)

from conddetr.interop.huggingface import attention_v5 as structure


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(structure, "asking_waits", lambda _: True)


@pytest.mark.parametrize("options", [{}, {"attn_implementation": "eager"}], ids=["fused", "eager"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
def test_encoder_has_the_numbers_of_transformers(is_padded, options):
    model = small_model(encoder_layers=2, **options).train()
    inputs = batch(is_padded, size=(96, 128), valid=(64, 96))
    expected = run(model, inputs)
    conddetr.accelerate(model, "eager")
    outputs = run(model, inputs)
    for name, value in expected.items():
        torch.testing.assert_close(outputs[name], value, atol=2e-5 * value.abs().max().clamp(min=1).item(), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("extra", [[], [float("inf")], [float("-inf"), float("nan")]], ids=str)
def test_values_are_clamped_as_in_transformers(dtype, extra):
    largest = torch.finfo(dtype).max
    tokens = torch.tensor([1.0, -0.99 * largest, 0.99 * largest, *extra], dtype=dtype, requires_grad=True)
    expected = tokens
    if not torch.isfinite(tokens).all():  # as in transformers' layer
        expected = torch.clamp(tokens, min=-(largest - 1000), max=largest - 1000)
    limited = structure._finite(tokens)
    torch.testing.assert_close(limited, expected, rtol=0, atol=0, equal_nan=True)
    grads = [torch.autograd.grad(x.sum(), tokens, retain_graph=True)[0] for x in (limited, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_recorded_encoder_outputs_stay():
    model = small_model(encoder_layers=2, attn_implementation="eager")
    inputs = {name: value for name, value in batch(True).items() if name != "labels"}
    options = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        expected = model(**inputs, **options)
        conddetr.accelerate(model, "eager")
        outputs = model(**inputs, **options)
    for name in ("encoder_attentions", "encoder_hidden_states"):
        assert len(outputs[name]) == len(expected[name]) > 1
        for actual, recorded in zip(outputs[name], expected[name], strict=True):
            torch.testing.assert_close(actual, recorded, atol=1e-5, rtol=0)
