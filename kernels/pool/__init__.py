"""The pooling behind the stem of a residual network."""

from conddetr.kernels.pool.op import max_pool

__all__ = ["max_pool"]
