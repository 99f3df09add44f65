"""The tutorial: its steps work in order, on real images, and its notebook has the same steps."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from conddetr.cli import main
from conddetr.engine.log import read_log

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "tutorial.md").read_text()
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
STEPS = BLOCK.findall(PAGE)
"""Language and text of each block of the page."""
SHORT = {"--epochs 20": "--epochs 2", "--eval-every 2": "--eval-every 1", "demo --out": "demo --seconds 2 --out"}
"""What a test changes: its detectors are not trained to the end."""


def test_notebook_has_the_steps_of_the_page():
    cells = json.loads((DOCS / "tutorial.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code == [("%%sh\n" if language == "sh" else "") + text.rstrip() for language, text in STEPS]
    texts = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert texts.split() == BLOCK.sub("", PAGE).split()


@pytest.mark.slow
@pytest.mark.parametrize("on_photos", [False, True], ids=["practice pictures", "photos"])
def test_steps_lead_from_photos_to_an_exported_detector(on_photos, request, tmp_path, monkeypatch, capsys):
    """With the weights of a short demonstration. On photos, the block that writes practice pictures is left out."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs the exported file")
    monkeypatch.chdir(tmp_path)
    steps = list(STEPS)
    if on_photos:
        coco = request.getfixturevalue("coco_path")
        shutil.copytree(coco / "val2017", "photos")
        shutil.copy(coco / "annotations" / "instances_val2017.json", "labels.json")
        [practice] = [step for step in steps if "SyntheticShapes(" in step[1]]
        steps[steps.index(practice)] = "python", "from pathlib import Path\nfrom PIL import Image"
    names = {}
    printed = run(steps, names, capsys)
    images = json.loads(Path("labels.json").read_text())["images"]
    draft = json.loads(Path("draft.json").read_text())
    assert len(draft["images"]) == len(images) == len(list(Path("photos").iterdir()))
    assert f"{len(images)} images" in printed["validate-data"]
    assert len(list(Path("runs/show-data").glob("*.png"))) == 4
    assert [record["epoch"] for record in read_log(Path("runs/mine/log.jsonl"))] == [0, 1]
    assert "<html" in Path("runs/mine/report.html").read_text()
    with open("detections.csv", newline="") as file:
        assert {row["image"] for row in csv.DictReader(file)} <= {f"photos/{image['file_name']}" for image in images}
    session = onnxruntime.InferenceSession("runs/mine/model.onnx")
    shapes = {entry.name: entry.shape for entry in session.get_inputs()}
    assert set(shapes) == {"images", "sizes"}


def run(steps: list[tuple[str, str]], names: dict, capsys: pytest.CaptureFixture) -> dict[str, str]:
    """Run blocks of Python and of commands, in order; returns the output of each command."""
    printed = {}
    for language, text in steps:
        if language == "python":
            exec(compile(text, "tutorial", "exec"), names)
            continue
        for old, new in SHORT.items():
            text = text.replace(old, new)
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            assert words[0] == "conddetr"
            assert main(words[1:]) == 0, line
            printed[words[1]] = capsys.readouterr().out
    return printed
