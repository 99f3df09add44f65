"""Images of every kind into one form: [3, H, W] RGB tensors."""

import math
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as F

MEAN = (0.485, 0.456, 0.406)
"""ImageNet's RGB mean, of values in [0, 1]."""
STD = (0.229, 0.224, 0.225)
"""ImageNet's RGB standard deviation."""

REDUCED_DECODING_GAP = 2.0
"""A JPEG may be decoded at a lower resolution as long as that is this many times what is needed."""
_ORIENTATION = 0x0112
_TRANSPOSED = (5, 6, 7, 8)
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
"""What turns an image with that orientation tag upright; other values mean nothing."""

ImageLike = str | Path | Image.Image | np.ndarray | Tensor


def read_image(source: ImageLike) -> Tensor:
    """Any image as an RGB tensor, upright.

    Args:
        source: a file; a PIL image of any mode; an array [H, W] or [H, W, 1 | 3 | 4], RGB; a tensor [1 | 3, H, W].
            Arrays and tensors are uint8, uint16 or floating in [0, 1].

    Returns:
        [3, H, W], uint8 (float32 in [0, 1] if the source was floating).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image, damaged, or an unknown shape or dtype; names the file, what was expected and
            what was found.
        TypeError: none of the accepted types.
    """
    if isinstance(source, (str, Path)):
        return _read_file(Path(source))[0]
    if isinstance(source, Image.Image):
        return _from_pil(source)
    if isinstance(source, np.ndarray):
        array = source[..., None] if source.ndim == 2 else source
        if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
            raise ValueError(f"Image array: expected [H, W] or [H, W, 1 | 3 | 4], got shape {source.shape}.")
        return _from_tensor(torch.from_numpy(np.ascontiguousarray(array[..., :3])).permute(2, 0, 1))
    if isinstance(source, Tensor):
        if source.dim() != 3 or source.shape[0] not in (1, 3):
            raise ValueError(f"Image tensor: expected [1 | 3, H, W], got shape {tuple(source.shape)}.")
        return _from_tensor(source)
    raise TypeError(f"Image: expected a path, PIL image, numpy array or torch tensor, got {type(source).__name__}.")


def read_reduced(path: Path, height: int, width: int) -> tuple[Tensor, tuple[int, int]]:
    """An image file for a target smaller than it: a JPEG at 1/2, 1/4 or 1/8, which its cosine transform gives cheaply.

    Args:
        path: the file.
        height, width: what it will be resized to, in pixels, upright. The image returned is at least
            `REDUCED_DECODING_GAP` times as large, or of the file's own size.

    Returns:
        As `read_image`, and the height and width of the file, upright.

    Raises:
        FileNotFoundError, ValueError: as `read_image`.
    """
    return _read_file(path, (height, width))


def _read_file(path: Path, target: tuple[int, int] | None = None) -> tuple[Tensor, tuple[int, int]]:
    if not path.is_file():
        raise FileNotFoundError(f"Image file {path} does not exist.")
    try:
        with Image.open(path) as image:
            size = image.size
            transposed = _orientation(image) in _TRANSPOSED
            if target is not None:
                needed = tuple(math.ceil(REDUCED_DECODING_GAP * side) for side in target)
                # Formats other than JPEG ignore it. PIL counts columns first.
                image.draft(None, needed if transposed else needed[::-1])
            return _from_pil(image), size if transposed else size[::-1]
    except UnidentifiedImageError as error:
        raise ValueError(f"Image file {path}: not an image in a known format.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"Image file {path}: truncated or damaged ({error}).") from error


def _orientation(image: Image.Image) -> object:
    """The value of the EXIF tag, which can be anything; None without one."""
    try:
        return image.getexif().get(_ORIENTATION)
    except (struct.error, SyntaxError) as error:
        raise ValueError(f"its EXIF data can not be read: {error}") from error


def _from_pil(image: Image.Image) -> Tensor:
    # Not ImageOps.exif_transpose: it writes all tags anew and fails where one of them is damaged.
    orientation = _orientation(image)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    if image.mode.startswith("I"):
        return _from_tensor(torch.from_numpy(np.asarray(image).astype(np.uint16))[None])
    if image.mode == "F":
        return _from_tensor(torch.from_numpy(np.array(image, dtype=np.float32))[None])
    # Colours stay interleaved as PIL has them: torch resizes that layout fastest.
    image = image if image.mode == "RGB" else image.convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _from_tensor(image: Tensor) -> Tensor:
    if image.numel() == 0:
        raise ValueError(f"Image: expected at least one pixel, got shape {tuple(image.shape)}.")
    if image.dtype == torch.uint16:
        image = (image.to(torch.int32) // 257).to(torch.uint8)
    elif image.is_floating_point():
        low, high = image.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"Image: expected floating values in [0, 1], got {low:.4g}…{high:.4g}.")
        image = image.to(torch.float32)
    elif image.dtype != torch.uint8:
        raise ValueError(f"Image: expected uint8, uint16 or floating values, got {image.dtype}.")
    return image.expand(3, -1, -1)


def resized_shape(height: int, width: int, short_side: int, max_side: int) -> tuple[int, int]:
    """(height, width) scaled to a short side, unless the long side would exceed `max_side`; at least 1 pixel."""
    scale = min(short_side / min(height, width), max_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def to_model_input(images: Tensor) -> Tensor:
    """[..., 3, H, W] uint8 or float in [0, 1] -> float32, normalised with ImageNet's mean and deviation."""
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    # In place on one new tensor: five times faster than torchvision's conversion and normalisation one after the other.
    result = torch.empty(images.shape, dtype=torch.float32, device=images.device).copy_(images)
    # By numbers, not by tensors of constants: those would come from the host, and a GPU's step would wait for them.
    for channel, mean, std in zip(result.unbind(-3), MEAN, STD, strict=True):
        channel.mul_(1 / (scale * std)).sub_(mean / std)
    return result


def prepare(image: Tensor, short_side: int, max_side: int) -> Tensor:
    """Resize (bilinear, antialiased) and normalise for the model: [3, H, W] -> [3, h, w] float32."""
    size = resized_shape(*image.shape[-2:], short_side, max_side)
    return to_model_input(F.resize(image, list(size), antialias=True))
