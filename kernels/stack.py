"""Stacking and its inverse without a copy, for parts that are adjacent in one memory.

A model returns the predictions of its layers one by one, as views of one tensor; the loss needs them in one tensor
again. Stacking computes nothing, so it is no operation: it has neither backends nor a benchmark.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from conddetr.kernels import registry


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Same as `torch.stack(parts)`, but parts from `unstacked` give a view of their common tensor, without a copy."""
    if not _is_ordinary(parts):
        return torch.stack(list(parts))
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        return _Stack.apply(*parts)
    return _join(parts)


def unstacked(x: Tensor) -> tuple[Tensor, ...]:
    """Same as `x.unbind()`, but gradients of the parts that are adjacent in memory are not copied."""
    if not _is_ordinary([x]) or not x.requires_grad or not torch.is_grad_enabled():
        return x.unbind()
    return _Unstack.apply(x)


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        return _join(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return unstacked(grad)


class _Unstack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        return x.unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return stacked(grads)


def _is_ordinary(tensors: Sequence[Tensor]) -> bool:
    """Whether these are strided tensors with a memory, outside of tracing and function transforms."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or registry.transforms():
        return False
    # Tensors of `torch.autograd.grad(is_grads_batched=True)` are batched without a transform of torch.func.
    is_batched = torch._C._functorch.is_legacy_batchedtensor
    return all(type(x) is Tensor and x.layout == torch.strided and not is_batched(x) for x in tensors)


def _join(parts: Sequence[Tensor]) -> Tensor:
    """A view of the parts if they are adjacent in one memory, else a copy."""
    first = parts[0]
    size, begin, memory = first.numel(), first.storage_offset(), first.untyped_storage().data_ptr()
    is_joined = all(
        part.untyped_storage().data_ptr() == memory
        and part.storage_offset() == begin + index * size
        and part.dtype == first.dtype
        and part.shape == first.shape
        and part.is_contiguous()
        for index, part in enumerate(parts)
    )
    # Empty tensors and meta tensors have no address.
    if not is_joined or size == 0 or first.device.type == "meta":
        return torch.stack(list(parts))
    return first.as_strided((len(parts), *first.shape), (size, *first.stride()))
