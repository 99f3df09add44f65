"""Comparison of a file's outputs with the model's."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert

from conddetr.export.files import Runner
from conddetr.model.detr import DETR
from conddetr.model.postprocess import postprocess

Difference = dict[str, float]
"""Output → largest absolute difference; scores from 0 to 1, boxes in fractions of the image."""

_APART = 1e6
"""Difference of detections with different labels."""


class Tolerance(NamedTuple):
    """Largest absolute differences that the check accepts."""

    logits: float
    others: float
    """Of scores, and of boxes in fractions of the image."""


def shapes_to_check(size: tuple[int, int] | None, stride: int, image_size: int) -> list[tuple[int, ...]]:
    """Batches of one and of several images; if the size is free, sizes that no tile divides, and the usual one."""
    if size:
        return [(1, 3, *size), (3, 3, *size)]
    return [(1, 3, 2 * stride, 7 * stride + 1), (3, 3, 6 * stride - 1, 4 * stride), (1, 3, image_size, image_size)]


@torch.no_grad()
def check(
    model: DETR, run: Runner, shapes: Sequence[tuple[int, ...]], tolerance: Tolerance, top_k: int | None, runtime: str
) -> float:
    """Compare a file with the model on noise images; returns the largest difference.

    Args:
        model: the float32 model in plain PyTorch.
        run: runs the file.
        shapes: of the batches.
        tolerance: see `Tolerance`.
        top_k: number of detections; None: the file returns logits and boxes.
        runtime: for the message.

    Raises:
        FloatingPointError: an output differs by more than the tolerance, or is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for shape in shapes:
        images = torch.randn(shape, generator=generator, dtype=torch.float32)
        output = model(images)
        if top_k is None:
            expected = {"logits": output["pred_logits"], "boxes": output["pred_boxes"]}
            pairs = zip(expected, run(images), strict=True)
            differences = {name: float((actual - expected[name]).abs().max()) for name, actual in pairs}
        else:
            sizes = torch.randint(100, 1000, (len(images), 2), generator=generator)
            detections = run(images, sizes)
            differences = compare_detections(
                output, sizes, detections, top_k, model.config.activation, tolerance.others
            )
        for name, difference in differences.items():
            allowed = tolerance.logits if name == "logits" else tolerance.others
            # Not `difference > allowed`, which is false for NaN.
            if not difference <= allowed:
                raise FloatingPointError(
                    f"The exported {name}, run by {runtime}, differ from the model's by {difference:.3g} on images of "
                    f"shape {shape}, at most {allowed:g} is allowed; nothing was written."
                )
            largest = max(largest, difference)
    return largest


def compare_detections(
    output: dict[str, Tensor],
    sizes: Tensor,
    detections: Sequence[Tensor],
    top_k: int,
    activation: str,
    tolerance: float,
) -> Difference:
    """Compare a file's detections with those of `conddetr.postprocess`, as sets.

    Rounding may exchange detections with nearly equal scores, also the last one with a candidate that is left out. So
    every detection is assigned to a different candidate of the model with the same label. Candidates are all whose
    score reaches the score of the model's last detection, up to the tolerance. The assignment has the smallest
    differences.

    Args:
        output: of the model.
        sizes: [B, 2] height and width in pixels.
        detections: scores [B, K], labels [B, K] and boxes [B, K, 4].
        top_k: expected number of detections, at most all candidates.
        activation: of the logits.
        tolerance: of scores.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in detections):
        return {"detections": float("nan")}
    expected = postprocess(output, sizes, top_k, activation)
    difference = 0.0
    for image, (height, width) in enumerate(sizes.tolist()):
        scores, labels, boxes = (tensor[image].numpy() for tensor in detections)
        if len(scores) != len(expected[image]["scores"]) or (np.diff(scores) > 0).any():
            return {"detections": float("nan")}
        least = float(expected[image]["scores"][-1]) - tolerance
        candidates = _candidates(output["pred_logits"][image], activation, least, tolerance)
        corners = box_convert(output["pred_boxes"][image], "cxcywh", "xyxy").numpy()
        # Boxes [k, Q], then candidates [k, c].
        cost = np.abs(boxes[:, None] / np.array([width, height, width, height]) - corners).max(-1)
        cost = np.maximum(cost[:, candidates.queries], np.abs(scores[:, None] - candidates.scores))
        cost[labels[:, None] != candidates.labels] = _APART
        difference = max(difference, float(cost[linear_sum_assignment(cost)].max()))
    return {"detections": difference}


class _Candidates(NamedTuple):
    """Pairs of a query and a class."""

    scores: np.ndarray
    queries: np.ndarray
    labels: np.ndarray


def _candidates(logits: Tensor, activation: str, least: float, tolerance: float) -> _Candidates:
    """Pairs that may be detections, from logits [Q, K]: of at least this score; with softmax each query's best class,
    up to the tolerance.
    """
    scores = logits.sigmoid() if activation == "sigmoid" else logits.softmax(-1)[:, :-1]
    may_be = scores >= least
    if activation == "softmax":
        may_be &= scores >= scores.amax(-1, keepdim=True) - tolerance
    queries, labels = may_be.nonzero(as_tuple=True)
    return _Candidates(scores[queries, labels].numpy(), queries.numpy(), labels.numpy())
