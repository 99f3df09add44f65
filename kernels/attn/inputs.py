"""Inputs of the operator of conditional attention, in its order. Its schema and all its readers use this definition."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """Inputs of one call; shapes as in `op.py`. The last dimension of each floating tensor is contiguous."""

    q_content: Tensor
    q_spatial: Tensor
    k_content: Tensor
    k_spatial: Tensor
    """One for every key; with columns, the rows of the grid."""
    columns: Tensor | None
    v: Tensor
    valid_cells: Tensor | None
    key_padding_mask: Tensor | None
    keep: Tensor | None
    """Dropout's bits, with shape `bits_shape`; None: nothing is dropped."""
    scale: float
    dropout_p: float
    """The actual probability, as rounded."""

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
SCHEMA = ", ".join(f"{_TYPES[annotation]} {name}" for name, annotation in Inputs.__annotations__.items())
"""The inputs in the syntax of an operator's schema."""


def bits_shape(batch: int, heads: int, queries: int, keys: int) -> tuple[int, int, int, int]:
    """Shape of the words of dropout's bits: [B, h, words, Q], words of 32 keys in whole tiles of 64."""
    return batch, heads, (keys + 63) // 64 * 2, queries
