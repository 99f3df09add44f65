"""Accelerated models under PEFT and transformers' Trainer give the results of plain ones."""

import copy

import pytest
import torch

import conddetr
from conddetr.kernels import native

pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[test])")

from small_huggingface import run, small_batch, small_dab, small_model
from transformers import ConditionalDetrForObjectDetection, Trainer, TrainingArguments

ALL_LINEAR = r".*\.(encoder|decoder)\.layers\.\d+\..*(proj|fc1|fc2)"


def with_adapters(model, **options):
    """LoRA on every projection of encoder and decoder, with random weights: fresh ones change nothing."""
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install -e .[test])")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=ALL_LINEAR, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapted.to(next(model.parameters()).dtype)


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("order", ["adapters first", "accelerated first"])
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_adapted_and_accelerated(backend, order, use_dora):
    """Outputs, losses and gradients of the adapters; also decelerated, and merged."""
    if backend == "native" and native.NOT_LOADED is not None:
        pytest.skip(native.NOT_LOADED)
    inputs = small_batch(torch.float64)
    plain = small_model(auxiliary_loss=True).double().train()
    model = copy.deepcopy(plain)
    adapted = with_adapters(copy.deepcopy(plain), use_dora=use_dora)
    expected = run(adapted, inputs)
    assert any("lora_A" in name for name in expected)
    assert not torch.allclose(expected["logits"], run(plain, inputs)["logits"], atol=0.1), "the adapters do nothing"

    if order == "accelerated first":
        conddetr.accelerate(model, backend)
    model = with_adapters(model, use_dora=use_dora)
    if order == "adapters first":
        assert "matcher and loss" in [part.name for part in conddetr.accelerate(model, backend).replaced]
    values = run(model, inputs)
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        # Sines of the native kernels have float32's accuracy.
        torch.testing.assert_close(values[name], value, rtol=1e-6, atol=1e-6, msg=name)
    assert not torch.equal(values["logits"], expected["logits"]), "nothing was replaced"

    conddetr.decelerate(model)
    assert torch.equal(run(model, inputs)["logits"], expected["logits"])
    conddetr.accelerate(model, backend)
    merged = model.merge_and_unload()
    assert type(merged) is ConditionalDetrForObjectDetection
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, expected["logits"], rtol=1e-6, atol=1e-6)


def test_adapted_dab():
    model = small_dab().train()
    # PEFT requests them because DAB-DETR shares weights, and transformers does not define them.
    model.model.get_input_embeddings = lambda: model.model.query_refpoint_embeddings
    model = with_adapters(model)
    expected = run(model, small_batch())
    conddetr.accelerate(model)
    values = run(model, small_batch())
    assert values.keys() == expected.keys()
    torch.testing.assert_close(values["logits"], expected["logits"], rtol=1e-4, atol=1e-4)


def test_adapters_are_saved_and_loaded_into_another_model(tmp_path):
    plain = small_model()
    model = copy.deepcopy(plain)
    conddetr.accelerate(model)
    model = with_adapters(model).eval()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**small_batch()).logits, model(**small_batch()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_under_adapters(use_reentrant):
    model = small_model(auxiliary_loss=True).train()
    if not model.supports_gradient_checkpointing:
        pytest.skip("transformers before 5 has no gradient checkpointing for this model")
    conddetr.accelerate(model)
    # Reentrant checkpoints need an input with a gradient: the projection of the backbone's output is trained as well.
    model = with_adapters(model, modules_to_save=["input_projection"])
    expected = run(model, small_batch())
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    values = run(model, small_batch())
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_a_wrapper_around_several_models_is_refused():
    pair = torch.nn.ModuleDict({"student": small_model(), "teacher": small_model()})
    with pytest.raises(TypeError, match=r"expected one detector, got .*ModuleDict with student, teacher inside"):
        conddetr.accelerate(pair)
    assert conddetr.accelerate(torch.nn.Sequential(pair["student"]), "eager").replaced


def test_trainer_in_bfloat16(tmp_path, monkeypatch):
    """Two steps: losses equal the plain model's up to bfloat16's rounding, weights change and stay float32."""
    pytest.importorskip("accelerate", reason="accelerate is not installed; transformers' Trainer needs it")
    # transformers before 5 sets it to "bf16", and later Trainers of this process would read that.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    inputs = small_batch()
    data = [{name: value[index] for name, value in inputs.items()} for index in range(2)]

    def collate(items):
        batch = {name: torch.stack([item[name] for item in items]) for name in ("pixel_values", "pixel_mask")}
        return batch | {"labels": [item["labels"] for item in items]}

    def losses(model):
        settings = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-4,
            bf16=True,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=settings, train_dataset=data, data_collator=collate)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    plain = small_model(auxiliary_loss=True)
    model = copy.deepcopy(plain)
    before = copy.deepcopy(model.state_dict())
    assert conddetr.accelerate(model).replaced
    accelerated = losses(model)
    assert accelerated == pytest.approx(losses(plain), rel=0.03)
    assert len(accelerated) == 2
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.float32}
    name = next(name for name in before if name.endswith("decoder.layers.1.encoder_attn_layer_norm.weight"))
    assert not torch.equal(model.state_dict()[name], before[name])
