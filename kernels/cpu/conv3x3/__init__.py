"""3×3 convolution with a quarter of the multiplications."""

from conddetr.kernels.cpu.conv3x3.op import KERNELS, convolution_3x3, convolution_3x3_weight_gradient, why_not

__all__ = ["KERNELS", "convolution_3x3", "convolution_3x3_weight_gradient", "why_not"]
