"""Flights (docs/gpu.md) with planted failures, whole flights on a null GPU, and tests of the parts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path

import null_gpu
import pytest
from flight import packing, processes, runner
from flight.runner import FILES, ROOT, Flight
from flight.steps import DEVICE_TESTS, Setup, Step, first_flight, second_flight
from small_runs import LIMIT

from conddetr.kernels import native


def python(name, seconds, code):
    """A step that runs this code in a Python that starts quickly."""
    return Step(name, (sys.executable, "-I", "-S", "-c", textwrap.dedent(code)), seconds, f"{name} as planted")


def run_flight(tmp_path, steps, limit=120.0):
    """Run a flight, with results in `tmp_path / "out"`; returns it and its table by step."""
    flight = Flight(steps, tmp_path / "out", tmp_path / "work", dict(os.environ), limit, {})
    flight.run()
    table = json.loads((tmp_path / "out" / "steps.json").read_text())
    return flight, {entry["step"]: entry for entry in table["steps"]}


def is_alive(process):
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# In a new session, so that no signal to the group reaches it.
SLEEPER = """
    import signal, subprocess, time
    sleeper = subprocess.Popen(["sleep", "600"], start_new_session=True)
    open({file!r}, "w").write(str(sleeper.pid))
"""


def test_failed_steps_do_not_stop_the_others(tmp_path):
    pids = [tmp_path / "of_hanging.txt", tmp_path / "of_leaving.txt"]
    steps = [
        python("failing", 30, "print('about to fail'); raise SystemExit(3)"),
        python(
            "hanging",
            5,
            SLEEPER.format(file=str(pids[0])) + "    signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)",
        ),
        python("talking", 60, "print('first'); print(100_000_000 * 'x'); print('last')"),
        python("leaving", 30, SLEEPER.format(file=str(pids[1]))),
        Step("missing", ("/no/such/program",), 30, "does not start"),
        python("environment", 30, "print('the machine')"),
        python("reporting", 30, f"open({str(tmp_path / 'work' / 'junit.xml')!r}, 'w').write('<testsuites/>')"),
    ]
    flight, table = run_flight(tmp_path, steps)
    expected = ["failed", "late", "done", "done", "failed", "done", "done"]
    assert [entry["status"] for entry in table.values()] == expected
    assert (table["failing"]["exit status"], table["missing"]["exit status"]) == (3, 127)
    assert 4.9 < table["hanging"]["seconds"] < 60
    for file in pids:
        assert not is_alive(int(file.read_text()))
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert set(files) == {"steps.json", "log.txt", "junit.xml", "environment.txt"}
    assert all(path.stat().st_size < 16 << 20 for path in files.values())
    log = files["log.txt"].read_text()
    assert "about to fail\n" in log
    assert "/no/such/program: cannot be started" in log
    assert "===== talking" in log
    # The head and the tail of the output, and the number of bytes between them.
    assert re.search(r"\nfirst\nx+\n\[… [\d,]+ bytes left out …\]\nx+\nlast\n", log)
    assert 100_000_000 - runner.LOGS < table["talking"]["bytes of log left out"] < 100_000_000
    assert files["environment.txt"].read_text() == "the machine\n"
    assert flight.seconds < 120


def test_late_step_is_interrupted_before_it_is_killed(tmp_path, monkeypatch):
    code = f"""
        import time
        try:
            open({str(tmp_path / "ready")!r}, "w").close()
            time.sleep(600)
        except KeyboardInterrupt:
            print("report written")
    """
    waits = []

    class Child(subprocess.Popen):
        """Times out when the step is ready, however long that takes, and then waits until the step ends."""

        def wait(self, timeout=None):
            waits.append(timeout)
            if len(waits) > 1:
                return super().wait(LIMIT)
            while not (tmp_path / "ready").exists():
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess, "Popen", Child)
    # As a shell does for background processes.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _, table = run_flight(tmp_path, [python("waiting", 100, code)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert table["waiting"]["status"] == "late"
    assert "report written\n" in (tmp_path / "out" / "log.txt").read_text()
    assert waits == [100.0 - processes.GRACE, processes.GRACE]


def test_limit_of_the_flight_bounds_its_steps(tmp_path):
    steps = [
        python("long", 6, "import time; time.sleep(600)"),
        python("longer", 1000, "print('not reached')"),
    ]
    flight, table = run_flight(tmp_path, steps, limit=2)
    assert table["long"]["status"] == "late"
    assert table["long"]["limit"] <= 2
    assert table["longer"]["status"] == "left out"
    assert table["longer"]["seconds"] is None
    assert "longer" in (tmp_path / "out" / "log.txt").read_text()
    assert flight.seconds < 60


def test_results_are_packed_after_every_step(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    training = f"""
        import os
        os.makedirs({str(work / "training")!r})
        for name in ("log.jsonl", "curves.png", "checkpoint.pt"):
            open(os.path.join({str(work / "training")!r}, name), "w").write(name)
    """
    listing = f"import tarfile; print(*tarfile.open({str(out / 'results.tar.gz')!r}).getnames())"
    run_flight(tmp_path, [python("training", 30, training), python("environment", 30, listing)])
    assert set((out / "environment.txt").read_text().split()) == {"training/log.jsonl", "training/curves.png"}


def test_too_large_file_does_not_come_back(tmp_path):
    report = tmp_path / "work" / "junit.xml"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "junit.xml").write_text("of an earlier flight")
    _, table = run_flight(tmp_path, [python("tests", 30, f"open({str(report)!r}, 'w').truncate({16 << 20})")])
    assert table["tests"]["status"] == "done"
    assert set(os.listdir(tmp_path / "out")) == {"steps.json", "log.txt"}
    message = "junit.xml does not come back: 16.0 MiB"
    assert message in (tmp_path / "out" / "log.txt").read_text()


def test_names_and_number_of_files():
    assert len(FILES) <= 7
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in FILES)


def test_killed_run_leaves_no_process(tmp_path):
    """A run within a run, as the sanitizers are within a flight: the outer run kills both."""
    inner = f"""
        import sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        from pathlib import Path
        from flight.processes import run_whole
        shell = "echo $$ > {tmp_path}/pid; trap '' INT; while :; do sleep 1; done"
        run_whole(["sh", "-c", shell], 600, Path({str(tmp_path / "inner.txt")!r}))
    """
    command = (sys.executable, "-I", "-S", "-c", textwrap.dedent(inner))
    ended = processes.run_whole(command, 4, tmp_path / "outer.txt")
    assert ended.status is None
    assert not is_alive(int((tmp_path / "pid").read_text()))
    assert ended.survivors == 0


def test_terminated_flight_kills_its_step(tmp_path):
    code = f"""
        import sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        import fly
        from pathlib import Path
        from flight.processes import run_whole
        fly.handle_signals()
        run_whole(["sh", "-c", "echo $$ > {tmp_path}/pid; sleep 600"], 600, Path({str(tmp_path / "log.txt")!r}))
    """
    outer = subprocess.Popen((sys.executable, "-I", "-S", "-c", textwrap.dedent(code)))
    while outer.poll() is None and not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        time.sleep(0.01)
    outer.terminate()
    assert outer.wait() == 143
    assert not is_alive(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("size", [0, 999, 1000, 1001, 50_000])
def test_capped_files_keep_their_ends(size, tmp_path):
    content = bytes(index % 251 for index in range(size))
    path = tmp_path / "log.txt"
    path.write_bytes(content)
    left_out = packing.cap(path, 1000)
    capped = path.read_bytes()
    assert left_out == max(0, size - 1000)
    if left_out == 0:
        assert capped == content
    else:
        assert capped.startswith(content[:500])
        assert capped.endswith(content[-500:])


def test_packed_triton_cache_works_in_another_folder(tmp_path, monkeypatch):
    """Triton reads it although it stores full paths; compilation stages, most of the bytes, are left out."""
    cache = pytest.importorskip("triton.runtime.cache", reason="the package triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "a"))
    written = cache.FileCacheManager("KEY")
    contents = {"kernel.ttir": "stage", "kernel.cubin": b"code", "kernel.json": "{}"}
    written.put_group("kernel.json", {name: written.put(content, name) for name, content in contents.items()})
    packing.pack(packing.launchable(tmp_path / "a"), tmp_path / "a", tmp_path / "cache.tar.gz")
    shutil.rmtree(tmp_path / "a")
    assert packing.unpack_cache(tmp_path / "cache.tar.gz", tmp_path / "b") == 1
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "b"))
    files = cache.FileCacheManager("KEY").get_group("kernel.json")
    assert files.keys() == {"kernel.cubin", "kernel.json"}
    assert Path(files["kernel.cubin"]).read_bytes() == b"code"


def test_failed_tests_run_again(tmp_path):
    """Pytest runs the node ids of its own report: the failed tests and no others."""
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\n"
        "@pytest.mark.parametrize('x', ['a::b', 'c [d]-1.5', 'good', 'no'])\n"
        "def test_x(x, request):\n    assert x in ('good', 'no')\n\n"
        "@pytest.fixture\ndef broken():\n    raise ValueError\n\n"
        "def test_error(broken):\n    pass\n"
    )
    pytest_here = (sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--rootdir", str(tmp_path))
    report = tmp_path / "junit.xml"
    command = (*pytest_here, f"--junitxml={report}", "-o", "junit_family=xunit1")
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    [step] = [step for step in second_flight(Setup(sys.executable, tmp_path, failed=report)) if step.name == "tests"]
    ids = [word for word in step.command if word.startswith("test_it.py")]
    assert len(ids) == 3
    again = subprocess.run((*pytest_here, *ids), cwd=tmp_path, capture_output=True, text=True).stdout
    assert re.search(r"2 failed, 1 error in", again)


def test_without_failed_tests_there_is_no_test_step(tmp_path):
    report = tmp_path / "junit.xml"
    report.write_text("<testsuites><testsuite><testcase file='a.py' name='test_a'/></testsuite></testsuites>")
    steps = second_flight(Setup(sys.executable, tmp_path, failed=report))
    assert "tests" not in {step.name for step in steps}


def test_flights_select_all_gpu_tests():
    """Every file with tests marked `gpu` is in the selection, or in a folder of it."""
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()]
    selected = [ROOT / folder for folder in DEVICE_TESTS]
    assert len(marked) > 10
    assert [path for path in marked if not any(path.is_relative_to(folder) for folder in selected)] == [Path(__file__)]


def test_limits_of_the_steps_fit_those_of_the_flights(tmp_path):
    setup = Setup(sys.executable, tmp_path, has_native=True)
    for steps, limit in ((first_flight(setup), 390), (second_flight(setup), 240)):
        assert sum(step.seconds for step in steps) <= limit
        assert len({step.name for step in steps}) == len(steps)
    assert second_flight(setup)[-1].name == "sanitizers"


def test_checkout_is_imported_without_being_installed(tmp_path):
    """A second checkout, imported from a third folder while this one is installed."""
    link = tmp_path / "tests" / "flight" / "link"
    shutil.copytree(ROOT / "tests" / "flight" / "link", link)
    for folder in ("conddetr", "kernels"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    code = "import conddetr.kernels; print(conddetr.__file__, conddetr.kernels.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(link)}
    command = (sys.executable, "-c", code)
    run = subprocess.run(command, cwd=tmp_path / "tests", env=environment, capture_output=True, text=True)
    assert run.stdout.split() == [str(tmp_path / folder / "__init__.py") for folder in ("conddetr", "kernels")]


def fly_py(*arguments, **options):
    """The command line."""
    command = [sys.executable, str(ROOT / "tests" / "fly.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_command_line(tmp_path):
    listed = fly_py("--list", "--flight", "2").stdout
    assert [line.split()[0] for line in listed.splitlines()][-1] == "sanitizers"
    without_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    refused = fly_py("--out", tmp_path / "out", "--steps", "none-such", env=without_gpu)
    assert refused.returncode == 2
    assert "no NVIDIA GPU: the driver" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert "no-such.tar.gz: no such file" in fly_py("--triton-cache", "no-such.tar.gz").stderr


@pytest.mark.slow
@pytest.mark.skipif(null_gpu.why_not() is not None, reason=str(null_gpu.why_not()))
@pytest.mark.skipif(native.NOT_LOADED is not None, reason=str(native.NOT_LOADED))
def test_both_flights_complete_on_a_null_gpu(tmp_path):
    """All their steps succeed there, and benchmarks neither print times nor write result files."""
    import conddetr._C

    before = {path.name for path in (ROOT / "benchmarks" / "results").iterdir()}
    options = ["--rehearse", "--patience", "30", "--limit", "5400", "--native", conddetr._C.__file__]
    first, second = tmp_path / "first", tmp_path / "second"
    # No step of a flight tests inductor, whose compilation would take most of the time.
    environment = {**null_gpu.environment(), "TORCH_COMPILE_DISABLE": "1"}
    for number, out in ((1, first), (2, second)):
        if number == 2:
            options += ["--triton-cache", first / "triton-cache.tar.gz", "--failed", first / "junit.xml"]
        run = fly_py("--flight", number, "--out", out, *options, env=environment)
        table = json.loads((out / "steps.json").read_text())
        log = (out / "log.txt").read_text()
        assert {entry["step"]: entry["status"] for entry in table["steps"] if entry["status"] != "done"} == {}, log
        assert len(table["steps"]) == len(fly_py("--list", "--flight", number, *options).stdout.splitlines())
        assert run.returncode == 0
        commands = " ".join(entry["command"] for entry in table["steps"])
        named = re.findall(r"benchmarks/run\.py ((?:[a-z]\w* )+)", commands)
        benchmarks = [name for names in named for name in names.split() if name != "report"]
        assert log.count("wrote no result file: null GPU") == len(benchmarks) == (15 if number == 1 else 4)
        assert not re.search(r"[0-9] ms\b|GB/s|TFLOP|× floor", log)
        assert table["files left out"] == {}
    assert {path.name for path in (ROOT / "benchmarks" / "results").iterdir()} == before
    names = set(os.listdir(first)) | set(os.listdir(second))
    assert names == set(FILES)
    with tarfile.open(first / "results.tar.gz") as archive:
        assert {"training/log.jsonl", "training/curves.png"} <= set(archive.getnames())
