"""Sine embedding and λ ⊙ p_s: the public functions, their checks, and the operator behind the kernels.

Autocast changes nothing here: phases are float32 for every input dtype, and the result has the promoted input dtype.
"""

from typing import Any

import torch
from torch import Tensor

from conddetr.kernels import operators, paths, registry
from conddetr.kernels.sine import reference

EMBEDDING = registry.declare("sine_embedding", triton=registry.Kernels(), native=registry.Kernels())
QUERY = registry.declare("conditional_spatial_query", triton=registry.Kernels(), native=registry.Kernels())


def sine_embedding(points: Tensor, dim: int = 256, temperature: float = 10000.0, backend: str = "auto") -> Tensor:
    """Sinusoidal embedding of normalised points (Conditional DETR, section 3.3).

    Args:
        points: [..., 2] as (x, y) in [0, 1], floating.
        dim: channels of the result, a multiple of 4.
        temperature: base of the geometric series of wavelengths.
        backend: `auto`, `triton`, `native` or `eager`.

    Returns:
        [..., dim] of the dtype of `points` (float64 if it is float64): the half of y first, then that of x; in each,
        sine and cosine interleaved.

    Raises:
        ValueError: the last dimension is not 2, a dtype is not floating, `dim` is not a positive multiple of 4.
        RuntimeError: the requested backend cannot run here; says why.
    """
    _check(points, dim)
    choice = EMBEDDING.choose(backend, points.device, points.dtype)
    paths.note("sine_embedding", choice.backend, choice.refused)
    if choice.backend == "eager":
        return reference.sine_embedding(points, dim, temperature)
    return operators.of(choice.backend).sine_embedding(points.contiguous(), None, dim, temperature)


def conditional_spatial_query(
    points: Tensor, transform: Tensor, temperature: float = 10000.0, backend: str = "auto"
) -> Tensor:
    """λ ⊙ p_s: the embedding of the reference point, scaled per channel (Conditional DETR, equation 5).

    Args:
        points: [..., 2] as (x, y) in [0, 1]; its leading dimensions broadcast against those of `transform`.
        transform: [..., dim] λ, dim a multiple of 4, on the same device.
        temperature: as in `sine_embedding`.
        backend: as in `sine_embedding`.

    Returns:
        [..., dim] of the promoted dtype.

    Raises:
        ValueError, RuntimeError: as in `sine_embedding`, and if devices differ.
    """
    _check(points, transform.shape[-1])
    if transform.device != points.device:
        raise ValueError(f"transform: expected device {points.device} like points, got {transform.device}.")
    dtype = torch.promote_types(points.dtype, transform.dtype)
    choice = QUERY.choose(backend, points.device, dtype)
    paths.note("conditional_spatial_query", choice.backend, choice.refused)
    if choice.backend == "eager":
        return reference.conditional_spatial_query(points, transform, temperature)
    if choice.backend == "native":
        points, transform = points.to(dtype), transform.to(dtype)
    leading = torch.broadcast_shapes(points.shape[:-1], transform.shape[:-1])
    points = points.expand(*leading, 2).contiguous()
    transform = transform.expand(*leading, transform.shape[-1]).contiguous()
    return operators.of(choice.backend).sine_embedding(points, transform, transform.shape[-1], temperature)


def _check(points: Tensor, dim: int) -> None:
    if points.shape[-1:] != (2,):
        raise ValueError(f"points: expected shape [..., 2], got {tuple(points.shape)}.")
    if not points.is_floating_point():
        raise ValueError(f"points: expected a floating dtype, got {points.dtype}.")
    if dim < 4 or dim % 4:
        raise ValueError(f"dim: expected a positive multiple of 4, got {dim}.")


def _fake_forward(points: Tensor, transform: Tensor | None, dim: int, temperature: float) -> Tensor:
    like = points if transform is None else transform
    return points.new_empty((*points.shape[:-1], dim), dtype=torch.promote_types(points.dtype, like.dtype))


def _fake_backward(
    grad: Tensor, points: Tensor, transform: Tensor | None, dim: int, temperature: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(points), points.new_empty(0) if transform is None else torch.empty_like(transform)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    points, transform, ctx.dim, ctx.temperature = inputs
    ctx.save_for_backward(points, transform)


def _differentiate(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    points, transform = ctx.saved_tensors
    gradients = ops.sine_embedding_backward(grad.contiguous(), points, transform, ctx.dim, ctx.temperature)
    return gradients[0], None if transform is None else gradients[1], None, None


_INPUTS = "Tensor points, Tensor? transform, int dim, float temperature"
operators.register(
    "sine_embedding",
    f"({_INPUTS}) -> Tensor",
    launch=operators.launcher(__package__, "forward"),
    fake=_fake_forward,
    backward=_differentiate,
    setup=_setup,
)
operators.register(
    "sine_embedding_backward",
    f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor)",
    launch=operators.launcher(__package__, "backward"),
    fake=_fake_backward,
    is_gradient=True,
)
