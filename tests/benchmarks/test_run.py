"""One command runs the named benchmarks, and the thin entry scripts call it."""

import importlib
import types

import pytest
import run

from harness import store
from harness.problem import Timed
from harness.result import Result


def module(calls, fault=None, why_not=None):
    """A benchmark of one problem; it appends the options of each run to `calls`."""

    class Problem(Timed):
        title = "one"

        def measured(self, options):
            calls.append(options)
            if fault:
                raise fault
            return Result("one", {"peer": [1.0]})

        @classmethod
        def arguments(cls, parser):
            parser.add_argument("--points", type=int)

        @classmethod
        def asked_for(cls, options):
            return [cls()]

    Problem.why_not = why_not
    return types.SimpleNamespace(Problem=Problem, __doc__="Something.")


@pytest.fixture
def benchmarks(monkeypatch, tmp_path):
    """Three operations: a good one, one that fails, one that does not run on this machine."""
    calls = {name: [] for name in ("good", "bad", "other")}
    modules = {
        "good": module(calls["good"]),
        "bad": module(calls["bad"], RuntimeError("out of luck")),
        "other": module(calls["other"], why_not="no GPU here"),
    }
    monkeypatch.setattr(run, "OPERATIONS", dict.fromkeys(modules, "ops"))
    monkeypatch.setattr(run, "TIMED", dict.fromkeys(modules, "ops"))
    monkeypatch.setattr(run, "imported", modules.__getitem__)
    monkeypatch.setattr(store, "RESULTS", tmp_path)
    return calls


def test_flags_apply_to_each_named_benchmark(benchmarks, tmp_path):
    assert run.main(["good", "good", "--points", "3", "--rounds", "2"]) == 0
    [options] = benchmarks["good"]
    assert (options.points, options.rounds, options.seconds) == (3, 2, 60)
    assert [path.name for path in tmp_path.glob("*/*")] == ["good.json"]


def test_failure_does_not_stop_the_next_benchmark(benchmarks, capsys):
    assert run.main(["bad", "good"]) == 1
    assert len(benchmarks["good"]) == 1
    printed = capsys.readouterr()
    assert "one: the problem itself: failed: out of luck" in printed.out
    assert printed.err.splitlines()[-1] == "failed: bad"


def test_ops_leaves_out_benchmarks_that_do_not_run_here(benchmarks, capsys):
    assert run.main(["ops"]) == 1
    assert [len(times) for times in benchmarks.values()] == [1, 1, 0]
    assert "other: no GPU here" in capsys.readouterr().out
    # Named explicitly, it is an error.
    with pytest.raises(SystemExit):
        run.main(["other"])
    assert "run.py other: error: no GPU here" in capsys.readouterr().err


def test_wrong_flag_is_an_error_before_anything_is_timed(benchmarks, capsys):
    with pytest.raises(SystemExit):
        run.main(["good", "bad", "--images", "3"])
    assert "run.py good: error: unrecognized arguments: --images 3" in capsys.readouterr().err
    assert not any(benchmarks.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "there is no benchmark nothing"),
        (["sine", "report"], "report must be named alone, got sine report"),
    ],
)
def test_wrong_names_are_refused(words, message, capsys):
    assert run.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", [*run.TIMED, *run.PROGRAMS])
def test_every_name_has_its_module(name):
    """The module imports, and has a `Problem` or a `main`."""
    if name in ("tune", "aot", "aot_cuda", "predict"):
        pytest.importorskip("triton", reason="the package triton is not installed")
    module = importlib.import_module(f"{(run.TIMED | run.PROGRAMS)[name]}.{name}")
    assert issubclass(module.Problem, Timed) if name in run.TIMED else callable(module.main)


def test_measured_covers_every_operation_benchmark():
    """Names are those of the files in `benchmarks/ops`."""
    from harness.measured import OPERATIONS

    assert OPERATIONS.keys() == run.OPERATIONS.keys()


@pytest.mark.parametrize("name", ["attn", "train", "model", "tables", "convergence"])
def test_thin_entries_run_their_name(name, monkeypatch):
    """For example `python benchmarks/attn.py`."""
    import runpy

    calls = []
    monkeypatch.setattr(run, "main", lambda words: calls.append(words) or 0)
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--rounds", "1"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(run.HERE / f"{name}.py"), run_name="__main__")
    assert calls == [[name, "--rounds", "1"]]
