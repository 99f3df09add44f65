"""Bias, dropout, residual sum and layer norm, with gradients, against plain PyTorch and torch.compile of it.

python benchmarks/run.py add_norm
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from conddetr.kernels import add_norm
from harness.machine import DEVICE, copy_bandwidth
from harness.timing import OURS, Result, Work, arguments, measure, parse, run_all, usable

CHANNELS = 256
P = 0.1
LEAVES = ("branch", "residual", "weight", "bias", "branch_bias")


@dataclass(frozen=True)
class Problem:
    """One size: images and their tokens, and the dtype of the branch; the trunk is float32, as autocast has it."""

    images: int
    tokens: int
    dtype: torch.dtype

    @property
    def title(self) -> str:
        """One line for tables and result files."""
        size = f"{self.images} images × {self.tokens:,} tokens × {CHANNELS}"
        return f"residual and norm, {size}, forward + backward, {str(self.dtype).removeprefix('torch.')}"

    def make(self) -> dict[str, Tensor]:
        """Random inputs and positions, and the gradients of trunk, out, and out with positions."""
        generator = torch.Generator().manual_seed(0)
        tokens = (self.images, self.tokens, CHANNELS)
        shapes = {
            **dict.fromkeys(LEAVES[:2], tokens),
            **dict.fromkeys(LEAVES[2:], (CHANNELS,)),
            "position": (1, *tokens[1:]),
            **dict.fromkeys(("of_trunk", "of_out", "of_placed"), tokens),
        }
        halves = ("branch", "position", "of_out", "of_placed")
        made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        return {
            name: x.to(DEVICE, self.dtype if name in halves else torch.float32).requires_grad_(name in LEAVES)
            for name, x in made.items()
        }

    def work(self) -> Work:
        """Bytes of a branch and a trunk: both read, and in backward again; three outputs, three gradients of outputs,
        and two of inputs. Vectors and positions, which all images share, are small beside them.
        """
        half, full = self.dtype.itemsize, torch.float32.itemsize
        per_element = 2 * (half + full) + 2 * (full + 2 * half) + half + full
        size = per_element * self.images * self.tokens * CHANNELS
        return Work(0, size, {"bytes": size / copy_bandwidth()})


def forward(backend: str, p: float, **inputs: Tensor) -> tuple[Tensor, ...]:
    """Trunk, out, and out with positions, as an encoder layer uses them."""
    vectors = (inputs["weight"], inputs["bias"])
    others = {name: inputs[name] for name in ("branch_bias", "position")}
    return add_norm(inputs["branch"], inputs["residual"], *vectors, **others, dropout_p=p, backend=backend)


def compute(run: Callable[..., tuple[Tensor, ...]], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients."""
    inputs = {name: x for name, x in tensors.items() if not name.startswith("of_")}
    outputs = run(**inputs)
    upstream = [x for name, x in tensors.items() if name.startswith("of_")]
    gradients = torch.autograd.grad(outputs, [tensors[name] for name in LEAVES], upstream)
    return {**dict(zip(("trunk", "out", "placed"), outputs, strict=True)), **dict(zip(LEAVES, gradients, strict=True))}


def run(problem: Problem, options: argparse.Namespace) -> Result:
    """Check all implementations of one problem, then time them."""
    torch.compiler.reset()
    tensors = problem.make()
    eager = partial(forward, "eager", P)
    forwards = {"eager": eager, "torch.compile of it": torch.compile(eager, dynamic=False)}
    forwards[f"{OURS}, triton"] = partial(forward, "triton", P)
    runs = {name: partial(compute, call, tensors) for name, call in forwards.items()}
    wide = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in tensors.items()}
    exact = {name: x.detach() for name, x in compute(partial(forward, "eager", 0.0), wide).items()}
    # The gradient of the norm's bias is the sum of what comes in, whatever was dropped: there is no error to compare.
    exact.pop("bias")
    good, refused = usable(runs, lambda call: call(), exact, is_random=True)
    return measure(problem.title, good, options, problem.work(), refused)


def main() -> None:
    """Time every problem asked for; one result file for all."""
    parser = arguments(__doc__.splitlines()[0], seconds=60)
    parser.add_argument("--images", nargs="+", type=int, default=[8, 2] if DEVICE.type == "cuda" else [2])
    # The feature map of 800×1066, and the queries.
    parser.add_argument("--tokens", nargs="+", type=int, default=[850, 300])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    options = parse(parser)
    problems = [
        Problem(images, tokens, getattr(torch, dtype))
        for dtype, images, tokens in product(options.dtypes, options.images, options.tokens)
    ]
    run_all("add_norm", {problem.title: partial(run, problem, options) for problem in problems}, options)


if __name__ == "__main__":
    main()
