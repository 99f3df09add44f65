"""Recorded steps give the same losses and weights as plain steps."""

import copy
from dataclasses import replace

import pytest
import torch
from small_runs import assert_equal, batches, small_trainer

import conddetr
from conddetr.capture import WARMUP
from conddetr.config.run import TrainConfig
from conddetr.data.batch import collate
from conddetr.engine import graphs
from conddetr.engine.graphs import buckets, why_no_graphs
from conddetr.engine.step import Stepper
from conddetr.kernels import records, registry

CPU = torch.device("cpu")


def shapes_of(batch):
    """The batch, and the same batch padded to a larger shape."""
    images = torch.nn.functional.pad(batch.images, (0, 32, 0, 32))
    return batch, replace(batch, images=images, padded=True)


def recorded(run):
    """Let a trainer record its steps. A replay runs the recorded function again on its recorded tensors; everything
    else is as on a GPU. Returns the list of recorded functions."""
    functions = []

    def capture(record):
        functions.append(record)
        return record

    run.stepper.record(capture)
    return functions


RATES = {"lr": 2**-10, "lr_backbone": 2**-11}
"""Learning rates that are exact in float32, which graphs use."""


# With one decoder layer some parameters have no gradient.
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"family": "detr"}, {"decoder_layers": 1}], ids=str)
def test_recorded_steps_equal_plain_steps(tmp_path, options, accumulate):
    """Bitwise: losses, weights, moments, statistics, moving average, and everything else in a checkpoint."""
    training = {**RATES, "accumulate": accumulate, "ema_decay": 0.9, "warmup_steps": 4}
    plain, graphed = (small_trainer(tmp_path / name, model_options=options, **training) for name in "ab")
    functions = recorded(graphed)
    windows = [shapes_of(batch) for batch in batches(plain, 3)]
    for run in (plain, graphed):
        run.model.train()
        for step, window in enumerate(windows):
            for number, batches_of_step in enumerate([window] if accumulate == 2 else [window[:1], window[1:]]):
                run.stepper(batches_of_step, 2 * step + number)
        run.stepper.flush()
    assert len(functions) == len(graphed.stepper.graphs.recorded) == 3 - accumulate
    assert graphed.stepper.means == plain.stepper.means
    assert_equal(graphed.stepper.state(), plain.stepper.state())
    rates = [group["lr"] for group in graphed.stepper.state()["optimizer"]["param_groups"]]
    assert all(type(rate) is float for rate in rates)


def test_recorded_steps_have_the_rate_of_each_pattern(tmp_path):
    rates = {"lr_patterns": f"heads={2**-9}, backbone.0.stages.3={2**-12}", "freeze": "encoder", "warmup_steps": 4}
    plain, graphed = (small_trainer(tmp_path / name, **RATES, **rates) for name in "ab")
    recorded(graphed)
    for run in (plain, graphed):
        run.stepper.train_mode()
        for step, batch in enumerate(batches(run, 2)):
            run.stepper([batch], step)
        run.stepper.flush()
    assert len(graphed.stepper.graphs.recorded) == 1
    assert_equal(graphed.stepper.state(), plain.stepper.state())


def test_step_that_is_not_finite_is_undone_and_explained(tmp_path, caplog):
    run = small_trainer(tmp_path, **RATES, ema_decay=0.9)
    recorded(run)
    run.model.train()
    first, second, third = batches(run, 3)
    run.stepper([first], 0)
    run.stepper.flush()
    before = copy.deepcopy(run.stepper.state())
    broken = replace(second, boxes=second.boxes.fill_(1e38))
    run.stepper([broken], 1)
    run.stepper.flush()
    assert run.stepper.skipped == 1
    assert f"on image ids {list(second.image_ids)}" in caplog.text
    assert "Step 1 is not finite, first in the loss term" in caplog.text
    after = run.stepper.state()
    del before["skipped"], after["skipped"]
    assert_equal(after, before)
    run.stepper([third], 2)
    run.stepper.flush()
    assert run.stepper.means["loss"] > 0


def test_gradients_start_empty_and_addresses_do_not_change(tmp_path):
    run = small_trainer(tmp_path)
    gradients, addresses = [], []

    def capture(record):
        gradients.append([parameter.grad for parameter in run.model.parameters()])

        def replay():
            record()
            moments = run.stepper.optimizer.state.values()
            tensors = [run.stepper._sums, *run.model.parameters(), *(values["exp_avg"] for values in moments)]
            addresses.append([tensor.data_ptr() for tensor in tensors])

        return replay

    run.stepper.record(capture)
    forwards = []
    run.model.register_forward_hook(lambda *_: forwards.append(1))
    for step, batch in enumerate(batches(run, 3)):
        run.stepper([batch], step)
        run.stepper.start_epoch()
    assert len(forwards) == WARMUP + 3
    assert gradients == [[None] * len(list(run.model.parameters()))]
    assert addresses[0] == addresses[1] == addresses[2]


def test_loading_a_state_records_again(tmp_path):
    run = small_trainer(tmp_path, **RATES)
    runs = recorded(run)
    first, second = batches(run, 2)
    run.stepper([first], 0)
    run.stepper.flush()
    state = copy.deepcopy(run.stepper.state())
    weights = []
    for _ in range(2):
        run.stepper([second], 1)
        run.stepper.flush()
        weights.append({name: value.clone() for name, value in run.model.state_dict().items()})
        run.stepper.load_state(copy.deepcopy(state))
    assert len(runs) == 2
    assert_equal(*weights)


def test_more_objects_than_max_targets_is_an_error(tmp_path):
    run = small_trainer(tmp_path, max_targets=1)
    with pytest.raises(ValueError, match=r"objects, max_targets is 1: build the criterion with.*--max-targets"):
        run.stepper(batches(run, 1), 0)


def full_batch():
    """The second image has one object more than the model has queries."""
    full = {"labels": torch.zeros(9, dtype=torch.int64), "boxes": torch.full((9, 4), 0.5), "original_size": (64, 64)}
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    fitting = {**full, "labels": full["labels"][:8], "boxes": full["boxes"][:8]}
    return collate([(images[0], {**fitting, "image_id": 5}), (images[1], {**full, "image_id": 7})])


def test_step_with_more_objects_than_queries_runs_without_a_graph(tmp_path, caplog):
    strict = small_trainer(tmp_path / "on")
    strict.stepper.config = replace(strict.config, cuda_graphs="on")
    recorded(strict)
    with pytest.raises(ValueError, match=r"Image id 7 has 9 objects, the model has 8 queries, .* `on` no image may"):
        strict.stepper([full_batch()], 0)
    run, plain = (small_trainer(tmp_path / name, **RATES) for name in "ab")
    recorded(run)
    windows = [full_batch(), *batches(run, 1), full_batch()]
    for trainer in (run, plain):
        for step, batch in enumerate(windows):
            trainer.stepper([batch], step)
        trainer.stepper.flush()
    assert caplog.text.count("image id 7 has 9 objects, a graph takes 8: such steps run without.") == 1
    assert len(run.stepper.graphs.recorded) == 1
    assert_equal(run.stepper.state(), plain.stepper.state())


def test_training_continues_without_graphs_if_memory_is_short(tmp_path, caplog):
    def capture(_):
        raise torch.OutOfMemoryError("planted")

    run, plain = (small_trainer(tmp_path / name, **RATES) for name in "ab")
    run.stepper.record(capture)
    windows = batches(run, 2)
    for trainer in (run, plain):
        for step, batch in enumerate(windows):
            trainer.stepper([batch], step)
        trainer.stepper.flush()
    assert caplog.text.count("the memory does not suffice for recording; training continues without.") == 1
    assert not run.stepper.graphs.recorded
    assert_equal(run.stepper.state(), plain.stepper.state())
    strict = small_trainer(tmp_path / "on")
    strict.stepper.config = replace(strict.config, cuda_graphs="on")
    strict.stepper.record(capture)
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        strict.stepper(windows[:1], 0)


def test_number_of_recorded_shapes_is_limited(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    run = small_trainer(tmp_path)
    runs = recorded(run)
    [batch] = batches(run, 1)
    for step, part in enumerate((*shapes_of(batch), *shapes_of(batch))):
        run.stepper([part], step)
    run.stepper.flush()
    assert len(runs) == 1
    assert run.stepper.means["loss"] > 0
    assert caplog.text.count("1 kinds of steps are recorded, others run without") == 1


def test_reasons_why_steps_cannot_be_recorded(tmp_path, monkeypatch):
    config = conddetr.config.resolve("conditional-detr-tiny")
    model = conddetr.build("conditional-detr-tiny")
    with pytest.raises(ValueError, match=r"cuda_graphs: graphs need an NVIDIA GPU, the device is cpu. Train without"):
        Stepper(model, TrainConfig(cuda_graphs="on"), CPU, 1)
    default, cuda = TrainConfig(), torch.device("cuda")
    assert Stepper(model, default, CPU, 1).graphs is None
    monkeypatch.setattr(registry, "why_not", lambda *_, **__: None)
    with records.pretend(None):
        reason = why_no_graphs(config, "auto", default, cuda)
    assert "matched on the host" in reason
    assert "conddetr check" in reason
    monkeypatch.setattr(records, "why_not", lambda *_: None)
    assert why_no_graphs(config, "auto", default, cuda) is None
    assert "matched on the host" in why_no_graphs(config, "eager", default, cuda)
    assert why_no_graphs(config, "auto", TrainConfig(compile=True), cuda) == "the model is compiled"
    assert why_no_graphs(config, "auto", TrainConfig(compile=True, cuda_graphs="on"), cuda) is None
    assert "check_finite" in why_no_graphs(config, "auto", TrainConfig(check_finite="always"), cuda)
    for mode in ("auto", "on"):
        recomputing = TrainConfig(checkpoint_activations=True, cuda_graphs=mode)
        assert "activations are recomputed" in why_no_graphs(config, "auto", recomputing, cuda)
    assert buckets(config, "auto", default, cuda) == 4
    assert buckets(config, "auto", TrainConfig(pad_buckets=0), cuda) == 0
    assert buckets(config, "auto", TrainConfig(pad_buckets=7), CPU) == 7
    assert buckets(config, "auto", TrainConfig(cuda_graphs="off"), cuda) == buckets(config, "auto", default, CPU) == 0
    assert small_trainer(tmp_path).run.train.pad_buckets == 0
    monkeypatch.setattr(graphs.distributed, "world_size", lambda: 2)
    assert "one process only, there are 2" in why_no_graphs(config, "auto", default, cuda)


@pytest.mark.gpu
@pytest.mark.compares_numbers
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU")
def test_losses_on_a_gpu_equal_those_of_plain_steps():
    device, curves = torch.device("cuda"), []
    for cuda_graphs in ("off", "on"):
        torch.manual_seed(0)
        model = conddetr.build("conditional-detr-tiny", num_classes=3, backend="auto", dropout=0.1).to(device).train()
        config = TrainConfig(lr=1e-4, lr_backbone=1e-4, cuda_graphs=cuda_graphs, max_targets=9, precision="float32")
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
