"""Post-processing: from the network's output to detections in pixels.

Source: `PostProcess` of the official Conditional DETR (sigmoid) and DETR (softmax) code.
"""

import torch
from torch import Tensor
from torchvision.ops import box_convert


def postprocess(
    outputs: dict, sizes: Tensor | list[tuple[int, int]], top_k: int = 100, activation: str = "sigmoid"
) -> list[dict[str, Tensor]]:
    """Select the best `top_k` detections of every image, best first.

    Args:
        outputs: `pred_logits` [B, Q, K] and `pred_boxes` [B, Q, 4] cxcywh in [0, 1], as the model returns.
        sizes: [B, 2] or list of (height, width) in pixels to which boxes are scaled: the original image.
        top_k: at most this many detections per image.
        activation: `sigmoid` (Conditional DETR: every query × class is a candidate) or `softmax` (DETR: the
            best class of every query is a candidate; the last logit is no-object).

    Returns:
        Per image: `scores` [n] in [0, 1], `labels` [n] int64, `boxes` [n, 4] xyxy in pixels, `queries` [n] int64, the
        object query of each; floats have the dtype of the outputs, at least float32.

    Raises:
        ValueError: batch sizes differ, `top_k` is below 1, or the activation is unknown.
    """
    logits, boxes = (outputs[name].detach() for name in ("pred_logits", "pred_boxes"))
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits, boxes = logits.to(dtype), boxes.to(dtype)
    sizes = torch.as_tensor(sizes, device=boxes.device)
    if tuple(sizes.shape) != (len(logits), 2):
        raise ValueError(f"sizes: expected shape {(len(logits), 2)}, got {tuple(sizes.shape)}.")
    if top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}.")
    if activation not in ("sigmoid", "softmax"):
        raise ValueError(f"activation: expected 'sigmoid' or 'softmax', got {activation!r}.")
    return [
        dict(zip(("scores", "labels", "boxes", "queries"), image, strict=True))
        for image in zip(*best_detections(logits, boxes, sizes, top_k, activation), strict=True)
    ]


def best_detections(
    logits: Tensor, boxes: Tensor, sizes: Tensor, top_k: int, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same as `postprocess` for checked arguments, on tensors alone, so that it can be traced.

    Returns:
        scores [B, n], labels [B, n] int64, boxes [B, n, 4] and queries [B, n] int64.
    """
    if activation == "sigmoid":
        scores, index = logits.sigmoid().flatten(1).topk(min(top_k, logits[0].numel()), dim=1)
        query, labels = index // logits.shape[-1], index % logits.shape[-1]
    else:
        best, best_label = logits.softmax(-1)[..., :-1].max(-1)
        scores, query = best.topk(min(top_k, best.shape[1]), dim=1)
        labels = best_label.gather(1, query)
    height, width = sizes.to(boxes.dtype).unbind(1)
    boxes = box_convert(boxes, "cxcywh", "xyxy").gather(1, query.unsqueeze(-1).expand(-1, -1, 4))
    boxes = boxes * torch.stack([width, height, width, height], dim=1).unsqueeze(1)
    return scores, labels, boxes, query
