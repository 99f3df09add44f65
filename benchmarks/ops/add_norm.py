"""Bias, dropout, residual add and layer norm, with gradients, against plain PyTorch and torch.compile of it."""

import argparse
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Self

import torch
from torch import Tensor

from conddetr.kernels import add_norm
from harness.machine import DEVICE, short_name
from harness.problem import Differentiated, Forward, Tensors, against_pytorch, least
from harness.result import Work

CHANNELS = 256
P = 0.1
LEAVES = ("branch", "residual", "weight", "bias", "branch_bias")


@dataclass(frozen=True)
class Problem(Differentiated):
    """One size: images, tokens per image, and the dtype of the branch; the trunk is float32, as under autocast."""

    images: int
    tokens: int
    dtype: torch.dtype

    is_random = True

    @property
    def title(self) -> str:
        size = f"{self.images} images × {self.tokens:,} tokens × {CHANNELS}"
        return f"residual and norm, {size}, forward + backward, {short_name(self.dtype)}"

    def make(self) -> Tensors:
        """Random inputs and positions, and the gradients of trunk, out, and out with positions."""
        generator = torch.Generator().manual_seed(0)
        tokens = (self.images, self.tokens, CHANNELS)
        shapes = {
            **dict.fromkeys(LEAVES[:2], tokens),
            **dict.fromkeys(LEAVES[2:], (CHANNELS,)),
            "position": (1, *tokens[1:]),
            **dict.fromkeys(("grad_trunk", "grad_out", "grad_placed"), tokens),
        }
        low_precision = ("branch", "position", "grad_out", "grad_placed")
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        return {
            name: x.to(DEVICE, self.dtype if name in low_precision else torch.float32).requires_grad_(name in LEAVES)
            for name, x in tensors.items()
        }

    def forwards(self) -> dict[str, Forward]:
        return against_pytorch(partial(forward, P), ["triton"], "eager")

    def exact_forward(self) -> Forward:
        """Without dropout."""
        return partial(forward, 0.0, backend="eager")

    def exact(self, inputs: Tensors) -> Tensors:
        """The gradient of the norm's bias is left out: with or without dropout it sums the incoming gradient."""
        answer = super().exact(inputs)
        answer.pop("bias")
        return answer

    def work(self) -> Work:
        """Bytes: branch and trunk read in each pass; three outputs, their gradients, and the gradients of two inputs.
        Vectors and positions, which all images share, are small in comparison.
        """
        half, full = self.dtype.itemsize, torch.float32.itemsize
        per_element = 2 * (half + full) + 2 * (full + 2 * half) + half + full
        return least(per_element * self.images * self.tokens * CHANNELS)

    @classmethod
    def arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--images", nargs="+", type=int, default=[8, 2] if DEVICE.type == "cuda" else [2])
        # Tokens of the feature map of 800×1066, and of the queries.
        parser.add_argument("--tokens", nargs="+", type=int, default=[850, 300])
        parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])

    @classmethod
    def asked_for(cls, options: argparse.Namespace) -> list[Self]:
        """All combinations."""
        sizes = product(options.dtypes, options.images, options.tokens)
        return [cls(images, tokens, getattr(torch, dtype)) for dtype, images, tokens in sizes]


def forward(p: float, *, backend: str, **inputs: Tensor) -> Tensors:
    """Trunk, out, and out with positions, as an encoder layer uses them."""
    vectors = (inputs["weight"], inputs["bias"])
    optional = {name: inputs[name] for name in ("branch_bias", "position")}
    outputs = add_norm(inputs["branch"], inputs["residual"], *vectors, **optional, dropout_p=p, backend=backend)
    return dict(zip(("trunk", "out", "placed"), outputs, strict=True))
