"""A cleaned annotation file has no errors and keeps all valid entries; changes are listed; the original stays."""

import copy
import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from conddetr.cli import main
from conddetr.data.fix import fix
from conddetr.data.validate import validate


def fixed(small_coco, content=None, processes=1):
    """Changes by kind, and the content of the cleaned file, which must have no errors; the original must not change."""
    text = json.dumps(content or small_coco.content)
    small_coco.file.write_text(text)
    out = small_coco.root / "fixed.json"
    result = fix(validate(small_coco.images, small_coco.file, processes=processes), out)
    assert small_coco.file.read_text() == text
    report = validate(small_coco.images, out, processes=processes)
    assert [finding for finding in report.findings if finding.severity == "error"] == []
    changes = {change.what: (change.count, change.first) for change in result.changes}
    return changes, json.loads(out.read_text())


def tagged_image(path, size=(60, 90)):
    """Save an image that its tag turns by 90°; `size` (height, width) as stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", size[::-1], (200, 30, 10)).save(path, exif=exif)


def everything_wrong(small_coco):
    """The fixture's four images with one box each, and one case of each fault."""
    content, images = small_coco.content, small_coco.images
    content["info"] = {"description": "by hand"}
    for number, annotation in enumerate(content["annotations"]):
        annotation["segmentation"] = [[10, 5, 40, 5, 40, number]]
    shutil.copy(images / "0.jpg", images / "again.jpg")
    (images / "damaged.jpg").write_bytes((images / "0.jpg").read_bytes()[:500])
    for name in ("Twice.jpg", "twice.JPG"):
        shutil.copy(images / "0.jpg", images / name)
    tagged_image(images / "tagged.jpg")
    Image.fromarray(np.full((60, 90), 7.5, np.float32)).save(images / "float.tif")
    names = ("absent.jpg", "damaged.jpg", "twice.jpg", "tagged.jpg", "again.jpg", "0.jpg", "float.tif")
    for key, name in enumerate(names, 200):
        content["images"].append({"id": key, "file_name": name, "height": 60, "width": 90, "licence": 1})
        small_coco.annotate(key, [5, 5, 20, 20], 3)
    content["images"][8]["height"] = 61
    content["images"][1].update(height=None, width=-1)
    (images / "x").mkdir()
    (images / "2.jpg").rename(images / "x" / "2.jpg")
    content["images"][2]["file_name"] = "x\\2.JPG"
    content["images"].insert(0, {**content["images"][0], "file_name": "other.jpg"})
    content["images"].append({"id": "twelve"})
    content["categories"] += [{"id": 90, "name": "brush"}, {"name": "nobody"}]
    small_coco.annotate(101, [5, 5, 20, 20], 55)
    small_coco.annotate(999, [5, 5, 20, 20], 3)
    small_coco.annotate(101, [5, 5, 0, 20], 3)
    small_coco.annotate(101, [95, 5, 10, 20], 3)
    small_coco.annotate(101, [80, 60, 20, 20], 3, area=400.0)
    small_coco.annotate(101, [-10, 60, 20, 20], 3, area=123.0)
    small_coco.annotate(101, [10, 5, 30, 40], 3)
    small_coco.annotate(101, [1, 2, 3, 4], 3, area=None, iscrowd=None)
    small_coco.annotate(101, [1, 2, 3], 3)
    small_coco.annotate(103, [7, 8, 9, 10], 90, id=1)
    return content


def test_a_file_with_every_fault_is_cleaned(small_coco):
    changes, content = fixed(small_coco, everything_wrong(small_coco))
    assert changes == {
        "malformed images dropped": (1, "images[12]: has no 'file_name'"),
        "malformed annotations dropped": (1, "annotations[19]: bbox: expected 4 finite numbers, got [1, 2, 3]"),
        "malformed categories dropped": (1, "categories[4]: has no 'id'"),
        "images dropped: a later entry has the same id": (1, "id 100"),
        "categories dropped: a later entry has the same id": (1, "id 90"),
        "annotations renumbered: their id was taken": (1, "annotation 1, image 103: 20"),
        "annotations dropped: unknown image": (1, "annotation 13, image 999: image 999"),
        "annotations dropped: unknown category": (1, "annotation 12, image 101: category 55"),
        "images dropped: missing file": (1, "absent.jpg"),
        "images dropped: damaged file": (1, changes["images dropped: damaged file"][1]),
        "images dropped: ambiguous file name": (1, changes["images dropped: ambiguous file name"][1]),
        "images dropped: pixels that are not colours": (1, changes["images dropped: pixels that are not colours"][1]),
        "images dropped: size mismatch": (
            1,
            "again.jpg: the annotations give height × width 61×90, but the image has 60×90",
        ),
        "annotations dropped: their image is dropped": (6, "annotation 5, image 200"),
        "sizes read from the image": (1, "1.jpg: 70×90"),
        "names replaced by those on disk": (1, "x\\2.JPG: x/2.jpg"),
        "images of the same file merged": (1, "0.jpg: id 205 is now 100"),
        "images dropped: orientation not clear": (1, changes["images dropped: orientation not clear"][1]),
        "boxes dropped: no area in their image": (2, "annotation 14, image 101: [5, 5, 0, 20]"),
        "boxes clipped to their image": (2, "annotation 16, image 101: [80, 60, 20, 20] to [80, 60, 10, 10]"),
        "identical annotations dropped": (1, "annotation 18, image 101"),
        "area filled in": (1, "annotation 19, image 101: 12"),
        "iscrowd filled in": (1, "annotation 19, image 101: 0"),
    }
    assert [image["id"] for image in content["images"]] == [100, 101, 102, 103]
    kept = {annotation["id"]: annotation for annotation in content["annotations"]}
    assert sorted(kept) == [1, 2, 3, 4, 10, 16, 17, 19, 20]
    # The first area was the box's, the second a mask's.
    assert (kept[16]["bbox"], kept[16]["area"]) == ([80, 60, 10, 10], 100)
    assert (kept[17]["bbox"], kept[17]["area"]) == ([0, 60, 10, 10], 123.0)
    assert kept[10]["image_id"] == 100
    assert content["categories"] == [*small_coco.categories[:2], {"id": 90, "name": "brush"}]
    assert content["info"] == {"description": "by hand"}
    assert kept[3]["segmentation"] == [[10, 5, 40, 5, 40, 2]]


def test_a_valid_file_stays_unchanged(small_coco):
    changes, content = fixed(small_coco)
    assert changes == {}
    assert content == small_coco.content


@pytest.mark.parametrize(
    ("boxes", "areas", "expected", "expected_areas"),
    [
        # Areas of boxes in the same unit, or of a mask in fractions; the image has 60×90 pixels.
        (
            [[0.1, 0.1, 0.4, 0.6], [0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.2, 0.2]],
            [0.24, 0.25, 0.01],
            [[9, 6, 36, 36], [45, 30, 45, 30], [18, 12, 18, 12]],
            [1296, 1350, 54],
        ),
        ([[10, 5, 40, 45], [60, 20, 90, 60]], [1800, 700], [[10, 5, 30, 40], [60, 20, 30, 40]], [1200, 700]),
    ],
)
def test_fractions_and_corners_are_converted(small_coco, boxes, areas, expected, expected_areas):
    small_coco.content["annotations"].clear()
    for box, area in zip(boxes, areas, strict=True):
        small_coco.annotate(100, box, 3, area=area)
    changes, content = fixed(small_coco)
    assert [count for count, _ in changes.values()] == [len(boxes)]
    assert [annotation["bbox"] for annotation in content["annotations"]] == expected
    assert [annotation["area"] for annotation in content["annotations"]] == pytest.approx(expected_areas)


def test_a_few_odd_boxes_do_not_cause_a_conversion(small_coco):
    for box in ([0.1, 0.1, 0.4, 0.6], [50, 5, 30, 40], [40, 30, 80, 55]):
        small_coco.annotate(100, box, 3)
    changes, content = fixed(small_coco)
    assert list(changes) == ["boxes clipped to their image"]
    assert content["annotations"][4]["bbox"] == [0.1, 0.1, 0.4, 0.6]


def test_nothing_is_written_if_no_objects_remain(small_coco, tmp_path):
    out = tmp_path / "out.json"
    out.write_text("as it was")

    def refused(message):
        with pytest.raises(ValueError, match=message):
            fix(validate(small_coco.images, small_coco.file), out)
        assert out.read_text() == "as it was"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["coco", "out.json"]

    for annotation in small_coco.content["annotations"]:
        annotation["iscrowd"] = 1
    small_coco.write()
    refused(r"out\.json is not written, because an error would remain: only crowds \(4 boxes, all crowds\)")
    for annotation in small_coco.content["annotations"]:
        annotation["bbox"] = [1, 2, 0, 0]
    small_coco.write()
    refused("no objects")
    for text, message in (
        ("{", "is not JSON"),
        ('{"images": [], "images": []}', "is repeated"),
        ("[]", "expected an object"),
        ("{}", "missing section"),
    ):
        small_coco.file.write_text(text)
        refused(message)
    with pytest.raises(ValueError, match="this is also"):
        fix(validate(small_coco.images, small_coco.file), small_coco.file.parent / "." / small_coco.file.name)
    assert small_coco.file.read_text() == "{}"


def test_the_command_lists_its_changes(small_coco, tmp_path, capsys):
    small_coco.content["images"][0]["height"] = 61
    # With a byte order mark, as Windows editors write it.
    small_coco.file.write_text(json.dumps(small_coco.content), encoding="utf-8-sig")
    out, report = tmp_path / "out.json", tmp_path / "report.json"
    command = ["validate-data", "--images", str(small_coco.images), "--annotations", str(small_coco.file)]
    assert main(command) == 1
    assert main([*command, "--fix", str(out), "--report", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "3 images, 3 annotations, 3 categories" in printed
    assert "images dropped: size mismatch" in printed
    written = json.loads(report.read_text())
    assert written["fixed"]["annotation_file"] == str(out)
    assert [(change["what"], change["count"]) for change in written["fixed"]["changes"]] == [
        ("images dropped: size mismatch", 1),
        ("annotations dropped: their image is dropped", 1),
    ]
    assert main([*command[:-1], str(out)]) == 0
    small_coco.content["annotations"].clear()
    small_coco.write()
    capsys.readouterr()
    assert main([*command, "--fix", str(out), "--report", str(report)]) == 2
    assert "no objects" in capsys.readouterr().err
    assert "fixed" not in json.loads(report.read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coco-path", "/", "--fix", "/x.json"], "--fix cleans one annotation file"),
        (
            ["--images", "/", "--annotations", "/no.json", "--fix", "//no.json"],
            "--fix //no.json: this is also /no.json",
        ),
        (["--images", "/", "--annotations", "/a", "--fix", "/x", "--report", "/x"], "--fix /x: this is also /x"),
    ],
)
def test_invalid_targets_of_fix_are_errors(arguments, message, capsys):
    assert main(["validate-data", *arguments]) == 2
    assert message in capsys.readouterr().err


NUMBERS = st.one_of(st.integers(-5, 100), st.floats(-1, 1), st.sampled_from([0, 60, 90, 59.5, 0.5]))


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_boxes_in_images_of_any_orientation_are_cleaned(small_coco, data):
    content = copy.deepcopy(small_coco.content)
    tagged_image(small_coco.images / "0.jpg")
    content["images"][0]["file_name"] = data.draw(st.sampled_from(["0.jpg", "0.JPG", "%30.jpg"]))
    content["images"][0].update(data.draw(st.sampled_from([{}, {"height": 90, "width": 60}, {"width": None}])))
    for annotation in content["annotations"][1:]:
        annotation["iscrowd"] = data.draw(st.sampled_from([0, 1, None]))
    boxes = data.draw(st.lists(st.lists(NUMBERS, min_size=4, max_size=4), max_size=6))
    for number, box in enumerate(boxes):
        image_id = data.draw(st.sampled_from([100, 101, 102, 999]))
        entry = {"id": number, "image_id": image_id, "category_id": 3, "bbox": box}
        content["annotations"].append(
            entry | data.draw(st.sampled_from([{}, {"area": None}, {"area": box[2] * box[3]}]))
        )
    # At least one object remains.
    content["annotations"][3]["iscrowd"] = 0
    fixed(small_coco, content)
