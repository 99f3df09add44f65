"""Boxes drawn on images in matplotlib figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from conddetr.data.images import MEAN, STD
from conddetr.files import atomic_file
from conddetr.viz.fonts import lettering


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
        captions: one text per box, drawn literally; empty: no caption.
        title: above the image.
    """
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set_axis_off()
    (title, *captions), families = lettering([title, *captions])
    if title:
        axes.set_title(title, fontsize=9, family=families, parse_math=False)
    palette = colormaps["tab10"]
    for box, label, caption in zip(boxes.tolist(), labels, captions, strict=True):
        color = palette(int(label) % 10)
        x0, y0, x1, y1 = box
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=1.5))
        if caption:
            # Above the box, or inside it if there is no room above. The edge ends the number of a caption that partly
            # covers another.
            side = "bottom" if y0 > 0.08 * image.shape[1] else "top"
            axes.text(
                max(x0, 0), y0, caption, fontsize=7, family=families, parse_math=False, color="white",
                verticalalignment=side, clip_on=True,
                bbox={"facecolor": color, "edgecolor": "white", "linewidth": 0.6, "pad": 1, "alpha": 0.9},
            )  # fmt: skip


def denormalize(image: Tensor) -> Tensor:
    """Convert the model's input [3, H, W] back to RGB in [0, 1]."""
    mean, std = image.new_tensor(MEAN)[:, None, None], image.new_tensor(STD)[:, None, None]
    return (image * std + mean).clamp(0, 1)


def save_figure(figure: Figure, path: str | Path, dpi: int = 110, marks: Mapping[str, str] | None = None) -> Path:
    """Write a figure as PNG and create its folder; returns the path. The file is complete or does not exist.

    Args:
        marks: texts to store in the file, by PNG keyword.
    """
    with atomic_file(path) as partial:
        FigureCanvasAgg(figure).print_figure(partial, dpi=dpi, format="png", metadata=marks)
    return Path(path)
