"""The documentation: its Python runs, its commands exist, its links lead to existing files."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import conddetr
from conddetr.cli import main
from conddetr.commands.parser import make_parser
from conddetr.engine.log import read_log

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
COMMANDS = ROOT / "docs" / "commands.md"
"""The page with all steps from images to an exported file."""
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
OTHER_PROGRAMS = ("pip", "pytest")
POWER_CUT = "timeout --signal KILL 30 "
"""How that page kills a run."""
BUDGET = {"bench-data": ["--count", "4", "--rounds", "1"], "eval": ["--workers", "0"]}
"""Flags with which a command takes less time and does the same otherwise."""


def blocks(page: Path, language: str) -> str:
    """All code blocks of a language, joined, because later blocks build on earlier ones."""
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE))


def commands() -> list[tuple[str, str]]:
    """Page and line of every shell command, including `conddetr …` in running text."""
    entries = []
    for page in PAGES:
        lines = blocks(page, "sh").replace("\\\n", " ").splitlines()
        lines += re.findall(r"`(conddetr [^`]*)`", page.read_text())
        lines = [line.split("#")[0].strip().removeprefix(POWER_CUT) for line in lines]
        entries += [(page.name, line) for line in lines if line]
    return entries


# Python of the tutorial needs its commands: test_tutorial.py.
WITH_PYTHON = [page for page in DOCS if blocks(page, "python") and page.stem != "tutorial"]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page.stem == "huggingface":
        pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[test])")
    run_python(page)


def run_python(page: Path, **names: object) -> None:
    """Run all Python of a page, with these names defined."""
    exec(compile(blocks(page, "python"), page.name, "exec"), {"__name__": page.stem, **names})


def test_python_of_readme_runs(tmp_path, monkeypatch, tiny_model):
    monkeypatch.chdir(tmp_path)
    classes = [{"id": number, "name": name} for number, name in enumerate(("cat", "dog", "bird"))]
    conddetr.Detector(tiny_model, classes, "cpu").save(tmp_path / "runs" / "train" / "checkpoint.pt")
    for name in ("cat.jpg", "dog.jpg"):
        Image.new("RGB", (80, 60), (200, 90, 30)).save(name)
    run_python(README)


@pytest.mark.slow
@pytest.mark.parametrize("page", [README, COMMANDS], ids=lambda page: page.stem)
def test_commands_lead_from_images_to_detections(page, coco_path, tmp_path, monkeypatch, capsys):
    """Runs a page's lines in order, with fewer epochs and rounds; the power cut comes with the first checkpoint.

    Leaves out `conddetr check`, whose result depends on the load of the machine.
    """
    pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")
    onnx = pytest.importorskip("onnx", reason="reads the exported file")
    monkeypatch.chdir(tmp_path)
    image = sorted((coco_path / "val2017").glob("*.jpg"))[0]
    text = blocks(page, "sh").replace("DIR", str(coco_path)).replace("IMAGE.jpg", str(image))
    lines = [line for line in text.replace("--epochs 30", "--epochs 3").splitlines() if "conddetr " in line]
    printed = {}
    for line in lines:
        words = shlex.split(line.split("#")[0].removeprefix(POWER_CUT))[1:]
        if words[0] == "check":
            continue
        if line.startswith(POWER_CUT):
            train_until_killed(words, Path("runs/train/checkpoint.pt"))
            continue
        assert main([*words, *BUDGET.get(words[0], [])]) == 0, line
        printed[words[0]] = capsys.readouterr().out
    assert [name for name in printed if name != "show-data"][:4] == ["validate-data", "train", "eval", "predict"]
    assert [record["epoch"] for record in read_log(Path("runs/train/log.jsonl"))] == [0, 1, 2]
    assert "AP50" in printed["eval"]
    pictures = [Path("runs/predict") / f"{image.stem}.png"]
    if page == COMMANDS:
        assert list(printed)[5:] == ["attention", "export", "bench-data", "env"]
        assert "boxes dropped" in printed["show-data"]
        assert "resuming from runs/train/checkpoint" in printed["train"]
        assert json.loads(Path("report.json").read_text())["ok"]
        assert {"image_id", "bbox"} < json.loads(Path("detections.json").read_text())[0].keys()
        assert onnx.load("model.onnx").graph.input[0].name == "images"
        pictures += Path("runs/attention").iterdir()
        assert len(pictures) == 2
    for file in pictures:
        with Image.open(file) as drawn:
            assert min(drawn.size) > 300


def train_until_killed(words: list[str], checkpoint: Path) -> None:
    """Train in a separate process and kill it at the first checkpoint; fails if it ends before."""
    run = subprocess.Popen([sys.executable, "-m", "conddetr", *words], stdout=subprocess.DEVNULL)
    while run.poll() is None and not checkpoint.exists():
        time.sleep(0.01)
    run.kill()
    assert run.wait() == -signal.SIGKILL


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_exist(page, line):
    words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
    if words[:2] == ["python", "tests/null_gpu"]:
        words = words[2:]
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
        text = "".join(script.read_text() for script in scripts(words[1:]))
        assert all(f'"{word}"' in text for word in words[2:] if word[:2] == "--" and word != "--help")
    else:
        assert program in OTHER_PROGRAMS


def scripts(words: list[str]) -> list[Path]:
    """The files that define the flags of a Python command; a benchmark's flags are in its file and in the harness."""
    folder, _, name = words[0].rpartition("/")
    if folder != "benchmarks":
        return [ROOT / folder / name / "__main__.py" if (ROOT / folder / name).is_dir() else ROOT / words[0]]
    assert (ROOT / words[0]).exists()
    benchmark = words[1] if name == "run.py" else name.removesuffix(".py")
    [file] = (ROOT / "benchmarks").glob(f"*/{benchmark}.py")
    return [file, *(ROOT / "benchmarks" / "harness").glob("*.py")]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("target", "is_on_photos"), [("demo", True), ("test-all", False)])
def test_demonstration_uses_real_images_only_on_request(target, is_on_photos):
    """In a dry run of make: `make test-all COCO=dir` runs the demonstration on shapes and the tests on the images."""
    # Without the variables of a make that runs these tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "-n", target, "COCO=/some"]
    plan = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    [demo] = [line for line in plan.splitlines() if "/conddetr demo" in line]
    assert ('--coco-path "/some"' in demo) == is_on_photos
    assert ('CONDDETR_COCO="/some"' in plan) != is_on_photos


def check_command_line(words: list[str]) -> None:
    """Fail for an unknown command or flag."""
    # A command that text mentions without arguments need only exist.
    if len(words) == 1:
        words = [*words, "--help"]
    try:
        _, unknown = make_parser().parse_known_args(words)
    except SystemExit as stop:
        assert stop.code == 0, f"conddetr {words}"  # noqa: PT017
    else:
        assert unknown == []


def variables(*paths: str) -> set[str]:
    """The environment variables that source files at or below these paths read."""
    files = [file for path in paths for file in (ROOT / path, *(ROOT / path).rglob("*"))]
    text = "\n".join(file.read_text() for file in files if file.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"))
    return set(re.findall(r"""(?:environ(?:\.get\(|\.setdefault\(|\[)|getenv\()["']([A-Z_]+)["']""", text)) - {"PATH"}


def test_environment_variables_are_listed_once():
    rows = re.findall(r"^\| (`[A-Z_`, ]+`) \|", (ROOT / "docs" / "environment.md").read_text(), re.MULTILINE)
    listed = re.findall(r"[A-Z_]{3,}", " ".join(rows))
    assert len(listed) == len(set(listed))
    used = variables("conddetr", "kernels", "csrc", "benchmarks", "tests", "setup.py")
    assert {"CONDDETR_COCO", "CONDDETR_HOPPER", "WORLD_SIZE", "CONDDETR_CUDA_ARCHS"} <= used
    assert used <= set(listed)
    assert {name for name in listed if name.startswith("CONDDETR_")} <= used | {"CONDDETR_CUDA"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_existing_files(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
