"""Augmentation of training images: a named set, and single switches that override it."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from conddetr.config.checks import check_fraction, check_value, check_values, nearest

AugmentSet = Literal["none", "paper", "strong"]


@dataclass(frozen=True, init=False)
class AugmentConfig:
    """How training images are augmented: the values of a set, and switches that replace some of them.

    `AugmentConfig("strong", colour=False)` is the set `strong` without colours. The fields hold the result; `augment`
    only names the set. Boxes always follow their objects.
    """

    augment: AugmentSet = "paper"
    """Set of augmentations; the options flip, resize, crop, colour and mosaic override its parts. `none`: the resize of
    evaluation alone; `paper`: flip, multi-scale resize and random crops; `strong`: flip, large-scale jitter, crops that
    keep boxes, and colour."""
    flip: bool = True
    """Mirror images left and right, with probability 1/2. Turn it off for text, and for classes that differ in left and
    right."""
    resize: Literal["fixed", "multi-scale", "large-scale-jitter"] = "multi-scale"
    """`fixed`: the size of evaluation; `multi-scale`: a random short side of 0.6 to 1 times `image_size`;
    `large-scale-jitter`: 0.1 to 2 times the size of evaluation, where larger images are cut to that size."""
    crop: Literal["none", "random", "keep-boxes"] = "random"
    """`none`: the whole image; `random`: the paper's crop, with probability 1/2; `keep-boxes`: SSD's crop, which always
    keeps an object. Objects whose centre it cuts off are dropped."""
    colour: bool = False
    """Change brightness, contrast, saturation and hue, each with probability 1/2."""
    mosaic: float = 0.0
    """Probability that an image is put together with three random ones of the training set. Crop and large-scale jitter
    do not apply to such an image."""

    def __init__(self, augment: AugmentSet = "paper", **switches: Any) -> None:
        """
        Args:
            augment: the set.
            switches: values of other fields, instead of the set's.

        Raises:
            ValueError: unknown set or switch (with the nearest name), or a wrong value.
        """
        check_value("Augmentation option augment", augment, AugmentSet)
        known = [field.name for field in fields(self)]
        for name in switches:
            if name not in known:
                raise ValueError(f"Unknown augmentation option {name!r}.{nearest(name, known[1:])}")
        values = {"augment": augment, **_SETS.get(augment, {}), **switches}
        for field in fields(self):
            object.__setattr__(self, field.name, values.get(field.name, field.default))
        check_values(self, "Augmentation option")
        check_fraction("Augmentation option mosaic", self.mosaic)

    def switches(self) -> dict[str, Any]:
        """Values of all switches by name, without the name of the set."""
        return {name: value for name, value in asdict(self).items() if name != "augment"}


_SETS: dict[str, dict[str, Any]] = {
    "none": {"flip": False, "resize": "fixed", "crop": "none"},
    "strong": {"resize": "large-scale-jitter", "crop": "keep-boxes", "colour": True},
}
"""What each set changes of the defaults, which are the paper's."""


def shapes_augment(**given: Any) -> AugmentConfig:
    """The augmentation of synthetic shapes: none, because every image is new.

    Raises:
        ValueError: an option that is given requests another one; or as `AugmentConfig`.
    """
    none = AugmentConfig("none")
    AugmentConfig(**given)
    for name, value in given.items():
        if value != getattr(none, name):
            raise ValueError(
                f"Augmentation option {name}: synthetic shapes (no images are named) are never augmented, expected "
                f"{getattr(none, name)!r}, got {value!r}: leave it out."
            )
    return none
