"""Conditional attention against everything that a user could pick instead, in one process, checked before timed.

    python benchmarks/attn.py                      # what this machine can run
    python benchmarks/attn.py --grids r50 --batch 8 --backward --dropout 0.1

Every implementation computes the same thing from the same projected tensors: concatenation, where one needs it, is
part of its time. Those that can not run are listed with the reason.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from harness import console, measure, write_result
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from conddetr.kernels import conditional_attention
from conddetr.kernels.attn.reference import dense_spatial_keys, rectangle_padding

GRIDS = {"r50": (25, 34), "dc5": (50, 67)}
"""Feature maps of an 800×1066 image at stride 32 and 16."""
QUERIES, HEADS, WIDTH = 300, 8, 32
OURS = "ours"


@dataclass(frozen=True)
class Problem:
    """One size: what is computed, and from what."""

    grid: str
    batch: int
    dtype: torch.dtype
    dropout: float
    padded: bool
    backward: bool
    device: torch.device

    @property
    def title(self) -> str:
        """One line for tables and result files."""
        height, width = GRIDS[self.grid]
        passes = "forward + backward" if self.backward else "forward"
        padding = "mixed aspect ratios" if self.padded else "no padding"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{height}×{width} keys, B = {self.batch}, {passes}, dropout {self.dropout}, {padding}, {dtype}"

    def make(self) -> "Tensors":
        """Random inputs, the same for every call."""
        generator = torch.Generator().manual_seed(0)
        height, width = GRIDS[self.grid]
        sizes = (QUERIES, QUERIES, height * width, height, width, height * width)
        made = [torch.randn(self.batch, n, HEADS, WIDTH, generator=generator) for n in sizes]
        made = [tensor.to(self.device, self.dtype).requires_grad_(self.backward) for tensor in made]
        valid = None
        if self.padded:
            # Landscape, portrait and square images of COCO's usual ratios, padded to one landscape grid.
            ratios = torch.tensor([(1.0, 1.0), (1.0, 0.56), (0.84, 1.0), (1.0, 0.75)]).repeat(self.batch, 1)
            valid = (ratios[: self.batch] * torch.tensor([height, width])).round().to(self.device, torch.int32)
        # What every peer starts from; made here, so that nobody is timed for it.
        k_spatial = dense_spatial_keys(made[3], made[4]).detach().requires_grad_(self.backward)
        padding = None if valid is None else rectangle_padding(valid, height, width)
        return Tensors(*made, k_spatial, valid, padding)


@dataclass(frozen=True)
class Tensors:
    """Inputs of one problem, [B, n, heads, 32] each."""

    q_content: Tensor
    q_spatial: Tensor
    k_content: Tensor
    rows: Tensor
    columns: Tensor
    v: Tensor
    k_spatial: Tensor
    valid_hw: Tensor | None
    padding: Tensor | None

    def leaves(self) -> list[Tensor]:
        """All that may need a gradient."""
        return [self.q_content, self.q_spatial, self.k_content, self.rows, self.columns, self.v, self.k_spatial]


def implementations(problem: Problem, tensors: Tensors) -> dict[str, Callable[[], Tensor]]:
    """Everything that might compute the problem; the first is the official code's way."""
    k_spatial, padding = tensors.k_spatial, tensors.padding
    content, p = (tensors.q_content, tensors.q_spatial, tensors.k_content), problem.dropout

    def eager() -> Tensor:
        return conditional_attention(
            *content, k_spatial, tensors.v, key_padding_mask=padding, dropout_p=p, backend="eager"
        )

    def sdpa(pad_values: bool = False) -> Tensor:
        query = torch.cat([tensors.q_content, tensors.q_spatial], -1).transpose(1, 2)
        key = torch.cat([tensors.k_content, k_spatial], -1).transpose(1, 2)
        value = F.pad(tensors.v, (0, WIDTH)) if pad_values else tensors.v
        mask = None if padding is None else ~padding[:, None, None, :]
        out = F.scaled_dot_product_attention(query, key, value.transpose(1, 2), mask, p).transpose(1, 2)
        return out[..., :WIDTH]

    def forced(backend: SDPBackend, pad_values: bool = False) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(pad_values)

        return run

    def ours(separable: bool) -> Callable[[], Tensor]:
        keys = (tensors.rows, tensors.columns) if separable else k_spatial
        options = {"valid_hw": tensors.valid_hw} if separable else {"key_padding_mask": padding}
        return lambda: conditional_attention(*content, keys, tensors.v, dropout_p=p, backend="triton", **options)

    found = {
        "official eager": eager,
        "torch.compile of it": torch.compile(eager, dynamic=False),
        "SDPA as is": sdpa,
        "SDPA, padded values": lambda: sdpa(pad_values=True),
    }
    if problem.device.type == "cuda":
        found["SDPA, memory-efficient"] = forced(SDPBackend.EFFICIENT_ATTENTION)
        found["SDPA, cuDNN"] = forced(SDPBackend.CUDNN_ATTENTION)
        found["SDPA, flash, padded values"] = forced(SDPBackend.FLASH_ATTENTION, pad_values=True)
    found[f"{OURS}, Triton, dense"] = ours(separable=False)
    found[f"{OURS}, Triton, separable"] = ours(separable=True)
    return found


def usable(
    runs: dict[str, Callable[[], Tensor]], problem: Problem, exact: Tensor
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Run each once: those that compute the right thing, and the reason against each of the others.

    Without dropout an error above that of the official way, twice over, stops the benchmark.
    """
    good, refused, budget = {}, {}, None
    for name, run in runs.items():
        try:
            out = run()
        except RuntimeError as error:
            refused[name] = str(error).splitlines()[0]
            continue
        good[name] = run
        if problem.dropout > 0:
            continue
        difference = (out.detach().double() - exact).abs().max().item()
        budget = difference if budget is None else budget
        if not difference <= 2 * budget + 4 * torch.finfo(problem.dtype).eps:
            raise SystemExit(f"{name}: error {difference:.2e}, official eager {budget:.2e}: not timing a wrong answer.")
    return good, refused


def exact_output(tensors: Tensors) -> Tensor:
    """Without dropout, in float64, [B, 300, 8, 32]."""
    wide = [tensor.detach().double() for tensor in tensors.leaves()]
    return conditional_attention(*wide[:3], tuple(wide[3:5]), wide[5], valid_hw=tensors.valid_hw, backend="eager")


def with_backward(run: Callable[[], Tensor], tensors: Tensors) -> Callable[[], None]:
    """Forward, then gradients of everything."""

    def step() -> None:
        for leaf in tensors.leaves():
            leaf.grad = None
        run().sum().backward()

    return step


def multiply_adds(problem: Problem) -> int:
    """Of the two products of the forward pass, all keys counted, padded or not."""
    height, width = GRIDS[problem.grid]
    return problem.batch * HEADS * QUERIES * height * width * 3 * WIDTH


def report(problem: Problem, samples: dict[str, list[float]], refused: dict[str, str]) -> None:
    """Print one problem's table; speed-up over the best that is not ours, GFLOP/s of the forward pass alone."""
    best = min(median(values) for name, values in samples.items() if not name.startswith(OURS))
    table = Table(title=problem.title)
    for column in ("implementation", "ms", "10–90 %", "vs best peer", "GFLOP/s"):
        table.add_column(column, justify="left" if column == "implementation" else "right", no_wrap=True)
    for name, values in samples.items():
        low, high = torch.tensor(values).quantile(torch.tensor([0.1, 0.9])).tolist()
        rate = "–" if problem.backward else f"{2e-9 * multiply_adds(problem) / median(values):.0f}"
        spread = f"{1e3 * low:.2f}–{1e3 * high:.2f}"
        table.add_row(name, f"{1e3 * median(values):.2f}", spread, f"{best / median(values):.2f}×", rate)
    console.print(table)
    for name, reason in refused.items():
        console.print(f"  {name}: {reason}", highlight=False, soft_wrap=True)


def main() -> None:
    """Time every problem asked for; one result file for all."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grids", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 2, 8, 32] if cuda else [1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"] if cuda else ["float32"])
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument("--backward", action=argparse.BooleanOptionalAction, help="only with, or only without")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    results = {}
    for problem in (
        Problem(grid, batch, getattr(torch, dtype), dropout, padded, backward, device)
        for grid in options.grids
        for batch in options.batch
        for dtype in options.dtypes
        for dropout in options.dropout
        for backward in ([False, True] if options.backward is None else [options.backward])
        # An image alone is never padded.
        for padded in ([False, True] if batch > 1 else [False])
    ):
        tensors = problem.make()
        runs, refused = usable(implementations(problem, tensors), problem, exact_output(tensors))
        if problem.backward:
            runs = {name: with_backward(run, tensors) for name, run in runs.items()}
        samples = measure(runs, options.rounds)
        report(problem, samples, refused)
        results[problem.title] = {"seconds": samples, "refused": refused}
    settings = {"queries": QUERIES, "heads": HEADS, "width": WIDTH, "rounds": options.rounds}
    console.print(f"wrote {write_result('attn', settings, results)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
