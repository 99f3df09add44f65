"""Data sets on disk: the layout is detected, and boxes follow the format's definition."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conddetr.config import PRESETS
from conddetr.data import layouts, yolo
from conddetr.data.coco import CocoDetection
from conddetr.data.layouts import find_layout
from conddetr.data.transforms import EvalTransform

pytest.importorskip("yaml", reason="YOLO's layout needs PyYAML")

HEIGHT, WIDTH = 60, 80


def draw(path, orientation=None):
    """Save an image of 60×80 pixels as stored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", (WIDTH, HEIGHT)).save(path, exif=exif)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_coco(path, count, first=1):
    """Annotations of `count` images named 1.jpg and so on, with one box each."""
    images = [{"id": n, "file_name": f"{n}.jpg", "height": HEIGHT, "width": WIDTH} for n in range(first, first + count)]
    annotations = [
        {"id": n, "image_id": n, "category_id": 1, "bbox": [1, 2, 3, 4]} for n in range(first, first + count)
    ]
    categories = [{"id": 0, "name": "cell"}, {"id": 1, "name": "cell"}]
    write(path, json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def coco2017(root):
    for split, count in (("train", 2), ("val", 1)):
        write_coco(root / f"annotations/instances_{split}2017.json", count)
        for number in range(count):
            draw(root / f"{split}2017/{number + 1}.jpg")


def roboflow(root):
    for split, count in (("train", 2), ("valid", 1), ("test", 1)):
        write_coco(root / split / "_annotations.coco.json", count)
        for number in range(count):
            draw(root / split / f"{number + 1}.jpg")


def yolo_splits(root, images="{}/images", labels="{}/labels", names=("train", "valid")):
    for split in names:
        for stem in ("a", "b"):
            draw(root / images.format(split) / f"{stem}.jpg")
        write(root / labels.format(split) / "a.txt", "1 0.5 0.5 0.25 0.5\n0 0.1 0.2 0.1 0.1\n")


def yolo_roboflow(root):
    yolo_splits(root)
    write(
        root / "data.yaml",
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['cat', 'dog']\n",
    )


XML = """<annotation><folder>x</folder><filename>{filename}</filename>{size}{objects}</annotation>"""
SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"


def voc_object(name, *corners, difficult=0):
    tags = "".join(
        f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{tags}</bndbox></object>"


def write_voc(path, *objects, filename="other.jpg", size=SIZE):
    write(path, XML.format(filename=filename, size=size, objects="".join(objects)))


def voc(root):
    for stem in ("a", "b", "c"):
        draw(root / f"JPEGImages/{stem}.jpg")
        write_voc(root / f"Annotations/{stem}.xml", voc_object("dog", 1, 1, WIDTH, HEIGHT))
    write(root / "ImageSets/Main/train.txt", "a\nb\n")
    write(root / "ImageSets/Main/val.txt", "c\n")


def boxes_of(annotations):
    """(image, class name, box) of all objects."""
    names = [category["name"] for category in annotations.categories]
    return [
        (annotations.names[image], names[category], box)
        for image, category, box in zip(
            annotations.image_of.tolist(),
            annotations.category_of.tolist(),
            annotations.boxes.round(9).tolist(),
            strict=True,
        )
    ]


@pytest.mark.parametrize(
    ("make", "name", "splits", "line"),
    [
        (coco2017, "COCO 2017", "train val", "COCO 2017 layout (annotations/instances_*2017.json): train, val"),
        (
            roboflow,
            "Roboflow COCO",
            "train val test",
            "Roboflow COCO layout (train/_annotations.coco.json): train, val, test",
        ),
        (yolo_roboflow, "YOLO", "train val", "YOLO layout (data.yaml): train 2 images, val 2"),
        (
            voc,
            "Pascal VOC",
            "train val",
            "Pascal VOC layout (Annotations/*.xml): train 2 images, val 1; "
            "pixels count from 1, both corners in the box",
        ),
    ],
    ids=["coco", "roboflow", "yolo", "voc"],
)
def test_layouts_are_detected(tmp_path, make, name, splits, line):
    make(tmp_path)
    layout = find_layout(tmp_path)
    assert (layout.name, " ".join(layout.splits)) == (name, splits)
    assert layout.describe() == f"data: {line}"
    for split in layout.splits.values():
        assert isinstance(split, layouts.Split)
        annotations = split.read()
        assert len(annotations) > 0
        assert all((split.images / file).is_file() for file in annotations.names)


def test_categories_with_the_same_name_stay_separate(tmp_path):
    roboflow(tmp_path)
    layout = find_layout(tmp_path)
    assert layout.splits["train"].read().categories == [{"id": 0, "name": "cell"}, {"id": 1, "name": "cell"}]
    assert layout.splits["val"].images == tmp_path / "valid"


def test_a_test_set_may_lack_annotations(tmp_path):
    coco2017(tmp_path)
    (tmp_path / "test2017").mkdir()
    images = [{"id": 1, "file_name": "1.jpg", "height": HEIGHT, "width": WIDTH}]
    write(
        tmp_path / "annotations/image_info_test-dev2017.json",
        json.dumps({"images": images, "categories": [{"id": 1, "name": "cell"}]}),
    )
    assert not find_layout(tmp_path).splits["test"].read().is_annotated


def test_a_folder_without_layout_is_an_error(tmp_path):
    draw(tmp_path / "photos/a.jpg")
    write(tmp_path / "labels.json", "{}")
    with pytest.raises(ValueError, match=r"It has labels\.json, photos/\. Expected one of:") as caught:
        find_layout(tmp_path)
    for name in ("COCO 2017: ", "Roboflow COCO: ", "YOLO: ", "Pascal VOC: "):
        assert name in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"Data set folder .*nowhere does not exist"):
        find_layout(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"labels\.json: expected a data set folder"):
        find_layout(tmp_path / "labels.json")


@pytest.mark.parametrize(
    ("make", "path", "name"),
    [
        (coco2017, "data/annotations", "data has the layout of COCO 2017"),
        (roboflow, "data/train", "data has the layout of Roboflow COCO"),
        (yolo_roboflow, "data/train/images", "data has the layout of YOLO"),
        (voc, "data/JPEGImages", "data has the layout of Pascal VOC"),
        (voc, ".", "data has the layout of Pascal VOC"),
        (coco2017, "..", "data has the layout of COCO 2017"),
    ],
)
def test_a_nearby_data_set_is_suggested(tmp_path, make, path, name):
    make(tmp_path / "top/data")
    with pytest.raises(
        ValueError, match=rf"has no known layout of a data set\. Folder .*/top/{name} .* use it instead"
    ):
        find_layout(tmp_path / "top" / path)


def test_an_annotation_file_is_refused_as_folder(tmp_path):
    coco2017(tmp_path)
    with pytest.raises(ValueError, match="--images and --annotations take a folder and a file in COCO's format"):
        find_layout(tmp_path / "annotations/instances_train2017.json")


def test_two_layouts_in_one_folder_are_an_error(tmp_path):
    roboflow(tmp_path)
    yolo_roboflow(tmp_path)
    with pytest.raises(ValueError, match=r"Roboflow COCO \(train/_anno.* and YOLO \(data\.yaml\)"):
        find_layout(tmp_path)


def test_yolo_boxes_refer_to_the_upright_image(tmp_path):
    yolo_roboflow(tmp_path)
    draw(tmp_path / "train/images/turned.jpg", orientation=6)
    write(tmp_path / "train/labels/turned.txt", "\ufeff0 0.5 0.5 0.25 0.5\n\n")
    annotations = find_layout(tmp_path).splits["train"].read()
    assert annotations.sizes.tolist() == [[60, 80], [60, 80], [80, 60]]
    assert annotations.categories == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    assert boxes_of(annotations) == [
        ("a.jpg", "dog", [30, 15, 20, 30]),
        ("a.jpg", "cat", [4, 9, 8, 6]),
        ("turned.jpg", "cat", [22.5, 20, 15, 40]),
    ]
    assert (annotations.image_ids.tolist(), annotations.ids.tolist()) == ([1, 2, 3], [1, 2, 3])
    assert annotations.areas.round(9).tolist() == [600, 48, 600]


@pytest.mark.parametrize(
    ("yaml", "images"),
    [
        ("path: ..\ntrain: here/train/images\nval: here/valid/images\nnames: [cat, dog]", "train/images"),
        ("path: /content/data\ntrain: train/images\nval: valid/images\nnames: {1: dog, 0: cat}", "train/images"),
        ("path: .\ntrain: train\\images\nval: valid/images\ntest:\nnames:\n  0: cat\n  1: dog", "train/images"),
        ("train: [train/images, more/images]\nvalid: valid/images\nnames: [cat, dog]", "."),
        ("train: lists/train.txt\nval: valid/images\nnames: [cat, dog]", "."),
    ],
    ids=["path", "absent path", "windows", "folders", "list"],
)
def test_paths_of_a_yaml_file_are_resolved(tmp_path, yaml, images):
    root = tmp_path / "here"
    yolo_splits(root)
    yolo_splits(root, "more/images", "more/labels")
    write(root / "lists/train.txt", "../train/images/b.jpg\n./../train/images/a.jpg\n\ntrain\\images\\a.jpg\n")
    write(root / "settings.yaml", yaml)
    write(root / "environment.yml", "name: x\ndependencies: [y]\n")
    for source in (root, root / "settings.yaml"):
        layout = find_layout(source)
        assert (layout.name, layout.marker, list(layout.splits)) == ("YOLO", "settings.yaml", ["train", "val"])
    split = layout.splits["train"]
    assert split.images == root / images
    annotations = split.read()
    expected = {
        "train/images": ["a.jpg", "b.jpg"],
        "[": ["train/images/a.jpg", "train/images/b.jpg", "more/images/a.jpg", "more/images/b.jpg"],
        "lists": ["train/images/b.jpg", "train/images/a.jpg", "train/images/a.jpg"],
    }
    key = "train/images" if images != "." else "[" if "more" in yaml else "lists"
    assert list(annotations.names) == expected[key]
    assert annotations.categories == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]


def test_a_missing_image_of_a_list_is_named(tmp_path):
    yolo_splits(tmp_path)
    write(tmp_path / "data.yaml", "train: train.txt\nnames: [cat, dog]")
    write(tmp_path / "train.txt", "train/images/a.jpg\ntrain/images/c.jpg\n")
    with pytest.raises(FileNotFoundError, match=r"train\.txt, line 2: image file .*train/images/c\.jpg does not exist"):
        find_layout(tmp_path).splits["train"].read()


@pytest.mark.parametrize("file", ["classes.txt", "labels/classes.txt", "labels/train/classes.txt"])
def test_yolo_without_a_yaml_file_is_detected(tmp_path, file):
    yolo_splits(tmp_path, "images/{}", "labels/{}", ("train", "val"))
    with pytest.raises(ValueError, match="no known layout"):
        find_layout(tmp_path)
    write(tmp_path / file, "cat\ndog\n")
    layout = find_layout(tmp_path)
    assert layout.describe() == f"data: YOLO layout ({file}): train 2 images, val 2"
    assert boxes_of(layout.splits["val"].read())[0] == ("a.jpg", "dog", [30, 15, 20, 30])
    write(tmp_path / "labels/val/classes.txt", "dog\ncat\n")
    with pytest.raises(ValueError, match="list different classes"):
        find_layout(tmp_path)


def test_yolo_without_splits_is_training_data(tmp_path):
    yolo_splits(tmp_path, "images", "labels")
    write(tmp_path / "classes.txt", "cat\ndog\n")
    layout = find_layout(tmp_path)
    assert {name: split.images for name, split in layout.splits.items()} == {"train": tmp_path / "images"}


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("/d/images/train/a.jpg", "/d/labels/train/a.txt"),
        ("/images/d/images/a.b.png", "/images/d/labels/a.b.txt"),
        ("/d/train/a.jpg", "/d/train/a.txt"),
        ("/d/images.jpg", "/d/images.txt"),
        ("/d/my images/a.jpg", "/d/my images/a.txt"),
    ],
)
def test_label_paths(image, label):
    assert yolo.label_path(Path(image)) == Path(label)


@pytest.mark.parametrize(
    ("line", "box"),
    [
        ("1 0.25 0.5 0.75 0.5 0.5 1", [20, 30, 40, 30]),
        ("1 0.25 0.5 0.5 0.5 0.5 1 0.25 1", [20, 30, 20, 30]),
        ("1.0 5e-1 .5 1.004 1", [-0.16, 0, 80.32, 60]),
    ],
)
def test_polygons_and_rounded_numbers_become_boxes(tmp_path, line, box):
    yolo_roboflow(tmp_path)
    write(tmp_path / "train/labels/a.txt", f"0 0.5 0.5 1 1\n{line}\n")
    annotations = find_layout(tmp_path).splits["train"].read()
    assert boxes_of(annotations) == [("a.jpg", "cat", [0, 0, 80, 60]), ("a.jpg", "dog", box)]


def test_points_of_poses_are_not_polygons(tmp_path):
    yolo_roboflow(tmp_path)
    with (tmp_path / "data.yaml").open("a") as file:
        file.write("kpt_shape: [2, 3]\n")
    for split in ("train", "valid"):
        write(tmp_path / f"{split}/labels/a.txt", "1 0.5 0.5 0.5 0.5 0.1 0.1 2 0.9 0.9 2\n")
    annotations = find_layout(tmp_path).splits["train"].read()
    assert boxes_of(annotations) == [("a.jpg", "dog", [20, 15, 40, 30])]
    write(tmp_path / "train/labels/a.txt", "1 0.5 0.5 0.5 0.5 0.1 0.1 2\n")
    with pytest.raises(
        ValueError, match="line 1: expected a class and cx cy w h, or 11 numbers with points, got 8 numbers"
    ):
        find_layout(tmp_path).splits["train"].read()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.5 0.5", r"expected a class of .*data\.yaml, which has classes 0 to 1, got 2"),
        ("-1 0.5 0.5 0.5 0.5", "which has classes 0 to 1, got -1"),
        ("0.5 0.5 0.5 0.5 0.5", r"which has classes 0 to 1, got 0\.5"),
        ("cat 0.5 0.5 0.5 0.5", "expected numbers, got 'cat 0.5"),
        ("0 0.5 0.5 0.5", "expected a class and cx cy w h, or a polygon .* got 4 numbers"),
        ("0 0.5 0.5 0.5 0.5 0.9", "got 6 numbers. A sixth number may be the score of a detection"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "got 8 numbers"),
        ("0 0.5 0.5 320 0.5", "expected fractions of the image's width and height, from 0 to 1, got 320"),
        ("0 0.5 0.5 0.5 -0.005", "from 0 to 1, got -0.005"),
        ("0 0.5 nan 0.5 0.5", "from 0 to 1, got nan"),
        ("0 0.1 0.1 0.2 0.2 0.3 1.2", r"from 0 to 1, got 1\.2"),
    ],
)
def test_invalid_lines_are_named(tmp_path, line, message):
    yolo_roboflow(tmp_path)
    write(tmp_path / "valid/labels/b.txt", f"0 0.5 0.5 0.5 0.5\n\n{line}\n")
    with pytest.raises(ValueError, match=rf"Label file .*valid/labels/b\.txt, line 3: .*{message}"):
        find_layout(tmp_path).splits["val"].read()


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("names: [a]\ntrain: nowhere\n", r"data\.yaml: train: .* got nowhere\. Searched for .*nowhere"),
        ("names: [a]\n", r"expected paths of images under `train` and `val`, got keys names"),
        ("names: 3\ntrain: train/images\n", r"names: expected a list of names, or names by number, got 3"),
        ("names: {a: b}\ntrain: train/images\n", r"names: expected class numbers from 0 on, got a"),
        ("nc: 3\nnames: [a, b]\ntrain: train/images\n", r"nc is 3, but there are 2 names"),
        ("names: [a, b]\ntrain: {x: y}\n", r"train: expected a path or a list of paths"),
        ("names: [a, b]\nval: valid/images\nvalid: valid/images\n", "val and valid are the same split"),
        ("names: [a, b\n", r"data\.yaml is not YAML: .* line 2"),
        ("names: [a, b]\nkpt_shape: 3\ntrain: train/images\n", "kpt_shape: expected two numbers, got 3"),
    ],
)
def test_invalid_yaml_files_are_named(tmp_path, yaml, message):
    yolo_splits(tmp_path)
    write(tmp_path / "data.yaml", yaml)
    with pytest.raises(ValueError, match=message):
        find_layout(tmp_path)


def test_names_that_yaml_reads_as_other_types_stay_texts(tmp_path):
    yolo_splits(tmp_path)
    write(tmp_path / "data.yaml", "names: [no, 010]\ntrain: train/images\ntest: ~\n")
    assert [c["name"] for c in find_layout(tmp_path).splits["train"].read().categories] == ["no", "010"]


def test_several_yaml_files_are_an_error(tmp_path):
    yolo_splits(tmp_path)
    for name in ("a.yaml", "b.yaml"):
        write(tmp_path / name, "names: [x, y]\ntrain: train/images\n")
    with pytest.raises(ValueError, match=r"more than one YAML file with names of classes: a\.yaml, b\.yaml"):
        find_layout(tmp_path)
    assert find_layout(tmp_path / "b.yaml").marker == "b.yaml"


def test_an_ambiguous_path_is_an_error(tmp_path):
    root = tmp_path / "here"
    yolo_roboflow(root)
    yolo_splits(tmp_path)
    with pytest.raises(ValueError, match=r"train: \.\./train/images could be .* or .*: write an absolute path"):
        find_layout(root)


def test_images_without_label_files_have_no_objects(tmp_path, caplog):
    yolo_roboflow(tmp_path)
    find_layout(tmp_path).splits["train"].read()
    assert "train: no label file for 1 of 2 images: they have no objects" in caplog.text
    (tmp_path / "train/labels/a.txt").unlink()
    with pytest.raises(
        ValueError, match=r"none of 2 images has a label file\. .*a\.jpg is expected at .*labels/a\.txt"
    ):
        find_layout(tmp_path).splits["train"].read()
    draw(tmp_path / "test/images/a.jpg")
    assert not find_layout(tmp_path).splits["test"].read().is_annotated
    write(tmp_path / "test/labels/a.txt", "")
    annotations = find_layout(tmp_path).splits["test"].read()
    assert (annotations.is_annotated, len(annotations.boxes)) == (True, 0)
    (tmp_path / "test/images/a.jpg").unlink()
    with pytest.raises(ValueError, match="test: there are no images in"):
        find_layout(tmp_path).splits["test"].read()


def test_voc_counts_pixels_from_1(tmp_path):
    voc(tmp_path)
    part = "<part><name>head</name><bndbox><xmin>0</xmin><ymin>0</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>"
    write_voc(
        tmp_path / "Annotations/a.xml",
        voc_object("cat", 11, 21, 30, 60).replace("</object>", f"{part}</object>"),
        voc_object("ant", "45.70000076", 5, 45.75, 5, difficult=1),
        size="",
    )
    layout = find_layout(tmp_path)
    annotations = layout.splits["train"].read()
    assert boxes_of(annotations) == [
        ("a.jpg", "cat", [10, 20, 20, 40]),
        ("a.jpg", "ant", [44.70000076, 4, 1.04999924, 1]),
        ("b.jpg", "dog", [0, 0, 80, 60]),
    ]
    # All classes of both splits, and the size from the image if the file gives none.
    categories = [{"id": 1, "name": "ant"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}]
    assert annotations.categories == layout.splits["val"].read().categories == categories
    assert annotations.sizes.tolist() == [[60, 80], [60, 80]]
    assert layout.describe().endswith(
        "pixels count from 1, both corners in the box; objects marked difficult: 1, used like all others"
    )


def test_voc_counts_pixels_from_0_if_a_corner_is_0(tmp_path):
    voc(tmp_path)
    write_voc(tmp_path / "Annotations/a.xml", voc_object("dog", 10, 20, 30, 60))
    # The corner at 0 is in the other split.
    write_voc(tmp_path / "Annotations/c.xml", voc_object("dog", 0, 20, 80, 60))
    layout = find_layout(tmp_path)
    assert boxes_of(layout.splits["train"].read())[0] == ("a.jpg", "dog", [10, 20, 20, 40])
    assert boxes_of(layout.splits["val"].read()) == [("c.jpg", "dog", [0, 20, 80, 40])]
    assert layout.describe().endswith("pixels count from 0, as some corners are below 1")


@pytest.mark.parametrize(
    ("annotations", "images"),
    [("{}", "{}"), ("annotations", "images"), ("Annotations", "Images"), ("{}/annotations", "{}/images"), (".", ".")],
)
def test_folders_of_xml_files_are_detected(tmp_path, annotations, images):
    splits = ("train", "valid", "test") if "{}" in images else ("",)
    for split in splits:
        draw(tmp_path / images.format(split) / f"a{split}.PNG")
        draw(tmp_path / images.format(split) / "without.png")
        write_voc(tmp_path / annotations.format(split) / f"a{split}.xml", voc_object("dog", 1, 2, 3, 4))
    layout = find_layout(tmp_path)
    assert (layout.name, list(layout.splits)) == ("Pascal VOC", ["train", "val", "test"][: len(splits)])
    for split in layout.splits.values():
        (row,) = boxes_of(split.read())
        assert row[1:] == ("dog", [0, 1, 3, 3])
        assert (split.images / row[0]).is_file()


def test_images_without_xml_files_are_counted(tmp_path, caplog):
    voc(tmp_path)
    (tmp_path / "ImageSets/Main/train.txt").rename(tmp_path / "ImageSets/Main/other.txt")
    (tmp_path / "ImageSets/Main/val.txt").rename(tmp_path / "ImageSets/Main/trainval.txt")
    assert len(find_layout(tmp_path).splits["train"].read()) == 1
    assert not caplog.records
    (tmp_path / "ImageSets/Main/trainval.txt").unlink()
    draw(tmp_path / "JPEGImages/d.jpg")
    assert len(find_layout(tmp_path).splits["train"].read()) == 3
    assert "no XML file for 1 of 4 images: they are left out" in caplog.text


def test_the_image_of_an_xml_file_has_its_name(tmp_path):
    voc(tmp_path)
    draw(tmp_path / "JPEGImages/a.png")
    with pytest.raises(ValueError, match=r"a\.xml: its image is a\.jpg or a\.png in"):
        find_layout(tmp_path).splits["train"].read()
    write_voc(tmp_path / "Annotations/a.xml", filename="a.png")
    assert list(find_layout(tmp_path).splits["train"].read().names) == ["a.png", "b.jpg"]
    write_voc(tmp_path / "Annotations/b.xml", filename="elsewhere.jpg")
    (tmp_path / "JPEGImages/b.jpg").rename(tmp_path / "JPEGImages/elsewhere.jpg")
    assert list(find_layout(tmp_path).splits["train"].read().names) == ["a.png", "elsewhere.jpg"]
    (tmp_path / "JPEGImages/elsewhere.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.xml: its image does not exist: expected b\.\* in .*JPEGImages"):
        find_layout(tmp_path).splits["train"].read()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation>", "is not XML: no element found"),
        ("<html/>", r"expected the element <annotation>, got <html>"),
        (XML.format(filename="", size="", objects="<object/>"), "object 1: has no name"),
        (
            XML.format(filename="", size="", objects="<object><name>x</name></object>"),
            r"object 1 \(x\): bndbox: expected",
        ),
        (XML.format(filename="", size="", objects=voc_object("x", 1, 2, "nan", 4)), "got 1, 2, nan, 4"),
        (
            XML.format(filename="", size="", objects=voc_object("x", 9, 2, 8, 4)),
            "expected xmin ≤ xmax .* got 9, 2, 8, 4",
        ),
        (XML.format(filename="", size=SIZE.replace("60", "6x"), objects=""), "size: expected .* got '6x'"),
        ('<?xml version="1.0" encoding="none"?><annotation/>', "is not XML: unknown encoding"),
        ('<?xml version="1.0" encoding="Shift_JIS"?><annotation>あ', "is not XML: .*can't decode byte 0x82"),
        (
            '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]>'
            + XML.format(filename="", size="", objects=voc_object("&x;", 1, 2, 3, 4)),
            "is not XML: undefined entity &x;",
        ),
        (
            '<!DOCTYPE a [<!ENTITY a "0123456789">'
            + "".join(f'<!ENTITY {n} "{f"&{p};" * 10}">' for p, n in zip("abcdefgh", "bcdefghi", strict=True))
            + "]>"
            + XML.format(filename="", size="", objects=voc_object("&i;", 1, 2, 3, 4)),
            "is not XML: limit on input amplification",
        ),
    ],
    ids=[
        "cut",
        "other",
        "no name",
        "no box",
        "nan",
        "order",
        "size",
        "encoding",
        "bytes",
        "external entity",
        "large entity",
    ],
)
def test_invalid_xml_files_are_named(tmp_path, content, message):
    voc(tmp_path)
    write(tmp_path / "Annotations/a.xml", content)
    with pytest.raises(ValueError, match=rf"Annotation file .*a\.xml.*{message}"):
        find_layout(tmp_path).splits["val"].read()


@pytest.mark.parametrize(("encoding", "name"), [("GBK", "狗"), ("shift_jis", "犬"), ("ISO-8859-1", "bâton")])
def test_xml_files_in_other_encodings_are_read(tmp_path, encoding, name):
    voc(tmp_path)
    text = XML.format(filename="", size=SIZE, objects=voc_object(name, 1, 1, 2, 2))
    (tmp_path / "Annotations/c.xml").write_bytes(f"<?xml version='1.0' encoding='{encoding}'?>{text}".encode(encoding))
    assert boxes_of(find_layout(tmp_path).splits["val"].read()) == [("c.jpg", name, [0, 0, 2, 2])]


def test_a_missing_xml_file_of_a_list_is_named(tmp_path):
    voc(tmp_path)
    write(tmp_path / "ImageSets/Main/val.txt", "absent\n")
    with pytest.raises(FileNotFoundError, match=r"Annotation file .*absent\.xml does not exist"):
        find_layout(tmp_path).splits["val"].read()
    write(tmp_path / "ImageSets/Main/val.txt", "\n")
    with pytest.raises(ValueError, match="there are no XML files of the split 'val'"):
        find_layout(tmp_path).splits["val"].read()


def test_a_detected_data_set_gives_targets(tmp_path):
    yolo_roboflow(tmp_path)
    draw(tmp_path / "train/images/turned.jpg", orientation=6)
    write(tmp_path / "train/labels/turned.txt", "0 0.5 0.25 0.25 0.5\n")
    split = find_layout(tmp_path).splits["train"]
    dataset = CocoDetection(split.images, split.read(), EvalTransform(PRESETS["conditional-detr-tiny"]))
    assert [category["name"] for category in dataset.classes] == ["cat", "dog"]
    # Fractions of the upright image, as in the label files.
    targets = [dataset[index][1] for index in range(3)]
    expected = [[[0.5, 0.5, 0.25, 0.5], [0.1, 0.2, 0.1, 0.1]], [], [[0.5, 0.25, 0.25, 0.5]]]
    for target, boxes in zip(targets, expected, strict=True):
        torch.testing.assert_close(target["boxes"], torch.tensor(boxes).reshape(-1, 4))
    assert [target["labels"].tolist() for target in targets] == [[1, 0], [], [0]]


def test_detected_annotations_convert_to_coco(tmp_path):
    yolo_roboflow(tmp_path)
    annotations = find_layout(tmp_path).splits["train"].read()
    assert annotations.boxes.dtype == np.float64
    content = annotations.to_coco()
    assert [image["file_name"] for image in content["images"]] == ["a.jpg", "b.jpg"]
    assert [entry["image_id"] for entry in content["annotations"]] == [1, 1]
    assert annotations.select(np.array([1])).to_coco()["annotations"] == []
