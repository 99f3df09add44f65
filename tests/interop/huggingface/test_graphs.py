"""`accelerate(model, graphs=True)`: the same training with its body replayed, and calls without graphs."""

import copy
from inspect import signature

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[test])")

from recorder import CAPTURE
from small_huggingface import run, small_batch, small_dab, small_model
from transformers.models.conditional_detr import modeling_conditional_detr as modeling

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


def run_and_record(model, **options):
    """The paths of the body, and the outputs."""
    inputs = {name: value.to(DEVICE) for name, value in small_batch().items() if name != "labels"}
    with conddetr.record_paths() as paths:
        outputs = model(**inputs, **options)
    return dict(paths.get("graph", {})), outputs


@pytest.mark.parametrize("auxiliary_loss", [False, True])
def test_outputs_losses_and_gradients_are_those_without_graphs(auxiliary_loss):
    plain, accelerated, graphed = models(auxiliary_loss=auxiliary_loss)
    expected = run(plain, small_batch())
    for model in (accelerated, graphed, graphed):
        values = run(model, small_batch())
        assert list(values) == list(expected)
        for name, value in expected.items():
            scale = value.abs().max().clamp(min=1).item()
            torch.testing.assert_close(values[name], value, atol=1e-4 * scale, rtol=0, msg=name)
        model.zero_grad()
    assert run_and_record(graphed)[0] == {"replayed": 1}
    assert len(graphed.model.graphs) == 1


def test_weights_may_change_in_place_and_gradients_accumulate():
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
def test_call_that_requests_more_runs_without_graphs(options, reason, caplog):
    *_, graphed = models()
    paths, outputs = run_and_record(graphed, **options)
    assert paths == {"called without": 1}
    assert reason in caplog.text
    recorded = outputs.decoder_attentions if reason == "output_attentions" else outputs.decoder_hidden_states
    assert recorded is not None


def test_gradient_checkpointing_runs_without_graphs(caplog):
    *_, graphed = models()
    if not graphed.supports_gradient_checkpointing:
        pytest.skip("transformers before 5 has no gradient checkpointing for this model")
    graphed.gradient_checkpointing_enable()
    assert run_and_record(graphed)[0] == {"called without": 1}
    assert "gradient checkpointing is on" in caplog.text


def test_evaluation_runs_as_before(caplog):
    *_, graphed = models()
    with torch.no_grad():
        assert run_and_record(graphed)[0] == {}
    graphed.eval()
    assert run_and_record(graphed)[0] == {}
    assert not caplog.records


def test_additional_argument_of_the_trainer_is_irrelevant():
    *_, graphed = models()
    if "kwargs" not in signature(graphed.forward).parameters:
        pytest.skip("the Trainer of transformers before 5 gives this model no additional argument")
    run_and_record(graphed)
    assert run_and_record(graphed, num_items_in_batch=torch.tensor(7))[0] == {"replayed": 1}


def test_graphs_can_be_switched_off_and_undone():
    model = small_model()
    report = conddetr.accelerate(model, graphs=True)
    assert "graphs of the body" in str(report)
    assert copy.deepcopy(model).model.graphs is not model.model.graphs
    conddetr.accelerate(model)
    assert model.model.graphs is None
    conddetr.decelerate(model)
    assert type(model.model) is modeling.ConditionalDetrModel
    assert "graphs" not in vars(model.model)


@pytest.mark.parametrize("make", [small_dab, lambda: conddetr.build("conditional-detr-tiny", num_classes=3)])
def test_graphs_of_other_models_are_refused(make):
    with pytest.raises(ValueError, match="graphs: expected transformers' ConditionalDetrForObjectDetection, got "):
        conddetr.accelerate(make(), graphs=True)
