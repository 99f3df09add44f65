"""Tables 1, 2 and 3 of the Conditional DETR paper: published and measured figures.

    python benchmarks/tables.py                          # image sizes of CONDDETR_COCO, else of a sample
    python benchmarks/tables.py --weights-dir DIR        # also AP, from checkpoints DIR/<model>-<epochs>.pth

A multiply-add counts as one; only convolutions and matrix products count, including attention's, as in the DETR and
Conditional DETR papers. The count is the forward pass of one image, averaged over validation images resized to a short
side of 800 and a long side of at most 1333. It runs on shapes alone (fake tensors). Published figures are those of the
paper (arXiv 2108.06152).

Writes results/paper/tables.json and, from it, tables.md.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.progress import track
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import conddetr
from conddetr.data.coco import coco_split
from conddetr.data.images import resized_shape
from conddetr.data.transforms import EvalTransform
from conddetr.engine.evaluator import evaluate
from conddetr.kernels import registry
from harness.command import command
from harness.machine import environment
from harness.show import console
from harness.store import RESULTS

SHORT_SIDE, LONG_SIDE = 800, 1333
SAMPLE = (
    "480×640:17 427×640:8 640×480:5 426×640:4 428×640:3 375×500:3 425×640:2 640×427:2 640×426:2 640×586:1 "
    "640×621:1 449×640:1 429×640:1 640×634:1 559×640:1 461×640:1 612×612:1 500×375:1 461×614:1 408×640:1 "
    "424×640:1 423×640:1 432×640:1 640×425:1 500×351:1 640×428:1 511×640:1 240×320:1 333×500:1 640×383:1 "
    "406×640:1 414×640:1 371×640:1 400×640:1 334×500:1"
)
"""Sample of COCO's validation images, as height×width:images."""
COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
Sizes = dict[tuple[int, int], int]


@dataclass(frozen=True)
class Row:
    """A line of a table as the paper prints it."""

    model: str
    epochs: int
    gflops: float
    parameters: int | None
    """In millions."""
    ap: tuple[float, ...]
    """In the order of `COLUMNS`; Table 3 has only AP."""
    measured_as: str = ""
    """Key of `MODELS`; empty: published only."""


def _rows(model: str, gflops: float, parameters: int | None, measured_as: str, *schedules: tuple) -> list[Row]:
    """One row per schedule: (epochs, AP…)."""
    return [Row(model, epochs, gflops, parameters, ap, measured_as) for epochs, *ap in schedules]


_CONDITIONAL_DC5_R50 = ("Conditional DETR-DC5-R50", 195, 44, "conditional-detr-dc5-r50")
_CONDITIONAL_DC5_R101 = ("Conditional DETR-DC5-R101", 262, 63, "conditional-detr-dc5-r101")
_DC5_R50_50, _DC5_R50_108 = (50, 43.8, 64.4, 46.7, 24.0, 47.6, 60.7), (108, 45.1, 65.4, 48.5, 25.3, 49.0, 62.2)
_DC5_R101_50, _DC5_R101_108 = (50, 45.0, 65.5, 48.4, 26.1, 48.9, 62.8), (108, 45.9, 66.8, 49.5, 27.2, 50.3, 63.3)

TABLES: dict[str, list[Row]] = {
    "Table 1: DETR and other single-scale variants, COCO 2017 val": [
        *_rows(
            *("DETR-R50", 86, 41, "detr-r50"),
            (500, 42.0, 62.4, 44.2, 20.5, 45.8, 61.1),
            (50, 34.9, 55.5, 36.0, 14.4, 37.2, 54.5),
        ),
        *_rows(
            *("Conditional DETR-R50", 90, 44, "conditional-detr-r50"),
            (50, 40.9, 61.8, 43.3, 20.8, 44.6, 59.2),
            (75, 42.1, 62.9, 44.8, 21.6, 45.4, 60.2),
            (108, 43.0, 64.0, 45.7, 22.7, 46.7, 61.5),
        ),
        *_rows(
            *("DETR-DC5-R50", 187, 41, "detr-dc5-r50"),
            (500, 43.3, 63.1, 45.9, 22.5, 47.3, 61.1),
            (50, 36.7, 57.6, 38.2, 15.4, 39.8, 56.3),
        ),
        *_rows(*_CONDITIONAL_DC5_R50, _DC5_R50_50, (75, 44.5, 65.2, 47.3, 24.4, 48.1, 62.1), _DC5_R50_108),
        *_rows(
            *("DETR-R101", 152, 60, "detr-r101"),
            (500, 43.5, 63.8, 46.4, 21.9, 48.0, 61.8),
            (50, 36.9, 57.8, 38.6, 15.5, 40.6, 55.6),
        ),
        *_rows(
            *("Conditional DETR-R101", 156, 63, "conditional-detr-r101"),
            (50, 42.8, 63.7, 46.0, 21.7, 46.6, 60.9),
            (75, 43.7, 64.9, 46.8, 23.3, 48.0, 61.7),
            (108, 44.5, 65.6, 47.5, 23.6, 48.4, 63.6),
        ),
        *_rows(
            *("DETR-DC5-R101", 253, 60, "detr-dc5-r101"),
            (500, 44.9, 64.7, 47.7, 23.7, 49.5, 62.3),
            (50, 38.6, 59.7, 40.7, 17.2, 42.2, 57.4),
        ),
        *_rows(*_CONDITIONAL_DC5_R101, _DC5_R101_50, (75, 45.6, 66.5, 48.8, 25.5, 49.7, 63.3), _DC5_R101_108),
        *_rows("Deformable DETR-R50-SS", 78, 34, "deformable-detr-r50-ss", (50, 39.4, 59.6, 42.3, 20.6, 43.0, 55.5)),
        *_rows(
            # Only its pre-training differs; the detector is DETR.
            *("UP-DETR-R50", 86, 41, "detr-r50"),
            (150, 40.5, 60.8, 42.6, 19.0, 44.4, 60.0),
            (300, 42.8, 63.0, 45.3, 20.8, 47.1, 61.7),
        ),
        *_rows(
            *("Deformable DETR-DC5-R50-SS", 128, 34, "deformable-detr-dc5-r50-ss"),
            (50, 41.5, 61.8, 44.9, 24.1, 45.3, 56.0),
        ),
    ],
    "Table 2: multi-scale and higher-resolution detectors, COCO 2017 val": [
        *_rows(
            *("Faster RCNN-FPN-R50", 180, 42, "faster-rcnn-fpn-r50"),
            (36, 40.2, 61.0, 43.8, 24.2, 43.5, 52.0),
            (108, 42.0, 62.1, 45.5, 26.6, 45.5, 53.4),
        ),
        *_rows("Deformable DETR-R50", 173, 40, "deformable-detr-r50", (50, 43.8, 62.6, 47.7, 26.4, 47.1, 58.0)),
        *_rows("TSP-FCOS-R50", 189, None, "", (36, 43.1, 62.3, 47.0, 26.6, 46.8, 55.9)),
        *_rows(
            *("TSP-RCNN-R50", 188, None, ""),
            (36, 43.8, 63.3, 48.3, 28.6, 46.9, 55.7),
            (96, 45.0, 64.5, 49.6, 29.7, 47.7, 58.0),
        ),
        *_rows(*_CONDITIONAL_DC5_R50, _DC5_R50_50, _DC5_R50_108),
        *_rows(
            *("Faster RCNN-FPN-R101", 246, 60, "faster-rcnn-fpn-r101"),
            (36, 42.0, 62.5, 45.9, 25.2, 45.6, 54.6),
            (108, 44.0, 63.9, 47.8, 27.2, 48.1, 56.0),
        ),
        *_rows("TSP-FCOS-R101", 255, None, "", (36, 44.4, 63.8, 48.2, 27.7, 48.6, 57.3)),
        *_rows(
            *("TSP-RCNN-R101", 254, None, ""),
            (36, 44.8, 63.8, 49.2, 29.0, 47.9, 57.1),
            (96, 46.5, 66.0, 51.2, 29.9, 49.7, 59.2),
        ),
        *_rows(*_CONDITIONAL_DC5_R101, _DC5_R101_50, _DC5_R101_108),
    ],
    "Table 3: forms of the conditional spatial query, R50, 50 epochs": [
        Row("CSQ-C", 50, 89.3, None, (37.1,), "csq=C"),
        Row("CSQ-T", 50, 89.5, None, (37.6,), "csq=T"),
        Row("CSQ-P", 50, 89.3, None, (37.8,), "csq=P"),
        Row("CSQ-I", 50, 89.5, None, (40.2,), "csq=I"),
        Row("CSQ", 50, 89.5, None, (40.9,), "conditional-detr-r50"),
    ],
}


@dataclass(frozen=True)
class Measured:
    """Counts of one model."""

    parameters: int | None = None
    gflops: float | None = None
    """For the algorithm as the paper writes it."""
    executed_gflops: float | None = None
    """With the fused kernels and separable spatial keys."""
    decoder_gflops: float | None = None
    """The decoder's part of `gflops`, if it explains a difference."""
    images: int = 0
    """Number of images over which the count is averaged."""
    not_measured: str = ""
    """Why there is no count."""


def count(run: Callable[[], object], module: str = "Global") -> float:
    """Multiply-adds, in 10⁹, of the convolutions and matrix products of a call.

    Args:
        run: the call.
        module: counts only this module: class of the model, then the path in it.
    """
    # Plain attention is two products, which are counted. Fused attention has formulas for some devices only.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return sum(counter.get_flop_counts()[module].values()) / 2e9


def average(passes: Callable[[int, int], object], sizes: Sizes) -> float:
    """Mean over images of `count` of a forward pass, which takes the image's height and width."""
    total = sum(images * count(partial(passes, *size)) for size, images in sizes.items())
    return total / sum(sizes.values())


def size_of(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def interpreted() -> Iterator[None]:
    """Let `triton` run on a CPU. No kernel is launched: the fake implementations return the shapes."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def ours(sizes: Sizes, preset: str, **overrides: str) -> Measured:
    """Counts of a preset of this project."""

    def gflops(backend: str) -> float:
        model = conddetr.build(preset, backend=backend, **overrides).requires_grad_(False)
        return average(lambda height, width: model(torch.empty(1, 3, height, width)), sizes)

    with FakeTensorMode():
        parameters = size_of(conddetr.build(preset, **overrides))
        nominal, executed = gflops("eager"), None
        if preset.startswith("conditional") and registry.HAS_TRITON:
            with interpreted():
                executed = gflops("triton")
    return Measured(parameters, nominal, executed, images=sum(sizes.values()))


def faster_rcnn(sizes: Sizes, backbone: str) -> Measured:
    """Counts of torchvision's model; its second stage has 1000 proposals, the most that it keeps."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    with FakeTensorMode():
        model = FasterRCNN(resnet_fpn_backbone(backbone_name=backbone, weights=None), num_classes=91)
        # In training it keeps more proposals.
        model.requires_grad_(False).eval()
        proposals = torch.empty(model.rpn.post_nms_top_n(), 256, 7, 7)

        def forward(height: int, width: int) -> None:
            # The model's transform pads to multiples of 32.
            image = torch.empty(1, 3, -(-height // 32) * 32, -(-width // 32) * 32)
            model.rpn.head(list(model.backbone(image).values()))
            model.roi_heads.box_predictor(model.roi_heads.box_head(proposals))

        return Measured(size_of(model), average(forward, sizes), images=sum(sizes.values()))


def deformable_detr(sizes: Sizes, **options: object) -> Measured:
    """Counts of HuggingFace's model. It needs values, so it is computed for the smallest and the largest area; between
    these the count is nearly linear."""
    if not (find_spec("transformers") and find_spec("timm")):
        return Measured(not_measured="needs transformers and timm")
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    config = DeformableDetrConfig(
        use_timm_backbone=True, backbone="resnet50", use_pretrained_backbone=False, num_labels=91, **options
    )
    model = DeformableDetrForObjectDetection(config).requires_grad_(False)
    least, greatest = (pick(sizes, key=math.prod) for pick in (min, max))
    images = sum(sizes.values())
    mean_area = sum(n * math.prod(size) for size, n in sizes.items()) / images
    share = (mean_area - math.prod(least)) / max(math.prod(greatest) - math.prod(least), 1)

    def between(module: str) -> float:
        ends = [count(partial(model, pixel_values=torch.rand(1, 3, *size)), module) for size in (least, greatest)]
        return ends[0] + share * (ends[1] - ends[0])

    decoder = between("DeformableDetrForObjectDetection.model.decoder")
    return Measured(size_of(model), between("Global"), decoder_gflops=decoder, images=images)


MODELS: dict[str, Callable[[Sizes], Measured]] = {
    **{name: partial(ours, preset=name) for name in conddetr.presets() if name.endswith(("r50", "r101"))},
    **{f"csq={form}": partial(ours, preset="conditional-detr-r50", csq=form) for form in "CTPI"},
    "faster-rcnn-fpn-r50": partial(faster_rcnn, backbone="resnet50"),
    "faster-rcnn-fpn-r101": partial(faster_rcnn, backbone="resnet101"),
    "deformable-detr-r50": deformable_detr,
    "deformable-detr-r50-ss": partial(deformable_detr, num_feature_levels=1),
    "deformable-detr-dc5-r50-ss": partial(deformable_detr, num_feature_levels=1, dilation=True),
}


def image_sizes(root: str | None) -> Sizes:
    """Resized height and width → number of images, the most frequent first.

    Args:
        root: folder in COCO's 2017 layout; its first 100 validation images are used, as in the DETR paper. None:
            `SAMPLE`.
    """
    if root:
        annotations = json.loads((Path(root) / "annotations" / "instances_val2017.json").read_text(encoding="utf-8"))
        images = sorted(annotations["images"], key=lambda image: image["id"])[:100]
        original = Counter((image["height"], image["width"]) for image in images)
    else:
        parsed = (re.fullmatch(r"(\d+)×(\d+):(\d+)", entry).groups() for entry in SAMPLE.split())
        original = Counter({(int(height), int(width)): int(images) for height, width, images in parsed})
    resized: Counter = Counter()
    for (height, width), images in original.items():
        resized[resized_shape(height, width, SHORT_SIDE, LONG_SIDE)] += images
    return dict(resized.most_common())


def checkpoint(folder: Path, row: Row) -> Path:
    """Path of a row's weights."""
    name = row.model.lower().replace(" ", "-")
    if row.model.startswith("CSQ"):
        name = row.measured_as.replace("csq=", "conditional-detr-r50-csq-")
    return folder / f"{name}-{row.epochs}.pth"


def evaluated(file: Path, coco: str) -> tuple[float, ...]:
    """AP in percent of a checkpoint on COCO's validation images, in the order of `COLUMNS`.

    Raises:
        ValueError: the file is neither ours nor an official one.
    """
    detector = conddetr.Detector.from_checkpoint(file)
    config = detector.model.config
    images = coco_split(coco, "val", EvalTransform(config))
    # As published, in float32. With dilation, padding in a batch costs AP.
    batch_size = 1 if config.dilation else 2
    metrics = evaluate(
        detector.model, detector.classes, images, detector.device, batch_size, precision="float32"
    ).metrics
    return tuple(100 * metrics[name] for name in COLUMNS)


def evaluate_all(folder: Path, coco: str) -> dict[str, tuple[float, ...]]:
    """`<model>, <epochs>` → AP of every row whose weights exist and can be read; each file is evaluated once."""
    by_file: dict[Path, tuple[float, ...]] = {}
    rows = {f"{row.model}, {row.epochs}": checkpoint(folder, row) for rows in TABLES.values() for row in rows}
    for file in sorted(set(rows.values())):
        try:
            if file.exists():
                by_file[file] = evaluated(file, coco)
        except ValueError as error:
            console.print(f"{file} is left out: {error}", highlight=False, soft_wrap=True)
    return {name: by_file[file] for name, file in rows.items() if file in by_file}


def content_of(measured: dict[str, Measured], ap: dict[str, tuple[float, ...]], sizes: Sizes, source: str) -> dict:
    """Content of the result file: everything that `markdown` and `print_tables` show."""
    return {
        "environment": environment(),
        "image sizes": {"from": source, "images": {f"{height}×{width}": n for (height, width), n in sizes.items()}},
        "measured": {name: asdict(counts) for name, counts in measured.items()},
        "measured AP": ap,
        "tables": {title: [asdict(row) for row in rows] for title, rows in TABLES.items()},
    }


def lines_of(content: dict, title: str, most: int = len(COLUMNS)) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of one table, with at most `most` columns of published AP, and as many of measured AP if there
    are any."""
    rows = content["tables"][title]
    names = COLUMNS[:most][: len(rows[0]["ap"])]
    measured_ap = [content["measured AP"].get(f"{row['model']}, {row['epochs']}") for row in rows]
    measured_columns = COLUMNS[:most] if any(measured_ap) else COLUMNS[:1]
    headings = ["model", "epochs", "GFLOPs, paper", "measured", "difference", "executed"]
    headings += ["M parameters, paper", "measured", *names, *(f"{name}, measured" for name in measured_columns)]
    lines = []
    for row, ap in zip(rows, measured_ap, strict=True):
        counts = content["measured"].get(row["measured_as"], {})
        gflops, parameters = counts.get("gflops"), counts.get("parameters")
        lines.append(
            [
                *(row["model"], str(row["epochs"]), f"{row['gflops']:g}", _cell(gflops, "published only")),
                *(difference(gflops, row["gflops"]) or "–", _cell(counts.get("executed_gflops"))),
                "–" if row["parameters"] is None else str(row["parameters"]),
                _cell(parameters and 1e-6 * parameters, "published only"),
                *(f"{value:.1f}" for value in row["ap"][: len(names)]),
                *(_cell(ap and ap[column]) for column in range(len(measured_columns))),
            ]
        )
    return headings, lines


def _cell(value: float | None, absent: str = "–") -> str:
    return absent if value is None else f"{value:.1f}"


def difference(measured: float | None, published: float) -> str:
    """Difference in percent, with its sign; empty: nothing was measured."""
    return "" if measured is None else f"{100 * (measured / published - 1):+.1f} %"


def notes_of(content: dict) -> list[str]:
    """Notes that explain the tables and their differences, with figures."""
    rows = {row["measured_as"]: row for rows in content["tables"].values() for row in rows}

    def differences(*names: str, without: str = "") -> str:
        parts = []
        for name in names:
            counts = content["measured"].get(name, {})
            gflops, subtracted = counts.get("gflops"), counts.get(without) or 0
            parts.append(difference(gflops and gflops - subtracted, rows[name]["gflops"]) or "not measured")
        return " and ".join(parts)

    single_scale = ("deformable-detr-r50-ss", "deformable-detr-dc5-r50-ss")

    sizes = [(*map(int, size.split("×")), images) for size, images in content["image sizes"]["images"].items()]
    area = sum(images * height * width for height, width, images in sizes)
    padded = sum(images * -(-height // 32) * -(-width // 32) * 32**2 for height, width, images in sizes)
    return [
        "GFLOPs: multiply-adds, in 10⁹, of convolutions and matrix products; `executed`: with the Triton kernels, "
        "which project spatial keys as rows and columns instead of cell by cell.",
        f"Faster RCNN: torchvision's; it differs by {differences('faster-rcnn-fpn-r50', 'faster-rcnn-fpn-r101')} "
        f"from the published count. It pads images to multiples of 32, here {difference(padded, area)} of area, and "
        "its second stage has 1000 proposals here, the most that it keeps; the number in the published count is "
        "unknown.",
        "Deformable DETR: HuggingFace's; sampling is not a matrix product and is not counted. The multi-scale "
        f"model differs by {differences('deformable-detr-r50')} from the published count, the single-scale models by "
        f"{differences(*single_scale)}, about their decoders: without these the difference is "
        f"{differences(*single_scale, without='decoder_gflops')} (multi-scale "
        f"{differences('deformable-detr-r50', without='decoder_gflops')}). Presumably the published count of the "
        "single-scale models omits the decoders; this is a guess.",
        "TSP-FCOS and TSP-RCNN: published only; no maintained implementation is known.",
        "UP-DETR: the detector is DETR's; its pre-training is not part of this project.",
    ]


def markdown(content: dict) -> str:
    """The page with all tables."""
    sizes = content["image sizes"]
    images = sum(sizes["images"].values())
    environment = content["environment"]
    page = [
        "# The paper's tables, with measured figures",
        f"Averaged over {images} images of {len(sizes['images'])} sizes, {sizes['from']}. "
        f"Commit {environment['commit']}, torch {environment['torch']}. Written by `benchmarks/tables.py`.",
    ]
    for title in content["tables"]:
        headings, lines = lines_of(content, title)
        rows = ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
        page += [f"## {title}", "\n".join([*rows, *("| " + " | ".join(line) + " |" for line in lines)])]
    reasons: dict[str, list[str]] = {}
    for name, counts in content["measured"].items():
        if counts["not_measured"]:
            reasons.setdefault(counts["not_measured"], []).append(name)
    notes = [*notes_of(content), *(f"{', '.join(names)}: {why}." for why, names in reasons.items())]
    page.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(page) + "\n"


def print_tables(content: dict) -> None:
    """Print all tables."""
    for title in content["tables"]:
        headings, lines = lines_of(content, title, most=1)
        table = Table(title=title)
        for index, heading in enumerate(headings):
            table.add_column(heading, justify="right" if index else "left", no_wrap=not index)
        for line in lines:
            table.add_row(*line)
        console.print(table)


def write(content: dict, folder: Path) -> None:
    """Write `tables.json` and `tables.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "tables.md").write_text(markdown(content), encoding="utf-8")
    console.print(f"wrote {folder / 'tables.json'} and tables.md", highlight=False, soft_wrap=True)


def main(words: list[str]) -> None:
    """Count, evaluate models whose weights exist, print and write."""
    parser = command("tables", __doc__)
    parser.add_argument("--weights-dir", type=Path, metavar="DIR", help="holds <model>-<epochs>.pth; needs COCO")
    options = parser.parse_args(words)
    coco = os.environ.get("CONDDETR_COCO")
    if options.weights_dir and not coco:
        parser.error("--weights-dir: set CONDDETR_COCO to a folder in COCO's 2017 layout")
    sizes = image_sizes(coco)
    source = "the first validation images of the data set" if coco else "a sample of COCO's validation images"
    measured = {name: count_of(sizes) for name, count_of in track(MODELS.items(), "counting", console=console)}
    folder = RESULTS / "paper"
    content = content_of(measured, {}, sizes, source)
    if options.weights_dir:
        # Evaluation takes long: counts are written first, in case it fails.
        write(content, folder)
        content["measured AP"] = evaluate_all(options.weights_dir, coco)
    print_tables(content)
    write(content, folder)
