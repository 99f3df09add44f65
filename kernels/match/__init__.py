"""Linear assignment: which prediction answers for which object."""

from conddetr.kernels.match.op import linear_assignment

__all__ = ["linear_assignment"]
