"""A residual branch added to its trunk, and the layer norm behind it."""

from conddetr.kernels.add_norm.op import add_norm

__all__ = ["add_norm"]
