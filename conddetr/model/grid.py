"""Where tokens lie. Everything is batch first: tokens are [B, N, C]."""

from typing import NamedTuple

from torch import Tensor


class FeatureGrid(NamedTuple):
    """The feature map that the tokens were, row by row, and what of it is padding."""

    size: tuple[int, int]
    """Height and width in cells."""
    padding: Tensor | None
    """[B, N] bool, True = padding; None: nothing is."""
    valid_cells: Tensor | None
    """[B, 2] int32, valid height and width in cells, where `padding` is known to be all outside that rectangle."""
