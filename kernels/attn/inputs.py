"""What the operator of conditional attention takes, in its order: the schema and all that reads it are made of this."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """Of one call; shapes as in `op.py`. The last dimension of each floating tensor is contiguous."""

    q_content: Tensor
    q_spatial: Tensor
    k_content: Tensor
    k_spatial: Tensor
    """Of every key, or where there are columns the rows of the grid."""
    columns: Tensor | None
    v: Tensor
    valid_cells: Tensor | None
    key_padding_mask: Tensor | None
    keep: Tensor | None
    """Bits of dropout, of `bits_shape`; None: nothing is dropped."""
    scale: float
    dropout_p: float
    """The probability really drawn."""

    @property
    def floating(self) -> tuple[Tensor | None, ...]:
        """The tensors that have gradients."""
        return self.q_content, self.q_spatial, self.k_content, self.k_spatial, self.columns, self.v

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, Q, h, N."""
        batch, queries, heads, _ = self.q_content.shape
        return batch, queries, heads, self.k_content.shape[1]


_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float"}
SCHEMA = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in Inputs.__annotations__.items())
"""As an operator's schema has them."""


def bits_shape(batch: int, heads: int, queries: int, keys: int) -> tuple[int, int, int, int]:
    """Of the words of dropout's bits: [B, h, words, Q], words of 32 keys in whole tiles of 64."""
    return batch, heads, (keys + 63) // 64 * 2, queries
