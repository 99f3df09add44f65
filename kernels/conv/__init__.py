"""Convolution with bias, residual sum and ReLU."""

from conddetr.kernels.conv.op import Layer, convolution, convolution_pair

__all__ = ["Layer", "convolution", "convolution_pair"]
