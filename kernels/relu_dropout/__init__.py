"""ReLU and dropout after a bias."""

from conddetr.kernels.relu_dropout.op import relu_dropout

__all__ = ["relu_dropout"]
