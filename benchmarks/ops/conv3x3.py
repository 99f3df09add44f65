"""3×3 convolutions of ResNet-50, forward and with both gradients, against PyTorch's, checked before timed.

    python benchmarks/run.py conv3x3 --size 800 1066 --batch 2

On a GPU there is nothing to compare: the model uses cuDNN's convolutions there.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from conddetr.kernels import convolution_3x3, convolution_3x3_weight_gradient
from harness.machine import DEVICE, Run
from harness.problem import Checked, Tensors, least
from harness.refusals import OURS
from harness.result import Work

STAGES = {64: 4, 128: 8, 256: 16, 512: 32}
"""Channels of each stage → image pixels per cell."""


@dataclass(frozen=True)
class Problem(Checked[Tensors]):
    """One size: a convolution in the stage with this many channels."""

    channels: int
    batch: int
    size: tuple[int, int]
    backward: bool

    why_not = (
        "the convolution has no kernel for GPUs: CUDA_VISIBLE_DEVICES= times it on the CPU"
        if DEVICE.type == "cuda"
        else None
    )

    @property
    def title(self) -> str:
        passes = "forward + backward" if self.backward else "forward"
        height, width = self.cells
        return f"3×3 convolution, {self.batch}×{self.channels}×{height}×{width}, {passes}, float32"

    @property
    def cells(self) -> tuple[int, int]:
        """Height and width of the map."""
        return tuple(-(-pixels // STAGES[self.channels]) for pixels in self.size)

    def make(self) -> Tensors:
        """Random x after ReLU, weight and the gradient of the output, in channels-last."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.channels, *self.cells)
        tensors = {
            "x": torch.randn(shape, generator=generator).relu(),
            "upstream": torch.randn(shape, generator=generator),
        }
        tensors["weight"] = torch.randn(self.channels, self.channels, 3, 3, generator=generator) / self.channels**0.5
        return {name: tensor.contiguous(memory_format=torch.channels_last) for name, tensor in tensors.items()}

    def work(self) -> Work:
        """Products as the convolution is defined; the floor counts the quarter of them that minimal filtering needs."""
        height, width = self.cells
        cells, passes = self.batch * height * width, 3 if self.backward else 1
        flops = passes * 2 * 9 * cells * self.channels**2
        size = passes * 4 * (2 * cells * self.channels + 9 * self.channels**2)
        return least(size, flops, torch.float32, needed=flops / 4)

    def implementations(self, tensors: Tensors) -> dict[str, Run]:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        return {
            "PyTorch, channels-last": partial(pytorch, self.backward, **tensors),
            "PyTorch, contiguous": partial(pytorch, self.backward, **contiguous),
            f"{OURS}, native": partial(ours, self.backward, **tensors),
        }

    def exact(self, tensors: Tensors) -> Tensors:
        """Computed by PyTorch."""
        return pytorch(self.backward, **{name: tensor.double() for name, tensor in tensors.items()})

    @classmethod
    def arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--size", type=int, nargs=2, default=[480, 640], metavar=("H", "W"), help="of the images")
        parser.add_argument("--batch", type=int, nargs="+", default=[2])

    @classmethod
    def asked_for(cls, options: argparse.Namespace) -> list[Self]:
        """Every stage; problems with gradients come first."""
        return [
            cls(channels, batch, tuple(options.size), backward)
            for batch, backward, channels in product(options.batch, (True, False), STAGES)
        ]


def pytorch(backward: bool, x: Tensor, weight: Tensor, upstream: Tensor) -> Tensors:
    """PyTorch's convolution."""
    if not backward:
        return {"out": F.conv2d(x, weight, padding=1)}
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight)]
    out = F.conv2d(*leaves, padding=1)
    x_grad, weight_grad = torch.autograd.grad(out, leaves, upstream)
    return {"out": out.detach(), "gradient of x": x_grad, "gradient of weight": weight_grad}


def ours(backward: bool, x: Tensor, weight: Tensor, upstream: Tensor) -> Tensors:
    """Our convolution."""
    outputs = {"out": convolution_3x3(x, weight, backend="native")}
    if backward:
        outputs["gradient of x"] = convolution_3x3(upstream, weight, transposed=True, backend="native")
        outputs["gradient of weight"] = convolution_3x3_weight_gradient(x, upstream, backend="native")
    return outputs
