"""Class error and cardinality error of all layers, against plain PyTorch and torch.compile of it."""

from functools import partial

import torch
from torch import Tensor

from conddetr.kernels import prediction_errors
from harness.machine import DEVICE, Run, short_name
from harness.problem import Checked, PerImages, Tensors, against_pytorch, least
from harness.result import Work

LAYERS, QUERIES, CLASSES, OBJECTS = 6, 300, 91, 7
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


class Problem(PerImages, Checked[Inputs]):
    """One size: images per step, and the dtype of the logits."""

    @property
    def title(self) -> str:
        size = f"{LAYERS} layers × {self.images} images × {QUERIES} queries × {CLASSES} classes"
        return f"errors of predictions, {size}, {short_name(self.dtype)}"

    def make(self) -> Inputs:
        """Logits [L, B, Q, K], the object of each prediction [L, B, Q], classes [B, N] and counts [B] of objects.

        Half of the matched predictions of the last layer have the right class.
        """
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(LAYERS, self.images, QUERIES, CLASSES, generator=generator)
        labels = torch.randint(CLASSES, (self.images, OBJECTS), generator=generator)
        assignment = torch.full(logits.shape[:-1], -1)
        assignment[..., :OBJECTS] = torch.arange(OBJECTS)
        for number in range(0, OBJECTS, 2):
            logits[-1, torch.arange(self.images), number, labels[:, number]] = 10.0
        counts = torch.full((self.images,), OBJECTS, dtype=torch.int32)
        return logits.to(DEVICE, self.dtype), assignment.to(DEVICE), labels.to(DEVICE), counts.to(DEVICE)

    def implementations(self, inputs: Inputs) -> dict[str, Run]:
        functions = against_pytorch(prediction_errors, ["triton"])
        return {name: partial(function, *inputs) for name, function in functions.items()}

    def answer(self, run: Run) -> Tensors:
        return dict(zip(("class", "cardinality"), run(), strict=True))

    def exact(self, inputs: Inputs) -> Tensors:
        """Computed in float64 from the best class of every prediction."""
        logits, assignment, labels, counts = inputs
        best, is_matched = logits.argmax(-1), assignment[-1] >= 0
        is_wrong = best[-1] != labels.gather(1, assignment[-1].clamp(min=0))
        difference = ((best != CLASSES - 1).sum(-1) - counts).abs()
        return {"class": 100 * is_wrong[is_matched].double().mean(), "cardinality": difference.double().mean(1)}

    def work(self) -> Work:
        """Bytes: logits and assignment read once. Objects and errors are small."""
        return least(LAYERS * self.images * QUERIES * (CLASSES * self.dtype.itemsize + torch.int64.itemsize))
