"""Result of a detector for one image."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Detection:
    """The objects detected in one image, best first."""

    scores: Tensor
    """[n] float32 in [0, 1]."""
    labels: Tensor
    """[n] int64, index into the detector's `classes`."""
    boxes: Tensor
    """[n, 4] float32 xyxy in pixels of the original image."""
    queries: Tensor
    """[n] int64, the object query of each object."""
    names: list[str]
    """Class name of each object."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def captions(self) -> list[str]:
        """Name and score of each object, for pictures."""
        return [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores.tolist(), strict=True)]
