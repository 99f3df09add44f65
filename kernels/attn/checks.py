"""Checks of conditional attention. Each raises a ValueError with the tensor's name, the expected and actual value."""

import torch
from torch import Tensor

from conddetr.kernels import registry
from conddetr.kernels.common.seed import check_one_number


def check_tensors(
    q_content: Tensor, q_spatial: Tensor, k_content: Tensor, rows: Tensor, columns: Tensor | None, v: Tensor
) -> None:
    """Checks shapes, dtypes and devices of the floating tensors; without columns, `rows` are dense keys."""
    if q_content.dim() != 4:
        raise ValueError(f"q_content: expected [B, Q, h, d], got shape {tuple(q_content.shape)}.")
    batch, queries, heads, width = q_content.shape
    keys = k_content.shape[1] if k_content.dim() == 4 else "N"
    spatial = q_spatial.shape[-1]
    expected = {
        "q_spatial": (q_spatial, (batch, queries, heads, spatial)),
        "k_content": (k_content, (batch, keys, heads, width)),
        "v": (v, (batch, keys, heads, v.shape[-1])),
    }
    if columns is None:
        expected["k_spatial"] = (rows, (batch, keys, heads, spatial))
    else:
        for name, part, size in (("rows", rows, "H"), ("columns", columns, "W")):
            images, length = part.shape[:2] if part.dim() == 4 else (batch, size)
            expected[f"{name} of k_spatial"] = (part, (1 if images == 1 else batch, length, heads, spatial))
    dtype, device = q_content.dtype, q_content.device
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}.")
        if tensor.dtype != dtype:
            raise ValueError(f"{name}: expected dtype {dtype} like q_content, got {tensor.dtype}.")
        if tensor.device != device:
            raise ValueError(f"{name}: expected device {device} like q_content, got {tensor.device}.")
    # Not min(...) < 1: that would compare sizes with each other, which an exported model must not do.
    if 0 in (batch, queries, heads, width, spatial, v.shape[-1], k_content.shape[1]):
        raise ValueError(f"q_content {tuple(q_content.shape)}, v {tuple(v.shape)}: expected no empty dimension.")
    if columns is not None and rows.shape[1] * columns.shape[1] != keys:
        raise ValueError(f"k_spatial: expected rows × columns = {keys} keys, got {rows.shape[1]} × {columns.shape[1]}.")


def check_padding(
    q_content: Tensor,
    k_content: Tensor,
    columns: Tensor | None,
    valid_cells: Tensor | None,
    key_padding_mask: Tensor | None,
) -> None:
    """Checks that at most one kind of padding is given, and that it fits the keys."""
    if valid_cells is not None and key_padding_mask is not None:
        raise ValueError("valid_cells and key_padding_mask: expected at most one of them, got both.")
    if valid_cells is not None and columns is None:
        raise ValueError(
            "valid_cells: needs separable k_spatial (rows, columns); with dense keys use key_padding_mask."
        )
    keys = (k_content.shape[0], k_content.shape[1])
    for name, tensor, shape, dtype in (
        ("valid_cells", valid_cells, (keys[0], 2), torch.int32),
        ("key_padding_mask", key_padding_mask, keys, torch.bool),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}.")
        if tensor.dtype != dtype:
            raise ValueError(f"{name}: expected dtype {dtype}, got {tensor.dtype}.")
        if tensor.device != q_content.device:
            raise ValueError(f"{name}: expected device {q_content.device} like q_content, got {tensor.device}.")
    has_values = not (torch.compiler.is_compiling() or registry.transforms())
    if valid_cells is not None and valid_cells.device.type == "cpu" and has_values:
        check_rectangles(valid_cells.tolist(), keys[1] // columns.shape[1], columns.shape[1])


def check_seed(seed: Tensor | None, q_content: Tensor) -> None:
    """Checks that a seed, if given, is one number on the device of the queries."""
    if seed is None:
        return
    check_one_number(seed)
    if seed.device != q_content.device:
        raise ValueError(f"seed: expected device {q_content.device} like q_content, got {seed.device}.")


def check_rectangles(valid_cells: list[list[int]], height: int, width: int) -> None:
    """Checks that valid heights and widths lie within the grid."""
    for image, (valid_height, valid_width) in enumerate(valid_cells):
        if not (0 <= valid_height <= height and 0 <= valid_width <= width):
            raise ValueError(
                f"valid_cells[{image}]: expected from 0 × 0 to the grid's {height} × {width}, "
                f"got {valid_height} × {valid_width}."
            )
