"""Two-dimensional sine position encoding of a feature map whose padding is given by a mask."""

from conddetr.kernels.position.reference import sine_position_encoding

__all__ = ["sine_position_encoding"]
