"""Boxes from offsets and reference points, and their gradient, against plain PyTorch and torch.compile of it."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from conddetr.kernels import predicted_boxes
from harness.machine import DEVICE, Run, short_name
from harness.problem import Checked, PerImages, Tensors, against_pytorch, gradients, least, wide
from harness.result import Work

LAYERS, QUERIES = 6, 300


class Problem(PerImages, Checked[Tensors]):
    """One size: images per step, and the dtype of the offsets."""

    @property
    def title(self) -> str:
        size = f"{LAYERS} layers × {self.images} images × {QUERIES} queries"
        return f"predicted boxes, {size}, forward + backward, {short_name(self.dtype)}"

    def make(self) -> Tensors:
        """Offsets [L, B, Q, 4] and reference points [Q, 2]."""
        generator = torch.Generator().manual_seed(0)
        offsets = torch.randn(LAYERS, self.images, QUERIES, 4, generator=generator)
        points = 0.05 + 0.9 * torch.rand(QUERIES, 2, generator=generator)
        made = {"offsets": offsets, "points": points}
        return {name: x.to(DEVICE, self.dtype).requires_grad_() for name, x in made.items()}

    def implementations(self, tensors: Tensors) -> dict[str, Run]:
        functions = against_pytorch(predicted_boxes, ["triton"])
        return {name: partial(compute, function, tensors) for name, function in functions.items()}

    def exact(self, tensors: Tensors) -> Tensors:
        """Computed by PyTorch."""
        return compute(partial(predicted_boxes, backend="eager"), wide(tensors))

    def work(self) -> Work:
        """Bytes: offsets read, boxes written; in backward boxes and their gradient read, the offsets' gradient written.
        Points are small.
        """
        return least(5 * LAYERS * self.images * QUERIES * 4 * self.dtype.itemsize)


def compute(predict: Callable[..., Tensor], tensors: Tensors) -> Tensors:
    """Boxes, and gradients of the sum of their squares."""
    boxes = predict(**tensors)
    return {"boxes": boxes.detach(), **gradients([boxes], tensors, [boxes.detach()])}
