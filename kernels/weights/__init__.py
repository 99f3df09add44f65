"""The weights of a step: cast, folded and stacked, all in one pass."""

from conddetr.kernels.weights.op import prepare_weights
from conddetr.kernels.weights.reference import FrozenNorm, Recipe, Replicas, Shift, Weight

__all__ = ["FrozenNorm", "Recipe", "Replicas", "Shift", "Weight", "prepare_weights"]
