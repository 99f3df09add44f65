"""Sine positions, padding and valid cells of a feature map, against plain PyTorch and torch.compile of it.

python benchmarks/run.py position
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from conddetr.kernels import grid_positions
from harness.machine import DEVICE, copy_bandwidth
from harness.timing import OURS, Result, Work, measure, run_losses, usable

IMAGE, GRID, DIM = (800, 1066), (25, 34), 256
"""Pixels of a batch, cells of its last feature map, channels."""
Answer = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """One size: images per step, and the dtype of positions."""

    images: int
    dtype: torch.dtype

    @property
    def title(self) -> str:
        """One line for tables and result files."""
        size = f"{self.images} images × {GRID[0]}×{GRID[1]} cells × {DIM}"
        return f"positions of a map, {size}, {str(self.dtype).removeprefix('torch.')}"

    def make(self) -> tuple[Tensor, Tensor]:
        """A feature map, of which only the shape matters, and sizes of images [B, 2], the first without padding."""
        generator = torch.Generator().manual_seed(0)
        least, greatest = torch.tensor(IMAGE) // 2, torch.tensor(IMAGE)
        valid = least + ((greatest - least) * torch.rand(self.images, 2, generator=generator)).long()
        valid[0] = greatest
        return torch.zeros(self.images, 1, *GRID, device=DEVICE, dtype=self.dtype), valid.to(DEVICE, torch.int32)

    def work(self) -> Work:
        """Positions and padding written once; sizes are few."""
        size = self.images * math.prod(GRID) * (DIM * self.dtype.itemsize + torch.bool.itemsize)
        return Work(0, size, {"bytes": size / copy_bandwidth()})


def exact_answer(valid: Tensor) -> dict[str, Tensor]:
    """By the definition, in float64, from sizes in pixels [B, 2]."""
    cells = (valid.double() * valid.new_tensor(GRID) / valid.new_tensor(IMAGE)).ceil()
    rows, columns = (torch.arange(size, device=DEVICE) < cells[:, axis, None] for axis, size in enumerate(GRID))
    is_valid = rows[:, :, None] & columns[:, None]
    counts = [is_valid.double().cumsum(axis) for axis in (1, 2)]
    turns = [count / (count.amax(axis, keepdim=True) + 1e-6) for axis, count in zip((1, 2), counts, strict=True)]
    wavelengths = 10000 ** torch.arange(0, 1, 4 / DIM, dtype=torch.float64, device=DEVICE)
    angles = 2 * math.pi * torch.stack(turns, dim=-1).unsqueeze(-1) / wavelengths
    position = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(3).flatten(1, 2)
    return {"position": position, "padding": (~is_valid).flatten(1).double(), "cells": cells}


def found_by(call: Callable[[], Answer]) -> dict[str, Tensor]:
    """What a call gives, all of it in numbers that can be compared."""
    position, padding, cells = call()
    return {"position": position, "padding": padding.float(), "cells": cells.float()}


def run(problem: Problem, options: argparse.Namespace) -> Result:
    """Check all implementations of one problem, then time them."""
    torch.compiler.reset()
    features, valid = problem.make()
    plain = partial(grid_positions, backend="eager")
    ways = {"PyTorch": plain, "torch.compile of it": torch.compile(plain, dynamic=False)}
    ways[f"{OURS}, triton"] = partial(grid_positions, backend="triton")
    runs = {name: partial(way, features, IMAGE, DIM, valid) for name, way in ways.items()}
    good, refused = usable(runs, found_by, exact_answer(valid), is_random=False)
    return measure(problem.title, good, options, problem.work(), refused)


if __name__ == "__main__":
    run_losses("position", __doc__.splitlines()[0], Problem, run, ["bfloat16" if DEVICE.type == "cuda" else "float32"])
