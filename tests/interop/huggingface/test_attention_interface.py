"""`attn_implementation="conddetr"` in transformers' Conditional DETR."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import conddetr
from conddetr.interop.huggingface import attention_interface as attention
from conddetr.kernels import native, registry

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[test])")

from small_huggingface import run, small_batch, small_model  # noqa: E402
from transformers.models.conditional_detr import modeling_conditional_detr as modeling  # noqa: E402

CAN_REGISTER = hasattr(modeling, "ALL_ATTENTION_FUNCTIONS")
needs_choice = pytest.mark.skipif(not CAN_REGISTER, reason="transformers before 5 has no choice of attention")
needs_native = pytest.mark.skipif(native.NOT_LOADED is not None, reason=str(native.NOT_LOADED))


@pytest.fixture
def calls(monkeypatch):
    """Widths of queries and values in each call of our attention."""
    widths = []

    def record(*tensors, **options):
        widths.append((tensors[0].shape[-1] + tensors[1].shape[-1], tensors[-1].shape[-1]))
        return conditional_attention(*tensors, **options)

    conditional_attention = attention.conditional_attention
    monkeypatch.setattr(attention, "conditional_attention", record)
    return widths


@needs_choice
@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        pytest.param("native", [(16, 16)] + 3 * [(16, 16), (32, 16)], marks=needs_native),
        ("eager", 3 * [(32, 16)]),
    ],
)
def test_outputs_losses_and_gradients_stay(backend, expected, calls):
    model = small_model(auxiliary_loss=True).double().train()
    before = run(model, small_batch(torch.float64))
    assert before["logits"].std(1).min() > 0.02, "with equal queries this test proves nothing"
    conddetr.register_attention(backend)
    model.set_attn_implementation("conddetr")
    after = run(model, small_batch(torch.float64))
    assert calls == expected
    assert after.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-9, atol=1e-9, msg=name)


@needs_choice
def test_pytorch_attention_runs_without_kernels(calls, monkeypatch):
    conddetr.register_attention()
    model = small_model()
    before = run(model, small_batch())
    model.set_attn_implementation("conddetr")
    monkeypatch.setattr(registry, "why_not", lambda *_, **__: "not built")
    after = run(model, small_batch())
    assert calls == []
    torch.testing.assert_close(after["logits"], before["logits"], rtol=1e-5, atol=1e-5)


@needs_choice
def test_dropout_is_active_in_training_only(calls):
    conddetr.register_attention("eager")
    model = small_model(attention_dropout=0.5)
    model.set_attn_implementation("conddetr")
    with torch.no_grad():
        first, second = (model(**small_batch()).logits for _ in range(2))
        assert torch.equal(first, second)
        first, second = (model.train()(**small_batch()).logits for _ in range(2))
        assert not torch.allclose(first, second, atol=1e-3)


@needs_choice
def test_attention_maps_are_those_of_transformers():
    conddetr.register_attention()
    model = small_model(attn_implementation="eager")
    options = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        before = model(**small_batch(), **options)
        model.set_attn_implementation("conddetr")
        after = model(**small_batch(), **options)
    for name in ("cross_attentions", "decoder_attentions", "encoder_attentions", "decoder_hidden_states"):
        assert len(after[name]) == len(before[name]) > 0
        for actual, expected in zip(after[name], before[name], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, msg=name)


@needs_choice
def test_implementation_can_be_named_while_loading_and_is_not_saved(tmp_path, calls):
    conddetr.register_attention("eager")
    model = small_model()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="conddetr")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**small_batch()).logits, model(**small_batch()).logits, rtol=0, atol=1e-5)
    assert len(calls) == 3
    loaded.save_pretrained(tmp_path)
    assert "conddetr" not in (tmp_path / "config.json").read_text()


@needs_choice
def test_registration_can_be_combined_with_accelerate():
    conddetr.register_attention()
    model = small_model()
    before = run(model, small_batch())
    model.set_attn_implementation("conddetr")
    with conddetr.accelerated(model):
        after = run(model, small_batch())
    torch.testing.assert_close(after["logits"], before["logits"], rtol=1e-5, atol=1e-5)
    assert model.config._attn_implementation == "conddetr"


@needs_choice
def test_a_mask_of_pairs_is_respected():
    """Our kernels mask keys only, so PyTorch's attention takes it."""
    conddetr.register_attention()
    ours, eager = transformers.AttentionInterface()["conddetr"], modeling.eager_attention_forward
    module = SimpleNamespace(is_causal=False, training=False)
    query, key, value = torch.randn(2, 4, 5, 32), torch.randn(2, 4, 7, 32), torch.randn(2, 4, 7, 16)
    allowed = torch.rand(2, 1, 5, 7) > 0.3
    expected = eager(module, query, key, value, torch.zeros(2, 1, 5, 7).masked_fill(~allowed, -1e30))[0]
    torch.testing.assert_close(ours(module, query, key, value, allowed)[0], expected, rtol=1e-5, atol=1e-5)

    make = transformers.AttentionMaskInterface()["conddetr"]
    padding = torch.tensor([[1, 1, 0], [1, 1, 1]])
    sizes = {"batch_size": 2, "q_length": 3, "kv_length": 3, "allow_is_causal_skip": False}
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    mask = make(**sizes, mask_function=bidirectional_mask_function, attention_mask=padding)
    assert torch.equal(mask, padding.bool()[:, None, None])
    assert make(**sizes, mask_function=bidirectional_mask_function, attention_mask=None) is None
    mask = make(**sizes, mask_function=causal_mask_function, attention_mask=padding.bool())
    assert torch.equal(mask, padding.bool()[:, None, None] & torch.ones(3, 3).tril().bool())


@needs_choice
@pytest.mark.parametrize(
    ("is_causal", "heads", "options", "reason"),
    [
        (True, 4, {}, "has a causal mask"),
        (False, 2, {}, "4 heads of queries, 2 of keys"),
        (False, 4, {"sliding_window": 128}, "has sliding_window"),
    ],
)
def test_attention_of_other_models_is_refused(is_causal, heads, options, reason):
    conddetr.register_attention()
    tensors = torch.randn(1, 4, 5, 16), torch.randn(1, heads, 5, 16), torch.randn(1, heads, 5, 16)
    module = SimpleNamespace(is_causal=is_causal)
    with pytest.raises(ValueError, match=f"'conddetr' is the attention of Conditional DETR.*{reason}.*'sdpa'"):
        transformers.AttentionInterface()["conddetr"](module, *tensors, None, **options)


def test_old_transformers_and_unknown_backend_raise_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"backend: expected one of auto, .* got 'fast'"):
        conddetr.register_attention("fast")
    monkeypatch.delattr(modeling, "ALL_ATTENTION_FUNCTIONS", raising=False)
    with pytest.raises(
        RuntimeError, match=rf"transformers {transformers.__version__} has no choice of attention .*accelerate\(model"
    ):
        conddetr.register_attention()


def test_importing_conddetr_does_not_import_transformers():
    code = "import sys, conddetr; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
