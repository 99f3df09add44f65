"""`accelerate(model, graphs=True)`: the same training, its body replayed, and calls where somebody wants more of it."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[test])")

from recorder import CAPTURE
from small_huggingface import run, small_batch, small_dab, small_model
from transformers.models.conditional_detr import modeling_conditional_detr as theirs

import conddetr
from conddetr.graphed import Graphs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu, pytest.mark.compares_numbers.with_args(ValueError)]


def models(**options):
    """One model three times: as shipped, accelerated, and with graphs."""
    plain = small_model(**options).to(DEVICE).train()
    accelerated, graphed = copy.deepcopy(plain), copy.deepcopy(plain)
    conddetr.accelerate(accelerated)
    conddetr.accelerate(graphed, graphs=True)
    graphed.model.graphs = Graphs(CAPTURE)
    return plain, accelerated, graphed


def ways(model, **options):
    """How the body was computed."""
    inputs = {name: value.to(DEVICE) for name, value in small_batch().items() if name != "labels"}
    with conddetr.record_paths() as paths:
        outputs = model(**inputs, **options)
    return dict(paths.get("graph", {})), outputs


@pytest.mark.parametrize("auxiliary_loss", [False, True])
def test_outputs_losses_and_gradients_are_those_without(auxiliary_loss):
    plain, accelerated, graphed = models(auxiliary_loss=auxiliary_loss)
    expected = run(plain, small_batch())
    for model in (accelerated, graphed, graphed):
        found = run(model, small_batch())
        assert list(found) == list(expected)
        for name, value in expected.items():
            scale = value.abs().max().clamp(min=1).item()
            torch.testing.assert_close(found[name], value, atol=1e-4 * scale, rtol=0, msg=name)
        model.zero_grad()
    assert ways(graphed)[0] == {"replayed": 1}
    assert len(graphed.model.graphs) == 1


def test_weights_may_change_in_place_and_gradients_be_added_up():
    _, accelerated, graphed = models(auxiliary_loss=True)
    for step in range(4):
        losses = []
        for model in (accelerated, graphed):
            inputs = small_batch()
            labels = [{name: value.to(DEVICE) for name, value in label.items()} for label in inputs["labels"]]
            outputs = model(inputs["pixel_values"].to(DEVICE), inputs["pixel_mask"].to(DEVICE), labels=labels)
            outputs.loss.backward()
            losses.append(outputs.loss.detach())
            if step % 2:
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.grad is not None:
                            parameter -= 1e-3 * parameter.grad / parameter.grad.norm().clamp(min=1e-6)
                model.zero_grad()
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    assert len(graphed.model.graphs) == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"output_hidden_states": True}, "output_hidden_states"),
    ],
)
def test_a_call_that_wants_more_is_called(options, reason, caplog):
    *_, graphed = models()
    way, outputs = ways(graphed, **options)
    assert way == {"called without": 1}
    assert reason in caplog.text
    found = outputs.decoder_attentions if reason == "output_attentions" else outputs.decoder_hidden_states
    assert found is not None


def test_checkpointing_is_called(caplog):
    *_, graphed = models()
    graphed.gradient_checkpointing_enable()
    assert ways(graphed)[0] == {"called without": 1}
    assert "gradient checkpointing is on" in caplog.text


def test_evaluation_is_called_as_before(caplog):
    *_, graphed = models()
    with torch.no_grad():
        assert ways(graphed)[0] == {}
    graphed.eval()
    assert ways(graphed)[0] == {}
    assert not caplog.records


def test_what_the_trainer_of_transformers_adds_does_not_matter():
    *_, graphed = models()
    ways(graphed)
    assert ways(graphed, num_items_in_batch=torch.tensor(7))[0] == {"replayed": 1}


def test_it_can_be_given_up_and_undone():
    model = small_model()
    report = conddetr.accelerate(model, graphs=True)
    assert "graphs of the body" in str(report)
    assert copy.deepcopy(model).model.graphs is not model.model.graphs
    conddetr.accelerate(model)
    assert model.model.graphs is None
    conddetr.decelerate(model)
    assert type(model.model) is theirs.ConditionalDetrModel
    assert "graphs" not in vars(model.model)


@pytest.mark.parametrize("make", [small_dab, lambda: conddetr.build("conditional-detr-tiny", num_classes=3)])
def test_other_models_have_none(make):
    with pytest.raises(ValueError, match="graphs: expected transformers' ConditionalDetrForObjectDetection, got "):
        conddetr.accelerate(make(), graphs=True)
