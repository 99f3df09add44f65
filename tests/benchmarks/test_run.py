"""One command runs what is named, and its thin entries say the same."""

import importlib
import types

import pytest
import run

from harness import store
from harness.problem import Timed
from harness.result import Result


def module(told, fault=None, why_not=None):
    """A benchmark of one problem, which notes the options that it is timed with."""

    class Problem(Timed):
        title = "one"

        def measured(self, options):
            told.append(options)
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
    """Three operations: a good one, one whose kernel is wrong, one that this machine cannot time."""
    told = {name: [] for name in ("good", "bad", "other")}
    found = {
        "good": module(told["good"]),
        "bad": module(told["bad"], RuntimeError("out of luck")),
        "other": module(told["other"], why_not="no GPU here"),
    }
    monkeypatch.setattr(run, "OPERATIONS", dict.fromkeys(found, "ops"))
    monkeypatch.setattr(run, "TIMED", dict.fromkeys(found, "ops"))
    monkeypatch.setattr(run, "imported", found.__getitem__)
    monkeypatch.setattr(store, "RESULTS", tmp_path)
    return told


def test_flags_are_for_each_that_is_named(benchmarks, tmp_path):
    assert run.main(["good", "good", "--points", "3", "--rounds", "2"]) == 0
    [options] = benchmarks["good"]
    assert (options.points, options.rounds, options.seconds) == (3, 2, 60)
    assert [path.name for path in tmp_path.glob("*/*")] == ["good.json"]


def test_one_that_fails_does_not_cost_the_next(benchmarks, capsys):
    assert run.main(["bad", "good"]) == 1
    assert len(benchmarks["good"]) == 1
    said = capsys.readouterr()
    assert "one: the problem itself: failed: out of luck" in said.out
    assert said.err.splitlines()[-1] == "failed: bad"


def test_all_operations_are_those_of_this_machine(benchmarks, capsys):
    assert run.main(["ops"]) == 1
    assert [len(times) for times in benchmarks.values()] == [1, 1, 0]
    assert "other: no GPU here" in capsys.readouterr().out
    # Named by itself it is an error.
    with pytest.raises(SystemExit):
        run.main(["other"])
    assert "run.py other: error: no GPU here" in capsys.readouterr().err


def test_a_wrong_flag_ends_all_before_anything_is_timed(benchmarks, capsys):
    with pytest.raises(SystemExit):
        run.main(["good", "bad", "--images", "3"])
    assert "run.py good: error: unrecognized arguments: --images 3" in capsys.readouterr().err
    assert not any(benchmarks.values())


@pytest.mark.parametrize(
    ("words", "said"),
    [(["nothing"], "there is no benchmark nothing"), (["sine", "report"], "report is named alone, got sine report")],
)
def test_names_are_those_of_files(words, said, capsys):
    assert run.main(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", [*run.TIMED, *run.PROGRAMS])
def test_every_name_has_its_module(name):
    """Without the sources nothing could be imported at its turn."""
    if name in ("tune", "aot", "aot_cuda", "predict"):
        pytest.importorskip("triton", reason="the package triton is not installed")
    found = importlib.import_module(f"{(run.TIMED | run.PROGRAMS)[name]}.{name}")
    assert issubclass(found.Problem, Timed) if name in run.TIMED else callable(found.main)


def test_every_operation_of_the_package_is_timed():
    """By the name of the folder in `kernels/`."""
    from harness.measured import OPERATIONS

    assert OPERATIONS.keys() == run.OPERATIONS.keys()


@pytest.mark.parametrize("name", ["attn", "train", "model", "tables", "convergence"])
def test_thin_entries_run_their_name(name, monkeypatch):
    """`python benchmarks/attn.py` and the like."""
    import runpy

    told = []
    monkeypatch.setattr(run, "main", lambda words: told.append(words) or 0)
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--rounds", "1"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(run.HERE / f"{name}.py"), run_name="__main__")
    assert told == [[name, "--rounds", "1"]]
