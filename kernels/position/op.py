"""Positions of a grid: the public function, its checks, and the operator behind the kernel. There is no gradient."""

import torch
from torch import Tensor

from conddetr.kernels import operators, paths, registry
from conddetr.kernels.position import reference

MAX_CELLS = 1024
"""Rows or columns of a grid; a program of the kernel counts over all of them."""


def _why_not(height: int, width: int) -> str | None:
    if max(height, width) <= MAX_CELLS:
        return None
    return f"its kernel takes at most {MAX_CELLS} rows and columns, got {height} × {width}."


OPERATION = registry.declare("grid_positions", triton=registry.Kernels(why_not=_why_not))


@torch.no_grad()
def grid_positions(
    features: Tensor,
    image_size: tuple[int, int],
    dim: int,
    valid_hw: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sine position encoding and padding mask of a feature map, from the sizes of its images.

    Args:
        features: [B, C, h, w], floating; only its shape, dtype and device are read.
        image_size: H and W in pixels of the batch that the features come from.
        dim: channels of the encoding, a multiple of 4.
        valid_hw: [B, 2] int32, valid height and width in pixels of images padded at the bottom and right; None:
            nothing is padded, and one encoding serves the whole batch.
        backend: `auto`, `triton` (one launch) or `eager`.

    Returns:
        position [B or 1, h·w, dim] in the dtype of `features`, as in `sine_position_encoding`, y's half first;
        padding [B, h·w] bool, True = padding; valid height and width in cells [B, 2] int32. The last two are None
        without `valid_hw`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; names the tensor, the expected and the actual value.
        RuntimeError: the requested backend cannot run here; says why.
    """
    _check(features, dim, valid_hw)
    height, width = features.shape[-2:]
    choice = OPERATION.choose(backend, features.device, features.dtype, height, width)
    paths.note("grid_positions", choice.backend, choice.refused)
    if choice.backend == "eager":
        position, padding, cells = reference.grid_positions(valid_hw, image_size, (height, width), dim, features.device)
        return position.to(features.dtype), padding, cells
    valid = None if valid_hw is None else valid_hw.contiguous()
    position, padding, cells = torch.ops.conddetr.grid_positions(features, valid, *image_size, dim)
    return (position, None, None) if valid is None else (position, padding, cells)


def _check(features: Tensor, dim: int, valid_hw: Tensor | None) -> None:
    if features.dim() != 4 or 0 in features.shape[2:] or not features.is_floating_point():
        actual = f"{tuple(features.shape)} {features.dtype}"
        raise ValueError(f"features: expected [B, C, h, w] with cells, floating, got {actual}.")
    if dim < 4 or dim % 4:
        raise ValueError(f"dim: expected a multiple of 4, got {dim}.")
    if valid_hw is None:
        return
    shape = (features.shape[0], 2)
    if tuple(valid_hw.shape) != shape or valid_hw.dtype != torch.int32:
        raise ValueError(f"valid_hw: expected {shape} torch.int32, got {tuple(valid_hw.shape)} {valid_hw.dtype}.")
    if valid_hw.device != features.device:
        raise ValueError(f"valid_hw: expected device {features.device} like features, got {valid_hw.device}.")


def _fake(
    features: Tensor, valid_hw: Tensor | None, image_height: int, image_width: int, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    images = 1 if valid_hw is None else features.shape[0]
    cells = features.shape[2] * features.shape[3]
    padded = 0 if valid_hw is None else images
    return (
        features.new_empty((images, cells, dim)),
        features.new_empty((padded, cells), dtype=torch.bool),
        features.new_empty((padded, 2), dtype=torch.int32),
    )


operators.register(
    "grid_positions",
    "(Tensor features, Tensor? valid_hw, SymInt image_height, SymInt image_width, SymInt dim) "
    "-> (Tensor, Tensor, Tensor)",
    launch=operators.launcher(__package__, "forward"),
    fake=_fake,
)
