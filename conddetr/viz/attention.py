"""Attention maps of the decoder, recorded from any model while it runs.

Source: figures 1 and 3 of the Conditional DETR paper.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from conddetr.detection import Detection
from conddetr.kernels.attn import attention_weights
from conddetr.model.detr import DETR
from conddetr.model.families.products import Products
from conddetr.model.families.table import PARTS
from conddetr.viz.boxes import draw_boxes
from conddetr.viz.fonts import lettering

KINDS = ("spatial", "content", "combined")
"""The three maps of a head, in storage and drawing order."""


@dataclass(frozen=True)
class AttentionMaps:
    """Where the cross-attention of one decoder layer looks."""

    weights: Tensor
    """[3, Q, heads, h, w] float32 on the CPU, over the feature map: softmax of the spatial product alone, of the
    content product alone, and of their sum, as in the model. Each map sums to 1."""
    formulas: tuple[str, str]
    """The spatial and the content product in the paper's notation, in matplotlib's math text."""
    layer: int
    """Index of the decoder layer, from 0."""
    cell: tuple[float, float]
    """Height and width of a cell of the feature map as fractions of the image."""


@torch.no_grad()
def attention_maps(model: DETR, image: Tensor, layer: int = -1) -> tuple[dict, AttentionMaps]:
    """Run a model on one image and return where one decoder layer looks.

    The products are computed from the inputs of the cross-attention, so they do not depend on its kernels. Each
    family's products are in its folder of `conddetr.model.families`.

    Args:
        model: of either family; is set to eval mode.
        image: [3, H, W] normalised, on the model's device.
        layer: decoder layer, from 0; negative: from the end.

    Returns:
        The model's output, and the maps of all queries.

    Raises:
        ValueError: the layer does not exist.
    """
    layers = model.transformer.decoder.layers
    if not -len(layers) <= layer < len(layers):
        raise ValueError(f"layer: expected 0 to {len(layers) - 1}, or negative from the end, got {layer}.")
    layer %= len(layers)
    family = PARTS[model.config.family]
    attention = family.cross_attention(layers[layer])
    inputs: list[tuple] = []
    features: list[Tensor] = []
    hooks = [
        attention.register_forward_hook(lambda module, args, output: inputs.append(args)),
        model.backbone.register_forward_hook(lambda module, args, output: features.append(output)),
    ]
    model.eval()
    try:
        output = model([image])
    finally:
        for hook in hooks:
            hook.remove()
    products = family.products(layers[layer], *inputs[0])
    weights = _weights(products, model.config.num_heads)
    weights = weights.unflatten(-1, tuple(features[0].shape[-2:])).cpu()
    stride = model.backbone[0].stride
    cell = (stride / image.shape[-2], stride / image.shape[-1])
    return output, AttentionMaps(weights, products.formulas, layer, cell)


def _weights(products: Products, num_heads: int) -> Tensor:
    """The three maps of all queries, [3, Q, heads, N]."""
    q_spatial, k_spatial, q_content, k_content = (part.float().unflatten(-1, (num_heads, -1)) for part in products[:4])
    both = torch.cat([q_spatial, q_content], dim=-1), torch.cat([k_spatial, k_content], dim=-1)
    pairs = ((q_spatial, k_spatial), (q_content, k_content), both)
    return torch.cat([attention_weights(query, key, None, products.scale) for query, key in pairs]).transpose(1, 2)


def attention_figure(image: Tensor, detections: Detection, index: int, maps: AttentionMaps) -> Figure:
    """The paper's figure for one detection: rows of spatial, content and combined maps, one column per head.

    A map's colour scale ends at its own peak, or at four times the uniform weight if the peak is lower, so that a flat
    map looks flat. The number in its corner is the peak as a multiple of the uniform weight.

    Args:
        image: [3, H, W] uint8 or float in [0, 1].
        detections: detections in that image.
        index: of the detection to show.
        maps: from `attention_maps`, of the same image.
    """
    query, box, caption = int(detections.queries[index]), detections.boxes[index], detections.captions[index]
    weights = maps.weights[:, query]
    heads = weights.shape[1]
    aspect = min(max(image.shape[-2] / image.shape[-1], 0.4), 2.0)
    figure = Figure(figsize=(1.4 * (heads + 2.8), 1.4 * 3 * aspect + 0.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    [name], families = lettering([caption])
    title = f"{name} · query {query} · decoder layer {maps.layer}"
    figure.suptitle(title, fontsize=11, family=families, parse_math=False)
    grid = figure.add_gridspec(3, heads + 1, width_ratios=[2.4] + [1.0] * heads)
    draw_boxes(figure.add_subplot(grid[:, 0]), image, box[None], [int(detections.labels[index])], [caption])
    for row, (kind, formula) in enumerate(zip(KINDS, (*maps.formulas, "sum of both"), strict=True)):
        for head in range(heads):
            axes = figure.add_subplot(grid[row, head + 1])
            draw_map(axes, image, box, weights[row, head], maps.cell)
            if row == 0:
                axes.set_title(f"head {head}", fontsize=9)
            if head == 0:
                axes.set_ylabel(f"{kind}\n{formula}", fontsize=9)
    return figure


def draw_map(axes: Axes, image: Tensor, box: Tensor, weights: Tensor, cell: tuple[float, float]) -> None:
    """Draw one map [h, w] over the grey image, with the box.

    The receptive field of cell j is centred at pixel stride · j, because strided convolutions pad symmetrically. The
    cell is drawn there.
    """
    height, width = image.shape[-2:]
    gray = image.float().mean(0)
    # The image is darkened, so that the map stands out. Its maximum is 0 if it is black.
    axes.imshow(gray.numpy(), cmap="gray", vmin=0, vmax=2.2 * max(float(gray.max()), 1e-6))
    peak, uniform = float(weights.max()), 1 / weights.numel()
    end = max(peak, 4 * uniform)
    # One more cell at the bottom and right, where the last cell ends before the image. matplotlib's smooth
    # interpolation is not used, because it lowers a peak of one cell.
    shade = F.pad(weights[None, None] / end, (0, 1, 0, 1), mode="replicate")
    shade = F.interpolate(shade, scale_factor=8, mode="bicubic")[0, 0].clamp(0, 1)
    (rows, columns), cell_height, cell_width = weights.shape, cell[0] * height, cell[1] * width
    extent = (-0.5 * cell_width, (columns + 0.5) * cell_width, (rows + 0.5) * cell_height, -0.5 * cell_height)
    axes.imshow(shade.numpy(), cmap="inferno", vmin=0, vmax=1, alpha=shade.sqrt().numpy(), extent=extent)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    x0, y0, x1, y1 = box.tolist()
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="white", linewidth=1))
    axes.text(
        0.97, 0.03, f"×{peak / uniform:.0f}", transform=axes.transAxes, color="white", fontsize=7,
        horizontalalignment="right", verticalalignment="bottom",
        bbox={"facecolor": "black", "edgecolor": "none", "pad": 1, "alpha": 0.6},
    )  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])
