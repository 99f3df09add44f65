"""The tutorial: its steps work in order, on real images, and its notebook has the same steps."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from conddetr.cli import main
from conddetr.config import PRESETS
from conddetr.data.coco import CocoDetection
from conddetr.data.transforms import EvalTransform
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


def test_practice_pictures_are_a_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [practice] = [text for _, text in STEPS if "SyntheticShapes(" in text]
    run([("python", practice.replace("length=300", "length=6"))], {})
    data = CocoDetection("photos", "labels.json", EvalTransform(PRESETS["conditional-detr-tiny"]))
    assert [category["name"] for category in data.classes] == ["coin", "tile", "sign"]
    assert len(data) == len(list(Path("photos").iterdir())) == 6
    assert data.objects >= 6


@pytest.mark.slow
def test_steps_lead_from_photos_to_an_exported_detector(coco_path, tmp_path, monkeypatch, capsys):
    """On real images instead of practice pictures, with the weights of a short demonstration."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs the exported file")
    monkeypatch.chdir(tmp_path)
    write_photos(coco_path, 12)
    steps = [step for step in STEPS if "SyntheticShapes(" not in step[1]]
    printed = run(steps, {"Path": Path, "Image": Image}, capsys)
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


def write_photos(coco: Path, count: int) -> None:
    """Write `photos` and `labels.json` with some validation images."""
    content = json.loads((coco / "annotations" / "instances_val2017.json").read_text())
    content["images"] = content["images"][:count]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in ids]
    Path("photos").mkdir()
    for image in content["images"]:
        shutil.copy(coco / "val2017" / image["file_name"], "photos")
    Path("labels.json").write_text(json.dumps(content))


def run(steps: list[tuple[str, str]], names: dict, capsys: pytest.CaptureFixture | None = None) -> dict[str, str]:
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
            printed[words[1]] = capsys.readouterr().out if capsys else ""
    return printed
