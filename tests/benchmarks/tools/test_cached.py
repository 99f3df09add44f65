"""A cached result is reused until one of its inputs changes."""

import pytest

from tools import cached as module
from tools.cached import cached


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    return tmp_path


def test_result_is_recomputed_only_after_a_change(checkout):
    source, calls = checkout / "kernel.py", []

    def make():
        calls.append(source.read_text())
        return {"registers": [len(calls)], "kernel": ("a", None)}

    source.write_text("one")
    first = cached("aot", [source, "3.9"], make)
    # Always as read from JSON, whether it is new or cached.
    assert first == cached("aot", [source, "3.9"], make) == {"registers": [1], "kernel": ["a", None]}
    cached("aot", [source, "3.10"], make)
    source.write_text("two")
    cached("aot", [source, "3.9"], make)
    cached("other", [source, "3.9"], make)
    assert calls == ["one", "one", "two", "two"]
    # The same letters split into other parts are different inputs.
    cached("aot", ["ab", "c"], make)
    cached("aot", ["a", "bc"], make)
    assert len(calls) == 6
    assert {path.suffix for path in (checkout / "build").glob("*/*")} == {".json"}


def test_failure_is_not_cached(checkout):
    def fail():
        raise RuntimeError("does not compile")

    with pytest.raises(RuntimeError, match="does not compile"):
        cached("aot", ["a"], fail)
    assert cached("aot", ["a"], lambda: 5) == 5


def test_nothing_is_written_into_an_installed_package(checkout):
    (checkout / "pyproject.toml").unlink()
    assert [cached("aot", ["a"], lambda number=number: number) for number in (1, 2)] == [1, 2]
    assert list(checkout.iterdir()) == []
