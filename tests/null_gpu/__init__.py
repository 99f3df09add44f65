"""A CUDA runtime and driver that do nothing, so that the host side of GPU code runs without a GPU. See README.md."""

from null_gpu.build import IS_RUNNING, environment, why_not

__all__ = ["IS_RUNNING", "environment", "why_not"]
