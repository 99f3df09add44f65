"""Convolutions of ResNet-50 with bias, residual sum and ReLU, against PyTorch's passes, checked before timed.

    python benchmarks/conv.py
    python benchmarks/conv.py --size 800 1066 --batch 2

Norms are folded already. On a GPU both are the same cuDNN.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from harness import OURS, Result, Work, arguments, measure, parse, run_all, usable
from machine import DEVICE, copy_bandwidth, product_rate
from torch import Tensor

from conddetr.kernels import convolution
from conddetr.kernels.conv import reference

# Name → channels in and out, window, stride, pixels of the image to a cell of the input, whether there is a residual.
LAYERS = {
    "1×1, in": (256, 64, 1, 1, 4, False),
    "3×3": (64, 64, 3, 1, 4, False),
    "1×1, out, residual": (64, 256, 1, 1, 4, True),
    "3×3, strided": (256, 256, 3, 2, 8, False),
    "1×1, out, residual, last stage": (512, 2048, 1, 1, 32, True),
}


@dataclass(frozen=True)
class Problem:
    """One layer at one size."""

    name: str
    batch: int
    size: tuple[int, int]
    backward: bool

    @property
    def title(self) -> str:
        """One line for tables and result files."""
        passes = "forward + backward" if self.backward else "forward"
        height, width = self.cells
        shape = f"{self.batch}×{LAYERS[self.name][0]}×{height}×{width}"
        return f"convolution {self.name}, {shape}, {passes}, float32"

    @property
    def cells(self) -> tuple[int, int]:
        """Height and width of the input."""
        return tuple(-(-pixels // LAYERS[self.name][4]) for pixels in self.size)

    @property
    def window(self) -> dict[str, tuple[int, int]]:
        """Stride and padding."""
        _, _, kernel, stride, *_ = LAYERS[self.name]
        return {"stride": (stride, stride), "padding": (kernel // 2, kernel // 2)}

    @property
    def shape_out(self) -> tuple[int, ...]:
        """Of the result."""
        _, given, _, stride, *_ = LAYERS[self.name]
        return (self.batch, given, *(-(-cells // stride) for cells in self.cells))

    def make(self) -> dict[str, Tensor]:
        """Random x and residual after ReLU, weight, bias and the gradient of the output, in channels-last."""
        taken, given, kernel, _, _, has_residual = LAYERS[self.name]
        generator = torch.Generator().manual_seed(0)
        made = {
            "x": torch.randn(self.batch, taken, *self.cells, generator=generator).relu(),
            "weight": torch.randn(given, taken, kernel, kernel, generator=generator) / (taken * kernel**2) ** 0.5,
            "upstream": torch.randn(self.shape_out, generator=generator),
        }
        if has_residual:
            made["residual"] = torch.randn(self.shape_out, generator=generator).relu()
        made = {name: tensor.contiguous(memory_format=torch.channels_last) for name, tensor in made.items()}
        return {**made, "bias": torch.randn(given, generator=generator)}

    def work(self) -> Work:
        """Products as the convolution is defined, and each tensor once a pass. The floor counts a quarter of those
        of 3×3 without stride, as minimal filtering needs them.
        """
        tensors = self.make()
        flops = 2 * tensors["weight"].numel() * tensors["upstream"].numel() // self.shape_out[1]
        size = sum(tensor.numel() * tensor.element_size() for name, tensor in tensors.items())
        passes = 3 if self.backward else 1
        flops, size = passes * flops, passes * size
        needed = flops / 4 if LAYERS[self.name][2:4] == (3, 1) else flops
        return Work(flops, size, {"bytes": size / copy_bandwidth(), "products": needed / product_rate(torch.float32)})


def theirs(problem: Problem, **tensors: Tensor) -> dict[str, Tensor]:
    """PyTorch's operators, one pass each."""

    def convolve(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        return reference.convolution(x, weight, bias, *problem.window.values(), (1, 1), 1, residual, True)

    return both_ways(problem, convolve, **tensors)


def ours(problem: Problem, backend: str, **tensors: Tensor) -> dict[str, Tensor]:
    """Ours."""

    def convolve(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        return convolution(x, weight, bias, **problem.window, residual=residual, relu=True, backend=backend)

    return both_ways(problem, convolve, **tensors)


def both_ways(
    problem: Problem,
    convolve: object,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    upstream: Tensor,
    residual: Tensor = None,
) -> dict[str, Tensor]:
    """The result, and where they are wanted the gradients of x, weight and bias."""
    if not problem.backward:
        with torch.no_grad():
            return {"out": convolve(x, weight, bias, residual)}
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    out = convolve(*leaves, residual)
    gradients = torch.autograd.grad(out, leaves, upstream)
    return {"out": out.detach(), **dict(zip(("of x", "of weight", "of bias"), gradients, strict=True))}


def run(problem: Problem, options: argparse.Namespace) -> Result:
    """Check all implementations of one problem, then time them."""
    tensors = problem.make()
    runs = {
        "PyTorch": partial(theirs, problem, **tensors),
        f"{OURS}, eager": partial(ours, problem, "eager", **tensors),
        f"{OURS}, auto": partial(ours, problem, "auto", **tensors),
    }
    exact = theirs(problem, **{name: tensor.double() for name, tensor in tensors.items()})
    good, refused = usable(runs, lambda call: call(), exact, is_random=False)
    return measure(problem.title, good, options, problem.work(), refused)


def main() -> None:
    """Time every problem asked for; one result file for all."""
    parser = arguments(__doc__.splitlines()[0], seconds=60)
    parser.add_argument("--size", type=int, nargs=2, default=[480, 640], metavar=("H", "W"), help="of the images")
    parser.add_argument("--batch", type=int, nargs="+", default=[2])
    options = parse(parser)
    if DEVICE.type == "cuda":
        parser.error("on a GPU both are the same cuDNN: CUDA_VISIBLE_DEVICES= times them on the CPU")
    problems = [
        Problem(name, batch, tuple(options.size), backward)
        for batch, backward, name in product(options.batch, (True, False), LAYERS)
    ]
    run_all("conv", {problem.title: partial(run, problem, options) for problem in problems}, options)


if __name__ == "__main__":
    main()
