"""Sine positions, padding and valid cells of a feature map, against plain PyTorch and torch.compile of it."""

import math
from functools import partial

import torch
from torch import Tensor

from conddetr.kernels import grid_positions
from harness.machine import DEVICE, Run, short_name
from harness.problem import Checked, PerImages, Tensors, against_pytorch, least
from harness.result import Work

IMAGE, GRID, DIM = (800, 1066), (25, 34), 256
"""Pixels of a batch, cells of its last feature map, channels."""


class Problem(PerImages, Checked[tuple[Tensor, Tensor]]):
    """One size: images per step, and the dtype of positions."""

    dtypes = ("bfloat16" if DEVICE.type == "cuda" else "float32",)

    @property
    def title(self) -> str:
        size = f"{self.images} images × {GRID[0]}×{GRID[1]} cells × {DIM}"
        return f"positions of a map, {size}, {short_name(self.dtype)}"

    def make(self) -> tuple[Tensor, Tensor]:
        """A feature map, whose values are not used, and sizes of images [B, 2], the first without padding."""
        generator = torch.Generator().manual_seed(0)
        least_size, greatest = torch.tensor(IMAGE) // 2, torch.tensor(IMAGE)
        valid = least_size + ((greatest - least_size) * torch.rand(self.images, 2, generator=generator)).long()
        valid[0] = greatest
        return torch.zeros(self.images, 1, *GRID, device=DEVICE, dtype=self.dtype), valid.to(DEVICE, torch.int32)

    def implementations(self, inputs: tuple[Tensor, Tensor]) -> dict[str, Run]:
        features, valid = inputs
        functions = against_pytorch(grid_positions, ["triton"])
        return {name: partial(function, features, IMAGE, DIM, valid) for name, function in functions.items()}

    def answer(self, run: Run) -> Tensors:
        """The outputs as floats, so that they can be compared."""
        position, padding, cells = run()
        return {"position": position, "padding": padding.float(), "cells": cells.float()}

    def exact(self, inputs: tuple[Tensor, Tensor]) -> Tensors:
        """Computed from the definition in float64, from sizes in pixels."""
        _, valid = inputs
        cells = (valid.double() * valid.new_tensor(GRID) / valid.new_tensor(IMAGE)).ceil()
        rows, columns = (torch.arange(size, device=DEVICE) < cells[:, axis, None] for axis, size in enumerate(GRID))
        is_valid = rows[:, :, None] & columns[:, None]
        counts = [is_valid.double().cumsum(axis) for axis in (1, 2)]
        turns = [count / (count.amax(axis, keepdim=True) + 1e-6) for axis, count in zip((1, 2), counts, strict=True)]
        wavelengths = 10000 ** torch.arange(0, 1, 4 / DIM, dtype=torch.float64, device=DEVICE)
        angles = 2 * math.pi * torch.stack(turns, dim=-1).unsqueeze(-1) / wavelengths
        position = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(3).flatten(1, 2)
        return {"position": position, "padding": (~is_valid).flatten(1).double(), "cells": cells}

    def work(self) -> Work:
        """Bytes: positions and padding written once. Sizes are small."""
        return least(self.images * math.prod(GRID) * (DIM * self.dtype.itemsize + torch.bool.itemsize))
