"""Sine embedding and λ ⊙ p_s against plain PyTorch and torch.compile of it, in one process, checked before timed.

python benchmarks/run.py sine
python benchmarks/run.py sine --points 2400 --cudagraph        # model size, where launches decide
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from conddetr.kernels import conditional_spatial_query, registry, sine_embedding
from harness.machine import DEVICE, copy_bandwidth
from harness.timing import OURS, Result, Work, arguments, measure, parse, run_all, usable

DIM = 256
CHECKED = 4096
"""Points held against float64; each is computed by itself, so these speak for all."""


@dataclass(frozen=True)
class Problem:
    """One size: what is computed, and from what."""

    operation: str
    points: int
    dtype: torch.dtype
    backward: bool

    @property
    def title(self) -> str:
        """One line for tables and result files."""
        passes = "forward + backward" if self.backward else "forward"
        name = {"sine_embedding": "sine embedding", "conditional_spatial_query": "λ ⊙ p_s"}[self.operation]
        return f"{name}, {self.points:,} points, {passes}, {str(self.dtype).removeprefix('torch.')}"

    def make(self) -> dict[str, Tensor]:
        """Random points [n, 2], λ [n, 256] for λ ⊙ p_s, and the gradient of the output [n, 256]."""
        generator = torch.Generator().manual_seed(0)
        made = {"points": torch.rand(self.points, 2, generator=generator)}
        if self.operation == "conditional_spatial_query":
            made["transform"] = torch.randn(self.points, DIM, generator=generator)
        made = {name: tensor.to(DEVICE, self.dtype).requires_grad_(self.backward) for name, tensor in made.items()}
        return made | {"upstream": torch.randn(self.points, DIM, generator=generator).to(DEVICE, self.dtype)}

    def work(self) -> Work:
        """Bytes: inputs read and outputs written once in each pass; backward reads λ again."""
        has_transform = self.operation == "conditional_spatial_query"
        wide = 1 + has_transform + self.backward * (1 + 2 * has_transform)
        narrow = 1 + 2 * self.backward
        size = self.points * (DIM * wide + 2 * narrow) * self.dtype.itemsize
        return Work(0, size, {"bytes": size / copy_bandwidth()})


def embed(operation: str, backend: str, points: Tensor, transform: Tensor | None = None) -> Tensor:
    """The output alone, [n, 256]."""
    if operation == "sine_embedding":
        return sine_embedding(points, DIM, backend=backend)
    return conditional_spatial_query(points, transform, backend=backend)


def compute(forward: Callable[..., Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output, and with backward the gradients."""
    leaves = {name: tensor for name, tensor in tensors.items() if name != "upstream"}
    out = forward(**leaves)
    if not out.requires_grad:
        return {"out": out}
    gradients = torch.autograd.grad(out, leaves.values(), tensors["upstream"])
    return {"out": out, **dict(zip(leaves, gradients, strict=True))}


def run(problem: Problem, options: argparse.Namespace) -> Result:
    """Check all implementations of one problem, then time them."""
    torch.compiler.reset()
    tensors = problem.make()
    eager = partial(embed, problem.operation, "eager")
    forwards = {"eager": eager, "torch.compile of it": torch.compile(eager, dynamic=False)}
    for backend in registry.BACKENDS:
        if backend != "eager":
            forwards[f"{OURS}, {backend}"] = partial(embed, problem.operation, backend)
    runs = {name: partial(compute, forward, tensors) for name, forward in forwards.items()}
    few = {
        name: tensor[:CHECKED].detach().double().requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }
    exact = {name: tensor.detach() for name, tensor in compute(eager, few).items()}
    good, refused = usable(runs, lambda call: {name: x[:CHECKED] for name, x in call().items()}, exact, False)
    return measure(problem.title, good, options, problem.work(), refused)


def main() -> None:
    """Time every problem asked for; one result file for all."""
    cuda = DEVICE.type == "cuda"
    parser = arguments(__doc__.splitlines()[0], seconds=120)
    # 2,400: eight images of 300 queries. A million points in plain PyTorch on a CPU: 10 s a call, 9 GiB.
    parser.add_argument("--points", nargs="+", type=int, default=[1_000_000 if cuda else 100_000, 2400])
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"] if DEVICE.type == "cuda" else ["float32"]
    )
    options = parse(parser)
    problems = [
        Problem(operation, points, getattr(torch, dtype), backward)
        for dtype, points, backward, operation in product(
            options.dtypes, options.points, (False, True), ("conditional_spatial_query", "sine_embedding")
        )
    ]
    run_all("sine", {problem.title: partial(run, problem, options) for problem in problems}, options)


if __name__ == "__main__":
    main()
