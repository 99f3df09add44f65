"""Boxes drawn on images."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from conddetr.data.images import MEAN, STD
from conddetr.files import atomic_file


def draw_boxes(
    axes: Axes,
    image: Tensor,
    boxes: Tensor,
    labels: Sequence[int],
    captions: Sequence[str],
    title: str = "",
) -> None:
    """Draw an image with boxes on matplotlib axes.

    Args:
        image: [3, H, W], uint8 or float in [0, 1].
        boxes: [n, 4] xyxy in pixels.
        labels: one class index per box; it sets the colour.
        captions: one text per box; empty: none.
        title: above the image.
    """
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set_axis_off()
    if title:
        axes.set_title(title, fontsize=9)
    palette = colormaps["tab10"]
    for box, label, caption in zip(boxes.tolist(), labels, captions, strict=True):
        color = palette(int(label) % 10)
        x0, y0, x1, y1 = box
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=1.5))
        if caption:
            # Above the box, or inside it where there is no room above.
            side = "bottom" if y0 > 0.08 * image.shape[1] else "top"
            axes.text(
                max(x0, 0), y0, caption, fontsize=7, color="white", verticalalignment=side, clip_on=True,
                bbox={"facecolor": color, "edgecolor": "none", "pad": 1, "alpha": 0.9},
            )  # fmt: skip


def denormalize(image: Tensor) -> Tensor:
    """[3, H, W] model input back to RGB in [0, 1]."""
    mean, std = image.new_tensor(MEAN)[:, None, None], image.new_tensor(STD)[:, None, None]
    return (image * std + mean).clamp(0, 1)


def save_figure(figure: Figure, path: str | Path, dpi: int = 110) -> Path:
    """Write a figure as PNG, whole or not at all, creating the folder; returns the path."""
    with atomic_file(path) as partial:
        FigureCanvasAgg(figure).print_figure(partial, dpi=dpi, format="png")
    return Path(path)


def save_detections(
    path: str | Path, image: Tensor, boxes: Tensor, labels: Sequence[int], captions: Sequence[str]
) -> Path:
    """One image with its boxes as a PNG of about the image's size; arguments as `draw_boxes`."""
    height, width = image.shape[-2:]
    scale = max(width, height, 480) / 110
    figure = Figure(figsize=(scale * width / max(width, height), scale * height / max(width, height)))
    draw_boxes(figure.add_axes((0, 0, 1, 1)), image, boxes, labels, captions)
    return save_figure(figure, path)
