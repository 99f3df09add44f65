"""Validation names every kind of damage, counts it, and never crashes; nor does loading, without a named cause."""

import copy
import io
import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from conddetr.cli import main
from conddetr.config import resolve
from conddetr.data.batch import make_loader
from conddetr.data.coco import coco_split
from conddetr.data.transforms import TrainTransform
from conddetr.data.validate import validate

FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PICTURE = Image.new("RGB", (90, 60), (200, 30, 10))
EXPECTED_WARNINGS = {"too small to train from scratch", "rare class", "class without objects"}
"""What the four images of `small_coco` deserve when they are sound."""


def report_of(small_coco, **options):
    small_coco.write()
    return validate(small_coco.images, small_coco.file, **options)


def doubled(small_coco):
    """The entry of a copy of the first image, which is written."""
    shutil.copy(small_coco.images / "0.jpg", small_coco.images / "double.jpg")
    return {**small_coco.content["images"][0], "id": 500, "file_name": "double.jpg"}


def kinds(report, severity):
    return {finding.kind: finding.count for finding in report.findings if finding.severity == severity}


def test_sound_data_have_no_errors(small_coco):
    report = report_of(small_coco)
    assert report.ok
    assert set(kinds(report, "warning")) == EXPECTED_WARNINGS
    assert (report.images, report.boxes, report.crowds) == (4, 4, 0)
    assert report.classes == {"cat": 0, "dog": 4, "toothbrush": 0}
    scratch = next(finding for finding in report.findings if finding.kind.startswith("too small"))
    assert "Fewer than 10,000 images: a detection transformer learns from data alone" in scratch.message


@pytest.mark.parametrize(
    ("spoil", "severity", "kind", "place"),
    [
        (lambda c: c.annotate(100, [5, 5, 5, 5], 55), "error", "unknown category", "image 100: category 55"),
        (lambda c: c.annotate(999, [5, 5, 5, 5], 3), "error", "unknown image", "annotation 5, image 999"),
        (lambda c: c.annotate(100, [95, 5, 5, 5], 3), "error", "box outside its image", "annotation 5, image 100"),
        (lambda c: c.annotate(100, [5, 5, 0, 5], 3), "warning", "box without area", "annotation 5, image 100"),
        (lambda c: c.annotate(100, [5, 5, 89, 5], 3), "warning", "box reaching out of its image", "in 60×90"),
        (lambda c: c.annotate(101, [10.0, 5.0, 30.0, 40.0], 3), "warning", "identical annotations", "annotation 5"),
        (lambda c: c.annotate(100, [5, 5, 5], 3), "error", "malformed annotations", "annotations[4]: bbox: expected"),
        (lambda c: c.content["images"][1].pop("width"), "error", "malformed images", "images[1]: has no 'width'"),
        (lambda c: c.content["annotations"][1].update(id=1), "error", "duplicate ids in annotations", "id 1"),
        (lambda c: c.content["images"][1].update(id=100), "error", "duplicate ids in images", "id 100"),
        (lambda c: c.content["images"][1].update(file_name="0.jpg"), "error", "duplicate file names", "0.jpg"),
        (lambda c: c.content["categories"].append({"id": 4, "name": "cat"}), "warning", "duplicate class names", "cat"),
        (lambda c: c.content.pop("categories"), "error", "no categories", "instances_train2017.json"),
        (lambda c: c.content["annotations"].pop(), "warning", "images without objects", "image 103"),
        (lambda c: c.content["annotations"].clear(), "error", "no objects", "instances_train2017.json"),
        (lambda c: (c.images / "2.jpg").unlink(), "error", "missing file", "2.jpg"),
        (lambda c: (c.images / "2.jpg").write_text("no"), "error", "damaged file", "2.jpg: not an image"),
        (lambda c: c.content["images"][2].update(height=81), "error", "size mismatch", "81×90, the file has 80×90"),
        (lambda c: c.content["images"].append(doubled(c)), "warning", "identical images", "0.jpg = double.jpg"),
    ],
)  # fmt: skip
def test_every_kind_of_damage_is_named(small_coco, spoil, severity, kind, place):
    spoil(small_coco)
    report = report_of(small_coco)
    assert kinds(report, severity).get(kind) == 1
    assert place in next(finding for finding in report.findings if finding.kind == kind).examples[0]
    assert report.ok == (severity == "warning")


def test_names_are_not_read_as_markup(small_coco):
    small_coco.content["images"][0]["file_name"] = "[/red][bold]x.jpg"
    small_coco.content["categories"][1]["name"] = "[/dog]"
    printed = io.StringIO()
    Console(file=printed, width=200).print(*report_of(small_coco).tables())
    assert "[/red][bold]x.jpg" in printed.getvalue()
    assert "[/dog]" in printed.getvalue()


def test_unbalanced_classes_are_said(small_coco):
    for index in range(101):
        small_coco.annotate(100, [index / 4, 5, 20, 20], 7)
    small_coco.content["annotations"] = small_coco.content["annotations"][3:]
    assert kinds(report_of(small_coco), "warning")["unbalanced classes"] == 1


def test_truncated_images_are_found_by_several_processes(small_coco):
    template = small_coco.content["images"][0]
    data = (small_coco.images / "0.jpg").read_bytes()
    for index in range(40):
        (small_coco.images / f"copy{index}.jpg").write_bytes(data[: len(data) // 2] if index % 10 == 7 else data)
        small_coco.content["images"].append({**template, "id": 200 + index, "file_name": f"copy{index}.jpg"})
    done = []
    report = report_of(small_coco, processes=2, on_image=lambda count, total: done.append(total))
    assert kinds(report, "error") == {"damaged file": 4}
    assert done == [44] * 44


def test_files_that_can_not_be_read_at_all(small_coco, tmp_path):
    assert kinds(validate(tmp_path, tmp_path / "no.json"), "error") == {"missing annotation file": 1}
    for text in ("{", "[1, 2]", "[" * 100_000, "\xff"):
        small_coco.file.write_text(text, encoding="latin-1")
        assert kinds(validate(small_coco.images, small_coco.file), "error") == {"unreadable annotation file": 1}


def test_the_command_prints_writes_and_sets_the_status(small_coco, tmp_path, capsys):
    out = tmp_path / "report.json"
    command = ["validate-data", "--coco-path", str(small_coco.root), "--report", str(out)]
    assert main(command) == 0
    assert "4 images, 4 boxes, 0 crowds, 3 classes" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content["ok"] is True
    train, val = content["data_sets"]
    assert (train["images"], val["images"]) == (4, 2)
    # The fixture's two sets are drawn from one seed: the same pixels.
    found = {finding["kind"]: finding for finding in val["findings"]}
    assert set(found) == {"images of the training set"}
    assert found["images of the training set"]["examples"] == ["0.jpg = 0.jpg", "1.jpg = 1.jpg"]
    (small_coco.images / "1.jpg").unlink()
    assert main(["validate-data", "--annotations", str(small_coco.file), "--images", str(small_coco.images)]) == 1
    assert "missing file" in capsys.readouterr().out
    assert main(["validate-data", "--annotations", str(small_coco.file)]) == 2


def test_real_images_are_sound(coco_path):
    for split in ("train", "val"):
        report = validate(coco_path / f"{split}2017", coco_path / "annotations" / f"instances_{split}2017.json")
        assert kinds(report, "error") == {}
        assert len(report.classes) == 80


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.one_of(st.integers(-5, 5), st.floats(), st.none()), max_size=5),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def places(content, prefix=()):
    """The path of every value inside the annotations."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from places(value, (*prefix, key))


@FUZZ
@given(data=st.data())
def test_any_value_anywhere_in_the_annotations(small_coco, data):
    content = copy.deepcopy(small_coco.content)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places(content))))
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        if data.draw(st.booleans()):
            parent[path[-1]] = data.draw(JUNK)
        else:
            del parent[path[-1]]
        if not content:
            break
    small_coco.file.write_text(json.dumps(content))
    report = validate(small_coco.images, small_coco.file, processes=1)
    json.dumps(report.to_dict())
    Console(file=io.StringIO()).print(*report.tables())
    check_loading(small_coco, report)


@FUZZ
@given(data=st.data())
def test_images_cut_or_changed_anywhere(small_coco, data):
    name = data.draw(st.sampled_from(["0.jpg", "x.jpg", "x.png", "x.webp", "progressive.jpg"]))
    path = small_coco.images / name
    if name != "0.jpg":
        options = {"progressive": True} if name == "progressive.jpg" else {}
        PICTURE.save(path, exif=exif_data(3), **options)
    content = path.read_bytes()
    check_image(small_coco, name, damaged(data, content[: data.draw(st.integers(0, len(content)))]))


@FUZZ
@given(data=st.data())
def test_exif_changed_anywhere(small_coco, data):
    name = data.draw(st.sampled_from(["x.jpg", "x.png", "x.webp"]))
    PICTURE.save(small_coco.images / name, exif=damaged(data, exif_data(6)))
    check_image(small_coco, name, (small_coco.images / name).read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize(
    "test",
    [test_any_value_anywhere_in_the_annotations, test_images_cut_or_changed_anywhere, test_exif_changed_anywhere],
    ids=lambda test: test.__name__,
)
def test_the_same_at_length(small_coco, test):
    """Five times as many examples of each."""
    at_length = settings(FUZZ, max_examples=5 * FUZZ.max_examples)
    at_length(given(data=st.data())(test.hypothesis.inner_test))(small_coco)


def exif_data(orientation: int) -> bytes:
    """Four tags, one of them in a directory of its own."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = orientation, "maker", 72.0
    exif.get_ifd(0x8769)[0x829A] = 0.01
    return exif.tobytes()


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """Up to four bytes changed, anywhere."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(0, 4)) if changed else 0):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    return bytes(changed)


def check_image(small_coco, name: str, content: bytes) -> None:
    """`check_loading` with this file as the first image, in place of what the folder has."""
    path = small_coco.images / name
    original = path.read_bytes()
    small_coco.content["images"][0]["file_name"] = name
    try:
        path.write_bytes(content)
        small_coco.write()
        check_loading(small_coco, validate(small_coco.images, small_coco.file, processes=1))
    finally:
        path.write_bytes(original)


def check_loading(small_coco, report):
    """What the report finds sound is loaded; what is refused is refused with the name of a file."""
    refusal = None
    try:
        dataset = coco_split(small_coco.root, "train", TrainTransform(resolve("conditional-detr-tiny")))
        if len(dataset):
            list(make_loader(dataset, 1, train=True))
    except (ValueError, FileNotFoundError) as error:
        refusal = str(error)
    assert refusal is None or (not report.ok and str(small_coco.root) in refusal), refusal
