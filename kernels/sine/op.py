"""Sine embedding and λ ⊙ p_s: the public functions, their checks, and the operator behind the kernels.

Under autocast nothing is cast: phases are float32 whatever comes in, and the result has the promoted input dtype.
"""

import torch
from torch import Tensor

from conddetr.kernels import paths, registry
from conddetr.kernels.sine import reference


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
        RuntimeError: the requested backend can not run here; says why.
    """
    _check(points, dim)
    choice = registry.choose(backend, points.device, points.dtype)
    paths.note("sine_embedding", choice.backend, choice.refused)
    if choice.backend == "eager":
        return reference.sine_embedding(points, dim, temperature)
    return registry.operators(choice.backend).sine_embedding(points.contiguous(), None, dim, temperature)


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
        ValueError, RuntimeError: as `sine_embedding`, and where devices differ.
    """
    _check(points, transform.shape[-1])
    if transform.device != points.device:
        raise ValueError(f"transform: expected device {points.device} as of points, got {transform.device}.")
    dtype = torch.promote_types(points.dtype, transform.dtype)
    choice = registry.choose(backend, points.device, dtype)
    paths.note("conditional_spatial_query", choice.backend, choice.refused)
    if choice.backend == "eager":
        return reference.conditional_spatial_query(points, transform, temperature)
    if choice.backend == "native":
        points, transform = points.to(dtype), transform.to(dtype)
    leading = torch.broadcast_shapes(points.shape[:-1], transform.shape[:-1])
    points = points.expand(*leading, 2).contiguous()
    transform = transform.expand(*leading, transform.shape[-1]).contiguous()
    return registry.operators(choice.backend).sine_embedding(points, transform, transform.shape[-1], temperature)


def _check(points: Tensor, dim: int) -> None:
    if points.shape[-1:] != (2,):
        raise ValueError(f"points: expected shape [..., 2], got {tuple(points.shape)}.")
    if not points.is_floating_point():
        raise ValueError(f"points: expected a floating dtype, got {points.dtype}.")
    if dim < 4 or dim % 4:
        raise ValueError(f"dim: expected a positive multiple of 4, got {dim}.")


@torch.library.custom_op(
    "conddetr::sine_embedding",
    mutates_args=(),
    schema="(Tensor points, Tensor? transform, int dim, float temperature) -> Tensor",
)
@registry.on_their_device
def _forward(points: Tensor, transform: Tensor | None, dim: int, temperature: float) -> Tensor:
    from conddetr.kernels.sine import triton

    return triton.forward(points, transform, dim, temperature)


@torch.library.custom_op(
    "conddetr::sine_embedding_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor points, Tensor? transform, int dim, float temperature) -> (Tensor, Tensor)",
)
@registry.on_their_device
def _backward(
    grad: Tensor, points: Tensor, transform: Tensor | None, dim: int, temperature: float
) -> tuple[Tensor, Tensor]:
    from conddetr.kernels.sine import triton

    return triton.backward(grad.contiguous(), points, transform, dim, temperature)


def _fake_forward(points: Tensor, transform: Tensor | None, dim: int, temperature: float) -> Tensor:
    like = points if transform is None else transform
    return points.new_empty((*points.shape[:-1], dim), dtype=torch.promote_types(points.dtype, like.dtype))


def _fake_backward(
    grad: Tensor, points: Tensor, transform: Tensor | None, dim: int, temperature: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(points), points.new_empty(0) if transform is None else torch.empty_like(transform)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    points, transform, ctx.dim, ctx.temperature = inputs
    ctx.save_for_backward(points, transform)


def _register(namespace: str) -> None:
    """Shapes and gradients of the operators, the same whatever computes them."""

    def differentiate(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
        points, transform = ctx.saved_tensors
        backward = getattr(torch.ops, namespace).sine_embedding_backward
        grad_points, grad_transform = backward(grad, points, transform, ctx.dim, ctx.temperature)
        return grad_points, None if transform is None else grad_transform, None, None

    torch.library.register_fake(f"{namespace}::sine_embedding", _fake_forward)
    torch.library.register_fake(f"{namespace}::sine_embedding_backward", _fake_backward)
    torch.library.register_autograd(f"{namespace}::sine_embedding", differentiate, setup_context=_setup)
    registry.once_differentiable(f"{namespace}::sine_embedding_backward")


for _namespace in registry.namespaces():
    _register(_namespace)
