"""The problems of every operation: the model's sizes, and a few odd ones.

The model has a ResNet-50 and images of 800×1066: 25×34 cells, 300 queries, 256 channels, 8 heads, 6 layers.
"""

from conddetr.kernels.check.cases import attention, convolutions, layers, losses, queries
from conddetr.kernels.check.problem import Problem

IMAGES = {"cpu": 2, "cuda": 8}
"""Images in a batch of the model, by device type."""


def problems(images: int) -> list[Problem]:
    """All problems, grouped by module.

    Args:
        images: number of images in a batch of the model.
    """
    modules = (attention, queries, layers, losses, convolutions)
    return [problem for module in modules for problem in module.problems(images)]
