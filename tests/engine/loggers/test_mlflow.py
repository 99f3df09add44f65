"""Metrics of MLflow in a local store are the records of `log.jsonl`, read back with MLflow's client."""

import json

import pytest
from small_runs import small_trainer

from conddetr.engine.log import read_log
from conddetr.engine.loggers import Loggers
from conddetr.interrupt import InterruptedRunError

pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")


@pytest.fixture
def client(tmp_path, monkeypatch):
    """A client of the store in `tmp_path / "mlflow"`; nothing is sent elsewhere."""
    for name, value in (("DISABLE_TELEMETRY", "true"), ("ALLOW_FILE_STORE", "true")):
        monkeypatch.setenv(f"MLFLOW_{name}", value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlflow"))
    return pytest.importorskip("mlflow", reason="writes its store").MlflowClient()


def history(client, number, name):
    return [(metric.step, metric.value) for metric in client.get_metric_history(number, name)]


def test_metrics_are_the_log_and_a_resumed_run_continues_the_same_run(tmp_path, client):
    folder, options = tmp_path / "run", {"images": 4, "log_to": "mlflow", "lr_patterns": "backbone.*=0.5"}
    small_trainer(folder, epochs=2, **options).fit()
    second = small_trainer(folder, epochs=3, **options)
    second.resume(folder / "checkpoint.pt")
    # As if it had been killed after the record and before the checkpoint, and lost its last epoch.
    second.position.epoch = 1
    second.fit()
    number = json.loads((folder / "mlflow.json").read_text())["run"]
    [run] = client.search_runs([client.get_experiment_by_name("conddetr").experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (number, "run", "FINISHED")
    log = read_log(folder / "log.jsonl")
    for name in log[0]:
        values = history(client, number, name.replace("*", "_"))
        expected = [(epoch, record[name]) for epoch, record in enumerate(log) if record[name] != -1]
        # The epoch that was sent already is not sent again, and keeps its first value: here other times.
        assert [value for value in values if value[0] != 1] == [value for value in expected if value[0] != 1]
        assert [step for step, _ in values] == [step for step, _ in expected]
    # Parameters cannot change: the changed option is a tag.
    assert (run.data.params["train.epochs"], run.data.tags["train.epochs"]) == ("2", "3")
    assert run.data.params["model.hidden_dim"] == "16"
    assert "model.hidden_dim" not in run.data.tags


@pytest.mark.parametrize(
    ("error", "status"), [(InterruptedRunError("SIGTERM"), "KILLED"), (FloatingPointError("NaN"), "FAILED")]
)
def test_end_of_the_run_is_its_status(tmp_path, client, error, status):
    from conddetr.engine.loggers.mlflow import MlflowLogger

    with pytest.raises(type(error)), Loggers([MlflowLogger()], {}, tmp_path, 0, False):
        raise error
    number = json.loads((tmp_path / "mlflow.json").read_text())["run"]
    assert client.get_run(number).info.status == status


def test_store_that_cannot_be_used_ends_the_run_before_its_first_step(tmp_path, client):
    (tmp_path / "mlflow.json").write_text('{"run": "gone", "epochs": 0}')
    run = small_trainer(tmp_path, images=4, log_to="mlflow")
    run.resumed_from = tmp_path / "checkpoint.pt"
    with pytest.raises(ValueError, match=r"cannot use .*'gone' not found.* delete .*mlflow\.json"):
        run.fit()
    assert run.position.step == 0


def test_new_run_is_not_told_to_delete_a_file_that_it_does_not_have(tmp_path, client, monkeypatch):
    from conddetr.engine.loggers.mlflow import MlflowLogger

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://x")
    with pytest.raises(ValueError, match=r"cannot use nowhere://x \(.*pip install mlflow\.$"):
        MlflowLogger().start({}, tmp_path, 0, False)
