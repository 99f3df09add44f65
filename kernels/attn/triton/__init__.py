"""Conditional attention in Triton, host side. The kernels share `tiles.py`; `launch.py` has their launch settings.

Shapes: q_content [B, Q, h, d], q_spatial [B, Q, h, ds], k_content [B, N, h, d], v [B, N, h, dv],
k_spatial [B, N, h, ds], or rows [B, H, h, ds] and columns [B, W, h, ds], or one image's for all: [1, ...];
keep [B, h, 2 ⌈N / 64⌉, Q] int32.
"""

import functools
import math
from dataclasses import replace

import torch
import triton.language as tl
from torch import Tensor

from conddetr.kernels import registry
from conddetr.kernels.attn.inputs import Inputs as OperatorInputs
from conddetr.kernels.attn.triton.backward import backward_grid_kernel, backward_key_kernel, backward_query_kernel
from conddetr.kernels.attn.triton.forward import forward_kernel
from conddetr.kernels.attn.triton.launch import Launch, Tiles, launch_settings, tuned_on
from conddetr.kernels.attn.triton.tiles import Operands, Rows
from conddetr.kernels.common.launch import cdiv, next_power_of_2
from conddetr.kernels.common.triton import precision

GRID_TILE = {"BLOCK": 16, "BLOCK_C": 64}
"""Cells and channels per program of the sums over the grid."""
SMALLEST = 2.0**-126
"""The smallest normal float32."""


class Inputs(OperatorInputs):
    """The inputs of one call, and the kernel arguments derived from them."""

    __slots__ = ()

    def launch(self) -> Launch:
        """The settings for these tensors: those tuned on their device, else the shipped ones."""
        architecture = 0
        if self.v.device.type == "cuda":
            major, minor = registry.capability(self.v.device)
            architecture = 10 * major + minor
        form = self.form()
        shipped = launch_settings(architecture, *form)
        tuned = tuned_on(self.v.device, *form)
        return replace(shipped, **tuned) if tuned else shipped

    def form(self) -> tuple[str, int, bool, bool, bool]:
        """Arguments of `launch_settings` after the architecture."""
        products = precision(self.v) if self.v.dtype == torch.float32 else "half"
        width = max(self.q_content.shape[-1], self.q_spatial.shape[-1], self.v.shape[-1])
        products = "half" if products == "emulate" else products
        return products, width, self.columns is not None, self.keep is not None, self._is_crowded()

    def _is_crowded(self) -> bool:
        """Argument `crowded` of `launch_settings`."""
        if self.v.device.type != "cuda":
            return False
        batch, queries, heads, _ = self.sizes
        return batch * heads * cdiv(queries, 64) > 3 * registry.multiprocessors(self.v.device)

    def operands(self) -> Operands:
        """The tensors that enter scores and sums."""
        columns = None if self.columns is None else _rows(self.columns)
        queries, content = (_rows(self.q_content), _rows(self.q_spatial)), _rows(self.k_content)
        return Operands(*queries, content, _rows(self.k_spatial), columns, _rows(self.v))

    def masks(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The masks, in the order that every kernel takes them."""
        return self.valid_cells, self.key_padding_mask, self.keep

    def scalars(self) -> tuple[float | int, ...]:
        """Arguments of every kernel from `scale` on, up to the widths."""
        _, queries, heads, keys = self.sizes
        height, width = (1, keys) if self.columns is None else (self.k_spatial.shape[1], self.columns.shape[1])
        # Positive, so that a masked score, -inf, stays -inf.
        log2_scale = abs(self.scale) * math.log2(math.e) or SMALLEST
        return self.scale, log2_scale, 1 / (1 - self.dropout_p), queries, keys, heads, height, width

    def options(self, tiles: Tiles) -> dict[str, object]:
        """Compile-time arguments and launch settings."""
        return {
            **_widths(self.q_content.shape[-1], self.q_spatial.shape[-1], self.v.shape[-1]),
            "OFFSET": tl.int64 if self._is_wide() else tl.int32,
            "PRECISION": precision(self.v),
            "BLOCK_Q": tiles.queries,
            "BLOCK_N": tiles.keys,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
            "maxnreg": tiles.registers,
            # Explicit, because its default differs between Triton's releases.
            "enable_fp_fusion": True,
        }

    def _is_wide(self) -> bool:
        """Whether offsets inside one head of one image, of any tensor or gradient, may need more than 32 bits."""
        _, queries, heads, keys = self.sizes
        tensors = [tensor for tensor in self.floating if tensor is not None]
        inputs = max(tensor.shape[1] * tensor.stride(1) for tensor in tensors)
        outputs = max(queries, keys) * heads * max(tensor.shape[-1] for tensor in tensors)
        return max(inputs, outputs, queries * (keys // 32 + 2)) >= 2**31


@functools.cache
def _widths(d: int, ds: int, dv: int) -> dict[str, int]:
    """Widths of heads, and their next powers of two."""
    widths = {"D": d, "DS": ds, "DV": dv}
    return {**widths, **{f"P{name}": max(16, next_power_of_2(width)) for name, width in widths.items()}}


def _rows(tensor: Tensor) -> Rows:
    """A tensor's pointer and strides; the stride of images is 0 if all images share one."""
    image, item, head, _ = tensor.stride()
    return Rows(tensor, 0 if len(tensor) == 1 else image, item, head)


def forward(inputs: Inputs, launch: Launch | None = None) -> tuple[Tensor, Tensor]:
    """out [B, Q, h, dv] and log-sum-exp [B, h, Q] float32, base 2; see `op.py`. `launch`: for tuning."""
    batch, queries, heads, _ = inputs.sizes
    tiles = (launch or inputs.launch()).forward
    out = inputs.v.new_empty((batch, queries, heads, inputs.v.shape[-1]))
    lse = inputs.v.new_empty((batch, heads, queries), dtype=torch.float32)
    forward_kernel[(cdiv(queries, tiles.queries), heads, batch)](
        inputs.operands(), out, lse, *inputs.masks(), *inputs.scalars(),
        AHEAD=tiles.ahead, **inputs.options(tiles),
    )  # fmt: skip
    return out, lse


def backward(
    inputs: Inputs, upstream: Tensor, out: Tensor, lse: Tensor, launch: Launch | None = None
) -> tuple[Tensor, ...]:
    """Gradients of q_content, q_spatial, k_content, k_spatial, columns (empty if dense) and v.

    Those of rows and columns are sums of the dense gradient in a fixed order, so that two runs agree bit for bit.
    """
    batch, queries, heads, keys = inputs.sizes
    settings = launch or inputs.launch()
    upstream = upstream.contiguous()
    operands, masks = inputs.operands(), inputs.masks()
    grad_qc, grad_qs, grad_kc, grad_v = (
        x.new_empty(x.shape) for x in (inputs.q_content, inputs.q_spatial, inputs.k_content, inputs.v)
    )
    # For separable keys the dense gradient is summed afterwards, rounded as in plain PyTorch.
    grad_ks = upstream.new_empty((batch, keys, heads, inputs.q_spatial.shape[-1]))
    by_query, by_key = settings.backward_query, settings.backward_key
    block = max(by_query.queries, by_key.queries)
    padded = cdiv(queries, block) * block
    statistics = lse.new_empty((batch, heads, 2, padded))
    backward_query_kernel[(padded // by_query.queries, heads, batch)](
        operands, upstream, out, lse, statistics, grad_qc, grad_qs, *masks, *inputs.scalars(),
        **inputs.options(by_query),
    )  # fmt: skip
    backward_key_kernel[(cdiv(keys, by_key.keys), heads, batch)](
        operands, upstream, statistics, grad_kc, grad_ks, grad_v, *masks, *inputs.scalars(), padded,
        **inputs.options(by_key),
    )  # fmt: skip
    if inputs.columns is None:
        return grad_qc, grad_qs, grad_kc, grad_ks, upstream.new_empty(0), grad_v
    return grad_qc, grad_qs, grad_kc, *_sum_over_the_grid(grad_ks, inputs.k_spatial, inputs.columns), grad_v


def _sum_over_the_grid(grad_ks: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows and columns, from that of dense spatial keys [B, H·W, h, ds], in one launch."""
    groups, height, width = len(rows), rows.shape[1], columns.shape[1]
    channels = grad_ks[0, 0].numel()
    grad_rows, grad_columns = rows.new_empty(rows.shape), columns.new_empty(columns.shape)
    backward_grid_kernel[(height + width, cdiv(channels, GRID_TILE["BLOCK_C"]), groups)](
        grad_ks, grad_rows, grad_columns, len(grad_ks) // groups, height, width, channels, **GRID_TILE
    )
    return grad_rows, grad_columns
