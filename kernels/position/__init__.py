"""Position encoding of a feature map whose padding is at the bottom and right."""

from conddetr.kernels.position.op import grid_positions

__all__ = ["grid_positions"]
