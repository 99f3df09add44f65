"""The model as it is exported: a function of tensors, traced by `torch.export`."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from conddetr.model.detr import DETR
from conddetr.model.fused import FusedConvolution
from conddetr.model.postprocess import best_detections

RAW = ("logits", "boxes")
"""Outputs without post-processing."""
DETECTIONS = ("scores", "labels", "boxes")
"""Outputs with post-processing."""
MEANINGS = {
    "images": "[batch, 3, height, width] float32: RGB in [0, 1], minus mean, divided by std",
    "sizes": "[batch, 2] int64: height and width in pixels of the original images, to which boxes are scaled",
    "scores": "[batch, top_k] float32 in [0, 1], best first",
    "labels": "[batch, top_k] int64: position in classes",
}
"""What inputs and outputs are."""

_WITH_WEIGHTS = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
"""Modules that autocast computes in half precision."""


def plain_copy(model: DETR) -> DETR:
    """The model on the CPU, in float32, from plain PyTorch operations, and not fused."""
    with torch.no_grad():
        plain = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    plain.set_backend("eager")
    plain.config = replace(plain.config, aux_loss=False)
    return plain


class Deployed(nn.Module):
    """A model as a function of tensors, its batch norms folded."""

    def __init__(self, model: DETR, precision: str, top_k: int | None) -> None:
        """
        Args:
            model: from `plain_copy`.
            precision: `float32`, or `float16` with heads, norms and positions in float32.
            top_k: number of detections per image; None: no post-processing.
        """
        super().__init__()
        self.model = model.fused(dtype=torch.float16 if precision == "float16" else None)
        self.top_k, self.activation = top_k, model.config.activation
        if precision == "float16":
            _fold_norms(self.model.backbone)
            _store_half(self.model)

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """`images` and, with post-processing, `sizes` as in `MEANINGS` -> the outputs."""
        output = self.model(images)
        logits, boxes = output["pred_logits"], output["pred_boxes"]
        if self.top_k is None or sizes is None:
            return logits, boxes
        return best_detections(logits, boxes, sizes, self.top_k, self.activation)[:3]


def _fold_norms(backbone: nn.Module) -> None:
    """Fold batch norms behind convolutions. onnxscript would do it too, but in float32 beside float16 inputs."""
    for part in [module for module in backbone.modules() if isinstance(module, nn.Sequential)]:
        for index, (conv, norm) in enumerate(pairwise(list(part))):
            if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
                part[index], part[index + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()


def _store_half(model: DETR) -> None:
    """Store the weights in float16 that autocast would cast in each call; heads and reference points stay float32."""
    kept = getattr(model.transformer.decoder, "ref_point_head", None)
    exempt = {id(module) for module in (kept.modules() if kept is not None else ())}
    for part in (model.backbone, model.input_proj, model.transformer):
        for module in part.modules():
            if isinstance(module, _WITH_WEIGHTS) and id(module) not in exempt:
                module.half()
            if isinstance(module, nn.LayerNorm):
                # As autocast does on GPUs; ONNX has no norm with weights of another dtype.
                module.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
            if isinstance(module, (nn.Conv2d, FusedConvolution)) and module.bias is None:
                # PyTorch's exporter would add zeros of float32, which ONNX refuses beside float16.
                module.bias = nn.Parameter(module.weight.new_zeros(len(module.weight)), requires_grad=False)


def trace(
    module: nn.Module, examples: tuple[Tensor, ...], shapes: dict[str, dict[int, str]], stride: int
) -> torch.export.ExportedProgram:
    """Trace a module for all sizes of the named dimensions.

    Args:
        module: takes the examples; evaluated without gradients.
        examples: one tensor for each input.
        shapes: input → axis → name of a free dimension.
        stride: size in pixels of a cell of the feature map.

    Raises:
        ValueError: this PyTorch needs fixed sizes.
    """
    least = {"batch": 1, "height": stride + 1, "width": stride + 1}
    dims: dict[str, torch.export.Dim] = {}
    for name in {name for axes in shapes.values() for name in axes.values()}:
        dims[name] = torch.export.Dim(name, min=least[name])
    dynamic = {key: {axis: dims[name] for axis, name in axes.items()} for key, axes in shapes.items()}
    try:
        with torch.no_grad():
            return torch.export.export(module, examples, dynamic_shapes=dynamic)
    except torch._dynamo.exc.UserError as error:
        # PyTorch 2.11 restricts max pooling of a free size to even or to odd sizes.
        raise ValueError(
            f"PyTorch {torch.__version__} cannot trace this model for any image size: fix the size with size=(H, W), "
            "on the command line --size H W, or use a newer PyTorch."
        ) from error


def description(
    model: DETR, size: tuple[int, int] | None, classes: Sequence[dict[str, Any]], precision: str, top_k: int | None
) -> dict[str, Any]:
    """Metadata for programs that run the file."""
    from conddetr.data.images import MEAN, STD

    config = model.config
    boxes = (
        "[batch, queries, 4] float32: cx, cy, w, h in [0, 1] of the image"
        if top_k is None
        else "[batch, top_k, 4] float32: x1, y1, x2, y2 in pixels of the original image"
    )
    logits = "[batch, queries, classes] float32, before the activation"
    if config.activation == "softmax":
        logits = "[batch, queries, classes + 1] float32, before the activation; the last one is no-object"
    meanings = {**MEANINGS, "logits": logits, "boxes": boxes}
    return {
        "classes": list(classes),
        "activation": config.activation,
        "mean": MEAN,
        "std": STD,
        "size": size,
        "short_side": config.image_size,
        "max_long_side": config.max_image_size,
        "precision": precision,
        "top_k": top_k,
        "inputs": {name: meanings[name] for name in (("images",) if top_k is None else ("images", "sizes"))},
        "outputs": {name: meanings[name] for name in (RAW if top_k is None else DETECTIONS)},
        "config": config.to_dict(),
    }
