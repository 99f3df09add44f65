"""Dropout after ReLU and before a residual sum, with gradients, against plain PyTorch and torch.compile of it.

python benchmarks/run.py dropout
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from conddetr.kernels import dropout_add, relu_dropout
from harness.machine import DEVICE, copy_bandwidth
from harness.timing import OURS, Result, Work, arguments, measure, parse, run_all, usable

P = 0.1
WIDTHS = {"relu_dropout": 2048, "dropout_add": 256}
"""Channels in a model: of the feed-forward network, and of a residual branch."""


@dataclass(frozen=True)
class Problem:
    """One size: what is computed, and from what."""

    operation: str
    tokens: int
    dtype: torch.dtype

    @property
    def title(self) -> str:
        """One line for tables and result files."""
        size = f"{self.tokens:,} × {WIDTHS[self.operation]}"
        return f"{self.operation}, {size}, forward + backward, {str(self.dtype).removeprefix('torch.')}"

    def make(self) -> dict[str, Tensor]:
        """Random inputs and the gradient of the output, [tokens, channels]."""
        generator = torch.Generator().manual_seed(0)
        names = ("x", "upstream") if self.operation == "relu_dropout" else ("x", "residual", "upstream")
        made = {name: torch.randn(self.tokens, WIDTHS[self.operation], generator=generator) for name in names}
        return {name: tensor.to(DEVICE, self.dtype).requires_grad_(name != "upstream") for name, tensor in made.items()}

    def work(self) -> Work:
        """Bytes: inputs and output once; in backward both gradients, and after ReLU the output again."""
        size = 5 * self.tokens * WIDTHS[self.operation] * self.dtype.itemsize
        return Work(0, size, {"bytes": size / copy_bandwidth()})


def drop(backend: str, p: float, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """The output alone; without a residual ReLU comes first."""
    return relu_dropout(x, p, backend) if residual is None else dropout_add(x, residual, p, backend)


def compute(forward: Callable[..., Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients."""
    leaves = {name: tensor for name, tensor in tensors.items() if name != "upstream"}
    out = forward(**leaves)
    gradients = torch.autograd.grad(out, leaves.values(), tensors["upstream"])
    return {"out": out, **dict(zip(leaves, gradients, strict=True))}


def run(problem: Problem, options: argparse.Namespace) -> Result:
    """Check all implementations of one problem, then time them."""
    torch.compiler.reset()
    tensors = problem.make()
    eager = partial(drop, "eager", P)
    forwards = {"eager": eager, "torch.compile of it": torch.compile(eager, dynamic=False)}
    for backend in ("triton", "native") if problem.operation == "relu_dropout" else ("native",):
        forwards[f"{OURS}, {backend}"] = partial(drop, backend, P)
    runs = {name: partial(compute, forward, tensors) for name, forward in forwards.items()}
    wide = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    exact = {name: x.detach() for name, x in compute(partial(drop, "eager", 0.0), wide).items()}
    # The trunk's gradient is the one above, bit by bit: of it there is no error to compare.
    exact.pop("residual", None)
    good, refused = usable(runs, lambda call: call(), exact, is_random=True)
    return measure(problem.title, good, options, problem.work(), refused)


def main() -> None:
    """Time every problem asked for; one result file for all."""
    parser = arguments(__doc__.splitlines()[0], seconds=60)
    # Two images of 480×640, and of 800×1066.
    parser.add_argument("--tokens", nargs="+", type=int, default=[600, 1700])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    options = parse(parser)
    problems = [
        Problem(operation, tokens, getattr(torch, dtype))
        for dtype, tokens, operation in product(options.dtypes, options.tokens, WIDTHS)
    ]
    run_all("dropout", {problem.title: partial(run, problem, options) for problem in problems}, options)


if __name__ == "__main__":
    main()
