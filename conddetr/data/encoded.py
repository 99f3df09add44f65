"""JPEG files that are read but not decoded, on their way to the device that decodes them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from conddetr.data.augment.plans import Mosaic, Plan
from conddetr.data.images import TRANSPOSED, opened, sizes_of

_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)
"""Markers of frames that every decoder reads: baseline, extended and progressive, with Huffman codes."""
_FRAMES = tuple(marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC))
_FILL, _SCAN, _END = 0xFF, 0xDA, b"\xff\xd9"


@dataclass(frozen=True)
class EncodedJpeg:
    """A JPEG file for `DeviceDecoder`."""

    path: Path
    content: bytes = field(repr=False)
    """The whole file."""
    stored: tuple[int, int]
    """Height and width of its pixels."""
    orientation: int
    """How to turn them: EXIF's orientation tag, 1 to 8."""
    note: str = ""
    """A sentence that errors end with."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the turned image."""
        return self.stored[::-1] if self.orientation in TRANSPOSED else self.stored


@dataclass(frozen=True)
class EncodedBatch:
    """A batch whose images are not decoded, as a worker process sends it."""

    images: Sequence[list[EncodedJpeg] | Tensor]
    """Per image: its file, or the four files of a mosaic; [3, h, w] uint8 if the worker has decoded it."""
    plans: Sequence[Plan | Mosaic]
    """What is left to do with files; the worker has applied the plan to an image that it has decoded."""
    targets: Sequence[dict]
    """As `CocoDetection.load` returns them, with the plans applied."""
    shape: tuple[int, int]
    """(H, W) to pad to, in pixels."""


def read_jpeg(path: Path, note: str = "") -> EncodedJpeg | None:
    """Read a file if it is a JPEG that every decoder reads alike.

    These are complete files with Huffman codes, 8 bits per sample, and grey or YCbCr colours. What a GPU makes of
    others was not verified, so they stay with Pillow, which names a file that ends early.

    Args:
        path: the file.
        note: a sentence that later errors end with.

    Returns:
        The file with its upright orientation; None: it is a file of another kind.

    Raises:
        FileNotFoundError, ValueError: as `read_image`, if the header cannot be read.
    """
    with opened(path) as image:
        # Not MPO files, a subclass that holds several images.
        if image.format != "JPEG" or not isinstance(image, JpegImageFile) or not _has_common_colours(image):
            return None
        sizes = sizes_of(image)
        content = path.read_bytes()
    frame, scan = _frame_and_scan(content)
    if frame not in _HUFFMAN_FRAMES or content.find(_END, scan) < 0:
        return None
    return EncodedJpeg(path, content, sizes.stored, sizes.orientation or 1, note)


def _has_common_colours(image: JpegImageFile) -> bool:
    """Whether a JPEG has 8 bits per sample, and grey or YCbCr colours."""
    if image.bits != 8 or image.layers not in (1, 3):
        return False
    # RGB says so in Adobe's segment, or in the names of its components.
    is_rgb = image.info.get("adobe_transform") == 0 or [layer[0] for layer in image.layer] == list(b"RGB")
    return image.layers == 1 or not is_rgb


def _frame_and_scan(content: bytes) -> tuple[int, int]:
    """Marker of a JPEG's frame, and the position of its first scan; (0, 0): not found."""
    position, frame = len(b"\xff\xd8"), 0
    while position + 4 <= len(content) and content[position] == _FILL:
        marker = content[position + 1]
        if marker == _SCAN:
            return frame, position
        if marker in _FRAMES:
            frame = marker
        length = 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        position += 1 if marker == _FILL else length
    return 0, 0
