"""Max pooling after the stem, which needs no gradient, against plain PyTorch and torch.compile of it."""

from functools import partial

import torch
from torch import Tensor

from conddetr.kernels import max_pool
from harness.machine import DEVICE, Run, short_name
from harness.problem import Checked, PerImages, Tensors, against_pytorch, least
from harness.result import Work

CHANNELS, HEIGHT, WIDTH = 64, 400, 533
"""The map after a ResNet's stem, of 800×1066 images."""


class Problem(PerImages, Checked[Tensor]):
    """One size: images per step, and the dtype of the map."""

    @property
    def title(self) -> str:
        return f"pooling, {self.images}×{CHANNELS}×{HEIGHT}×{WIDTH}, {short_name(self.dtype)}"

    def make(self) -> Tensor:
        """A map in channels-last."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.images, CHANNELS, HEIGHT, WIDTH, generator=generator).to(DEVICE, self.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def implementations(self, x: Tensor) -> dict[str, Run]:
        functions = against_pytorch(max_pool, ["triton"])
        return {name: partial(function, x) for name, function in functions.items()}

    def answer(self, run: Run) -> Tensors:
        return {"out": run()}

    def exact(self, x: Tensor) -> Tensors:
        """Computed by PyTorch."""
        return {"out": torch.nn.functional.max_pool2d(x.double(), 3, 2, 1)}

    def work(self) -> Work:
        """Bytes: the map read once, a quarter of it written."""
        return least(self.images * CHANNELS * HEIGHT * WIDTH * self.dtype.itemsize * 5 / 4)
