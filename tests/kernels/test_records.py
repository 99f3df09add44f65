"""Records of the kernels checked on a device: their files, the devices they hold for, and the choices of `auto`."""

import dataclasses
import json
import logging
import math
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conddetr.kernels import native, records, registry
from conddetr.kernels.records import Record, Table, Verdict, files, machine

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
GOOD = Verdict("conditional_attention", "triton", "bfloat16", refused="", error=0.5, speedup=2.13)
WRONG = Verdict("focal_loss", "triton", "float32", refused="its loss is wrong.", error=7.0, speedup=3.0)
UNTIMED = Verdict("max_pool", "triton", "float32", refused="", error=0.25, speedup=None)
ATTENTION = ("conditional_attention", "triton")
NOT_CHECKED = "it is not checked on this GPU: run `conddetr check`."


def record_of(identity: dict[str, str], *verdicts: Verdict, is_short: bool = False) -> Record:
    return Record(identity, verdicts or (GOOD, WRONG, UNTIMED), is_short, "2026-11-29T12:00:00+00:00", {})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of this test's records."""
    monkeypatch.setenv("CONDDETR_CACHE", str(tmp_path / "cache"))
    records.forget()
    yield tmp_path / "cache"
    records.forget()


@pytest.fixture
def gpus(monkeypatch) -> list[tuple[str, str]]:
    """Model and compute capability of the simulated GPUs of this machine."""
    models = [("NVIDIA H100 80GB HBM3", "9.0"), ("NVIDIA H100 80GB HBM3", "9.0"), ("NVIDIA L4", "8.9")]
    real_name, real_capability = machine.device_name, machine.compute_capability

    def name(device: torch.device) -> str:
        return models[device.index][0] if device.type == "cuda" else real_name(device)

    def capability(device: torch.device) -> str:
        return models[device.index][1] if device.type == "cuda" else real_capability(device)

    # PyTorch's own functions stay: torch.compile calls them for the real GPU.
    monkeypatch.setattr(machine, "device_name", name)
    monkeypatch.setattr(machine, "compute_capability", capability)
    return models


def test_saved_record_is_found_by_the_next_process(cache):
    record = record_of(records.identity(CPU))
    file = records.save(CPU, record)
    assert file == records.path(CPU)
    assert file.is_relative_to(cache)
    records.forget()
    assert records.load(CPU) == record
    assert records.why_ignored(CPU) is None
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_missing_file_means_no_record_and_no_message(cache):
    assert records.load(CPU) is None
    assert records.why_ignored(CPU) is None
    assert not cache.exists()


def test_record_is_read_once(monkeypatch):
    records.save(CPU, record_of(records.identity(CPU)))
    records.forget()
    reads = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (reads.append(path), read_bytes(path))[1])
    for _ in range(3):
        assert records.load(CPU) is not None
    assert reads.count(records.path(CPU)) == 1


def test_numbers_that_json_lacks_become_none():
    verdict = Verdict("focal_loss", "triton", "float32", refused="it gives NaN.", error=math.nan, speedup=math.inf)
    assert (verdict.error, verdict.speedup) == (None, None)
    record = record_of({}, verdict)
    assert Record.from_json(record.to_json()) == record


@pytest.mark.parametrize("error", [1.01, math.inf, math.nan])
def test_an_error_above_the_budget_needs_a_reason(error):
    with pytest.raises(ValueError, match="focal_loss, triton, float32: expected an error of at most 1"):
        Verdict("focal_loss", "triton", "float32", refused="", error=error, speedup=2.0)


def damaged(text: str) -> dict[str, str | bytes]:
    """Contents that a file may have instead of a record."""
    content = json.loads(text)

    def with_verdict(**changes: object) -> str:
        verdicts = [{**content["content"]["verdicts"][0], **changes}]
        return json.dumps({**content, "content": {**content["content"], "verdicts": verdicts}})

    def without(key: str) -> str:
        kept = {name: value for name, value in content["content"].items() if name != key}
        return json.dumps({**content, "content": kept})

    fields = [field.name for field in dataclasses.fields(Record)]
    wrong_types = {"identity": {"device": 1}, "verdicts": {}, "is_short": 0, "date": 2026, "tuned": []}
    return {
        "empty": "",
        "cut off": text[: len(text) // 2],
        "something behind it": text + "{}",
        "not UTF-8": b"\xff\xfe\x00",
        "not UTF-8 inside": text.encode().replace(b"focal_loss", b"\xff\xff"),
        "nested without end": "[" * 100_000,
        "a list": "[]",
        "a number": "1",
        "null": "null",
        "no version": json.dumps({"content": content["content"]}),
        "another version": json.dumps({**content, "version": 2}),
        "a version that only equals": json.dumps({**content, "version": True}),
        "only a version": json.dumps({"version": 1}),
        **{f"without {name}": without(name) for name in fields},
        **{
            f"wrong type of {name}": json.dumps({**content, "content": {**content["content"], name: value}})
            for name, value in wrong_types.items()
        },
        "no date": json.dumps({**content, "content": {**content["content"], "date": "yesterday"}}),
        "another backend": with_verdict(backend="eager"),
        "another dtype": with_verdict(dtype="float64"),
        "a text for a number": with_verdict(error="0.5"),
        "NaN": with_verdict(speedup=math.nan),
        "a number for a text": with_verdict(refused=0),
        "null for a text": with_verdict(refused=None),
        "good with an error above the budget": with_verdict(error=1.5),
        "two of one": json.dumps(
            {**content, "content": {**content["content"], "verdicts": 2 * content["content"]["verdicts"]}}
        ),
    }


@pytest.mark.parametrize("damage", damaged(record_of({}).to_json()))
def test_damaged_record_is_ignored_and_rewritten(damage):
    record = record_of(records.identity(CPU))
    file = records.save(CPU, record)
    content = damaged(file.read_text(encoding="utf-8"))[damage]
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    records.forget()
    assert records.load(CPU) is None
    assert records.why_ignored(CPU).startswith(f"{file} is damaged, or has another version: ")
    records.save(CPU, record)
    records.forget()
    assert records.load(CPU) == record


def test_folder_instead_of_the_file_is_ignored(caplog):
    records.path(CPU).mkdir(parents=True)
    assert records.load(CPU) is None
    assert "cannot be read" in records.why_ignored(CPU)
    assert records.save(CPU, record_of(records.identity(CPU))) is None
    assert len(caplog.records) == 1


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this system has no endless device")
def test_device_instead_of_the_file_is_not_read_and_is_replaced(monkeypatch):
    file = records.path(CPU)
    file.parent.mkdir(parents=True)
    file.symlink_to("/dev/zero")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
        assert records.load(CPU) is None
    assert "is no regular file" in records.why_ignored(CPU)
    assert records.save(CPU, record_of(records.identity(CPU))) == file
    assert file.is_file()
    assert not file.is_symlink()


@pytest.mark.parametrize("name", records.identity(CPU))
def test_record_with_another_identity_is_ignored(name):
    identity = records.identity(CPU)
    records.save(CPU, record_of({**identity, name: "other"}))
    records.forget()
    assert records.load(CPU) is None
    assert records.why_ignored(CPU) == f"its {name} was other, now {identity[name]}"


def test_record_with_missing_or_extra_identity_entries_is_ignored():
    identity = records.identity(CPU)
    del identity["Triton"]
    records.save(CPU, record_of({**identity, "phase of the moon": "full"}))
    records.forget()
    reasons = records.why_ignored(CPU).split("; ")
    now = records.identity(CPU)["Triton"]
    assert reasons == [f"its Triton was none, now {now}", "its phase of the moon was full, now none"]


def test_identity_has_texts_that_name_versions_and_device():
    identity = records.identity(CPU)
    assert all(type(value) is str for value in identity.values())
    assert identity["PyTorch"] == torch.__version__
    assert (identity["compute capability"], identity["driver"]) == ("none", "none")


def test_identity_of_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", {GPU: "NVIDIA H100 80GB HBM3"}.get)
    monkeypatch.setattr(torch.cuda, "get_device_capability", {GPU: (9, 0)}.get)
    version = tmp_path / "version"
    version.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build  (dvs-builder)\n"
        "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
    )
    monkeypatch.setattr(machine, "_DRIVER_FILES", (str(tmp_path / "absent"), str(version)))
    identity = records.identity(GPU)
    assert (identity["device"], identity["compute capability"], identity["driver"]) == (
        "NVIDIA H100 80GB HBM3",
        "9.0",
        "570.124.06",
    )
    assert identity["PyTorch"] == torch.__version__


@pytest.mark.parametrize(("release", "expected"), [(13020, "of CUDA 13.2"), (None, "unknown")])
def test_cuda_reports_the_driver_if_the_system_does_not(monkeypatch, release, expected):
    def get_version(target):
        target._obj.value = release
        return 0

    def load(name):
        if release is None:
            raise OSError(f"{name}: no such file")
        return SimpleNamespace(cuDriverGetVersion=get_version)

    monkeypatch.setattr(machine, "_DRIVER_FILES", ())
    monkeypatch.setattr(machine.ctypes, "CDLL", load)
    assert machine._driver() == expected


def test_equal_sources_have_one_hash_and_every_change_gives_another(tmp_path, monkeypatch):
    def hash_of(folder: Path) -> str:
        monkeypatch.setattr(machine, "__file__", str(folder / "records" / "machine.py"))
        return machine._sources.__wrapped__()

    sources = {"records/machine.py": "a = 1\n", "attn/triton/forward.py": "b = 2\n", "attn/op.py": "c = 3\n"}
    for copy in ("one", "other"):
        for name, text in sources.items():
            (tmp_path / copy / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / copy / name).write_text(text)
    # Only sources count: compiled files differ between folders.
    (tmp_path / "other" / "attn" / "op.pyc").write_bytes(b"compiled")
    same = hash_of(tmp_path / "one")
    assert hash_of(tmp_path / "other") == same
    hashes = {same}
    for name, text in sources.items():
        changed = tmp_path / "one" / name
        changed.write_text(text.replace("=", "= 1 +"))
        hashes.add(hash_of(tmp_path / "one"))
        changed.write_text(text)
    (tmp_path / "one" / "new.py").touch()
    hashes.add(hash_of(tmp_path / "one"))
    (tmp_path / "one" / "new.py").unlink()
    (tmp_path / "one" / "attn" / "op.py").rename(tmp_path / "one" / "attn" / "pow.py")
    hashes.add(hash_of(tmp_path / "one"))
    assert len(hashes) == 1 + len(sources) + 2


def test_another_build_of_the_native_library_changes_the_identity(monkeypatch):
    monkeypatch.setattr(native, "NOT_LOADED", None)
    seen = set()
    for info in ({"compiler": "g++ 12", "sources": "1"}, {"compiler": "g++ 13", "sources": "1"}, {"sources": "2"}):
        monkeypatch.setattr(native, "_INFO", info)
        seen.add(records.identity(CPU)["native library"])
    monkeypatch.setattr(native, "NOT_LOADED", "not built.")
    seen.add(records.identity(CPU)["native library"])
    assert len(seen) == 4
    assert "none" in seen


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"CONDDETR_CACHE": "/own", "XDG_CACHE_HOME": "/xdg", "HOME": "/home/me"}, "/own"),
        ({"CONDDETR_CACHE": "~/own", "HOME": "/home/me"}, "/home/me/own"),
        ({"CONDDETR_CACHE": "", "XDG_CACHE_HOME": "/xdg", "HOME": "/home/me"}, "/xdg/conddetr"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home/me"}, "/home/me/.cache/conddetr"),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/conddetr"),
        ({"HOME": "/home/me"}, "/home/me/.cache/conddetr"),
    ],
)
def test_cache_folder_from_the_environment(monkeypatch, variables, folder):
    for name in ("CONDDETR_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert records.folder() == Path(folder)


def test_equal_gpus_share_a_file_and_different_ones_never_do(gpus):
    names = [records.path(torch.device("cuda", index)).name for index in range(3)]
    assert names[0].startswith("nvidia-h100-80gb-hbm3-")
    assert names[0] == names[1] != names[2]
    # Names that differ only in punctuation or case; without ASCII letters; the same with another capability.
    gpus[:] = [("GPU A-1", "9.0"), ("gpu a 1", "9.0"), ("显卡", "9.0"), ("卡", "9.0"), ("卡", "9.1")]
    gpus.append(("x" * 300, "9.0"))
    names = [records.path(torch.device("cuda", index)).name for index in range(6)]
    assert len({name.lower() for name in names}) == 6
    assert all(len(name.encode()) < 120 for name in names)


def test_record_holds_only_for_gpus_of_its_model(gpus, monkeypatch):
    records.save(GPU, record_of(records.identity(GPU)))
    records.forget()
    assert records.load(torch.device("cuda:1")) is not None
    assert records.load(torch.device("cuda:2")) is None
    assert records.why_not(*ATTENTION, torch.device("cuda:1"), torch.bfloat16) is None
    assert records.why_not(*ATTENTION, torch.device("cuda:2"), torch.bfloat16) == NOT_CHECKED
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert records.why_not(*ATTENTION, torch.device("cuda"), torch.bfloat16) == NOT_CHECKED


def test_unwritable_folder_is_reported_once_and_the_record_still_counts(tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("CONDDETR_CACHE", str(blocked))
    assert records.load(CPU) is None
    record = record_of(records.identity(CPU))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert records.save(CPU, record) is None
    [message] = [entry.getMessage() for entry in caplog.records]
    assert f"because {blocked} cannot be written to: " in message
    assert "CONDDETR_CACHE" in message
    assert records.load(CPU) == record
    assert blocked.read_text() == "not a folder"
    assert list(tmp_path.iterdir()) == [blocked]


def test_missing_home_folder_means_no_record_and_no_error(monkeypatch, caplog):
    for name in ("CONDDETR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(files, "_reported", set())
    assert records.load(CPU) is None
    record = record_of(records.identity(CPU))
    assert records.save(CPU, record) is None
    assert records.load(CPU) == record
    [message] = [entry.getMessage() for entry in caplog.records]
    assert "the cache folder cannot be written to: there is no home folder. Set CONDDETR_CACHE to another" in message


def test_interrupted_save_keeps_the_old_record(monkeypatch):
    before = record_of(records.identity(CPU))
    file = records.save(CPU, before)

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Record, "to_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        records.save(CPU, record_of(records.identity(CPU), UNTIMED))
    assert list(file.parent.iterdir()) == [file]
    records.forget()
    assert records.load(CPU) == before


def save_often(number: int, start) -> None:
    """A process that saves the same file repeatedly while another does too."""
    verdicts = [Verdict(f"operation {index}", "triton", "float32", "", 0.5, float(number)) for index in range(100)]
    record = record_of(records.identity(CPU), *verdicts)
    start.wait()
    for _ in range(30):
        if records.save(CPU, record) is None:
            raise SystemExit("a record was not saved.")


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork processes")
def test_concurrent_saves_leave_a_whole_record():
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(3)
    processes = [fork.Process(target=save_often, args=(number, start)) for number in (1, 2)]
    for process in processes:
        process.start()
    start.wait()
    seen = set()
    while any(process.is_alive() for process in processes):
        records.forget()
        record = records.load(CPU)
        assert records.why_ignored(CPU) is None
        if record is not None:
            # A whole record, written by one process alone.
            [speedup] = {verdict.speedup for verdict in record.verdicts}
            seen.add(speedup)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert seen <= {1.0, 2.0}
    assert os.listdir(records.path(CPU).parent) == [records.path(CPU).name]


def test_cpus_need_no_record():
    with records.pretend(record_of({}, dataclasses.replace(WRONG, backend="native"))):
        assert records.why_not("focal_loss", "native", CPU, torch.float32) is None
        assert records.source("focal_loss", "native", CPU, torch.float32) == ""
        # The verdict exists for display only.
        assert records.verdict("focal_loss", "native", CPU, torch.float32).refused == "its loss is wrong."


def test_record_decides_what_auto_may_choose_on_a_gpu():
    with records.pretend(record_of({"device": "NVIDIA H100"})):
        assert records.why_not(*ATTENTION, GPU, torch.bfloat16) is None
        assert records.why_not("focal_loss", "triton", GPU, torch.float32) == "its loss is wrong."
        assert records.why_not(*ATTENTION, GPU, torch.float16) == "`conddetr check` does not check it in float16."
        assert records.source(*ATTENTION, GPU, torch.bfloat16) == "checked on NVIDIA H100"
        assert records.source("max_pool", "triton", GPU, torch.float32) == "checked on NVIDIA H100"
        assert records.source("focal_loss", "triton", GPU, torch.float32) == ""
        assert records.source(*ATTENTION, GPU, torch.float16) == ""
        assert records.verdict(*ATTENTION, GPU, torch.bfloat16) == GOOD
    with records.pretend(record_of({}, is_short=True)):
        reason = "the short check of this GPU does not include it: run `conddetr check`."
        assert records.why_not("dropout_bits", "triton", GPU, torch.float32) == reason
    with records.pretend(None):
        assert records.why_not(*ATTENTION, GPU, torch.bfloat16) == NOT_CHECKED
        assert records.verdict(*ATTENTION, GPU, torch.bfloat16) is None
        assert records.source(*ATTENTION, GPU, torch.bfloat16) == ""


def test_record_takes_precedence_over_the_table():
    slow = dataclasses.replace(GOOD, refused="it is slower than PyTorch on X.", error=None, speedup=0.7)
    measured = dataclasses.replace(UNTIMED, error=None, speedup=1.26)
    table = Table("sm_90", {"NVIDIA H100 80GB HBM3": "torch 2.15.0"}, (slow, measured))
    assert Table.from_json(table.to_json()) == table
    with records.pretend(record_of({"device": "this one"}, GOOD, is_short=True), table):
        assert records.source(*ATTENTION, GPU, torch.bfloat16) == "checked on this one"
        assert records.why_not("max_pool", "triton", GPU, torch.float32) is None
        assert records.source("max_pool", "triton", GPU, torch.float32) == "measured on sm_90"
    with records.pretend(None, table):
        assert records.why_not(*ATTENTION, GPU, torch.bfloat16) == slow.refused


def test_table_holds_for_exactly_its_architecture(gpus, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MEASURED", tmp_path)
    table = Table("sm_90", {}, (GOOD,))
    (tmp_path / "sm_90.json").write_text(table.to_json(), encoding="utf-8")
    assert records.source(*ATTENTION, GPU, torch.bfloat16) == "measured on sm_90"
    assert records.why_not(*ATTENTION, torch.device("cuda:2"), torch.bfloat16) == NOT_CHECKED
    assert records.verdict(*ATTENTION, CPU, torch.bfloat16) is None


def test_new_record_replaces_earlier_answers(gpus):
    assert records.why_not(*ATTENTION, GPU, torch.bfloat16) == NOT_CHECKED
    with records.pretend(record_of({})):
        assert records.why_not(*ATTENTION, GPU, torch.bfloat16) is None
    assert records.why_not(*ATTENTION, GPU, torch.bfloat16) == NOT_CHECKED
    records.adopt(GPU, record_of({}))
    assert records.why_not(*ATTENTION, GPU, torch.bfloat16) is None
    # Nothing was written.
    records.forget()
    assert records.why_not(*ATTENTION, GPU, torch.bfloat16) == NOT_CHECKED
    records.save(GPU, record_of(records.identity(GPU)))
    assert records.why_not(*ATTENTION, GPU, torch.bfloat16) is None


def why_not_triton() -> str | None:
    """The reason why `choose` refuses Triton's kernels of attention."""
    choice = registry.OPERATIONS["conditional_attention"].choose("auto", GPU, torch.bfloat16)
    return choice.refused.get("triton")


def test_answers_are_cached_after_the_first_time(gpus, monkeypatch):
    """A step needs an answer hundreds of times: neither files nor the device are read again."""
    monkeypatch.setattr(registry, "why_not", lambda *_, **__: None)
    assert why_not_triton() == NOT_CHECKED

    def fail(*_):
        raise AssertionError("the device or a file was read.")

    with monkeypatch.context() as patch:
        for module, name in ((machine, "device_name"), (machine, "compute_capability"), (records, "why_not")):
            patch.setattr(module, name, fail)
        patch.setattr(Path, "read_bytes", fail)
        assert why_not_triton() == NOT_CHECKED
    records.adopt(GPU, record_of({}))
    assert why_not_triton() is None


def test_answer_is_not_cached_if_records_change_meanwhile(gpus, monkeypatch):
    monkeypatch.setattr(registry, "why_not", lambda *_, **__: None)
    real = records.why_not

    def changed_by_another_thread(*key):
        reason = real(*key)
        records.adopt(GPU, record_of({}))
        return reason

    with monkeypatch.context() as patch:
        patch.setattr(records, "why_not", changed_by_another_thread)
        assert why_not_triton() == NOT_CHECKED
    assert why_not_triton() is None


@pytest.mark.parametrize("is_read_before", [False, True])
def test_torch_compile_has_no_graph_break(gpus, is_read_before):
    """Files are read during tracing, or were read before. A new compilation sees a new record."""

    def choose(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        reason = records.why_not(*ATTENTION, device, torch.bfloat16)
        return x + 1 if reason is None else x - len(reason)

    torch.compiler.reset()
    records.save(GPU, record_of(records.identity(GPU)))
    records.forget()
    if is_read_before:
        assert records.why_not(*ATTENTION, GPU, torch.bfloat16) is None
    compiled = torch.compile(choose, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(2), GPU).tolist() == [1, 1]
    torch.compiler.reset()
    with records.pretend(None):
        assert compiled(torch.zeros(2), GPU).tolist() == [-len(NOT_CHECKED)] * 2
    assert compiled(torch.zeros(2), CPU).tolist() == [1, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="fake GPU tensors are for machines without a GPU")
def test_torch_compile_supports_the_device_of_a_tensor():
    def choose(x: torch.Tensor) -> torch.Tensor:
        return x if records.why_not(*ATTENTION, x.device, x.dtype) is None else x.new_empty(0)

    shapes = []

    def keep(graph, inputs):
        shapes.append(
            [node.args[0][0].meta["example_value"].shape for node in graph.graph.nodes if node.op == "output"]
        )
        return graph.forward

    with records.pretend(record_of({}), None), torch._subclasses.FakeTensorMode():
        x = torch.empty(3, device="cuda:0", dtype=torch.bfloat16) * 1
        assert choose(x).shape == (3,)
        torch.compile(lambda x: choose(x) * 2, backend=keep, fullgraph=True)(x)
    assert shapes == [[(3,)]]
