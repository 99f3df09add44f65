"""Attention maps of the decoder, taken from any model while it runs.

Source: figures 1 and 3 of the Conditional DETR paper.
"""

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from conddetr.kernels.attn import attention_weights, dense_spatial_keys
from conddetr.model.detr import DETR
from conddetr.model.transformer import ConditionalCrossAttention
from conddetr.viz.boxes import draw_boxes


@torch.no_grad()
def attention_maps(model: DETR, image: Tensor) -> tuple[dict, Tensor]:
    """Run a model on one image and take the weights of every cross-attention.

    Args:
        model: either family; put into eval mode.
        image: [3, H, W] normalised, on the model's device.

    Returns:
        The model's output, and attention weights [L, heads, Q, h, w] over the feature map, float, on the CPU;
        each map sums to 1.
    """
    model.eval()
    layers = model.transformer.decoder.layers
    modules = [layer.multihead_attn if model.config.family == "detr" else layer.cross_attn for layer in layers]
    maps: list[Tensor] = []
    shapes: list[torch.Size] = []
    hooks = [module.register_forward_hook(_record(maps), with_kwargs=True) for module in modules]
    hooks.append(model.backbone.register_forward_hook(lambda *call: shapes.append(call[-1].shape[-2:])))
    try:
        output = model([image])
    finally:
        for hook in hooks:
            hook.remove()
    return output, torch.stack(maps).unflatten(-1, tuple(shapes[0])).cpu()


def _record(maps: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if isinstance(module, ConditionalCrossAttention):
            q_content, q_spatial, keys, grid = args
            k_spatial = dense_spatial_keys(*keys.spatial) if isinstance(keys.spatial, tuple) else keys.spatial
            query = torch.cat([module.split(q_content), module.split(q_spatial)], dim=-1)
            key = torch.cat([module.split(keys.content), module.split(k_spatial)], dim=-1)
            weights = attention_weights(query, key, grid.padding, query.shape[-1] ** -0.5)
        else:
            # Not module(...): that would run this hook again.
            options = {**kwargs, "need_weights": True, "average_attn_weights": False}
            weights = module.forward(*args, **options)[1]
        maps.append(weights[0])

    return hook


def attention_figure(
    image: Tensor,
    ground_truth: tuple[Tensor, Sequence[int], Sequence[str]],
    detections: tuple[Tensor, Sequence[int], Sequence[str]],
    maps: Tensor,
) -> Figure:
    """One row per detected object: the box beside the ground truth, then a map per decoder layer.

    Args:
        image: [3, H, W] float in [0, 1].
        ground_truth: boxes [m, 4] xyxy in pixels, labels, captions.
        detections: boxes [n, 4], labels, captions of the objects to show, n ≥ 1.
        maps: [L, n, h, w] attention of the query behind each of them, averaged over heads.
    """
    boxes, labels, captions = detections
    num_layers = len(maps)
    figure = Figure(figsize=(2.2 * (num_layers + 2), 2.3 * len(boxes)), layout="constrained")
    grid = figure.subplots(len(boxes), num_layers + 2, squeeze=False)
    height, width = image.shape[-2:]
    for row, axes in enumerate(grid):
        draw_boxes(axes[0], image, *ground_truth, title="ground truth")
        one = (boxes[row : row + 1], labels[row : row + 1], captions[row : row + 1])
        draw_boxes(axes[1], image, *one, title="detection")
        for layer in range(num_layers):
            draw_boxes(axes[2 + layer], image, one[0], one[1], [""], title=f"attention, layer {layer + 1}")
            heat = maps[layer, row].numpy()
            extent = (0, width, height, 0)
            axes[2 + layer].imshow(heat, cmap="inferno", alpha=0.65, extent=extent, interpolation="bilinear")
    return figure
