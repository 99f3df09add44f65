"""Conditional attention against all alternatives that a user has, in one process, checked before timed.

    python benchmarks/attn.py                      # all problems, the most important first
    python benchmarks/attn.py --grids r50 --batch 8 --backward --dropout 0.1
    python benchmarks/attn.py --batch 1 --cudagraph

Every implementation computes the same result from the same projected tensors. If it needs them concatenated, that is
part of its time. Implementations that cannot run are listed with the reason.
"""

import argparse
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from types import ModuleType
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from conddetr.kernels import conditional_attention, registry
from conddetr.kernels.attn import dense_spatial_keys, rectangle_padding
from harness import rates
from harness.machine import DEVICE, Run, dtype_name
from harness.problem import Checked, beside_compiled, detached, gradients, wide
from harness.refusals import OURS
from harness.result import Work

GRIDS = {"r50": (25, 34), "dc5": (50, 67)}
"""Feature maps of an 800×1066 image at stride 32 and 16."""
QUERIES, HEADS, WIDTH = 300, 8, 32
SHAPES = ((1.0, 1.0), (1.0, 0.56), (0.84, 1.0), (1.0, 0.75))
"""Valid share of height and width: landscape, portrait and square images padded to one landscape grid."""
Attend = Callable[[], Tensor]


@dataclass(frozen=True)
class Tensors:
    """Inputs of one problem, [B, n, heads, 32] each, and the gradient of its output."""

    q_content: Tensor
    q_spatial: Tensor
    k_content: Tensor
    rows: Tensor
    columns: Tensor
    v: Tensor
    k_spatial: Tensor
    upstream: Tensor
    valid_cells: Tensor | None
    padding: Tensor | None

    def leaves(self, separable: bool) -> dict[str, Tensor]:
        """The tensors that an implementation reads."""
        spatial = ("rows", "columns") if separable else ("k_spatial",)
        return {name: getattr(self, name) for name in ("q_content", "q_spatial", "k_content", "v", *spatial)}


@dataclass(frozen=True)
class Problem(Checked[Tensors]):
    """One size, with dtype, dropout, padding and direction."""

    grid: str
    batch: int
    dtype: torch.dtype
    dropout: float
    padded: bool
    backward: bool
    queries: int = QUERIES

    seconds = 180

    @property
    def title(self) -> str:
        height, width = GRIDS[self.grid]
        passes = "forward + backward" if self.backward else "forward"
        padding = "mixed aspect ratios" if self.padded else "no padding"
        size = f"{height}×{width} keys, B = {self.batch}"
        return f"{size}, {passes}, dropout {self.dropout}, {padding}, {dtype_name(self.dtype)}"

    def valid_cells(self) -> Tensor:
        """Valid height and width of each image's grid, [B, 2] int32 on the host."""
        return mixed_shapes(GRIDS[self.grid], self.batch if self.padded else 1).expand(self.batch, -1).contiguous()

    def make(self) -> Tensors:
        """Random inputs, the same for every call."""
        generator = torch.Generator().manual_seed(0)
        height, width = GRIDS[self.grid]
        sizes = (self.queries, self.queries, height * width, height, width, height * width, self.queries)
        made = [torch.randn(self.batch, n, HEADS, WIDTH, generator=generator) for n in sizes]
        *made, upstream = [tensor.to(DEVICE, self.dtype).requires_grad_(self.backward) for tensor in made]
        valid = self.valid_cells().to(DEVICE) if self.padded else None
        # All peers start from dense keys; they are made here, outside the timing.
        k_spatial = dense_spatial_keys(made[3], made[4]).detach().requires_grad_(self.backward)
        padding = None if valid is None else rectangle_padding(valid, height, width)
        return Tensors(*made, k_spatial, upstream.detach(), valid, padding)

    @property
    def is_random(self) -> bool:
        return self.dropout > 0

    def implementations(self, tensors: Tensors) -> dict[str, "Implementation"]:
        """Name → implementation; the first follows the official code."""
        content = (tensors.q_content, tensors.q_spatial, tensors.k_content)

        def ours(backend: str, separable: bool) -> Tensor:
            keys = (tensors.rows, tensors.columns) if separable else tensors.k_spatial
            padding = {"valid_cells": tensors.valid_cells} if separable else {"key_padding_mask": tensors.padding}
            return conditional_attention(*content, keys, tensors.v, dropout_p=self.dropout, backend=backend, **padding)

        def eager() -> Tensor:
            return ours("eager", separable=False)

        peers = {
            **beside_compiled("official eager", eager),
            "FlexAttention": flex(self, tensors),
            "SDPA": lambda: sdpa(self, tensors),
        }
        if DEVICE.type == "cuda":
            peers["SDPA, memory-efficient"] = forced(SDPBackend.EFFICIENT_ATTENTION, self, tensors)
            peers["SDPA, cuDNN"] = forced(SDPBackend.CUDNN_ATTENTION, self, tensors)
            peers["SDPA, flash, padded values"] = forced(SDPBackend.FLASH_ATTENTION, self, tensors, pad_values=True)
            peers["FlexAttention, FLASH"] = flex(self, tensors, by_flash=True)
            peers["varlen_attn"] = packed(self, tensors, varlen_attn)
            flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION)(varlen_attn)
            peers["varlen_attn, flash, padded values"] = packed(self, tensors, flash, pad_values=True)
            peers["FlashAttention-4"] = flash_attention_4(self, tensors)
        else:
            peers["SDPA, padded values"] = lambda: sdpa(self, tensors, pad_values=True)
        built = {name: Implementation(attend, tensors) for name, attend in peers.items()}
        for backend, separable in product(registry.BACKENDS, (False, True)):
            if backend != "eager":
                attend = partial(ours, backend, separable)
                name = f"{OURS}, {backend}, {'separable' if separable else 'dense'}"
                built[name] = Implementation(attend, tensors, separable)
                if backend == "native" and self.has_hopper_kernel():
                    built[f"{name}, not Hopper's kernel"] = Implementation(without_hopper(attend), tensors, separable)
        return built

    def has_hopper_kernel(self) -> bool:
        """Whether `native` has a Hopper kernel for this GPU, beside the kernel for all GPUs."""
        is_hopper = DEVICE.type == "cuda" and torch.cuda.get_device_capability(DEVICE)[0] == 9
        return is_hopper and self.dtype != torch.float32 and os.environ.get("CONDDETR_HOPPER") != "0"

    def answer(self, run: Run) -> dict[str, Tensor]:
        return comparable(run())

    def exact(self, tensors: Tensors) -> dict[str, Tensor]:
        """Output and gradients without dropout, in float64."""
        leaves = wide(tensors.leaves(separable=True))
        keys = (leaves["rows"], leaves["columns"])
        inputs = (leaves["q_content"], leaves["q_spatial"], leaves["k_content"], keys, leaves["v"])
        out = conditional_attention(*inputs, valid_cells=tensors.valid_cells, backend="eager")
        leaves = leaves if out.requires_grad else {}
        return detached({"out": out, **gradients([out], leaves, [tensors.upstream.double()])})

    def work(self) -> Work:
        """Work of the valid keys: padding is not work, and an implementation that computes it is slower.

        The floor counts the separable form, in which only content scores and values are products over all keys.
        Backward recomputes scores and exponentials, and adds three products.
        """
        scores = self.scores()
        floors = {
            "bytes": self.size() / rates.copy_bandwidth(),
            "products": 2 * scores * WIDTH * (7 if self.backward else 2) / rates.product_rate(self.dtype),
        }
        if rates.exponential_rate() is not None:
            floors["exponentials"] = scores * (2 if self.backward else 1) / rates.exponential_rate()
        return Work(2 * scores * WIDTH * (11 if self.backward else 3), self.size(), floors)

    def scores(self) -> float:
        """Number of scores of valid keys."""
        return HEADS * self.queries * self.valid_cells().double().prod(dim=1).sum().item()

    def size(self) -> float:
        """Bytes of all inputs and outputs; with backward three times: read again, and gradients written."""
        valid = self.valid_cells().double()
        outputs = self.batch * self.queries
        inputs = 2 * outputs + 2 * valid.prod(dim=1).sum().item() + valid.sum().item()
        numbers = 3 * (inputs + outputs) if self.backward else inputs + outputs
        return numbers * HEADS * WIDTH * self.dtype.itemsize

    @classmethod
    def arguments(cls, parser: argparse.ArgumentParser) -> None:
        cuda = DEVICE.type == "cuda"
        parser.add_argument("--grids", nargs="+", choices=list(GRIDS), default=list(GRIDS))
        parser.add_argument("--batch", nargs="+", type=int, default=[8, 32, 1, 2] if cuda else [2, 1])
        parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"] if cuda else ["float32"])
        parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1])
        parser.add_argument(
            "--backward", action=argparse.BooleanOptionalAction, help="only with or only without backward"
        )

    @classmethod
    def asked_for(cls, options: argparse.Namespace) -> list[Self]:
        """Every problem of the options. Values that come first in an option matter most; the sum of positions decides.

        Inference is forward without dropout, training backward with dropout: these come before the others.
        """
        passes = (False, True) if options.backward is None else (options.backward,)
        ranked = []
        for positions in product(*(enumerate(values) for values in (options.grids, options.batch, options.dtypes))):
            (_, grid), (_, batch), (_, dtype) = positions
            for dropout, backward in product(options.dropout, passes):
                rank = sum(position for position, _ in positions) + (backward != (dropout > 0))
                # A single image is never padded.
                for padded in (False, True) if batch > 1 else (False,):
                    ranked.append((rank, cls(grid, batch, getattr(torch, dtype), dropout, padded, backward)))
        return [problem for _, problem in sorted(ranked, key=lambda item: item[0])]


@dataclass(frozen=True)
class Implementation:
    """One implementation of a problem: forward, or forward with the gradients of all inputs."""

    attend: Attend
    tensors: Tensors
    separable: bool = False

    def __call__(self) -> dict[str, Tensor]:
        out = self.attend()
        leaves = self.tensors.leaves(self.separable) if out.requires_grad else {}
        return {"out": out, **gradients([out], leaves, [self.tensors.upstream])}


def mixed_shapes(grid: tuple[int, int], batch: int) -> Tensor:
    """Valid height and width of images of `SHAPES` in turn, [B, 2] int32 on the host."""
    shares = torch.tensor(SHAPES)[torch.arange(batch) % len(SHAPES)]
    return (shares * torch.tensor(grid)).round().int()


def comparable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients in float64. Gradients of dense spatial keys are summed to those of rows and columns.

    The sums are in the gradients' dtype, as in PyTorch's backward of `dense_spatial_keys`.
    """
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    if "k_spatial" in tensors:
        dense = tensors.pop("k_spatial")
        height, width = next(grid for grid in GRIDS.values() if grid[0] * grid[1] == dense.shape[1])
        dense = dense.unflatten(1, (height, width))
        tensors |= {"rows": dense.sum(2), "columns": dense.sum(1)}
    return {name: tensor.double() for name, tensor in tensors.items()}


def without_hopper(attend: Attend) -> Attend:
    """The same call on the kernel for all GPUs."""

    def run() -> Tensor:
        os.environ["CONDDETR_HOPPER"] = "0"
        try:
            return attend()
        finally:
            del os.environ["CONDDETR_HOPPER"]

    return run


def concatenated(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [B, heads, n, 64 | 32], the layout of stock attention."""
    query = torch.cat([tensors.q_content, tensors.q_spatial], -1).transpose(1, 2)
    key = torch.cat([tensors.k_content, tensors.k_spatial], -1).transpose(1, 2)
    return query, key, tensors.v.transpose(1, 2)


def sdpa(problem: Problem, tensors: Tensors, pad_values: bool = False) -> Tensor:
    """PyTorch's scaled_dot_product_attention; `pad_values` for kernels that need equal widths."""
    query, key, value = concatenated(tensors)
    if pad_values:
        value = F.pad(value, (0, WIDTH))
    mask = None if tensors.padding is None else ~tensors.padding[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, mask, problem.dropout).transpose(1, 2)[..., :WIDTH]


def forced(backend: SDPBackend, problem: Problem, tensors: Tensors, pad_values: bool = False) -> Attend:
    """SDPA on one backend; an error if that refuses."""

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(problem, tensors, pad_values)

    return run


def flex(problem: Problem, tensors: Tensors, by_flash: bool = False) -> Attend:
    """FlexAttention after concatenation, compiled: uncompiled, it writes the scores.

    Padding is a block mask, made once and not timed: a model makes one per batch for all layers.

    Args:
        problem: the problem to compute.
        tensors: its inputs.
        by_flash: run FlashAttention-4's kernels instead of Triton's.
    """
    kernel_options = {"BACKEND": "FLASH"} if by_flash else None

    @cache
    def block_mask() -> object:
        def is_valid(image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return ~tensors.padding[image, key]

        height, width = GRIDS[problem.grid]
        return create_block_mask(is_valid, problem.batch, None, problem.queries, height * width, device=DEVICE)

    @torch.compile(dynamic=False)
    def attend(mask: object) -> Tensor:
        query, key, value = concatenated(tensors)
        return flex_attention(query, key, value, block_mask=mask, kernel_options=kernel_options).transpose(1, 2)

    def run() -> Tensor:
        if problem.dropout > 0:
            raise NotImplementedError("FlexAttention has no dropout on the weights.")
        if by_flash:
            # Without the package PyTorch raises too, but only after seconds of compilation.
            flash_attention_interface()
        return attend(None if tensors.padding is None else block_mask())

    return run


@dataclass(frozen=True)
class Layout:
    """Starts of a batch's sequences when padding is left out."""

    query_starts: Tensor
    """[B + 1] int32."""
    key_starts: Tensor
    """[B + 1] int32, of valid keys."""
    longest: int
    """Most valid keys of an image."""
    valid: Tensor | None
    """Index of each valid key among all keys of the batch; None: all are valid. Padding on the right of a grid lies
    between its rows, so valid keys are not a prefix."""

    @classmethod
    def of(cls, problem: Problem) -> "Layout":
        """The layout of a problem, computed on the host, which has the sizes."""
        valid_cells, (height, width) = problem.valid_cells(), GRIDS[problem.grid]
        counts = valid_cells.prod(1)
        starts = [
            F.pad(n.cumsum(0), (1, 0)).to(DEVICE, torch.int32)
            for n in (torch.full_like(counts, problem.queries), counts)
        ]
        valid = None
        if problem.padded:
            valid = (~rectangle_padding(valid_cells, height, width)).flatten().nonzero().squeeze(1).to(DEVICE)
        return cls(*starts, int(counts.max()), valid)


def packed(problem: Problem, tensors: Tensors, attend: Callable, pad_values: bool = False) -> Attend:
    """Attention over concatenated sequences of any lengths, as `varlen_attn` takes them: valid keys only.

    Gathering keys and values is part of the time, as every layer projects new ones. Computing which keys are valid is
    not: a model does it once per batch for all layers.

    Args:
        problem: the problem to compute.
        tensors: its inputs.
        attend: query, key and value [tokens, heads, width], starts of queries and keys, longest of queries and keys →
            [queries of the batch, heads, width].
        pad_values: for kernels that need equal widths.
    """
    layout = Layout.of(problem)

    def pick(keys: Tensor) -> Tensor:
        keys = keys.flatten(0, 1)
        return keys if layout.valid is None else keys.index_select(0, layout.valid)

    def run() -> Tensor:
        if problem.dropout > 0:
            raise NotImplementedError("It has no dropout on the weights.")
        query = torch.cat([tensors.q_content, tensors.q_spatial], -1).flatten(0, 1)
        key, value = torch.cat([pick(tensors.k_content), pick(tensors.k_spatial)], -1), pick(tensors.v)
        if pad_values:
            value = F.pad(value, (0, WIDTH))
        starts = (layout.query_starts, layout.key_starts)
        out = attend(query, key, value, *starts, problem.queries, layout.longest)
        return out.unflatten(0, (problem.batch, problem.queries))[..., :WIDTH]

    return run


def flash_attention_interface() -> ModuleType:
    """FlashAttention-4's Python functions.

    Raises:
        ImportError: the package or one of its dependencies is not installed.
    """
    try:
        return importlib.import_module("flash_attn.cute.interface")
    except ImportError as error:
        raise ImportError(f"not installed (pip install flash-attn-4): {error}") from error


def flash_attention_4(problem: Problem, tensors: Tensors) -> Attend:
    """FlashAttention-4; with padding, over valid keys only."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, key_starts: Tensor, max_q: int, max_k: int
    ) -> Tensor:
        interface = flash_attention_interface()
        if not problem.padded:
            images = (tensor.unflatten(0, (problem.batch, -1)) for tensor in (query, key, value))
            return interface.flash_attn_func(*images)[0].flatten(0, 1)
        starts = {"cu_seqlens_q": query_starts, "cu_seqlens_k": key_starts}
        lengths = {"max_seqlen_q": max_q, "max_seqlen_k": max_k}
        return interface.flash_attn_varlen_func(query, key, value, **starts, **lengths)[0]

    return packed(problem, tensors, attend)
