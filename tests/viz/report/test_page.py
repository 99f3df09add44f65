"""The page of a report: its numbers, escaped names, pictures, and how a real browser shows it."""

import base64
import dataclasses
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from detection_cases import from_annotations, noisy
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import conddetr
from conddetr.data.coco import coco_split
from conddetr.data.synthetic import SyntheticShapes
from conddetr.data.transforms import EvalTransform
from conddetr.engine.coco_metrics import Detections, coco_result
from conddetr.engine.quality import measure_quality
from conddetr.engine.tables import percent
from conddetr.viz.report import check_report_target, report_beside, write_report
from conddetr.viz.report.page import render
from conddetr.viz.report.pictures import MAX_PICTURES, MAX_SIDE, missed_objects, shown_part

pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")

NAMES = ("<script>document.title='run'</script>", "собака & 犬", "triangle")


def detected(truth, seed=0):
    """Detections of shapes with every kind of error."""
    rng = np.random.default_rng(seed)
    parts = [from_annotations(truth["annotations"]) for _ in range(3)]
    scores = rng.random((3, len(parts[0]))).astype(np.float32)
    for part, score, noise in zip(parts, scores, (0.02, 0.2, 0.6), strict=True):
        size = part.boxes[:, 2:].copy()
        part.boxes[:, :2] += rng.normal(0, noise, size.shape) * size
        part.scores = score * (1 - noise)
    wrong = rng.random(len(parts[1])) < 0.3
    parts[1].category_ids[wrong] = rng.integers(1, 4, wrong.sum())
    parts[0] = Detections(*(column[::2] for column in vars(parts[0]).values()))
    return Detections.join(parts)


@pytest.fixture(scope="module")
def shapes():
    """Synthetic shapes with awkward class names."""
    dataset = SyntheticShapes(40, seed=3)
    for category, name in zip(dataset.classes, NAMES, strict=True):
        category["name"] = name
    return dataset


@pytest.fixture(scope="module")
def report(shapes, tmp_path_factory):
    """A report on shapes with every section, and what it was made from."""
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    truth = shapes.ground_truth()
    detections = detected(truth)
    result = coco_result(truth, detections, source="shapes")
    line = write_report(path, result, truth, detections, shapes, {"checkpoint": "runs/<b>best</b>.pt"})
    assert line == f"wrote {path}"
    return path, result, measure_quality(truth, detections)


class Tables(HTMLParser):
    """The texts of all cells, by table and row."""

    def __init__(self, page):
        super().__init__()
        self.tables, self._text = [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._text = self.tables[-1][-1]

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._text = None

    def handle_data(self, data):
        if self._text is not None:
            self._text[-1] += data.strip()


def test_tables_have_the_metrics_the_classes_and_the_matrix(report):
    path, result, quality = report
    metrics, classes, matrix = Tables(path.read_text()).tables
    assert [row[:2] for row in metrics[1:]] == [[name, percent(value)] for name, value in result.metrics.items()]
    assert all(row[2] for row in metrics[1:])
    rows = {
        row.name: [str(row.objects), percent(row.ap), percent(row.ap50), f"{best.threshold:.3f}"]
        + [percent(value) for value in (best.precision, best.recall, best.f1)]
        for row, best in zip(result.per_class, quality.class_best, strict=True)
    }
    assert {name: values for name, *values in classes[1:]} == rows
    assert [float(row[2]) for row in classes[1:]] == sorted((float(row[2]) for row in classes[1:]), reverse=True)
    assert matrix[0] == ["", *NAMES, "missed"]
    assert [row[0] for row in matrix[1:]] == [*NAMES, "background"]
    cells = [[int(cell or 0) for cell in row[1:]] for row in matrix[1:]]
    assert cells == quality.confusion.tolist()
    # The detections have errors of all kinds, so no section is empty.
    assert (quality.confusion.sum(0) > 0).all()


def test_page_names_the_threshold_and_the_kinds_of_errors(report):
    path, _, quality = report
    text = path.read_text()
    assert f"<code>conddetr predict --threshold {quality.best.threshold:.3f}</code>" in text
    for name, count in quality.errors.counts().items():
        assert re.search(rf"<dt>{name}</dt>\s*<dd><div.*>{count}</div>", text), name


def test_page_is_self_contained_and_escapes_every_name(report):
    text = report[0].read_text()
    assert NAMES[0] not in text
    assert html.escape(NAMES[0], quote=False).replace("'", "&#39;") in text
    assert "runs/&lt;b&gt;best&lt;/b&gt;.pt" in text
    assert "собака &amp; 犬" in text
    assert not re.findall(r"https?:|<link|@import|url\(", text)
    assert set(re.findall(r'(?:src|href)="([^"]{0,10})', text)) <= {"data:image"} | {
        link[:10] for link in re.findall(r'href="(#[a-z]+)"', text)
    }


def test_same_detections_give_the_same_bytes(report, shapes, tmp_path):
    path, result, _ = report
    truth = shapes.ground_truth()
    write_report(tmp_path / "again.html", result, truth, detected(truth), shapes, {"checkpoint": "runs/<b>best</b>.pt"})
    assert (tmp_path / "again.html").read_bytes() == path.read_bytes()
    assert path.stat().st_size < 1_000_000


def rendered(truth, detections):
    """A page without pictures."""
    return render(coco_result(truth, detections), measure_quality(truth, detections), {}, [], [])


@pytest.mark.parametrize(("classes", "is_drawn"), [(60, True), (150, False)])
def test_matrix_of_many_classes_is_a_picture_with_a_table_of_confused_pairs(classes, is_drawn):
    truth, _ = noisy(images=80, per_image=0, classes=classes)
    detections = from_annotations(truth["annotations"])
    detections.category_ids[::3] = np.roll(detections.category_ids[::3], 1)
    page, quality = rendered(truth, detections), measure_quality(truth, detections)
    confusion = quality.confusion
    assert page.count("--share:") == (np.count_nonzero(confusion) if is_drawn else 0)
    assert ("</i>each class, IoU 0.5" in page) == is_drawn
    assert ("</i>the 100 classes with most objects, IoU 0.5" in page) != is_drawn
    off_diagonal = confusion[:-1, :-1] - np.diag(np.diag(confusion)[:-1])
    pairs = Tables(page).tables[-1][1:]
    assert [int(row[2]) for row in pairs] == sorted(off_diagonal.flatten().tolist(), reverse=True)[:20]
    names = quality.overlaps.names
    for name, other, count, share in pairs:
        row = names.index(name)
        assert off_diagonal[row, names.index(other)] == int(count)
        assert share == f"{percent(int(count) / quality.objects[row])} %"


def test_page_without_objects_or_right_detections_says_so():
    truth, detections = noisy(images=4, per_image=3, classes=2)
    empty = Detections.join([])
    assert "no detection is right at any of them" in rendered(truth, empty)
    page = rendered({**truth, "annotations": []}, detections)
    assert "there are no objects" in page
    assert "nan" not in page.lower()
    assert "</i>each class, IoU 0.5" in page
    perfect = rendered(truth, from_annotations([a for a in truth["annotations"] if not a["iscrowd"]]))
    assert "No detection is wrong" in perfect
    assert "No object is missed" in perfect


def test_unreadable_images_are_named_and_the_report_is_written(small_coco, tmp_path):
    config = conddetr.config.resolve("conditional-detr-tiny", num_classes=3)
    dataset = coco_split(small_coco.root, "train", EvalTransform(config))
    truth = dataset.ground_truth()
    # Of four images, one is removed and one damaged after the evaluation.
    dataset.path(0).unlink()
    dataset.path(1).write_bytes(b"no image")
    none = Detections.join([])
    path = tmp_path / "report.html"
    line = write_report(path, coco_result(truth, none), truth, none, dataset, {})
    assert line.startswith(f"wrote {path}; 2 of its pictures are missing, first: ")
    text = path.read_text()
    assert text.count("This image cannot be read: ") == 2
    assert text.count("data:image/jpeg") == 2
    assert "0.jpg · id 100" in text


def test_pictures_are_few_small_and_of_different_images(report):
    path, _, quality = report
    wrong, missed = (set(part.tolist()) for part in (quality.errors.wrong, quality.errors.undetected))
    images = (
        len({int(quality.overlaps.images[k]) for k in wrong}),
        len({int(quality.overlaps.object_images[k]) for k in missed}),
    )
    assert min(images) > MAX_PICTURES
    figures = re.findall(r"<figcaption><b>(.*?)</b>(.*?)<small>(.*?)</small>", path.read_text())
    assert len(figures) == 2 * MAX_PICTURES
    scores = [float(title.split()[-1]) for title, _, _ in figures[:MAX_PICTURES]]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(float(quality.overlaps.scores[quality.errors.wrong[0]]), abs=0.005)
    areas = [np.prod([int(n) for n in re.findall(r"\d+(?= )", title)[-2:]]) for title, _, _ in figures[MAX_PICTURES:]]
    assert areas[0] == max(areas)
    for part in (figures[:MAX_PICTURES], figures[MAX_PICTURES:]):
        assert len({image for _, _, image in part}) == MAX_PICTURES


def test_pictures_of_large_images_are_reduced():
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [900, 100, 600, 400], "area": 1, "iscrowd": 0}
    images = [{"id": 1, "file_name": "a.jpg", "height": 1000, "width": 2000}]
    truth = {"images": images, "annotations": [annotation], "categories": [{"id": 1, "name": "cat"}]}
    quality = measure_quality(truth, Detections.join([]))
    [picture] = missed_objects(quality, images, lambda position: torch.zeros(3, 1000, 2000, dtype=torch.uint8))
    # The longest side that is shown is three times the box's, as far as the image reaches at 4 to 3.
    assert (picture.width, picture.height) == (1333, 1000)
    with Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2]))) as drawn:
        assert drawn.size == (MAX_SIDE, MAX_SIDE * 3 // 4)
    # Its centre is at 1200 of 2000 pixels, so the part begins at 533.5, rounded.
    assert picture.boxes[0].box == (900 - 534, 100, 600, 400)


@given(
    st.tuples(*[st.floats(0, 600)] * 2, *[st.floats(1, 700)] * 2),
    st.tuples(st.integers(1, 640), st.integers(1, 640)),
)
def test_shown_part_lies_in_the_image_and_contains_the_box(box, size):
    height, width = size
    x, y = min(box[0], width - 1), min(box[1], height - 1)
    clipped = np.array([x, y, min(box[2], width - x), min(box[3], height - y)])
    top, left, rows, columns = shown_part(clipped, height, width)
    assert min(top, left) >= 0
    assert 1 <= rows <= height - top
    assert 1 <= columns <= width - left
    # Rounding moves an edge by up to a pixel.
    assert left - 1 <= x
    assert x + clipped[2] <= left + columns + 1
    assert top - 1 <= y
    assert y + clipped[3] <= top + rows + 1


def test_only_an_earlier_report_is_replaced(report, tmp_path):
    check_report_target("--report", report[0])
    check_report_target("--report", tmp_path / "new" / "a.html")
    (tmp_path / "notes.html").write_text("<h1>my notes</h1>")
    (tmp_path / "folder.html").mkdir()
    for name, message in (
        ("notes.html", r"--report .*notes\.html: the file exists and is not a report of conddetr: name another file"),
        ("folder.html", r"expected a name for an HTML file, got a folder"),
        ("model.pt", r"expected a name ending in \.html, got 'model\.pt'"),
    ):
        with pytest.raises(ValueError, match=message):
            check_report_target("--report", tmp_path / name)
    assert report_beside(tmp_path / "best.pt") == report_beside(tmp_path) == tmp_path / "report.html"


@dataclasses.dataclass
class Browser:
    """Debian's Chromium without a window and without a network."""

    folder: Path

    def run(self, page: Path, width: int, *flags: str) -> subprocess.CompletedProcess:
        """Load a file; returns what was printed."""
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=2000"]
        command += [f"--user-data-dir={self.folder}", f"--window-size={width},900", *flags, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    def probe(self, page: Path, width: int, *flags: str) -> dict:
        """Values that a script reads from the loaded page."""
        # In a frame, because a window is at least 500 pixels wide.
        text = page.read_text().replace("</body>", f"<script>{PROBE}</script></body>")
        frame = self.folder / "frame.html"
        frame.write_text(
            f'<!doctype html><iframe style="border:0;width:{width}px;height:900px" srcdoc="{html.escape(text)}" '
            'onload="document.documentElement.dataset.probe = contentDocument.documentElement.dataset.probe"></iframe>'
        )
        loaded = self.run(frame, 1200, "--dump-dom", *flags)
        assert "CONSOLE" not in loaded.stderr, loaded.stderr
        return json.loads(html.unescape(re.search(r'<html[^>]* data-probe="([^"]*)"', loaded.stdout)[1]))


PROBE = """
const first = () => [...document.querySelectorAll("table.sortable tbody tr")].map(row => row.cells[1].textContent);
const before = first();
document.querySelectorAll("table.sortable th button")[1].click();
document.documentElement.dataset.probe = JSON.stringify({
  width: innerWidth, needed: document.documentElement.scrollWidth, title: document.title,
  images: [...document.images].map(image => image.naturalWidth),
  broken: [...document.images].filter(image => !image.complete).length,
  headings: [...document.querySelectorAll("h1, h2")].map(heading => heading.textContent),
  background: getComputedStyle(document.body).backgroundColor, before, sorted: first(),
  chart: document.querySelector("svg.chart").getBoundingClientRect().width,
  cut: [...document.querySelectorAll("svg.chart text")]
    .filter(text => text.getBoundingClientRect().right > text.closest("svg").getBoundingClientRect().right)
    .map(text => text.textContent),
});
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if shutil.which("chromium") is None:
        pytest.skip("chromium is not installed (Debian: apt install chromium)")
    return Browser(tmp_path_factory.mktemp("browser"))


@pytest.mark.parametrize(("width", "is_dark"), [(390, True), (1100, False)], ids=["phone", "desktop"])
def test_browser_shows_the_whole_page_without_errors(report, browser, width, is_dark):
    path, _, _ = report
    scheme = f"--blink-settings=preferredColorScheme={0 if is_dark else 1}"
    values = browser.probe(path, width, scheme)
    assert values["width"] == width
    assert values["needed"] <= width, "the page scrolls sideways"
    assert len(values["images"]) == 2 * MAX_PICTURES
    assert all(0 < image <= MAX_SIDE for image in values["images"])
    assert values["broken"] == 0
    assert 300 < values["chart"] < width
    assert values["headings"][0] == "Quality of a detector"
    assert len(values["headings"]) == 9
    # The class name's script did not run.
    assert values["title"] == "Quality of runs/<b>best</b>.pt"
    channels = [int(value) for value in re.findall(r"\d+", values["background"])]
    assert (max(channels) < 60) == is_dark
    assert values["sorted"] == sorted(values["before"], key=int, reverse=True)


def test_long_numbers_at_the_end_of_an_axis_are_not_cut(browser, tmp_path):
    """The scores of a short training are low, so the axis of thresholds ends at 0.08."""
    truth, detections = noisy(images=4, per_image=9, classes=2)
    detections.scores *= 0.07 / detections.scores.max()
    (tmp_path / "low.html").write_text(rendered(truth, detections))
    assert ">0.08</text>" in (tmp_path / "low.html").read_text()
    assert browser.probe(tmp_path / "low.html", 1100)["cut"] == []


@pytest.mark.parametrize("width", [390, 1100])
def test_browser_draws_a_picture_of_the_page(report, browser, width, tmp_path):
    browser.run(report[0], width, f"--screenshot={tmp_path / 'page.png'}")
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (width, 900)
        # Text, tiles and curves have more colours than an empty page.
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
