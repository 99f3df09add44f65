"""Figure 1 of the paper: attention maps of several detectors for the same object, a row per detector.

    python benchmarks/run.py figure1 photo.jpg conditional.pt detr.pt --out runs/figure1.png

For the first detector it shows the best detection, or with --top K the K-th best; for the others the query whose box
overlaps that one most. Checkpoints are ours or official ones.
"""

from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.ops import box_iou

from conddetr import Detector
from conddetr.data.images import read_image
from conddetr.detection import Detection
from conddetr.viz.attention import KINDS, AttentionMaps, draw_map
from conddetr.viz.boxes import draw_boxes, save_figure
from harness.command import command
from harness.show import console


class Shown(NamedTuple):
    """One detector's detections and attention maps for the object that all rows show."""

    detections: Detection
    index: int
    """Index of the object among the detections."""
    maps: AttentionMaps


def same_object(detectors: list[Detector], image: Tensor, top: int, layer: int) -> list[Shown]:
    """Detections of each detector, the one that overlaps the first detector's `top`-th best most, and the maps."""
    shown, reference = [], None
    for detector in detectors:
        detections, maps = detector.attention(image, None, detector.model.config.num_queries, layer)
        if reference is None:
            reference = detections.boxes[top - 1]
        shown.append(Shown(detections, int(box_iou(reference[None], detections.boxes)[0].argmax()), maps))
    return shown


def draw(image: Tensor, titles: list[str], shown: list[Shown], kind: str) -> Figure:
    """A row per detector: the box, then the map of each head."""
    heads = max(row.maps.weights.shape[2] for row in shown)
    aspect = min(max(image.shape[-2] / image.shape[-1], 0.4), 2.0)
    figure = Figure(figsize=(1.5 * (heads + 1), (1.5 * aspect + 0.3) * len(shown) + 0.3), layout="constrained")
    figure.suptitle(f"{kind} attention of each head, decoder layer {shown[0].maps.layer}", fontsize=10)
    grid = figure.subplots(len(shown), heads + 1, squeeze=False)
    for axes, title, row in zip(grid, titles, shown, strict=True):
        _draw_row(axes, image, title, row, KINDS.index(kind))
    return figure


def _draw_row(axes: list[Axes], image: Tensor, title: str, row: Shown, kind: int) -> None:
    detections, index, maps = row
    box, caption = detections.boxes[index], detections.captions[index]
    draw_boxes(axes[0], image, box[None], [int(detections.labels[index])], [caption], title=title)
    axes[0].title.set_fontsize(8)
    weights = maps.weights[kind, int(detections.queries[index])]
    for head, panel in enumerate(axes[1 : len(weights) + 1]):
        draw_map(panel, image, box, weights[head], maps.cell)
        panel.set_title(f"head {head}", fontsize=8)
    # For detectors with fewer heads than others.
    for panel in axes[len(weights) + 1 :]:
        panel.axis("off")


def titles_of(files: list[str]) -> list[str]:
    """Names of the files without extension; with their folders if two are equal."""
    stems = [Path(file).stem for file in files]
    if len(set(stems)) == len(stems):
        return stems
    return [f"{Path(file).absolute().parent.name}/{stem}" for file, stem in zip(files, stems, strict=True)]


def main(words: list[str]) -> None:
    """Draw one figure."""
    parser = command("figure1", __doc__)
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("checkpoints", nargs="+", metavar="FILE", help="checkpoints, one row each")
    parser.add_argument("--kind", choices=KINDS, default="spatial", help="which product; default: spatial")
    parser.add_argument("--top", type=int, default=1, metavar="K", help="the K-th best detection of the first")
    parser.add_argument("--layer", type=int, default=-1, help="decoder layer, from 0; default: the last")
    parser.add_argument("--out", default="runs/figure1.png", metavar="FILE", help="output image")
    options = parser.parse_args(words)
    image = read_image(options.image)
    shown = same_object(
        [Detector.from_checkpoint(file) for file in options.checkpoints], image, options.top, options.layer
    )
    figure = draw(image, titles_of(options.checkpoints), shown, options.kind)
    console.print(f"wrote {save_figure(figure, options.out)}", highlight=False)
