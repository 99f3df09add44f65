"""The conditional spatial query λ ⊙ p_s with its projection, see `spatial_query`."""

from conddetr.kernels.query.op import spatial_query

__all__ = ["spatial_query"]
