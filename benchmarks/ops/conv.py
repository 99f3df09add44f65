"""Convolutions of ResNet-50 with bias, residual add and ReLU, against separate PyTorch operators, checked before timed.

    python benchmarks/run.py conv --size 800 1066 --batch 2

Norms are folded already. On a GPU all implementations call cuDNN for the convolution itself, and torch.compile is a
peer. On a CPU torch.compile would call the same operators as PyTorch.
"""

import argparse
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple, Self

import torch
from torch import Tensor

from conddetr.kernels import convolution, convolution_pair
from conddetr.kernels.conv import Layer, reference
from harness.machine import DEVICE, dtype_name
from harness.problem import Differentiated, Forward, Tensors, beside_compiled, least, ours
from harness.result import Work


class Form(NamedTuple):
    """A convolution of the network."""

    taken: int
    """Input channels."""
    given: int
    """Output channels."""
    kernel: int
    stride: int
    pixels: int
    """Image pixels per cell of the input."""
    has_residual: bool = False
    before: int = 0
    """Input channels of a 1×1 convolution that is computed before it; 0: there is none."""


FORMS = {
    "1×1, in": Form(256, 64, 1, 1, 4),
    "3×3": Form(64, 64, 3, 1, 4),
    "1×1, out, residual": Form(64, 256, 1, 1, 4, has_residual=True),
    "3×3, strided": Form(256, 256, 3, 2, 8),
    "pair, 1×1 and 3×3, strided": Form(128, 128, 3, 2, 4, before=256),
    "1×1, out, residual, last stage": Form(512, 2048, 1, 1, 32, has_residual=True),
}
GIVEN = ("grad_out", "residual")
"""Tensors without a gradient here."""


@dataclass(frozen=True)
class Problem(Differentiated):
    """One convolution at one size."""

    name: str
    batch: int
    size: tuple[int, int]
    backward: bool
    dtype: torch.dtype = torch.float32

    @property
    def title(self) -> str:
        passes = "forward + backward" if self.backward else "forward"
        height, width = self.cells
        shape = f"{self.batch}×{self.form.before or self.form.taken}×{height}×{width}"
        return f"convolution {self.name}, {shape}, {passes}, {dtype_name(self.dtype)}"

    @property
    def form(self) -> Form:
        """Everything that does not depend on the size."""
        return FORMS[self.name]

    @property
    def cells(self) -> tuple[int, int]:
        """Height and width of the input."""
        return tuple(-(-pixels // self.form.pixels) for pixels in self.size)

    @property
    def window(self) -> dict[str, tuple[int, int]]:
        """Stride and padding."""
        stride, kernel = self.form.stride, self.form.kernel
        return {"stride": (stride, stride), "padding": (kernel // 2, kernel // 2)}

    @property
    def shape_out(self) -> tuple[int, ...]:
        """Shape of the result."""
        return (self.batch, self.form.given, *(-(-cells // self.form.stride) for cells in self.cells))

    def make(self) -> Tensors:
        """Random x and residual after ReLU, weights, biases and the gradient of the output, in channels-last."""
        form, generator = self.form, torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        tensors = {
            "x": normal(self.batch, form.before or form.taken, *self.cells).relu(),
            "weight": normal(form.given, form.taken, form.kernel, form.kernel) / (form.taken * form.kernel**2) ** 0.5,
            "grad_out": normal(*self.shape_out),
        }
        if form.has_residual:
            tensors["residual"] = normal(*self.shape_out).relu()
        if form.before:
            tensors["first_weight"] = normal(form.taken, form.before, 1, 1) / form.before**0.5
        tensors = {name: tensor.contiguous(memory_format=torch.channels_last) for name, tensor in tensors.items()}
        tensors["bias"] = normal(form.given)
        if form.before:
            tensors["first_bias"] = normal(form.taken)
        return {
            name: tensor.to(DEVICE, self.dtype).requires_grad_(self.backward and name not in GIVEN)
            for name, tensor in tensors.items()
        }

    def work(self) -> Work:
        """Products as the convolutions are defined, and each tensor once per pass. The floor counts a quarter of the
        products of 3×3 without stride, as minimal filtering needs.
        """
        tensors = self.make()
        flops = 2 * tensors["weight"].numel() * tensors["grad_out"].numel() // self.shape_out[1]
        if self.form.before:
            flops += 2 * tensors["first_weight"].numel() * tensors["x"].numel() // self.form.before
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        passes = 3 if self.backward else 1
        flops, size = passes * flops, passes * size
        needed = flops / 4 if (self.form.kernel, self.form.stride) == (3, 1) else flops
        return least(size, flops, self.dtype, needed)

    def forwards(self) -> dict[str, Forward]:
        peers = beside_compiled("PyTorch", self.pytorch) if DEVICE.type == "cuda" else {"PyTorch": self.pytorch}
        return peers | ours(self.ours, ("eager", "triton", "auto"))

    def compute(self, forward: Forward, tensors: Tensors) -> Tensors:
        """Without backward no graph is recorded, as in inference."""
        with torch.set_grad_enabled(self.backward):
            return super().compute(forward, tensors)

    def pytorch(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None = None,
        first_weight: Tensor | None = None,
        first_bias: Tensor | None = None,
    ) -> Tensor:
        """PyTorch's operators, one pass over memory each."""
        if first_weight is not None:
            x = reference.convolution(x, first_weight, first_bias, (1, 1), (0, 0), (1, 1), 1, None, True)
        return reference.convolution(x, weight, bias, *self.window.values(), (1, 1), 1, residual, True)

    def ours(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None = None,
        first_weight: Tensor | None = None,
        first_bias: Tensor | None = None,
        *,
        backend: str,
    ) -> Tensor:
        """Our operation."""
        if first_weight is None:
            return convolution(x, weight, bias, **self.window, residual=residual, relu=True, backend=backend)
        layers = (Layer(first_weight, first_bias), Layer(weight, bias, **self.window))
        return convolution_pair(x, *layers, backend=backend)

    @classmethod
    def arguments(cls, parser: argparse.ArgumentParser) -> None:
        on_gpu = DEVICE.type == "cuda"
        size, batch, dtype = ([800, 1066], 8, "bfloat16") if on_gpu else ([480, 640], 2, "float32")
        parser.add_argument("--size", type=int, nargs=2, default=size, metavar=("H", "W"), help="of the images")
        parser.add_argument("--batch", type=int, nargs="+", default=[batch])
        parser.add_argument("--dtypes", nargs="+", default=[dtype])

    @classmethod
    def asked_for(cls, options: argparse.Namespace) -> list[Self]:
        """Every convolution; those with gradients come first."""
        return [
            cls(name, batch, tuple(options.size), backward, getattr(torch, dtype))
            for dtype, batch, backward, name in product(options.dtypes, options.batch, (True, False), FORMS)
        ]
