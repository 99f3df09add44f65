"""The documentation: its Python runs, its commands exist, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from conddetr.cli import _parser

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
OTHER_PROGRAMS = ("pip", "pytest")


def blocks(page: Path, language: str) -> str:
    """All code blocks of a language, joined: later ones build on earlier ones."""
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE))


def commands() -> list[tuple[str, str]]:
    """Page and line of every shell command, those of `code` in running text that begin with our program too."""
    found = []
    for page in PAGES:
        lines = blocks(page, "sh").replace("\\\n", " ").splitlines()
        lines += re.findall(r"`(conddetr [^`]*)`", page.read_text())
        found += [(page.name, line.split("#")[0].strip()) for line in lines if line.split("#")[0].strip()]
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(page, "python"), page.name, "exec"), {"__name__": page.stem})


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_exist(page, line):
    words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
    program = words[0].removeprefix(".venv/bin/")
    if program == "conddetr":
        check_command_line(words[1:])
    elif program == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in targets)
    elif program == "python" and words[1] == "-m":
        module = words[2].removeprefix("conddetr.").replace(".", "/")
        assert words[2] == "pip" or (ROOT / f"{module}.py").exists() or (ROOT / "conddetr" / f"{module}.py").exists()
    elif program == "torchrun":
        check_command_line(words[words.index("conddetr") + 1 :])
    elif program == "python":
        text = (ROOT / words[1]).read_text() + (ROOT / "benchmarks" / "harness.py").read_text()
        assert all(f'"{word}"' in text for word in words[2:] if word[:2] == "--" and word != "--help")
    else:
        assert program in OTHER_PROGRAMS


def check_command_line(words: list[str]) -> None:
    """Fails for a command or a flag that the command line does not know."""
    # A command alone, as text mentions it, lacks what it requires; it must exist.
    if len(words) == 1:
        words = [*words, "--help"]
    try:
        _, unknown = _parser().parse_known_args(words)
    except SystemExit as stop:
        assert stop.code == 0, f"conddetr {words}"  # noqa: PT017
    else:
        assert unknown == []


def variables(*places: str) -> set[str]:
    """The environment variables that source files below these places read."""
    files = [file for place in places for file in (ROOT / place, *(ROOT / place).rglob("*"))]
    text = "\n".join(file.read_text() for file in files if file.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"))
    return set(re.findall(r"""(?:environ(?:\.get\(|\.setdefault\(|\[)|getenv\()["']([A-Z_]+)["']""", text)) - {"PATH"}


def test_environment_variables_are_listed():
    def listed(page: str) -> set[str]:
        rows = re.findall(r"^\| (`[A-Z_`, ]+`) \|", (ROOT / "docs" / page).read_text(), re.MULTILINE)
        return set(re.findall(r"[A-Z_]{3,}", " ".join(rows)))

    when_running = variables("conddetr", "kernels", "csrc", "benchmarks", "tests")
    when_building = variables("setup.py")
    assert {"CONDDETR_COCO", "CONDDETR_HOPPER", "WORLD_SIZE"} <= when_running
    assert when_running - when_building <= listed("environment.md")
    assert when_building <= listed("building.md")
    ours = {name for name in listed("environment.md") | listed("building.md") if name.startswith("CONDDETR_")}
    assert ours <= when_running | when_building | {"CONDDETR_CUDA"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
