"""Results of a detector for one image."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    def to_dict(self) -> dict[str, list]:
        """The fields by name as plain lists, for JSON."""
        tensors = {key: value.tolist() for key, value in vars(self).items() if key != "names"}
        return {**tensors, "names": list(self.names)}


@dataclass(frozen=True)
class Frame:
    """One frame of a video, a camera or a network stream."""

    video: str
    """The video's name: a path, `camera:N`, or an address without its password."""
    index: int
    """Number of the frame, from 0."""
    seconds: float
    """Time of the frame: in a file, as stored; of a live source, since its first frame."""
    image: Tensor
    """[3, H, W] uint8, RGB."""


@dataclass(frozen=True)
class Prediction:
    """The result for one image of a stream (`Detector.predict_stream`)."""

    source: Any
    """The image as it was given: file, PIL image, array, tensor or `Frame`."""
    index: int
    """Position among the images of the stream, from 0."""
    image: Tensor | None = None
    """[3, H, W] as `read_image` returns it; None if it cannot be read."""
    result: Detection | None = None
    """The detected objects; None if the image cannot be read."""
    error: Exception | None = None
    """Why the image cannot be read; None if it was read."""

    @property
    def detection(self) -> Detection:
        """The detected objects.

        Raises:
            FileNotFoundError, ValueError, TypeError: the image cannot be read; the error of `read_image`.
        """
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result

    @property
    def name(self) -> str:
        """The file or the video; the position of an image that has neither, from 0."""
        if isinstance(self.source, Frame):
            return self.source.video
        return str(self.source) if isinstance(self.source, (str, Path)) else str(self.index)
