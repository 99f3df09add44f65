"""Losses of matched boxes and their gradient against the official code and torchvision, checked before timed."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou, generalized_box_iou_loss

from conddetr.kernels import matched_box_loss, registry
from harness.machine import DEVICE, Run, short_name
from harness.problem import Checked, PerImages, Tensors, detached, least, ours
from harness.result import Work

LAYERS, QUERIES, OBJECTS = 6, 300, 7
Inputs = tuple[Tensor, Tensor, Tensor]
Losses = Callable[[Tensor, Tensor, Tensor], Iterable[Tensor]]


class Problem(PerImages, Checked[Inputs]):
    """One size: images per step, and the dtype of the boxes."""

    @property
    def title(self) -> str:
        size = f"{LAYERS} layers × {self.images} images × {OBJECTS} objects"
        return f"matched boxes, {size}, forward + backward, {short_name(self.dtype)}"

    def make(self) -> Inputs:
        """Predictions [L, B, Q, 4], objects [B, N, 4], and the object of each prediction [L, B, Q], -1: none."""
        generator = torch.Generator().manual_seed(0)
        boxes = torch.rand(LAYERS, self.images, QUERIES, 4, generator=generator)
        objects = torch.rand(self.images, OBJECTS, 4, generator=generator)
        assignment = torch.full(boxes.shape[:-1], -1)
        order = torch.rand(boxes.shape[:-1], generator=generator).argsort(-1)[..., :OBJECTS]
        assignment.scatter_(-1, order, torch.arange(OBJECTS).expand_as(order))
        return boxes.to(DEVICE, self.dtype).requires_grad_(), objects.to(DEVICE, self.dtype), assignment.to(DEVICE)

    def implementations(self, inputs: Inputs) -> dict[str, Run]:
        losses: dict[str, Losses] = {
            "official-style": layer_by_layer(diagonal_giou_loss),
            "torchvision, elementwise": layer_by_layer(partial(generalized_box_iou_loss, reduction="sum")),
            **ours(matched_box_loss, registry.OPERATIONS["matched_box_loss"].backends),
        }
        return {name: partial(compute, loss, *inputs) for name, loss in losses.items()}

    def exact(self, inputs: Inputs) -> Tensors:
        """Computed as in the official code."""
        boxes, objects, assignment = inputs
        leaf = boxes.detach().double().requires_grad_()
        return detached(compute(layer_by_layer(diagonal_giou_loss), leaf, objects.double(), assignment))

    def work(self) -> Work:
        """Bytes: matched boxes, objects and assignments read in each pass; the whole gradient written once."""
        matched = LAYERS * self.images * OBJECTS * 2 * 4 * self.dtype.itemsize
        predictions = LAYERS * self.images * QUERIES
        return least(2 * (matched + 8 * predictions) + 4 * predictions * self.dtype.itemsize)


def layer_by_layer(giou_loss: Callable[[Tensor, Tensor], Tensor]) -> Losses:
    """The official loop over layers, which gathers the matched pairs first.

    Args:
        giou_loss: corners of both boxes of each pair → sum of 1 - GIoU.
    """

    def losses(boxes: Tensor, objects: Tensor, assignment: Tensor) -> tuple[Tensor, Tensor]:
        layers = []
        for layer_boxes, layer_assignment in zip(boxes, assignment, strict=True):
            image, query = (layer_assignment >= 0).nonzero(as_tuple=True)
            dtype = torch.promote_types(boxes.dtype, torch.float32)
            a, b = layer_boxes[image, query].to(dtype), objects[image, layer_assignment[image, query]].to(dtype)
            pairs = (box_convert(x, "cxcywh", "xyxy") for x in (a, b))
            layers.append((F.l1_loss(a, b, reduction="sum"), giou_loss(*pairs)))
        return tuple(torch.stack(column) for column in zip(*layers, strict=True))

    return losses


def diagonal_giou_loss(a: Tensor, b: Tensor) -> Tensor:
    """As in the official code: GIoU of all pairs, then the diagonal."""
    return (1 - generalized_box_iou(a, b).diag()).sum()


def compute(losses: Losses, boxes: Tensor, objects: Tensor, assignment: Tensor) -> Tensors:
    """Both losses [L] and the gradient of their sum."""
    l1, giou = losses(boxes, objects, assignment)
    return {"L1": l1, "GIoU": giou, "gradient": torch.autograd.grad(l1.sum() + giou.sum(), boxes)[0]}
