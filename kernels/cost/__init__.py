"""Matching cost of predictions and objects."""

from conddetr.kernels.cost.op import matching_cost
from conddetr.kernels.cost.reference import focal_cost

__all__ = ["focal_cost", "matching_cost"]
