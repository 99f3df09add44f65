"""A whole training step does not make the host wait for the device."""

import pytest
import torch
from small_runs import SMALL_MODEL, batches, small_trainer
from waiting import RefusesToWait, no_synchronisation

import conddetr
from conddetr.config.run import TrainConfig
from conddetr.engine.step import Stepper
from conddetr.loss import targets

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.gpu
@pytest.mark.compares_numbers
@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_step_waits_only_for_matching_on_the_host(tmp_path, backend, monkeypatch):
    """Forward, losses, backward, clipping, update and report, on the machine's own device."""
    # Triton's kernels need heads of this width.
    options = {**SMALL_MODEL, "num_heads": 1, "dropout": 0.1, "backend": backend}
    model = conddetr.build("conditional-detr-tiny", **options).to(DEVICE).train()
    stepper = Stepper(model, TrainConfig(max_targets=9, cuda_graphs="off"), DEVICE, steps_per_epoch=3)
    first, *others = (batch.to(DEVICE) for batch in batches(small_trainer(tmp_path), 3))
    if DEVICE.type == "cpu":
        # It reads the host's copy of the targets, which on a CPU is the only one.
        monkeypatch.setattr(targets, "_check_values", lambda *_: None)
    # The first step creates state that later steps reuse.
    stepper([first], 0)
    # On a GPU the report is copied to the host without waiting, so PyTorch's own check is used there.
    guard = no_synchronisation if DEVICE.type == "cuda" else RefusesToWait
    if backend == "eager":
        with pytest.raises((AssertionError, RuntimeError), match=r"waits for the device|synchronizing"), guard():
            stepper([others[0]], 1)
        return
    for step, batch in enumerate(others, 1):
        with guard():
            stepper([batch], step)
    stepper.flush()
    assert stepper.skipped == 0
    assert stepper.means["loss"] > 0
