"""The grid of the tokens. Everything is batch first: tokens are [B, N, C]."""

from typing import NamedTuple

from torch import Tensor


class FeatureGrid(NamedTuple):
    """The feature map from which the tokens were flattened row by row, and its padding."""

    size: tuple[int, int]
    """Height and width in cells."""
    padding: Tensor | None
    """[B, N] bool, True = padding; None: no padding."""
    valid_cells: Tensor | None
    """[B, 2] int32, valid height and width in cells, if `padding` is known to be everything outside that rectangle."""
