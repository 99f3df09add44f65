"""Steps that are not finite change nothing, and the message names their cause."""

import pytest
import torch
from small_runs import assert_equal, batches, small_trainer


def spoil_output(run):
    run.model.transformer.encoder.layers[0].linear1.register_forward_hook(lambda module, args, out: out / 0)


def spoil_loss(run):
    run.stepper.criterion.weights["loss_bbox"] = float("inf")


def spoil_gradient(run):
    run.model.input_proj.weight.register_hook(lambda gradient: gradient * float("nan"))


def spoil_weight(run):
    with torch.no_grad():
        run.model.bbox_embed.layers[-1].bias.fill_(float("nan"))


def spoil_matching(run):
    """As on a GPU, where the step does not wait to check the cost."""
    run.stepper.criterion.check_finite = False
    predict = run.model._predict
    run.model._predict = lambda *args: {k: v * float("nan") for k, v in predict(*args).items() if k != "aux_outputs"}


CAUSES = [
    (spoil_output, r"first in the output of module transformer\.encoder\.layers\.0\.linear1 \(2048 of 2048 values\)"),
    (spoil_matching, r"first in the matching cost \(Matching decoder layer 0, image 0 of the batch: .*\)"),
    (spoil_loss, r"first in the loss term loss \(1 of 1 values\)"),
    (spoil_gradient, r"first in the gradient of input_proj\.weight \(2048 of 2048 values\)"),
    (spoil_weight, r"first in the weight bbox_embed\.layers\.2\.bias \(4 of 4 values\)"),
]


@pytest.mark.parametrize(("spoil", "cause"), CAUSES)
def test_error_names_the_first_tensor_and_the_images(tmp_path, spoil, cause):
    run = small_trainer(tmp_path, max_skipped_steps=0)
    spoil(run)
    [batch] = batches(run, 1)
    run.stepper([batch], 0)
    with pytest.raises(FloatingPointError, match=cause + r", on image ids \[0, 1, 2, 3\]"):
        run.stepper.flush()


@pytest.mark.parametrize(("check_finite", "skipped"), [("auto", 1), ("always", 1), ("never", 0)])
def test_query_without_a_box_skips_the_step_only_if_checked(tmp_path, caplog, check_finite, skipped):
    """Without the check it is matched last, so losses and gradients stay finite."""
    run = small_trainer(tmp_path, check_finite=check_finite, model_options={"num_queries": 20})
    predict = run.model._predict

    def without_box(*args):
        outputs = predict(*args)
        is_first = (torch.arange(20) == 0)[:, None]
        return {**outputs, "pred_boxes": torch.where(is_first, float("nan"), outputs["pred_boxes"])}

    run.model._predict = without_box
    run.stepper(batches(run, 1), 0)
    run.stepper.flush()
    assert run.stepper.skipped == skipped
    assert ("first in the matching cost (Matching decoder layer 1, image 0 of the batch" in caplog.text) == bool(
        skipped
    )


@pytest.mark.parametrize("waits", [True, False], ids=["read at once", "read after the next forward pass"])
def test_skipped_step_changes_nothing(tmp_path, caplog, waits):
    """A run with a bad step in the middle equals one without that step: weights, statistics, optimizer, average."""
    plain, spoiled = (small_trainer(tmp_path / name, max_skipped_steps=1, ema_decay=0.9, ema_ramp=1) for name in "ab")
    inputs = batches(plain, 3)
    for step in (0, 2):
        plain.stepper([inputs[step]], step)
    bad_images, is_bad = inputs[1].model_input(), False

    def detect(module, args):
        nonlocal is_bad
        is_bad = torch.equal(args[0], bad_images)

    spoiled.model.register_forward_pre_hook(detect)
    # After the backbone, so that its statistics get finite values from a step that does not count.
    spoiled.model.input_proj.register_forward_hook(lambda module, args, out: out * float("nan") if is_bad else out)
    for step in range(3):
        spoiled.stepper([inputs[step]], step)
        if waits:
            spoiled.stepper.flush()
    for run in (plain, spoiled):
        run.stepper.flush()
    assert "Step 1 is not finite, first in the output of module input_proj" in caplog.text
    assert spoiled.stepper.skipped == 1
    first, second = (run.stepper.state() for run in (plain, spoiled))
    assert first.pop("skipped") == 0
    assert second.pop("skipped") == 1
    assert_equal(second, first)
