"""The matching cost of all layers and images against the official code, checked before timed."""

import argparse
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from conddetr.kernels import matching_cost, registry
from harness.machine import DEVICE, Run, short_name
from harness.problem import Checked, PerImages, Tensors, least, ours
from harness.result import Result, Work

LAYERS, QUERIES, CLASSES, OBJECTS = 6, 300, 91, 7
ALPHA, GAMMA = 0.25, 2.0
CLASS, BBOX, GIOU = 2.0, 5.0, 2.0
"""Weights of the three terms."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of the matching cost."""

    logits: Tensor
    """[L, B, Q, K]."""
    boxes: Tensor
    """[L, B, Q, 4]."""
    labels: Tensor
    """[B, N]."""
    objects: Tensor
    """[B, N, 4]."""


class Problem(PerImages, Checked[Inputs]):
    """One size: images per step, and the dtype of logits and boxes."""

    @property
    def title(self) -> str:
        size = f"{LAYERS} layers × {self.images} images × {QUERIES} queries × {OBJECTS} objects"
        return f"matching cost, {size}, {short_name(self.dtype)}"

    def make(self) -> Inputs:
        """Logits around the focal prior, and random boxes."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(LAYERS, self.images, QUERIES, CLASSES, generator=generator) - 4.6
        boxes = torch.rand(LAYERS, self.images, QUERIES, 4, generator=generator)
        labels = torch.randint(CLASSES, (self.images, OBJECTS), generator=generator)
        objects = torch.rand(self.images, OBJECTS, 4, generator=generator)
        logits, boxes, objects = (x.to(DEVICE, self.dtype) for x in (logits, boxes, objects))
        return Inputs(logits, boxes, labels.to(DEVICE), objects)

    def implementations(self, inputs: Inputs) -> dict[str, Run]:
        costs = {"official-style": official} | ours(our_cost, registry.OPERATIONS["matching_cost"].backends)
        return {name: partial(cost, inputs) for name, cost in costs.items()}

    def answer(self, run: Run) -> Tensors:
        return {"cost": run()}

    def exact(self, inputs: Inputs) -> Tensors:
        """Computed as in the official code."""
        wide = {name: getattr(inputs, name).double() for name in ("logits", "boxes", "objects")}
        return {"cost": official(replace(inputs, **wide))}

    def work(self) -> Work:
        """Bytes: one logit per pair and all boxes read; the cost written once, in float32."""
        pairs = LAYERS * self.images * QUERIES * OBJECTS
        boxes = 4 * self.images * (LAYERS * QUERIES + OBJECTS)
        return least((pairs + boxes) * self.dtype.itemsize + 4 * pairs)

    @torch.no_grad()
    def measured(self, options: argparse.Namespace) -> Result:
        """As in the base class, without gradients: matching has none."""
        return super().measured(options)


def official(inputs: Inputs) -> Tensor:
    """The cost [L, B, N, Q] as in the official matcher: layer by layer, every query of the batch with every object of
    the batch; then the blocks on the diagonal are kept."""
    labels, objects = inputs.labels.flatten(), inputs.objects.flatten(0, 1)
    layers = []
    for logits, boxes in zip(inputs.logits, inputs.boxes, strict=True):
        p = logits.flatten(0, 1).sigmoid()
        negative = (1 - ALPHA) * p**GAMMA * -(1 - p + 1e-8).log()
        positive = ALPHA * (1 - p) ** GAMMA * -(p + 1e-8).log()
        boxes = boxes.flatten(0, 1)
        giou = generalized_box_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(objects, "cxcywh", "xyxy"))
        cost = BBOX * torch.cdist(boxes, objects, p=1) + CLASS * (positive - negative)[:, labels] - GIOU * giou
        blocks = cost.view(len(logits), QUERIES, len(logits), OBJECTS).diagonal(dim1=0, dim2=2)
        layers.append(blocks.permute(2, 1, 0))
    return torch.stack(layers)


def our_cost(inputs: Inputs, backend: str) -> Tensor:
    """The cost by our operation."""
    counts = torch.full((len(inputs.labels),), OBJECTS, dtype=torch.int32, device=DEVICE)
    weights = {"class_weight": CLASS, "bbox_weight": BBOX, "giou_weight": GIOU, "alpha": ALPHA, "gamma": GAMMA}
    return matching_cost(inputs.logits, inputs.boxes, inputs.labels, inputs.objects, counts, backend=backend, **weights)
