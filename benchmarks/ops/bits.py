"""Bits of dropout for attention weights, against the same in plain PyTorch and torch.compile of it.

python benchmarks/run.py bits
"""

import argparse
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from conddetr.kernels import dropout_bits
from conddetr.kernels.attn.inputs import bits_shape
from conddetr.kernels.bits.reference import unpacked
from harness.machine import DEVICE, copy_bandwidth
from harness.timing import OURS, Result, Work, arguments, measure, parse, run_all, usable

P, HEADS, QUERIES = 0.1, 8, 300
KEYS = {"25×34": 850, "50×67": 3350}
"""Of images of 800×1066, at strides 32 and 16."""


@dataclass(frozen=True)
class Problem:
    """The weights of one layer's cross-attention."""

    images: int
    grid: str

    @property
    def title(self) -> str:
        """One line for tables and result files."""
        return f"bits of dropout, {self.grid} keys, B = {self.images}, p = {P}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Images, heads, words, queries."""
        return bits_shape(self.images, HEADS, QUERIES, KEYS[self.grid])

    def work(self) -> Work:
        """The words written, once."""
        images, heads, words, queries = self.shape
        size = 4 * images * heads * words * queries
        return Work(0, size, {"bytes": size / copy_bandwidth()})


def run(problem: Problem, options: argparse.Namespace) -> Result:
    """Check all implementations of one problem, which make the same bits, then time them."""
    torch.compiler.reset()
    seed = torch.tensor([7], device=DEVICE)

    def make(backend: str) -> Tensor:
        return dropout_bits(seed, problem.shape, P, backend)

    plain = partial(make, "eager")
    runs = {"PyTorch": plain, "torch.compile of it": torch.compile(plain, dynamic=False)}
    runs |= {f"{OURS}, {backend}": partial(make, backend) for backend in ("triton", "native")}
    exact = {"kept": unpacked(plain()).double()}
    good, refused = usable(runs, lambda call: {"kept": unpacked(call()).float()}, exact, False)
    return measure(problem.title, good, options, problem.work(), refused)


def main() -> None:
    """Time every problem asked for; one result file for all."""
    parser = arguments(__doc__.splitlines()[0], seconds=60)
    parser.add_argument("--images", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--grids", nargs="+", choices=KEYS, default=["25×34"])
    options = parse(parser)
    problems = [Problem(images, grid) for grid in options.grids for images in options.images]
    run_all("bits", {problem.title: partial(run, problem, options) for problem in problems}, options)


if __name__ == "__main__":
    main()
