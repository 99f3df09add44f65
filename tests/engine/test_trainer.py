"""Training lowers the loss, writes its files, resumes, and reports errors."""

import json
import time

import pytest
import torch
from small_runs import SMALL_MODEL, assert_equal
from small_runs import small_trainer as trainer

import conddetr
from conddetr.config import resolve
from conddetr.config.augment import AugmentConfig
from conddetr.config.run import RunConfig, TrainConfig
from conddetr.data.coco import coco_split
from conddetr.data.synthetic import SyntheticShapes
from conddetr.data.transforms import TrainTransform
from conddetr.engine.checkpoint import CheckpointWriter, read_checkpoint
from conddetr.engine.lines import epoch_line
from conddetr.engine.trainer import Trainer

pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")


def weights(folder, name="checkpoint.pt"):
    return read_checkpoint(folder / name)["model"]


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_loss_falls_and_files_are_complete(tmp_path):
    metrics = trainer(
        tmp_path, images=96, epochs=4, eval_every=2, save_every=3, ema_decay=0.9, lr=3e-3, lr_backbone=3e-3
    ).fit()
    lines = records(tmp_path)
    assert [record["epoch"] for record in lines] == [0, 1, 2, 3]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert "AP" not in lines[0]
    assert lines[-1]["AP50"] == metrics["AP50"]
    assert len(metrics) == 12
    content = read_checkpoint(tmp_path / "checkpoint.pt")
    assert content["position"] == {"epoch": 4, "batch": 0, "step": 96}
    assert content["config"]["num_classes"] == content["run"]["model"]["num_classes"] == 3
    assert content["run"]["train"]["save_every"] == 3
    assert [c["name"] for c in content["classes"]] == ["disk", "square", "triangle"]
    assert json.loads((tmp_path / "config.json").read_text()) == content["run"]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert read_checkpoint(tmp_path / "epoch-0003.pt")["position"]["epoch"] == 3
    # The moving average is evaluated and written to the files for other programs.
    assert_equal(weights(tmp_path, "checkpoint.safetensors"), content["ema"])
    best = max((line for line in lines if "AP" in line), key=lambda line: line["AP"])
    content_of_best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert content_of_best["metrics"]["AP"] == best["AP"]
    assert content_of_best["model"].keys() == content["model"].keys()
    for name in ("best.pt", "best.safetensors", "checkpoint.safetensors"):
        assert read_checkpoint(tmp_path / name)["run"] == content["run"]
    # It holds only the weights of one model.
    assert (tmp_path / "best.pt").stat().st_size < (tmp_path / "checkpoint.pt").stat().st_size / 3
    detector = conddetr.Detector.from_checkpoint(tmp_path / "checkpoint.pt", device="cpu")
    assert_equal(detector.model.state_dict(), content["ema"])


def test_line_of_an_epoch_has_a_dash_for_undefined_metrics():
    speed = {"images_per_second": 8.0, "seconds": 3.0, "loading_share": 0.04}
    record = {"epoch": 0, "loss": 1.5, **speed, "AP": -1.0, "AP50": 0.5}
    assert epoch_line(record, 2) == "epoch 1/2  loss 1.500  8.0 images/s  3 s so far  AP –  AP50 50.0"


def test_line_of_an_epoch_says_that_loading_is_slow():
    record = {"epoch": 0, "loss": 1.5, "images_per_second": 8.0, "seconds": 3.0, "loading_share": 0.256}
    assert epoch_line(record, 2) == "epoch 1/2  loss 1.500  8.0 images/s  3 s so far  loading 26% of the time"


def test_time_for_loading_is_measured(tmp_path, monkeypatch):
    load = SyntheticShapes.load

    def slow(*arguments):
        time.sleep(0.05)
        return load(*arguments)

    monkeypatch.setattr(SyntheticShapes, "load", slow)
    run = trainer(tmp_path, epochs=2, workers=0)
    run.fit()
    for record in records(tmp_path):
        # Seconds per second of the epoch; sleep is never shorter than asked for.
        assert 0.05 * record["images_per_second"] <= record["loading_share"] < 1


def test_workers_start_the_next_epoch_before_the_evaluation(tmp_path, monkeypatch):
    run, events = trainer(tmp_path, epochs=3), []
    started, evaluate = run._started, run._evaluate
    monkeypatch.setattr(run, "_started", lambda *at: events.append(at) or started(*at))
    monkeypatch.setattr(run, "_evaluate", lambda *args: events.append("evaluated") or evaluate(*args))
    run.fit()
    assert events == [(0, 0), (1, 0), "evaluated", (2, 0), "evaluated", "evaluated"]


def test_batches_that_were_loaded_ahead_are_not_used_elsewhere(tmp_path, monkeypatch):
    """The evaluation fails once, and the same trainer resumes before it."""
    trainer(tmp_path / "whole", epochs=2).fit()
    run = trainer(tmp_path / "cut", epochs=2)
    with monkeypatch.context() as patch:
        patch.setattr(run, "_evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.fit()
    run.resume(tmp_path / "cut" / "checkpoint.pt")
    run.fit()
    assert run.position.step == 8
    assert_equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_decoding_on_a_device_needs_a_gpu_and_files(tmp_path, small_coco):
    with pytest.raises(
        ValueError, match="option decode: synthetic shapes of seed 1 are not files that could be decoded"
    ):
        trainer(tmp_path, decode="device")
    images = coco_split(small_coco.root, "train", TrainTransform(resolve("conditional-detr-tiny")))
    run = RunConfig(output_dir=str(tmp_path), train=TrainConfig(decode="device", batch_size=1))
    with pytest.raises(
        ValueError, match="option decode: `device` needs an NVIDIA GPU, the device is cpu: leave it out"
    ):
        Trainer(conddetr.build("conditional-detr-tiny", num_classes=3), images, images, run, torch.device("cpu"))


def test_resuming_says_that_images_were_decoded_elsewhere(tmp_path):
    trainer(tmp_path, epochs=1).fit()
    content = read_checkpoint(tmp_path / "checkpoint.pt")
    for decode, changes in (
        ("workers", []),
        ("device", ["decode was device, is workers: rounding of the pixels differs"]),
    ):
        content["run"]["train"]["decode"] = decode
        torch.save(content, tmp_path / "checkpoint.pt")
        run = trainer(tmp_path, epochs=2)
        run.resume(tmp_path / "checkpoint.pt")
        assert run.changes == changes


def test_two_equal_runs_give_equal_weights(tmp_path):
    for name in ("a", "b"):
        trainer(tmp_path / name).fit()
    assert_equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_resuming_with_more_epochs_equals_one_long_run(tmp_path):
    trainer(tmp_path / "whole", epochs=3).fit()
    trainer(tmp_path / "cut", epochs=1).fit()
    second = trainer(tmp_path / "cut", epochs=3)
    second.resume(tmp_path / "cut" / "checkpoint.pt")
    second.fit()
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert [record["epoch"] for record in records(tmp_path / "cut")] == [0, 1, 2]


def test_schedule_counts_epochs_if_the_batch_size_changes(tmp_path):
    trainer(tmp_path, epochs=2, lr_drop=2).fit()
    run = trainer(tmp_path, epochs=3, lr_drop=2, batch_size=8)
    run.resume(tmp_path / "checkpoint.pt")
    run.fit()
    assert [record["lr"] for record in records(tmp_path)] == pytest.approx([1e-3, 1e-3, 1e-4])


def test_resuming_a_complete_run_changes_nothing(tmp_path):
    metrics = trainer(tmp_path, epochs=1).fit()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    again = trainer(tmp_path, epochs=1)
    again.resume(tmp_path / "checkpoint.pt")
    assert again.fit() == metrics
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_damaged_checkpoint_falls_back_to_the_previous_one_with_a_warning(tmp_path, caplog):
    trainer(tmp_path / "whole").fit()
    trainer(tmp_path / "cut", epochs=1).fit()
    latest, previous = (tmp_path / "cut" / name for name in ("checkpoint.pt", "checkpoint.previous.pt"))
    damaged, good = bytearray(latest.read_bytes()), previous.read_bytes()
    damaged[len(damaged) // 2] ^= 1
    latest.write_bytes(damaged)
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:
        file.write('{"epoch": 1, "loss": 0.')
    again = trainer(tmp_path / "cut")
    again.resume(latest)
    assert "checkpoint.pt cannot be read" in caplog.text
    assert "Resuming from" in caplog.text
    assert "The damaged file is now" in caplog.text
    # The next save does not move the file that was read.
    with CheckpointWriter() as writer:
        again.save(writer)
    assert (tmp_path / "cut" / "checkpoint.pt.damaged").read_bytes() == damaged
    assert previous.read_bytes() == good
    again.fit()
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert [record["epoch"] for record in records(tmp_path / "cut")] == [0, 1]


def test_earlier_run_is_not_overwritten(tmp_path):
    trainer(tmp_path, epochs=1).fit()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(FileExistsError, match=r"checkpoint\.pt is from an earlier run: resume it"):
        trainer(tmp_path, epochs=1).fit()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_missing_metrics_library_is_reported_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install pycocotools"):
        trainer(tmp_path).fit()
    assert not list(tmp_path.iterdir())


def test_checkpoints_that_do_not_fit_are_not_resumed(tmp_path):
    torch.save({"model": {}}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt cannot be resumed: it has no 'optimizer'.*--weights"):
        trainer(tmp_path).resume(tmp_path / "weights.pt")
    run = trainer(tmp_path, epochs=1, save_every_steps=3, eval_every=9)
    run._finish_epoch = lambda *args, **options: pytest.fail("stop here")
    with pytest.raises(pytest.fail.Exception):
        run.fit()
    file = tmp_path / "checkpoint.pt"
    assert read_checkpoint(file)["position"] == {"epoch": 0, "batch": 3, "step": 3}
    with pytest.raises(ValueError, match="of another model: num_queries was 8, is 9"):
        trainer(tmp_path, model_options={"num_queries": 9}).resume(file)
    with pytest.raises(ValueError, match="its batches would now be different: batch_size was 4, is 8"):
        trainer(tmp_path, batch_size=8).resume(file)
    other = trainer(tmp_path)
    other.train_set.classes = [{"id": 5, "name": "star"}, *other.train_set.classes[1:]]
    with pytest.raises(ValueError, match=r"first that differs was id 1 'disk', is id 5 'star'.*--weights"):
        other.resume(file)


def test_a_run_resumes_inside_an_epoch_with_its_augmentation_only(small_coco, tmp_path):
    def start(folder, augment):
        transforms = [TrainTransform(resolve("conditional-detr-tiny", **SMALL_MODEL), augment) for _ in range(2)]
        sets = [coco_split(small_coco.root, "train", transform) for transform in transforms]
        torch.manual_seed(0)
        model = conddetr.build("conditional-detr-tiny", num_classes=3, **SMALL_MODEL)
        config = TrainConfig(epochs=1, batch_size=1, workers=0, save_every_steps=2)
        return Trainer(model, *sets, RunConfig(output_dir=str(folder), train=config), torch.device("cpu"))

    strong = AugmentConfig("strong", mosaic=0.5)
    whole = start(tmp_path / "whole", strong)
    assert whole.run.augment == strong
    whole.fit()
    stopped = start(tmp_path / "stopped", strong)
    stopped._finish_epoch = lambda *args, **options: pytest.fail("stop here")
    with pytest.raises(pytest.fail.Exception):
        stopped.fit()
    file = tmp_path / "stopped" / "checkpoint.pt"
    assert read_checkpoint(file)["position"]["batch"] in (2, 4)
    with pytest.raises(ValueError, match="batches would now be different: resize was 'large-scale-jitter', is 'multi"):
        start(tmp_path / "stopped", "paper").resume(file)
    with pytest.raises(ValueError, match=r"batches would now be different: mosaic was 0\.5, is 0\.0"):
        start(tmp_path / "stopped", "strong").resume(file)
    resumed = start(tmp_path / "stopped", strong)
    resumed.resume(file)
    resumed.fit()
    assert_equal(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))


def test_learning_rates_follow_the_schedule(tmp_path):
    run = trainer(tmp_path, epochs=3, lr_drop=2, lr_backbone=1e-4)
    rates = []
    run.stepper.optimizer.register_step_pre_hook(
        lambda optimizer, *args: rates.append(tuple(group["lr"] for group in optimizer.param_groups))
    )
    run.fit()
    assert rates[0] == rates[7] == (1e-3, 1e-4)
    assert rates[8] == rates[11] == pytest.approx((1e-4, 1e-5))


def test_gradients_are_clipped(tmp_path):
    run = trainer(tmp_path, epochs=1, clip_max_norm=0.05)
    run.fit()
    norm = torch.stack([p.grad.norm() for p in run.model.parameters()]).norm()
    assert norm == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize(
    ("option", "tolerance"),
    [pytest.param({"compile": True}, 1e-4, marks=pytest.mark.slow), ({"precision": "bfloat16"}, 0.02)],
)
def test_losses_of_compiled_and_bfloat16_runs_are_close_to_plain_ones(tmp_path, option, tolerance):
    """Losses of three steps; the later ones depend on the weights that the earlier ones changed."""
    variants = {"plain": {}, "other": option}
    losses = {}
    for name, options in variants.items():
        run = trainer(tmp_path / name, images=12, epochs=1, eval_every=9, **options)
        losses[name] = []
        for step, batch in enumerate(run.loader):
            run.stepper.start_epoch()
            run.stepper([batch], step)
            run.stepper.flush()
            losses[name].append([run.stepper.means[key] for key in sorted(run.stepper.means) if "loss" in key])
    plain, other = (torch.tensor(losses[name]) for name in variants)
    assert plain.shape[0] == 3
    assert torch.isfinite(other).all()
    torch.testing.assert_close(other, plain, rtol=tolerance, atol=tolerance)
    # Rounding differs, so the option took effect.
    assert not torch.equal(other, plain)


def test_time_limit_stops_training_and_still_evaluates(tmp_path):
    metrics = trainer(tmp_path, images=4000, epochs=50, time_limit=0.5).fit()
    assert len(metrics) == 12
    assert read_checkpoint(tmp_path / "checkpoint.pt")["position"]["epoch"] == 1


def test_training_stops_after_max_skipped_steps(tmp_path, caplog):
    run = trainer(tmp_path, max_skipped_steps=2, save_every_steps=1)
    whole = run.stepper._losses

    def spoiled(forward, batch, normalizer):
        # From the fourth step on a weight of the classification loss overflows.
        run.stepper.criterion.weights["loss_ce"] = float("inf") if run.position.step >= 3 else 2.0
        return whole(forward, batch, normalizer)

    run.stepper._losses = spoiled
    message = (
        r"first in the loss term loss \(1 of 1 values\), on image ids \[\d+, \d+, \d+, \d+\]. 3 steps were not finite"
    )
    with pytest.raises(FloatingPointError, match=message):
        run.fit()
    assert "Step 3 is not finite" in caplog.text
    assert "Skipped, 1 of at most 2" in caplog.text
    # The checkpoint is that of the last finite step.
    saved = read_checkpoint(tmp_path / "checkpoint.pt")
    assert all(torch.isfinite(value).all() for value in saved["model"].values())
    assert {int(state["step"]) for state in saved["optimizer"]["state"].values()} == {3}


def test_wrong_number_of_classes_and_too_large_batch_are_errors(tmp_path):
    model = conddetr.build("conditional-detr-tiny")
    with pytest.raises(ValueError, match="num_classes: expected 3 as the data set has, got 91"):
        Trainer(model, SyntheticShapes(4, 1), SyntheticShapes(4, 2), RunConfig(), torch.device("cpu"))
    with pytest.raises(ValueError, match="batch_size: 100 is more than the 16 training images: lower it"):
        trainer(tmp_path, batch_size=100)
