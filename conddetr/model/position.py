"""Two-dimensional sine position encoding of the feature map; where nothing but a mask is known of its padding."""

from conddetr.kernels.position.reference import sine_position_encoding

__all__ = ["sine_position_encoding"]
