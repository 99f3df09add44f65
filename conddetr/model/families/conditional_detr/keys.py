"""Keys of the conditional cross-attention for all decoder layers at once."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conddetr.kernels import paths
from conddetr.model.families.conditional_detr.attention import Keys
from conddetr.model.plain import is_plain_linear


def project_all_keys(
    layers: Iterable[nn.Module], memory: Tensor, position: Tensor, size: tuple[int, int]
) -> list[Keys]:
    """Keys of all layers from two matrix products: one over the memory, one over rows and columns.

    Inside the valid rectangle the encoding of cell (y, x) is [PE(y); PE(x)], so its projection is the sum of a term of
    its row and a term of its column.

    Args:
        layers: L decoder layers.
        memory: [B, N, C].
        position: [B or 1, N, C], of a grid whose padding, if any, is at the bottom and right.
        size: height and width of the grid.
    """
    layers = list(layers)
    content_and_value = [projection for layer in layers for projection in (layer.ca_kcontent_proj, layer.ca_v_proj)]
    projected = project_together(memory, content_and_value)
    spatial = _separable_keys([layer.ca_kpos_proj for layer in layers], position, size, memory.shape[0])
    return [Keys(*keys) for keys in zip(projected[0::2], spatial, projected[1::2], strict=True)]


def project_together(x: Tensor, projections: list[nn.Module]) -> list[Tensor]:
    """Several projections of the same [..., C]: plain linear layers in one matrix product, other modules by a call."""
    results, plain = _call_others(x, projections)
    if not plain:
        return results
    weight, bias = _stacked(plain)
    parts = iter(F.linear(x, weight, bias).split([projection.out_features for projection in plain], dim=-1))
    return [next(parts) if result is None else result for result in results]


def _call_others(x: Tensor, projections: list[nn.Module]) -> tuple[list[Tensor | None], list[nn.Linear]]:
    """The results of projections that have to be called, None for plain linear layers; and the plain linear layers."""
    results = [None if is_plain_linear(projection) else projection(x) for projection in projections]
    for result in results:
        paths.note("key projections", "one product" if result is None else "modules")
    return results, [projection for projection, result in zip(projections, results, strict=True) if result is None]


def _stacked(projections: list[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Weights and biases, concatenated along the outputs."""
    return tuple(torch.cat([getattr(projection, name) for projection in projections]) for name in ("weight", "bias"))


def _separable_keys(
    projections: list[nn.Module], position: Tensor, size: tuple[int, int], batch: int
) -> list[Tensor | tuple[Tensor, Tensor]]:
    """The spatial keys of each layer: row and column terms, or dense keys if the projection is no plain linear layer,
    because its terms would not add up to the projection of their sum.
    """
    results, plain = _call_others(position, projections)
    dense = [None if result is None else result.expand(batch, -1, -1) for result in results]
    if not plain:
        return dense
    half = position.shape[-1] // 2
    cells = position.unflatten(1, size)
    weight, bias = _stacked(plain)
    # The first cell of a row or column is valid if any is.
    rows = F.linear(cells[:, :, 0, :half], weight[:, :half], bias)
    columns = F.linear(cells[:, 0, :, half:], weight[:, half:])
    parts = zip(*(part.expand(batch, -1, -1).chunk(len(plain), dim=-1) for part in (rows, columns)), strict=True)
    return [next(parts) if result is None else result for result in dense]
