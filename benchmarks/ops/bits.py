"""Dropout bits of attention weights, against plain PyTorch and torch.compile of it."""

import argparse
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Self

import torch
from torch import Tensor

from conddetr.kernels import dropout_bits
from conddetr.kernels.attn.inputs import bits_shape
from conddetr.kernels.bits.reference import unpacked
from harness.machine import DEVICE, Run
from harness.problem import Checked, Tensors, against_pytorch, least
from harness.result import Work

P, HEADS, QUERIES = 0.1, 8, 300
KEYS = {"25×34": 850, "50×67": 3350}
"""Keys of 800×1066 images at strides 32 and 16."""


@dataclass(frozen=True)
class Problem(Checked[Tensor]):
    """The weights of one layer's cross-attention."""

    images: int
    grid: str

    @property
    def title(self) -> str:
        return f"bits of dropout, {self.grid} keys, B = {self.images}, p = {P}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the bits: images, heads, words, queries."""
        return bits_shape(self.images, HEADS, QUERIES, KEYS[self.grid])

    def make(self) -> Tensor:
        """The seed, from which all implementations make the same bits."""
        return torch.tensor([7], device=DEVICE)

    def implementations(self, seed: Tensor) -> dict[str, Run]:
        return against_pytorch(partial(dropout_bits, seed, self.shape, P), ["triton", "native"])

    def answer(self, run: Run) -> Tensors:
        """Whether each weight is kept."""
        return {"kept": unpacked(run()).float()}

    def exact(self, seed: Tensor) -> Tensors:
        """Computed by PyTorch."""
        return {"kept": unpacked(dropout_bits(seed, self.shape, P, backend="eager")).double()}

    def work(self) -> Work:
        """Bytes: every word written once."""
        images, heads, words, queries = self.shape
        return least(4 * images * heads * words * queries)

    @classmethod
    def arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--images", nargs="+", type=int, default=[1, 2])
        parser.add_argument("--grids", nargs="+", choices=KEYS, default=["25×34"])

    @classmethod
    def asked_for(cls, options: argparse.Namespace) -> list[Self]:
        """Every number of images on every grid."""
        return [cls(images, grid) for grid, images in product(options.grids, options.images)]
