"""What training, evaluation and drawing need of a data set."""

from random import Random
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from conddetr.config.augment import AugmentConfig
from conddetr.data.augment.plans import Mosaic, Plan
from conddetr.data.encoded import EncodedJpeg


class ImageSet(Protocol):
    """Images with boxes: `CocoDetection`, `SyntheticShapes`, or any class with these members.

    An image is planned in the main process, from its size alone, and loaded in a worker process.
    """

    @property
    def classes(self) -> list[dict[str, Any]]:
        """`id` and `name` of each class, in the order of the labels."""

    @property
    def endless(self) -> bool:
        """Whether any index ≥ 0 is valid; then every epoch has new images."""

    @property
    def augment(self) -> AugmentConfig:
        """How the images are augmented."""

    @property
    def source(self) -> str:
        """Where the images come from; for tables."""

    @property
    def is_annotated(self) -> bool:
        """Whether there are annotations to compare detections with."""

    def __len__(self) -> int:
        """Number of images, or images per epoch."""

    def describe(self) -> str:
        """Source and numbers, in one line."""

    def plan(self, index: int, generator: Random) -> Plan | Mosaic:
        """Sample the augmentation of an image; nothing is read."""

    def whole_plan(self, index: int) -> Plan:
        """The plan that changes nothing of an image."""

    def largest_shape(self) -> tuple[int, int]:
        """Short and long side, in pixels, that no planned image exceeds."""

    def load(self, index: int, plan: Plan | Mosaic) -> tuple[Tensor, dict[str, Any]]:
        """Read an image and apply a plan; result and errors as `CocoDetection.load`."""

    def ground_truth(self) -> dict[str, Any]:
        """The annotations in COCO's format, for evaluation."""


@runtime_checkable
class HasFiles(Protocol):
    """A data set whose images are files."""

    def load_encoded(self, index: int, plan: Plan | Mosaic) -> tuple[list[EncodedJpeg] | Tensor, dict[str, Any]]:
        """As `load`, but JPEG files are only read; see `CocoDetection.load_encoded`."""
