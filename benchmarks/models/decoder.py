"""The decoder of conditional-detr-r50, forward and backward with dropout: eager, torch.compile of it, ours.

    python benchmarks/run.py decoder --batch 8 --dtypes float32

Inputs are random tokens and object queries; the output is checked without dropout before anything is timed.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor

import conddetr
from conddetr.kernels import registry
from conddetr.kernels.attn import rectangle_padding
from conddetr.model.grid import FeatureGrid
from conddetr.model.position import sine_position_encoding
from harness.check import usable
from harness.machine import DEVICE, dtype_name
from harness.problem import Tensors, Timed, beside_compiled
from harness.refusals import OURS
from harness.result import Result
from harness.timing import measure
from ops.attn import GRIDS, mixed_shapes


@dataclass(frozen=True)
class Problem(Timed):
    """One size: images, and a dtype."""

    batch: int
    dtype: torch.dtype

    @property
    def title(self) -> str:
        size = f"25×34 keys, B = {self.batch}, forward + backward, dropout 0.1"
        return f"six decoder layers, {size}, {dtype_name(self.dtype)}"

    def measured(self, options: argparse.Namespace) -> Result:
        """Check all implementations, then time the decoder's part of a training step."""
        transformers, tensors = decoders(self.dtype), make(self.batch, self.dtype)
        wide = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
        exact = outputs(decoders(torch.float64)["eager"], wide)
        checks = {name: partial(outputs, transformer, tensors) for name, transformer in transformers.items()}
        good, refused = usable(checks, lambda call: call(), exact, is_random=False)
        runs = {name: partial(train, transformers[name].train(), tensors) for name in good}
        return measure(self.title, runs, options, None, refused)

    @classmethod
    def arguments(cls, parser: argparse.ArgumentParser) -> None:
        cuda = DEVICE.type == "cuda"
        parser.add_argument("--batch", type=int, default=8 if cuda else 2)
        parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"] if cuda else ["float32"])

    @classmethod
    def asked_for(cls, options: argparse.Namespace) -> list[Self]:
        """Every dtype."""
        return [cls(options.batch, getattr(torch, dtype)) for dtype in options.dtypes]


def decoders(dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """Implementation → transformer without encoder layers, all with the same weights."""
    built = {}
    for backend in ("eager", *(name for name in registry.BACKENDS if name != "eager")):
        torch.manual_seed(0)
        model = conddetr.build("conditional-detr-r50", encoder_layers=0, backend=backend)
        built[backend] = model.transformer.to(DEVICE, dtype)
    return beside_compiled("eager", built.pop("eager")) | {
        f"{OURS}, {backend}": transformer for backend, transformer in built.items()
    }


def make(batch: int, dtype: torch.dtype) -> Tensors:
    """Random tokens and object queries, positions of a grid whose images have mixed aspect ratios."""
    generator = torch.Generator().manual_seed(0)
    height, width = GRIDS["r50"]
    valid_cells = mixed_shapes((height, width), batch).to(DEVICE)
    padding = rectangle_padding(valid_cells, height, width)
    tensors = {
        "tokens": torch.randn(batch, height * width, 256, generator=generator),
        "position": sine_position_encoding(padding.unflatten(1, (height, width)), 256),
        "object_query": torch.randn(300, 256, generator=generator),
        "upstream": torch.randn(6, batch, 300, 256, generator=generator),
    }
    tensors = {name: tensor.to(DEVICE, dtype) for name, tensor in tensors.items()}
    return tensors | {"padding": padding, "valid_cells": valid_cells}


def decode(transformer: Callable, tensors: Tensors) -> Tensor:
    """Normalised outputs of all layers, [6, B, 300, 256]."""
    grid = FeatureGrid(GRIDS["r50"], tensors["padding"], tensors["valid_cells"])
    return transformer(tensors["tokens"], grid, tensors["position"], tensors["object_query"])[0]


def train(transformer: torch.nn.Module, tensors: Tensors) -> tuple[Tensor, ...]:
    """Forward in training mode, then the gradients of all parameters in use."""
    out = decode(transformer, tensors)
    return torch.autograd.grad(out, list(transformer.parameters()), tensors["upstream"], allow_unused=True)


def outputs(transformer: torch.nn.Module, tensors: Tensors) -> Tensors:
    """The output without dropout, for the check."""
    transformer.eval()
    with torch.no_grad():
        return {"hidden": decode(transformer, tensors)}
