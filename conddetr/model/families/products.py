"""The products from which pictures of a decoder layer's cross-attention are drawn."""

from typing import NamedTuple

from torch import Tensor


class Products(NamedTuple):
    """Queries [1, Q, C] and keys [1, N, C], whose two products add up to the scores of an attention."""

    q_spatial: Tensor
    k_spatial: Tensor
    q_content: Tensor
    k_content: Tensor
    formulas: tuple[str, str]
    """The spatial and the content product in the paper's notation, in matplotlib's math text."""
    scale: float
    """Factor of the scores before the softmax."""
