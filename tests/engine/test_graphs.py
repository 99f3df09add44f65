"""Recorded steps: the same losses and weights as steps that are not recorded."""

from dataclasses import replace

import pytest
import torch
from small_runs import assert_equal, batches, small_trainer

import conddetr
from conddetr.data.batch import collate
from conddetr.engine import graphs
from conddetr.engine.config import TrainConfig
from conddetr.engine.graphs import WARMUP, StepGraphs, refuse_graphs
from conddetr.engine.step import Stepper

CPU = torch.device("cpu")


def shapes_of(batch):
    """The batch, and the same padded to a larger shape."""
    images = torch.nn.functional.pad(batch.images, (0, 32, 0, 32))
    return batch, replace(batch, images=images, padded=True)


# With one decoder layer some parameters get no gradient.
@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"family": "detr"}, {"decoder_layers": 1}], ids=str)
def test_steps_equal_those_that_are_not_recorded(tmp_path, options):
    """What is recorded is here run again, from the tensors it was recorded with; all else is as on a GPU."""
    plain, recorded = (
        small_trainer(tmp_path / name, model_options=options, max_targets=9, accumulate=2) for name in "ab"
    )
    runs = []

    def capture(run):
        runs.append(run)
        return run

    recorded.stepper.graphs = StepGraphs(recorded.model, recorded.stepper._losses_of_packed, capture)
    windows = [shapes_of(batch) for batch in batches(plain, 3)]
    for run in (plain, recorded):
        run.model.train()
        for step, window in enumerate(windows):
            run.stepper(window, step)
        run.stepper.flush()
    assert len(runs) == len(recorded.stepper.graphs.recorded) == 2
    assert recorded.stepper.means == plain.stepper.means
    assert_equal(recorded.stepper.state(), plain.stepper.state())


def test_memory_stays_where_it_is(tmp_path):
    run = small_trainer(tmp_path, max_targets=9)
    calls = []

    def capture(record):
        def replay():
            calls.append([parameter.grad.data_ptr() for parameter in run.model.parameters()])
            record()

        return replay

    run.stepper.graphs = StepGraphs(run.model, run.stepper._losses_of_packed, capture)
    forwards = []
    run.model.register_forward_hook(lambda *_: forwards.append(1))
    for step, batch in enumerate(batches(run, 3)):
        run.stepper([batch], step)
    assert len(forwards) == WARMUP + 3
    assert calls[0] == calls[1] == calls[2]
    [found] = run.stepper.graphs.recorded.values()
    packed = run.stepper.criterion.pack(batch.targets, CPU)
    assert torch.equal(found.inputs[0], batch.images)
    assert torch.equal(found.inputs[3], packed.boxes)


def test_more_objects_than_the_capacity(tmp_path):
    run = small_trainer(tmp_path, max_targets=1)
    with pytest.raises(ValueError, match=r"objects, max_targets is 1: build the criterion with.*--max-targets"):
        run.stepper(batches(run, 1), 0)


def test_more_objects_than_queries(tmp_path):
    run = small_trainer(tmp_path, max_targets=9)
    run.stepper.graphs = StepGraphs(run.model, run.stepper._losses_of_packed, lambda record: record)
    full = {"labels": torch.zeros(9, dtype=torch.int64), "boxes": torch.full((9, 4), 0.5), "original_size": (64, 64)}
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    few = {**full, "labels": full["labels"][:8], "boxes": full["boxes"][:8]}
    batch = collate([(images[0], {**few, "image_id": 5}), (images[1], {**full, "image_id": 7})])
    with pytest.raises(ValueError, match="Image id 7 has 9 objects, the model 8 queries: with cuda_graphs none may"):
        run.stepper([batch], 0)


def test_where_steps_can_not_be_recorded(monkeypatch):
    config = conddetr.config.resolve("conditional-detr-tiny", backend="auto")
    model = conddetr.build("conditional-detr-tiny")
    with pytest.raises(ValueError, match=r"cuda_graphs: graphs need an NVIDIA GPU, the device is cpu. Train without"):
        Stepper(model, TrainConfig(cuda_graphs=True), CPU, 1)
    cuda = torch.device("cuda")
    monkeypatch.setattr(graphs, "choose", lambda backend, *_: "eager" if backend == "eager" else "triton")
    refuse_graphs(config, cuda)
    with pytest.raises(ValueError, match="matched on the host: train with backend auto or triton"):
        refuse_graphs(replace(config, backend="eager"), cuda)
    monkeypatch.setattr(graphs.distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="one process, there are 2"):
        refuse_graphs(config, cuda)


@pytest.mark.gpu
@pytest.mark.compares_numbers
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU")
def test_losses_on_a_gpu_are_those_of_plain_steps():
    device, curves = torch.device("cuda"), []
    for cuda_graphs in (False, True):
        torch.manual_seed(0)
        model = conddetr.build("conditional-detr-tiny", num_classes=3, backend="auto", dropout=0.1).to(device).train()
        config = TrainConfig(lr=1e-4, lr_backbone=1e-4, cuda_graphs=cuda_graphs, max_targets=9)
        stepper = Stepper(model, config, device, steps_per_epoch=20)
        curves.append([])
        for step in range(20):
            stepper(shapes_of(gpu_batch(step)), step)
            stepper.flush()
            curves[-1].append(stepper.means["loss"])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def gpu_batch(step):
    """Two images of noise with three objects each, on the host."""
    generator = torch.Generator().manual_seed(step)
    samples = []
    for number in range(2):
        image = torch.randint(256, (3, 64, 64), dtype=torch.uint8, generator=generator)
        boxes = 0.2 * torch.rand(3, 4, generator=generator) + 0.3
        samples.append(
            (image, {"labels": torch.arange(3), "boxes": boxes, "image_id": number, "original_size": (64, 64)})
        )
    return collate(samples)
