"""The problems of every operation: the model's sizes, and a few odd ones.

The model is that of ResNet-50 on images of 800×1066: 25×34 cells, 300 queries, 256 channels, 8 heads, 6 layers.
"""

from conddetr.kernels.check.cases import attention, convolutions, layers, losses, queries
from conddetr.kernels.check.problem import Problem

IMAGES = {"cpu": 2, "cuda": 8}
"""Of a batch of the model, by type of device."""


def problems(images: int) -> list[Problem]:
    """All of them, those of an operation one after the other.

    Args:
        images: of a batch of the model.
    """
    rooms = (attention, queries, layers, losses, convolutions)
    return [problem for room in rooms for problem in room.problems(images)]
