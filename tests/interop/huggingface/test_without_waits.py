"""What replaces the questions that transformers asks a GPU gives the same numbers; here as if the host would wait."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[test])")

from small_huggingface import batch, run, small_model
from transformers.models.conditional_detr import modeling_conditional_detr as theirs

import conddetr

if not hasattr(theirs, "ConditionalDetrDecoderCrossAttention"):
    pytest.skip("the encoder of transformers before 5 is left as it is", allow_module_level=True)

from conddetr.interop.huggingface import attention_v5 as structure


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(structure, "asking_waits", lambda _: True)


@pytest.mark.parametrize("options", [{}, {"attn_implementation": "eager"}], ids=["fused", "eager"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
def test_the_encoder_is_transformers_own(is_padded, options):
    model = small_model(encoder_layers=2, **options).train()
    inputs = batch(is_padded, size=(96, 128), valid=(64, 96))
    expected = run(model, inputs)
    conddetr.accelerate(model, "eager")
    found = run(model, inputs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5 * value.abs().max().clamp(min=1).item(), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("found", [[], [float("inf")], [float("-inf"), float("nan")]], ids=str)
def test_numbers_are_limited_as_by_transformers(dtype, found):
    largest = torch.finfo(dtype).max
    tokens = torch.tensor([1.0, -0.99 * largest, 0.99 * largest, *found], dtype=dtype, requires_grad=True)
    expected = tokens
    if not torch.isfinite(tokens).all():  # as in transformers' layer
        expected = torch.clamp(tokens, min=-(largest - 1000), max=largest - 1000)
    limited = structure._finite(tokens)
    torch.testing.assert_close(limited, expected, rtol=0, atol=0, equal_nan=True)
    grads = [torch.autograd.grad(x.sum(), tokens, retain_graph=True)[0] for x in (limited, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_what_is_recorded_of_the_encoder_stays():
    model = small_model(encoder_layers=2, attn_implementation="eager")
    inputs = {name: value for name, value in batch(True).items() if name != "labels"}
    options = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        expected = model(**inputs, **options)
        conddetr.accelerate(model, "eager")
        found = model(**inputs, **options)
    for name in ("encoder_attentions", "encoder_hidden_states"):
        assert len(found[name]) == len(expected[name]) > 1
        for one, other in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
