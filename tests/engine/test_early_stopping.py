"""Early stopping: a run ends when its AP no longer rises, and its checkpoint says so."""

import json
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import assert_equal, counter, finish, run_to_the_end, small_trainer, start_ranks

import conddetr
from conddetr.config.run import RunConfig, TrainConfig
from conddetr.data.synthetic import SyntheticShapes
from conddetr.engine.checkpoint import read_checkpoint
from conddetr.engine.early_stopping import EarlyStopping
from conddetr.engine.trainer import Trainer

pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")


def run_with(folder, aps, **options):
    """A trainer whose evaluations give these values of AP."""
    run = small_trainer(folder, images=4, **{"epochs": len(aps), **options})
    run._evaluate = lambda *_: {"AP": aps[run.position.epoch], "AP50": 0.5, "AP75": 0.2}
    return run


def resumed(folder, aps, **options):
    run = run_with(folder, aps, **options)
    run.resume(folder / "checkpoint.pt")
    return run


def epochs_in_log(folder):
    return [json.loads(line)["epoch"] for line in (folder / "log.jsonl").read_text().splitlines()]


@given(aps=st.lists(st.sampled_from([-1.0, 0.0, 0.1, 0.2, 0.3])), patience=st.integers(0, 4))
def test_run_ends_once_the_last_evaluations_do_not_exceed_the_best_before(aps, patience):
    early_stopping, defined = EarlyStopping(), []
    for ap in aps:
        early_stopping.update(ap, min_delta=0.0)
        # An undefined AP never counts.
        defined += [ap] * (ap >= 0)
        before, last = defined[:-patience], defined[-patience:]
        ends = bool(patience and before) and max(before) >= max(last)
        assert early_stopping.is_over(patience) == ends
        if ends:
            break


def test_small_gains_count_once_together_they_exceed_the_least_one():
    early_stopping, counts = EarlyStopping(), []
    for ap in (0.5, 0.5005, 0.5009, 0.5011, 0.5012):
        early_stopping.update(ap, min_delta=0.001)
        counts.append(early_stopping.evaluations)
    assert counts == [0, 1, 2, 0, 1]


def test_run_ends_as_if_complete_and_continues_with_more_patience(tmp_path, capsys):
    aps = [0.1, 0.3, 0.2, 0.3, 0.4, 0.0]
    run_with(tmp_path, aps, patience=2, ema_decay=0.9, save_every=1).fit()
    assert "the run ends after 2 evaluations in a row without a better AP (patience 2" in capsys.readouterr().out
    assert epochs_in_log(tmp_path) == [0, 1, 2, 3]
    saved = (tmp_path / "checkpoint.pt").read_bytes()
    assert read_checkpoint(tmp_path / "checkpoint.pt")["early_stopping"] == {"evaluations": 2, "ap": 0.3}
    # The moving average was evaluated: the best file holds it.
    best, second = (read_checkpoint(tmp_path / name) for name in ("best.pt", "epoch-0002.pt"))
    assert best["metrics"]["AP"] == 0.3
    assert_equal(best["model"], second["ema"])
    name = "class_embed.weight"
    assert not torch.equal(best["model"][name], second["model"][name])
    assert resumed(tmp_path, aps, patience=2, ema_decay=0.9).fit()["AP"] == 0.3
    assert "holds 4 epochs of 6; the run ends after 2 evaluations in a row" in capsys.readouterr().out
    assert (tmp_path / "checkpoint.pt").read_bytes() == saved
    resumed(tmp_path, aps, patience=3, ema_decay=0.9).fit()
    assert epochs_in_log(tmp_path) == [0, 1, 2, 3, 4, 5]


def test_resumed_run_counts_the_evaluations_before(tmp_path):
    aps = [0.3, 0.2, 0.1, 0.0, 0.0, 0.0]
    run_with(tmp_path, aps[:2], patience=3).fit()
    resumed(tmp_path, aps, patience=3).fit()
    assert epochs_in_log(tmp_path) == [0, 1, 2, 3]


def test_patience_counts_evaluations_not_epochs(tmp_path, capsys):
    run_with(tmp_path, [0.3] * 8, patience=1, eval_every=3).fit()
    assert "the run ends after 1 evaluation without a better AP (patience 1" in capsys.readouterr().out
    assert epochs_in_log(tmp_path) == [0, 1, 2, 3, 4, 5]


def test_two_processes_end_together_and_the_first_one_logs(tmp_path):
    """Only the first has the metrics. Without training AP stays as it is, and the second evaluation ends the run."""
    log_to = "tensorboard" if find_spec("tensorboard") else ""
    options = {"images": 8, "epochs": 5, "patience": 1, "lr": 0.0, "lr_backbone": 0.0, "eval_every": 2}
    finish(*start_ranks(2, run_to_the_end, tmp_path, {**options, "log_to": log_to}, counter()))
    assert read_checkpoint(tmp_path / "checkpoint.pt")["position"]["epoch"] == 4
    assert len(list(tmp_path.glob("tensorboard/*"))) == bool(log_to)


def test_patience_without_objects_to_measure_is_refused(tmp_path):
    model = conddetr.build("conditional-detr-tiny", num_classes=3)
    run = RunConfig(output_dir=str(tmp_path), train=TrainConfig(patience=1))
    empty = SyntheticShapes(4, 2, 64)
    empty.objects = 0
    with pytest.raises(ValueError, match="patience: the validation set has no objects"):
        Trainer(model, SyntheticShapes(8, 1, 64), empty, run, torch.device("cpu"))
