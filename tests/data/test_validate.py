"""Validation names and counts every kind of fault and never crashes; loading fails only with a named file."""

import copy
import io
import json
import re
import shutil

import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from conddetr.cli import main
from conddetr.config import resolve
from conddetr.data.annotations import read_annotations
from conddetr.data.coco import coco_split
from conddetr.data.fix import fix
from conddetr.data.loader import make_loader
from conddetr.data.transforms import TrainTransform
from conddetr.data.validate import ValidationReport, compare_splits, validate

FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PICTURE = Image.new("RGB", (90, 60), (200, 30, 10))
EXPECTED_WARNINGS = {"too small to train from scratch", "rare class", "class without objects"}
"""Warnings for the four valid images of `small_coco`."""


def report_of(small_coco, **options):
    small_coco.write()
    return validate(small_coco.images, small_coco.file, **options)


def copied(small_coco):
    """Write a copy of the first image; returns its entry."""
    shutil.copy(small_coco.images / "0.jpg", small_coco.images / "double.jpg")
    return {**small_coco.content["images"][0], "id": 500, "file_name": "double.jpg"}


def kinds(report, severity):
    return {finding.kind: finding.count for finding in report.findings if finding.severity == severity}


def finding_of(report, kind):
    return next(finding for finding in report.findings if finding.kind == kind)


def test_valid_data_have_no_errors(small_coco):
    report = report_of(small_coco)
    assert report.ok
    assert set(kinds(report, "warning")) == EXPECTED_WARNINGS
    assert (report.images, report.boxes, report.crowds) == (4, 4, 0)
    assert report.classes == [
        {"id": 7, "name": "cat", "boxes": 0},
        {"id": 3, "name": "dog", "boxes": 4},
        {"id": 90, "name": "toothbrush", "boxes": 0},
    ]
    scratch = next(finding for finding in report.findings if finding.kind.startswith("too small"))
    assert "Fewer than 10,000 images: a detection transformer learns from data alone" in scratch.message


@pytest.mark.parametrize(
    ("spoil", "severity", "kind", "place"),
    [
        (lambda c: c.annotate(100, [5, 5, 5, 5], 55), "error", "unknown category", "id 5 has category_id 55"),
        (lambda c: c.annotate(999, [5, 5, 5, 5], 3), "error", "unknown image", "annotation id 5 has image_id 999"),
        (lambda c: c.annotate(100, [95, 5, 5, 5], 3), "error", "box outside its image", "annotation 5, image 100"),
        (lambda c: c.annotate(100, [5, 5, 0, 5], 3), "warning", "box without area", "annotation 5, image 100"),
        (lambda c: c.annotate(100, [5, 5, 89, 5], 3), "warning", "box reaching out of its image", "in 60×90"),
        (lambda c: c.annotate(101, [10.0, 5.0, 30.0, 40.0], 3), "warning", "identical annotations", "annotation 5"),
        (lambda c: c.annotate(100, [5, 5, 5], 3), "error", "malformed annotations", "annotations[4] (id 5): bbox: exp"),
        (lambda c: c.content["images"][1].pop("id"), "error", "malformed images", "images[1]: has no 'id'"),
        (lambda c: c.content["images"][1].pop("width"), "warning", "size not given", "1.jpg"),
        (lambda c: c.content["images"][1].update(width=None), "warning", "size not given", "1.jpg"),
        (lambda c: c.content["images"][1].update(width=-1, height=-1), "warning", "size not given", "1.jpg"),
        (lambda c: c.content["images"][1].update(file_name="1.JPG"), "warning", "name spelled differently", "1.JPG is"),
        (lambda c: spell_ambiguously(c), "error", "ambiguous file name", "several files differ from it"),
        (lambda c: c.content["images"][1].update(file_name="./0.jpg"), "error", "duplicate file names", "0.jpg"),
        (lambda c: c.content["images"][1].update(file_name="0.JPG"), "error", "duplicate file names", "0.jpg"),
        (lambda c: c.content["annotations"][1].update(id=1), "error", "duplicate ids in annotations", "id 1"),
        (lambda c: c.content["images"][1].update(id=100), "error", "duplicate ids in images", "id 100"),
        (lambda c: c.content["images"][1].update(file_name="0.jpg"), "error", "duplicate file names", "0.jpg"),
        (lambda c: c.content["categories"].append({"id": 4, "name": "cat"}), "warning", "duplicate class names", "cat"),
        (lambda c: c.content.pop("categories"), "error", "no categories", "instances_train2017.json"),
        (lambda c: c.content.update(annotations=None), "error", "missing section", "annotations"),
        (lambda c: c.content.pop("annotations"), "error", "no annotations", "instances_train2017.json"),
        (lambda c: all_crowds(c), "error", "only crowds", "4 boxes, all crowds"),
        (lambda c: c.annotate(100, [0.1, 0.1, 0.4, 0.6], 3), "warning", "boxes in fractions of the image",
         "annotation 5, image 100: [0.1, 0.1, 0.4, 0.6] in 60×90 would be [9.0, 6.0, 36.0, 36.0]"),
        (lambda c: c.annotate(100, [50, 5, 30, 40], 3) or c.annotate(100, [40, 30, 80, 55], 3), "warning",
         "boxes are corners", "annotation 6, image 100: [40, 30, 80, 55] in 60×90 would be [40, 30, 40, 25]"),
        (lambda c: wide_values(c), "error", "pixels that are not colours", "expected 32-bit integers in 0…65535"),
        (lambda c: c.content["annotations"].pop(), "warning", "images without objects", "image 103"),
        (lambda c: c.content["annotations"].clear(), "error", "no objects", "instances_train2017.json"),
        (lambda c: (c.images / "2.jpg").unlink(), "error", "missing file", "2.jpg"),
        (lambda c: (c.images / "2.jpg").write_text("no"), "error", "damaged file", "2.jpg: not an image"),
        (lambda c: c.content["images"][2].update(height=81), "error", "size mismatch", "81×90, but the image has 80"),
        (lambda c: c.content["images"].append(copied(c)), "warning", "identical images", "0.jpg = double.jpg"),
    ],
)  # fmt: skip
def test_every_kind_of_fault_is_named(small_coco, spoil, severity, kind, place):
    spoil(small_coco)
    report = report_of(small_coco)
    assert kinds(report, severity).get(kind) == 1
    assert place in finding_of(report, kind).examples[0]
    assert report.ok == (severity == "warning")


def spell_ambiguously(small_coco):
    for name in ("A.jpg", "a.JPG"):
        shutil.copy(small_coco.images / "1.jpg", small_coco.images / name)
    small_coco.content["images"][1]["file_name"] = "a.jpg"


def all_crowds(small_coco):
    for annotation in small_coco.content["annotations"]:
        annotation["iscrowd"] = 1


def wide_values(small_coco):
    Image.fromarray(np.full((70, 90), 100_000, np.int32)).save(small_coco.images / "wide.tif")
    small_coco.content["images"][1]["file_name"] = "wide.tif"


def report_of_boxes(small_coco, *boxes):
    """The report of a file with only these boxes, all in the first image of 60×90."""
    small_coco.content["annotations"].clear()
    for box in boxes:
        small_coco.annotate(100, box, 3)
    return report_of(small_coco)


@pytest.mark.parametrize(
    ("boxes", "kind", "numbers", "example"),
    [
        (
            [[0.1, 0.1, 0.4, 0.6], [0.5, 0.5, 0.5, 0.25], [10, 5, 30, 40]],
            "boxes in fractions of the image",
            "x, y, width, height",
            "[0.1, 0.1, 0.4, 0.6] in 60×90 would be [9.0, 6.0, 36.0, 36.0]",
        ),
        (
            # The last box as rounded by a tool.
            [[0.5, 0.5, 1, 1], [0.8, 0.8, 0.4, 0.4], [0.5, 0.5, 1, 1.000001]],
            "boxes in fractions of the image",
            "x, y of the centre, width, height",
            "[0.5, 0.5, 1.0, 1.0] in 60×90 would be [0.0, 0.0, 90.0, 60.0]",
        ),
        (
            [[0.2, 0.1, 0.9, 0.6], [0.8, 0.5, 1, 1]],
            "boxes in fractions of the image",
            "x, y of two corners",
            "[0.2, 0.1, 0.9, 0.6] in 60×90 would be [18.0, 6.0, 63.0, 30.0]",
        ),
        (
            [[10, 5, 40, 45], [60, 20, 90, 60]],
            "boxes are corners",
            "as two corners they fit",
            "[10, 5, 40, 45] in 60×90 would be [10, 5, 30, 40]",
        ),
    ],
)
def test_fractions_and_corners_are_errors(small_coco, boxes, kind, numbers, example):
    report = report_of_boxes(small_coco, *boxes)
    assert list(kinds(report, "error")) == [kind]
    finding = finding_of(report, kind)
    assert finding.examples[0] == f"annotation 1, image 100: {example}"
    assert numbers in finding.message
    assert finding.count == sum(max(box) < 1.1 for box in boxes) or kind == "boxes are corners"
    assert "box reaching out of its image" not in kinds(report, "warning")


def test_correct_boxes_are_not_taken_for_fractions_or_corners(small_coco):
    # The first would also fit as two corners; others exceed the image by one pixel, which tools round away.
    report = report_of_boxes(small_coco, [10, 5, 30, 40], [0, 0, 91, 60.5], [-1, -1, 20, 20], [2, 1, 0.5, 1])
    assert report.ok
    assert set(kinds(report, "warning")) == {*EXPECTED_WARNINGS, "images without objects"}
    # A box that fits neither way does not indicate corners.
    assert "boxes are corners" not in kinds(report_of_boxes(small_coco, [50, 30, 45, 29]), "warning")


def test_boxes_of_a_smaller_copy_are_reported(small_coco):
    boxes = [[index / 5, 5, 20, 20] for index in range(50)]
    finding = finding_of(report_of_boxes(small_coco, *boxes), "boxes in one corner")
    assert finding.examples == ["they end at 33% of the width and 42% of the height"]
    assert "boxes in one corner" not in kinds(report_of_boxes(small_coco, *boxes, [80, 5, 5, 5]), "warning")


def tagged(small_coco, orientation, size, boxes):
    """Report of the first image, 60×90 as stored, with a tag, with `size` (height, width) and boxes as annotations."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (90, 60), (9, 99, 199)).save(small_coco.images / "0.jpg", exif=exif)
    small_coco.content["images"][0].update(height=size[0], width=size[1])
    del small_coco.content["annotations"][0]
    for box in boxes:
        small_coco.annotate(100, box, 3)
    for number, annotation in enumerate(small_coco.content["annotations"]):
        annotation["id"] = number
    report = report_of(small_coco)
    tag = finding_of(report, "orientation tag")
    assert (tag.count, tag.examples) == (1, [f"0.jpg: tag {orientation}"])
    assert "upright" in tag.message
    return report


@pytest.mark.parametrize(
    ("orientation", "size", "box", "severity", "kind"),
    [
        (6, (90, 60), [10, 50, 30, 39], "warning", None),
        (3, (60, 90), [50, 10, 39, 30], "warning", None),
        (6, (60, 90), [50, 10, 39, 30], "warning", "annotated as stored"),
        (6, (60, 90), [10, 10, 30, 30], "error", "orientation not clear"),
        (6, (60, 90), [10, 50, 30, 39], "error", "orientation not clear"),
        (6, (60, 91), [10, 10, 30, 30], "error", "size mismatch"),
    ],
)
def test_orientation_tags_are_checked(small_coco, orientation, size, box, severity, kind):
    report = tagged(small_coco, orientation, size, [box])
    size_kinds = {"annotated as stored", "orientation not clear", "size mismatch"}
    findings = {(finding.severity, finding.kind) for finding in report.findings if finding.kind in size_kinds}
    assert findings == ({(severity, kind)} if kind else set())
    check_loading(small_coco, report)


def test_an_image_beyond_pillows_limit_is_not_called_damaged(small_coco, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    report = report_of(small_coco, processes=1)
    assert kinds(report, "error") == {"image too large": 4}
    assert "CONDDETR_MAX_PIXELS" in finding_of(report, "image too large").message


def test_names_from_windows_are_resolved(small_coco):
    small_coco.images.rename(small_coco.root / "img")
    small_coco.images.mkdir()
    (small_coco.root / "img").rename(small_coco.images / "img")
    for image in small_coco.content["images"]:
        image["file_name"] = f"img\\{image['file_name'].upper()}"
    report = report_of(small_coco)
    assert report.ok
    finding = finding_of(report, "name spelled differently")
    assert (finding.count, finding.examples[0]) == (4, "img\\0.JPG is img/0.jpg")
    # No similar file exists: the message explains the backslashes.
    small_coco.content["images"][0]["file_name"] = "img\\9.jpg"
    assert "backslashes" in finding_of(report_of(small_coco), "missing file").examples[0]


def test_two_categories_with_the_same_name_stay_separate(small_coco):
    small_coco.content["categories"] = [{"id": 3, "name": "dog"}, {"id": 0, "name": "dog"}]
    report = report_of(small_coco)
    assert report.to_dict()["classes"] == [
        {"id": 3, "name": "dog", "boxes": 4},
        {"id": 0, "name": "dog", "boxes": 0},
    ]
    assert ", 2 classes" in report.summary()
    printed = io.StringIO()
    Console(file=printed, width=200).print(report.tables()[0])
    rows = [line.split() for line in printed.getvalue().splitlines()]
    assert ["dog", "(id", "3)", "4"] in rows
    assert ["dog", "(id", "0)", "0"] in rows


def test_a_test_set_may_lack_annotations(small_coco):
    del small_coco.content["annotations"]
    report = report_of(small_coco, train=False)
    assert kinds(report, "error") == {}
    assert kinds(report, "warning") == {"no annotations": 1}
    assert "nothing can be measured" in finding_of(report, "no annotations").message


def test_annotations_are_accepted_instead_of_a_file(small_coco):
    report = validate(small_coco.images, read_annotations(small_coco.file))
    assert report.ok
    assert (report.annotation_file, report.boxes) == (str(small_coco.file), 4)


def test_splits_are_compared_by_id_and_name():
    train = ValidationReport("t", "t", classes=[{"id": 1, "name": "cat", "boxes": 5}, {"id": 2, "name": "dog"}])
    val = ValidationReport("v", "v", classes=[{"id": 2, "name": "cat"}, {"id": 3, "name": "cow"}])
    compare_splits(train, val)
    assert kinds(val, "error") == {"category with another name": 1, "category not in the training set": 1}
    assert finding_of(val, "category with another name").examples == ["id 2: 'cat' here, 'dog' in the training set"]
    assert finding_of(val, "category not in the training set").examples == ["id 3: 'cow'"]
    # No finding if validation has fewer categories, or the training set could not be read.
    fewer = ValidationReport("v", "v", classes=[{"id": 1, "name": "cat"}])
    compare_splits(train, fewer)
    compare_splits(ValidationReport("t", "t"), fewer)
    assert fewer.findings == []


def test_names_are_not_read_as_markup(small_coco):
    small_coco.content["images"][0]["file_name"] = "[/red][bold]x.jpg"
    small_coco.content["categories"][1]["name"] = "[/dog]"
    printed = io.StringIO()
    Console(file=printed, width=200).print(*report_of(small_coco).tables())
    assert "[/red][bold]x.jpg" in printed.getvalue()
    assert "[/dog]" in printed.getvalue()


def test_unbalanced_classes_are_reported(small_coco):
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


def test_unreadable_annotation_files_are_errors(small_coco, tmp_path):
    assert kinds(validate(tmp_path, tmp_path / "no.json"), "error") == {"missing annotation file": 1}
    for text in ("{", "[1, 2]", "[" * 100_000, "\xff"):
        small_coco.file.write_text(text, encoding="latin-1")
        assert kinds(validate(small_coco.images, small_coco.file), "error") == {"unreadable annotation file": 1}


def test_the_command_prints_writes_and_sets_its_exit_status(small_coco, tmp_path, capsys):
    out = tmp_path / "report.json"
    command = ["validate-data", "--coco-path", str(small_coco.root), "--report", str(out)]
    assert main(command) == 0
    assert "4 images, 4 boxes, 0 crowds, 3 classes" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content["ok"] is True
    train, val = content["data_sets"]
    assert (train["images"], val["images"]) == (4, 2)
    # The fixture draws both sets from one seed, so their pixels are equal.
    findings = {finding["kind"]: finding for finding in val["findings"]}
    assert set(findings) == {"images of the training set"}
    assert findings["images of the training set"]["examples"] == ["0.jpg = 0.jpg", "1.jpg = 1.jpg"]
    (small_coco.images / "1.jpg").unlink()
    assert main(["validate-data", "--annotations", str(small_coco.file), "--images", str(small_coco.images)]) == 1
    assert "missing file" in capsys.readouterr().out
    assert main(["validate-data", "--annotations", str(small_coco.file)]) == 2


def test_the_command_accepts_any_layout_and_two_files(small_coco, tmp_path, capsys):
    val = small_coco.root / "annotations" / "instances_val2017.json"
    content = json.loads(val.read_text())
    content["categories"][0]["name"] = "lion"
    val.write_text(json.dumps(content))
    two_files = ["--annotations", str(small_coco.file), "--images", str(small_coco.images)]
    two_files += ["--val-annotations", str(val), "--val-folder", str(small_coco.root / "val2017")]
    for source in (["--dataset", str(small_coco.root)], two_files):
        out = tmp_path / "report.json"
        assert main(["validate-data", *source, "--report", str(out)]) == 1
        train, other = json.loads(out.read_text())["data_sets"]
        assert train["ok"]
        clash = next(finding for finding in other["findings"] if finding["kind"] == "category with another name")
        assert clash["examples"] == ["id 7: 'lion' here, 'cat' in the training set"]
    assert "data: COCO 2017 layout" in capsys.readouterr().out
    for extra, message in (
        (["--images", "x", "--coco-path", "y"], "images has no effect with `coco_path`"),
        (["--val-folder", "x", *two_files[:4]], "val_annotations is missing"),
        (["--fix", "x.json", *two_files], "--fix cleans one annotation file"),
    ):
        assert main(["validate-data", *extra]) == 2
        assert message in capsys.readouterr().err


def test_real_images_are_valid(coco_path):
    for split in ("train", "val"):
        report = validate(coco_path / f"{split}2017", coco_path / "annotations" / f"instances_{split}2017.json")
        assert kinds(report, "error") == {}
        assert len(report.classes) == 80


JUNK = st.one_of(
    st.none(),
    st.just(-1),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.one_of(st.integers(-5, 5), st.floats(), st.none()), max_size=5),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def paths(content, prefix=()):
    """The path of every value inside the annotations."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from paths(value, (*prefix, key))


@FUZZ
@given(data=st.data())
def test_any_value_anywhere_in_the_annotations(small_coco, data):
    content = copy.deepcopy(small_coco.content)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(paths(content))))
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
    check_fixing(small_coco, report)


@FUZZ
@given(data=st.data())
def test_any_size_in_the_annotations(small_coco, data):
    content = copy.deepcopy(small_coco.content)
    for image in content["images"]:
        for side in ("height", "width"):
            value = data.draw(st.sampled_from([image[side], None, -1, 0, "absent", image[side] + 1]))
            image[side] = value
            if value == "absent":
                del image[side]
    small_coco.file.write_text(json.dumps(content))
    report = validate(small_coco.images, small_coco.file, processes=1)
    unknown = sum(any(image.get(side) in (None, -1, 0) for side in ("height", "width")) for image in content["images"])
    assert kinds(report, "warning").get("size not given", 0) == unknown
    check_loading(small_coco, report)
    check_fixing(small_coco, report)


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
    [
        test_any_value_anywhere_in_the_annotations,
        test_any_size_in_the_annotations,
        test_images_cut_or_changed_anywhere,
        test_exif_changed_anywhere,
    ],
    ids=lambda test: test.__name__,
)
def test_more_examples_of_each(small_coco, test):
    """Each of these tests with five times as many examples."""
    at_length = settings(FUZZ, max_examples=5 * FUZZ.max_examples)
    at_length(given(data=st.data())(test.hypothesis.inner_test))(small_coco)


def exif_data(orientation: int) -> bytes:
    """Four tags, one of them in a separate directory."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = orientation, "maker", 72.0
    exif.get_ifd(0x8769)[0x829A] = 0.01
    return exif.tobytes()


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """The content with up to four bytes changed anywhere."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(0, 4)) if changed else 0):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    return bytes(changed)


def check_image(small_coco, name: str, content: bytes) -> None:
    """`check_loading` with this content as the first image, instead of the stored file."""
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
    """A valid data set loads; a refused one has an error in its report, and the refusal names a file."""
    refusal = None
    try:
        dataset = coco_split(small_coco.root, "train", TrainTransform(resolve("conditional-detr-tiny")))
        if len(dataset):
            list(make_loader(dataset, 1, train=True))
    except (ValueError, FileNotFoundError) as error:
        refusal = str(error)
    assert refusal is None or (not report.ok and str(small_coco.root) in refusal), refusal


NOTHING_LEFT = (
    "no images|no objects|only crowds|no categories|no annotations|missing section|is not JSON|expected an object"
)
"""Possible reasons why no file can be written."""


def check_fixing(small_coco, report):
    """A cleaned copy has no errors; if none is written, no objects for training remain."""
    out, original = small_coco.root / "fixed.json", small_coco.file.read_bytes()
    out.unlink(missing_ok=True)
    refusal = None
    try:
        fix(report, out)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert re.search(NOTHING_LEFT, refusal), refusal
        assert not out.exists()
    else:
        fixed = validate(small_coco.images, out, processes=1)
        assert kinds(fixed, "error") == {}
        assert fixed.boxes > 0
    assert small_coco.file.read_bytes() == original
