"""Focal loss and its gradient against torchvision's and torch.compile of it, checked before timed.

All start from the class of each prediction. Making a one-hot tensor is part of the time of those that need it.
"""

from functools import partial

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from conddetr.kernels import focal_loss, registry
from harness.machine import DEVICE, Run, short_name
from harness.problem import Checked, Forward, PerImages, Tensors, beside_compiled, detached, least, ours
from harness.result import Work

LAYERS, QUERIES, CLASSES, OBJECTS = 6, 300, 91, 7
ALPHA, GAMMA = 0.25, 2.0


class Problem(PerImages, Checked[tuple[Tensor, Tensor]]):
    """One size: images per step, and the dtype of the logits."""

    dtypes = ("float32", "bfloat16") if DEVICE.type == "cuda" else ("float32",)
    peer_factor = 1000
    """In errors of torchvision: on a CPU torch.compile sums the losses with a relative error of 3e-6 to 9e-6,
    torchvision with 1e-7. That is not wrong, and leaving it out would favour our kernels."""

    @property
    def title(self) -> str:
        size = f"{LAYERS} layers × {self.images} images × {QUERIES} queries × {CLASSES} classes"
        return f"focal loss, {size}, forward + backward, {short_name(self.dtype)}"

    def make(self) -> tuple[Tensor, Tensor]:
        """Logits [L, B, Q, K] around the focal prior, and classes [L, B, Q], -1 where there is no object."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(LAYERS, self.images, QUERIES, CLASSES, generator=generator) - 4.6
        target = torch.randint(CLASSES, logits.shape[:-1], generator=generator)
        target[:, :, OBJECTS:] = -1
        return logits.to(DEVICE, self.dtype).requires_grad_(), target.to(DEVICE)

    def implementations(self, inputs: tuple[Tensor, Tensor]) -> dict[str, Run]:
        losses = beside_compiled("torchvision", by_torchvision)
        losses |= ours(partial(focal_loss, alpha=ALPHA, gamma=GAMMA), registry.BACKENDS)
        return {name: partial(compute, loss, *inputs) for name, loss in losses.items()}

    def exact(self, inputs: tuple[Tensor, Tensor]) -> Tensors:
        """Computed by torchvision."""
        logits, target = inputs
        return detached(compute(by_torchvision, logits.detach().double().requires_grad_(), target))

    def work(self) -> Work:
        """Bytes: logits read once in each pass, their gradient written once."""
        return least(3 * LAYERS * self.images * QUERIES * CLASSES * self.dtype.itemsize)


def by_torchvision(logits: Tensor, target: Tensor) -> Tensor:
    """Loss [L] as in the official code, on a one-hot tensor whose extra last class is cut off."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    one_hot = torch.zeros((*logits.shape[:-1], CLASSES + 1), dtype=logits.dtype, device=logits.device)
    one_hot.scatter_(-1, torch.where(target < 0, CLASSES, target).unsqueeze(-1), 1)
    return sigmoid_focal_loss(logits, one_hot[..., :-1], ALPHA, GAMMA).flatten(1).sum(1)


def compute(forward: Forward, logits: Tensor, target: Tensor) -> Tensors:
    """Loss [L] and gradient."""
    loss = forward(logits, target)
    return {"loss": loss, "gradient": torch.autograd.grad(loss.sum(), logits)[0]}
