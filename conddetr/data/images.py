"""Images from all sources as [3, H, W] RGB tensors."""

import functools
import io
import math
import os
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as F

MEAN = (0.485, 0.456, 0.406)
"""ImageNet's RGB mean, for values in [0, 1]."""
STD = (0.229, 0.224, 0.225)
"""ImageNet's RGB standard deviation."""

REDUCED_DECODING_GAP = 2.0
"""A JPEG may be decoded at a lower resolution that is at least this many times the target's."""
_ORIENTATION = 0x0112
TRANSPOSED = (5, 6, 7, 8)
"""Values of the EXIF orientation tag with rows and columns swapped."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that turns an image with each orientation tag upright; other values have no meaning."""
_SIZED_BY_HEADER = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""Formats whose size does not change when they are decoded."""
_PNG_TAG_KEYWORDS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
"""First bytes of text chunks that can hold an orientation."""
_DTYPES = [np.dtype(name) for name in ("uint8", "uint16", "float16", "float32", "float64")]

ImageLike = str | Path | Image.Image | np.ndarray | Tensor

# Pillow prints a warning for every image between its limit and twice the limit, which it reads like all others.
# An appended filter yields to filters that a program has set before.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)


class ImageTooLargeError(ValueError):
    """An image with more pixels than Pillow's limit allows."""


class PixelError(ValueError):
    """An image that can be decoded, but whose values are not colours."""


@dataclass(frozen=True)
class ImageSizes:
    """Height and width in pixels of an image file, from its header."""

    upright: tuple[int, int]
    """Size of the upright image, which `read_image` returns."""
    stored: tuple[int, int]
    """Size of the pixels in the file; swapped against `upright` if the orientation is 5 to 8."""
    orientation: int | None
    """EXIF's orientation tag, 1 to 8; None without a tag, and for values without a meaning."""


def pixel_limit(value: str) -> int:
    """The value of `CONDDETR_MAX_PIXELS`.

    Raises:
        ValueError: not a positive whole number.
    """
    if not value.isdecimal() or int(value) == 0:
        raise ValueError(f"Environment variable CONDDETR_MAX_PIXELS: expected a positive whole number, got {value!r}.")
    return int(value)


# At import, so that worker processes have the limit too, and a program can still set another one.
if _limit := os.environ.get("CONDDETR_MAX_PIXELS"):
    Image.MAX_IMAGE_PIXELS = pixel_limit(_limit)


def read_image(source: ImageLike) -> Tensor:
    """Any image as an upright RGB tensor.

    Args:
        source: a file; a PIL image of any mode; an array [H, W] or [H, W, 1 | 3 | 4], RGB; a tensor [1 | 3, H, W].
            Arrays and tensors are uint8, uint16 or floating in [0, 1]. Files and PIL images of 32-bit integers are
            read as 16-bit ones, files and PIL images of floats as floating ones.

    Returns:
        [3, H, W], uint8 (float32 in [0, 1] if the source was floating).

    Raises:
        FileNotFoundError: no such file.
        ImageTooLargeError: more pixels than Pillow's limit allows.
        PixelError: values outside their range, or of a mode that has no colours.
        ValueError: not an image, damaged, or an unknown shape or dtype; names the file,
            the expected and the actual value.
        TypeError: another type.
    """
    if isinstance(source, (str, Path)):
        return _read_file(Path(source))[0]
    if isinstance(source, Image.Image):
        with _named_errors("Image"):
            turned = _upright(source)
        return _from_pil(turned, "Image")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Tensor):
        if source.dim() != 3 or source.shape[0] not in (1, 3):
            raise ValueError(f"Image tensor: expected [1 | 3, H, W], got shape {tuple(source.shape)}.")
        return _from_tensor(source, "Image")
    raise TypeError(f"Image: expected a path, PIL image, numpy array or torch tensor, got {type(source).__name__}.")


def read_reduced(path: Path, height: int, width: int, upright: bool = True) -> tuple[Tensor, tuple[int, int]]:
    """Read an image file for a smaller target: a JPEG at 1/2, 1/4 or 1/8, which its cosine transform makes cheap.

    Args:
        path: the file.
        height, width: the target size, in pixels. The returned image is at least `REDUCED_DECODING_GAP` times as
            large, or has the file's own size.
        upright: turn the image by its orientation tag. If False, its pixels, its sizes and the target are as stored.

    Returns:
        As `read_image`, and the height and width of the file.

    Raises:
        FileNotFoundError, ValueError: as in `read_image`.
    """
    return _read_file(path, (height, width), upright)


def image_sizes(path: Path) -> ImageSizes:
    """Sizes of an image file, in most formats from its header alone, so a file truncated after it is not noticed.

    Raises:
        FileNotFoundError, ValueError: as in `read_image`.
    """
    with opened(path) as image:
        return sizes_of(image)


def _read_file(
    path: Path, target: tuple[int, int] | None = None, upright: bool = True
) -> tuple[Tensor, tuple[int, int]]:
    with opened(path) as image:
        sizes = sizes_of(image)
        if target is not None:
            needed = tuple(math.ceil(REDUCED_DECODING_GAP * side) for side in target)
            # Formats other than JPEG ignore it. PIL takes the width first.
            image.draft(None, needed if upright and sizes.orientation in TRANSPOSED else needed[::-1])
        turned = _upright(image) if upright else _as_stored(image, sizes.orientation)
    return _from_pil(turned, f"Image file {path}"), sizes.upright if upright else sizes.stored


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The file as a PIL image before decoding; errors inside name the file."""
    if not path.is_file():
        raise FileNotFoundError(f"Image file {path} {'is a folder' if path.is_dir() else 'does not exist'}.")
    with _named_errors(f"Image file {path}"), Image.open(path) as image:
        yield image


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Turn Pillow's errors into errors that begin with `name`."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: not an image in a known format.") from error
    # The warning is an error if a program has set that.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        match = re.search(r"\d+", str(error))
        limit = match.group() if match else "None"
        raise ImageTooLargeError(
            f"{name}: too large. {error} If you trust it, raise the limit: PIL.Image.MAX_IMAGE_PIXELS = {limit} in "
            f"Python, or the environment variable CONDDETR_MAX_PIXELS={limit}."
        ) from error
    except PermissionError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror}): change its permissions.") from error
    # AVIF's decoder raises RuntimeError.
    except (OSError, SyntaxError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: truncated or damaged ({error}).") from error


def sizes_of(image: Image.Image) -> ImageSizes:
    """Sizes of an open file before decoding."""
    if image.format not in _SIZED_BY_HEADER or (image.format == "PNG" and _has_late_tags(image.fp)):
        image.load()
    orientation = _orientation(image)
    # Recent Pillow returns a TIFF's upright size, and swaps it by the tag alone, not by XMP data.
    width, height = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
    upright = (width, height) if orientation in TRANSPOSED else (height, width)
    return ImageSizes(upright, (height, width), int(orientation) if orientation in range(1, 9) else None)


def _orientation(image: Image.Image) -> object:
    """The value of the EXIF tag, which can be anything; None without a tag."""
    try:
        # Not `image.getexif`, which decodes a PNG first, for tags that may follow the pixels.
        return Image.Image.getexif(image).get(_ORIENTATION)
    except (struct.error, SyntaxError) as error:
        raise ValueError(f"its EXIF data cannot be read: {error}") from error


def _has_late_tags(file: BinaryIO) -> bool:
    """Whether a PNG has EXIF or XMP data after its pixels."""
    position = file.tell()
    file.seek(len(b"\x89PNG\r\n\x1a\n"))
    has_tags = pixels = False
    while not has_tags and len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        following = file.tell() + length + len(b"CRC.")
        pixels |= kind == b"IDAT"
        has_tags = pixels and (kind == b"eXIf" or file.read(min(length, 32)).startswith(_PNG_TAG_KEYWORDS))
        file.seek(following)
    file.seek(position)
    return has_tags


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose, which rewrites all tags and fails if one of them is damaged.
    orientation = _decoded_orientation(image)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _as_stored(image: Image.Image, orientation: int | None) -> Image.Image:
    """Undo Pillow's turn of a TIFF; `orientation` is the tag before the image was decoded."""
    if _decoded_orientation(image) == orientation or orientation not in _UPRIGHT:
        return image
    return image.transpose(_UPRIGHT[{6: 8, 8: 6}.get(orientation, orientation)])


def _decoded_orientation(image: Image.Image) -> object:
    """Decode the image and return its orientation afterwards. Pillow turns TIFFs; recent versions remove the tag."""
    image.load()
    if image.format == "TIFF" and _ORIENTATION in image.tag_v2 and _keeps_tags_of_turned_tiffs():
        return None
    return _orientation(image)


@functools.cache
def _keeps_tags_of_turned_tiffs() -> bool:
    """Whether this version of Pillow leaves the tag on a TIFF that it has turned."""
    file = io.BytesIO()
    Image.new("L", (2, 1)).save(file, "tiff", tiffinfo={_ORIENTATION: 6})
    with Image.open(file) as image:
        image.load()
        return image.size == (1, 2) and _ORIENTATION in image.tag_v2


def _from_pil(image: Image.Image, name: str) -> Tensor:
    if 0 in image.size:
        raise ValueError(f"{name}: expected at least one pixel, got height × width {image.height}×{image.width}.")
    if image.mode == "I":
        low, high = image.getextrema()
        if low < 0 or high > 65535:
            raise PixelError(
                f"{name}: expected 32-bit integers in 0…65535, got {low}…{high}. Scale them to that range, and save "
                "them as 16-bit integers."
            )
    if image.mode.startswith("I"):
        return _from_tensor(torch.from_numpy(np.asarray(image).astype(np.uint16))[None], name)
    if image.mode == "F":
        return _from_tensor(torch.from_numpy(np.array(image, dtype=np.float32))[None], name)
    if image.mode == "P" and "transparency" in image.info:
        # The colours are the same; Pillow warns if it converts directly to RGB.
        image = image.convert("RGBA")
    try:
        # Colours stay interleaved as in PIL, because torch resizes that layout fastest.
        image = image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise PixelError(f"{name}: its pixels (mode {image.mode}) cannot be read as RGB; save it as RGB.") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _from_array(source: np.ndarray) -> Tensor:
    array = source[..., None] if source.ndim == 2 else source
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ValueError(f"Image array: expected [H, W] or [H, W, 1 | 3 | 4], got shape {source.shape}.")
    native = array.dtype.newbyteorder("=")
    if native not in _DTYPES:
        raise ValueError(f"Image array: expected uint8, uint16 or floating values, got {array.dtype}.")
    # A copy if torch cannot share the memory: other byte order, negative strides, read-only.
    array = np.require(array[..., :3], native, ["C_CONTIGUOUS", "WRITEABLE"])
    return _from_tensor(torch.from_numpy(array).permute(2, 0, 1), "Image")


def _from_tensor(image: Tensor, name: str) -> Tensor:
    if image.numel() == 0:
        raise ValueError(f"{name}: expected at least one pixel, got shape {tuple(image.shape)}.")
    if image.dtype == torch.uint16:
        image = (image.to(torch.int32) // 257).to(torch.uint8)
    elif image.is_floating_point():
        low, high = (bound.item() for bound in image.detach().aminmax())
        if math.isnan(low):
            raise PixelError(f"{name}: expected floating values in [0, 1], got nan: replace it with a number.")
        if not (low >= 0 and high <= 1):
            raise PixelError(
                f"{name}: expected floating values in [0, 1], got {low:.9g}…{high:.9g}. Scale them to that range."
            )
        image = image.to(torch.float32)
    elif image.dtype != torch.uint8:
        raise ValueError(f"{name}: expected uint8, uint16 or floating values, got {image.dtype}.")
    return image.expand(3, -1, -1)


def resized_shape(height: int, width: int, short_side: int, max_side: int) -> tuple[int, int]:
    """(height, width) scaled to a short side, unless the long side would exceed `max_side`; at least 1 pixel."""
    scale = min(short_side / min(height, width), max_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def to_model_input(images: Tensor) -> Tensor:
    """[..., 3, H, W] uint8 or float in [0, 1] -> float32, normalised with ImageNet's mean and standard deviation."""
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    # In place on one new tensor: five times faster than torchvision's conversion followed by its normalisation.
    result = torch.empty(images.shape, dtype=torch.float32, device=images.device).copy_(images)
    # Numbers, not tensors of constants, which a GPU's step would wait for as they come from the host.
    for channel, mean, std in zip(result.unbind(-3), MEAN, STD, strict=True):
        channel.mul_(1 / (scale * std)).sub_(mean / std)
    return result


def prepare(image: Tensor, short_side: int, max_side: int) -> Tensor:
    """Resize (bilinear, antialiased) and normalise for the model: [3, H, W] -> [3, h, w] float32."""
    size = resized_shape(*image.shape[-2:], short_side, max_side)
    return to_model_input(F.resize(image, list(size), antialias=True))
