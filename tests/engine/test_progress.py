"""Lines and tables print names, paths and metrics unchanged, in any output encoding."""

import contextlib
import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from conddetr.engine import progress
from conddetr.engine.progress import say, show
from conddetr.engine.tables import metrics_table, percent

AS_MARKUP = "photo [copy].png [/b] [bold]x[/bold] :smile: 'text' 3.5 https://a.b"


def test_line_is_printed_unchanged(capsys, monkeypatch):
    say(AS_MARKUP)
    show(AS_MARKUP, metrics_table({"AP": 0.5}))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [AS_MARKUP, AS_MARKUP]
    # A narrow terminal gets no colours either, and no broken path.
    terminal = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=terminal, force_terminal=True, width=20))
    say(AS_MARKUP)
    assert terminal.getvalue() == AS_MARKUP + "\n"


@pytest.mark.parametrize(
    ("encoding", "line"),
    [
        ("ascii", r"3x4 - \u4fe1 \xe9 \udcff"),
        ("latin-1", r"3×4 - \u4fe1 é \udcff"),
        ("cp1252", r"3×4 – \u4fe1 é \udcff"),
        ("utf-8", r"3×4 – 信 é \udcff"),
    ],
)
def test_any_text_is_printed_in_any_encoding(monkeypatch, encoding, line):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    # The last character stands for a byte of a file name that is not UTF-8.
    say("3×4 – 信 é \udcff")
    show("metrics", metrics_table({"AP": -1.0, "AP50": 0.25}))
    printed = stream.buffer.getvalue().decode(encoding).splitlines()
    assert printed[0] == line
    values = next(row for row in printed if "25.0" in row)
    assert ("–" in values) == (encoding in ("cp1252", "utf-8"))
    assert ("─" in "".join(printed)) == (encoding == "utf-8")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_full_disk_of_the_output_is_reported(monkeypatch):
    with open("/dev/full", "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(OSError, match=r"The standard output could not be written: No space left"):
            say("x")
        monkeypatch.undo()
        # Closing the file would try to write the rest again.
        with contextlib.suppress(OSError):
            stream.close()


def test_no_output_stream_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    say("no reader")
    with progress.Progress("epoch 1/2", total=2) as bar:
        bar.advance(1)


@pytest.mark.parametrize(
    ("value", "text"), [(-1.0, "–"), (float("nan"), "–"), (0.0, "0.0"), (0.6113, "61.1"), (1.0, "100.0")]
)
def test_undefined_metric_is_a_dash(value, text):
    assert percent(value) == text
