"""Decodes and augments images on the device that trains."""

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import decode_jpeg

from conddetr.data.batch import Batch, collate, interleaved
from conddetr.data.encoded import EncodedBatch, EncodedJpeg
from conddetr.data.images import TRANSPOSED, read_reduced
from conddetr.data.transforms import transform_images

log = logging.getLogger(__name__)


class DeviceDecoder:
    """Turns the batches of workers that only read files into batches on a device.

    On a GPU, nvJPEG decodes through torchvision (baseline files in the chip's JPEG engine, where it has one), and
    torchvision's transforms apply the plans. Files are decoded at their whole size. Pixels differ from those of the
    workers by rounding: of the inverse cosine transform, of the chroma planes' interpolation, and of the resize.
    """

    def __init__(self, device: torch.device) -> None:
        """
        Raises:
            ValueError: this device cannot decode JPEGs; the message says why.
        """
        self.device = device
        # Its own stream, so that decoding does not wait for the training step that is queued.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._has_warned = False
        try:
            decode_jpeg([_smallest_jpeg()], "RGB", device)
        except RuntimeError as error:
            raise ValueError(f"JPEG files cannot be decoded on {device}: {_first_line(error)}.") from error

    def __call__(self, encoded: EncodedBatch) -> Batch:
        """The batch, images on the device.

        Raises:
            ValueError: a file is damaged; names it.
        """
        with self._aside():
            jpegs = [file for image in encoded.images if isinstance(image, list) for file in image]
            pixels = iter(self._decoded(jpegs) if jpegs else [])
            images = [
                image.to(self.device)
                if isinstance(image, Tensor)
                else transform_images([_turned(next(pixels), file.orientation) for file in image], plan)
                for image, plan in zip(encoded.images, encoded.plans, strict=True)
            ]
            height, width = encoded.shape
            memory = torch.empty(len(images) * 3 * height * width, dtype=torch.uint8, device=self.device)
            batch = collate(zip(images, encoded.targets, strict=True), interleaved(memory, height, width))
        if self._stream is None:
            return batch
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        batch.images.record_stream(current)
        # Pinned, so that the step's copy of them does not wait.
        return replace(batch, sizes=batch.sizes.pin_memory())

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Work goes to the decoder's own stream."""
        if self._stream is None:
            yield
            return
        # torchvision decodes into new memory of the current stream without waiting for that stream, which may still
        # read what the memory held before. This stream holds nothing but the last batch's transforms.
        self._stream.synchronize()
        with torch.cuda.stream(self._stream):
            yield

    def _decoded(self, files: list[EncodedJpeg]) -> list[Tensor]:
        """[3, H, W] uint8 of each file as stored, on the device."""
        contents = [torch.frombuffer(bytearray(file.content), dtype=torch.uint8) for file in files]
        try:
            return decode_jpeg(contents, "RGB", self.device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # It does not say which file.
            if len(files) > 1:
                return [pixels for file in files for pixels in self._decoded([file])]
            return [self._decoded_on_host(files[0], error)]

    def _decoded_on_host(self, file: EncodedJpeg, why: RuntimeError) -> Tensor:
        try:
            pixels, _ = read_reduced(file.path, *file.stored, upright=False)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{error}{file.note}") from error
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "Image file %s cannot be decoded on %s (%s): it is decoded on the host, as other such files, which are "
                "not listed.",
                file.path,
                self.device,
                _first_line(why),
            )
        return pixels.to(self.device)


def _turned(pixels: Tensor, orientation: int) -> Tensor:
    """[3, H, W] as stored -> upright, by EXIF's orientation tag."""
    pixels = pixels.transpose(-2, -1) if orientation in TRANSPOSED else pixels
    rows, columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    dims = [dim for dim, is_flipped in ((-2, rows), (-1, columns)) if is_flipped]
    return pixels.flip(dims) if dims else pixels


def _smallest_jpeg() -> Tensor:
    """The bytes of a grey square, [n] uint8."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "grey").save(file, "jpeg")
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _first_line(error: RuntimeError) -> str:
    return (str(error).splitlines() or ["no reason given"])[0].rstrip(".")
