"""Rows of W&B in its offline mode are the records of `log.jsonl`, read back from its files."""

import json
import struct

import pytest
from small_runs import small_trainer

from conddetr.engine.log import read_log
from conddetr.engine.loggers import Loggers

pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")
pytest.importorskip("wandb", reason="writes its files")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    for name, value in (("MODE", "offline"), ("ERROR_REPORTING", "false"), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)


def records_of(file):
    """The records of a W&B file: blocks of 32 KiB, as in LevelDB's log, behind a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, part = file.read_bytes(), 7, b""
    while position + 7 <= len(content):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        size, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        part += content[position + 7 : position + 7 + size]
        position += 7 + size
        # Whole, first, middle or last part of a record.
        if kind in (1, 4):
            yield Record.FromString(part)
            part = b""


def stored_runs(folder):
    """Id, configuration, rows without W&B's own columns, and exit status of every offline run, in order."""
    import wandb

    # Its process writes the files, and then waits for further runs.
    wandb.teardown()
    stored = []
    for file in folder.glob("wandb/offline-run-*/*.wandb"):
        records = list(records_of(file))
        [run] = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        rows = [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.WhichOneof("record_type") == "history"
        ]
        rows = [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]
        status = [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        stored.append((run.start_time.ToNanoseconds(), run.run_id, config, rows, status))
    return [tuple(values) for _, *values in sorted(stored)]


def defined(folder):
    return [{name: value for name, value in record.items() if value != -1} for record in read_log(folder / "log.jsonl")]


def test_rows_are_the_log_and_a_resumed_run_continues_the_same_run(tmp_path):
    options = {"images": 4, "log_to": "wandb", "lr_patterns": "backbone.*=0.5"}
    small_trainer(tmp_path, epochs=2, **options).fit()
    # As if it had been killed after the record and before the checkpoint, and lost its last epoch.
    second = small_trainer(tmp_path, epochs=3, **options)
    second.resume(tmp_path / "checkpoint.pt")
    second.position.epoch = 1
    second.fit()
    (first_id, config, first_rows, first_status), (second_id, _, second_rows, second_status) = stored_runs(tmp_path)
    assert first_id == second_id == json.loads((tmp_path / "wandb.json").read_text())["run"]
    assert config["train"]["lr_patterns"] == "backbone.*=0.5"
    assert first_status == second_status == [0]
    # The epoch that was sent already is not sent again.
    assert [row["epoch"] for row in first_rows + second_rows] == [0, 1, 2]
    log = defined(tmp_path)
    assert [first_rows[0], second_rows[0]] == [log[0], log[2]]
    assert log[0]["lr_pattern/backbone.*"] == 0.5


def test_run_that_goes_back_begins_a_new_one(tmp_path, capsys):
    from conddetr.engine.loggers.wandb import WandbLogger

    for first_epoch, resumed in ((0, False), (1, True)):
        with Loggers([WandbLogger()], {}, tmp_path, first_epoch, resumed) as loggers:
            for epoch in range(first_epoch, 4):
                loggers.log({"loss": 1.0}, epoch)
    assert "has 4 epochs and cannot go back to 1: a new run begins." in capsys.readouterr().out
    (first_id, _, first_rows, _), (second_id, _, second_rows, _) = stored_runs(tmp_path)
    assert first_id != second_id
    assert (len(first_rows), len(second_rows)) == (4, 3)


def test_error_marks_the_run_as_failed(tmp_path):
    from conddetr.engine.loggers.wandb import WandbLogger

    with pytest.raises(FloatingPointError), Loggers([WandbLogger()], {}, tmp_path, 0, False):
        raise FloatingPointError
    [(_, _, rows, status)] = stored_runs(tmp_path)
    assert (rows, status) == ([], [1])


def test_error_of_wandb_is_one_line_with_what_to_do(tmp_path, monkeypatch):
    from conddetr.engine.loggers.wandb import WandbLogger

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "nobody is logged in"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(
        ValueError, match=r"Logger wandb cannot start \(No API key.*\)\. Log in .* WANDB_MODE=offline\.$"
    ):
        WandbLogger().start({}, tmp_path, 0, False)
    assert not list(tmp_path.glob("*.json"))


def test_damaged_file_is_named(tmp_path):
    (tmp_path / "wandb.json").write_text('{"run": "a"')
    run = small_trainer(tmp_path, images=4, log_to="wandb")
    run.resumed_from = tmp_path / "checkpoint.pt"
    with pytest.raises(ValueError, match=r"wandb\.json is damaged .* delete it, and a new wandb run begins"):
        run.fit()
