"""3×3 convolution with a quarter of the multiplications."""

from conddetr.kernels.conv3x3.op import choose, convolution_3x3, convolution_3x3_weight_gradient, why_not

__all__ = ["choose", "convolution_3x3", "convolution_3x3_weight_gradient", "why_not"]
