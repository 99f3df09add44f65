"""Convolution with bias, residual sum and ReLU."""

from conddetr.kernels.conv.op import convolution

__all__ = ["convolution"]
