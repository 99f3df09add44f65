"""Detection on a stream of images: reading ahead in threads, and batches of images of one resized shape.

Padding changes the features near an image's border, because frozen norms turn its zeros into other values. So a batch
holds only images that are resized to one shape, and no image is padded. Results then depend on the batch size only by
rounding.
"""

import contextlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from conddetr.data.images import prepare, read_image, resized_shape
from conddetr.detection import Detection, Frame, Prediction
from conddetr.engine.precision import autocast
from conddetr.model.detr import DETR
from conddetr.model.postprocess import postprocess
from conddetr.processes import cores

READERS = 4
"""Largest number of threads that read images."""
LEAST_AHEAD = 8
"""Smallest default number of images in memory."""
BATCHES_AHEAD = 4
"""Default number of images in memory, in batches: images of several shapes fill batches better if there are more."""


@dataclass(frozen=True)
class Inference:
    """A model with everything that turns images into detections."""

    model: DETR
    device: torch.device
    precision: str
    """`float32` or `bfloat16`, for `autocast`."""
    classes: Sequence[dict[str, Any]]
    threshold: float
    """Smallest score to keep."""
    top_k: int

    def shape(self, image: Tensor) -> tuple[int, int]:
        """Height and width to which an image [3, H, W] is resized."""
        config = self.model.config
        return resized_shape(image.shape[-2], image.shape[-1], config.image_size, config.max_image_size)

    @torch.inference_mode()
    def detect(self, images: Sequence[Tensor]) -> list[Detection]:
        """Detections of images [3, H, W], all of one resized shape, in one batch.

        Raises:
            ValueError: the model is compiled, and the compilation fails.
        """
        batch = torch.stack([model_input(self.model, image, self.device) for image in images])
        with autocast(self.model, self.precision), _compilation_errors(self.model):
            output = self.model(batch)
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        rows = postprocess(output, sizes, self.top_k, self.model.config.activation)
        # One copy for the whole batch, because each waits for the device.
        columns = {key: torch.stack([row[key] for row in rows]).cpu() for key in rows[0]}
        rows = [{key: column[index] for key, column in columns.items()} for index in range(len(images))]
        return [detection_of(row, row["scores"] >= self.threshold, self.classes) for row in rows]


def model_input(model: DETR, image: Tensor, device: torch.device) -> Tensor:
    """Pixels [3, h, w] in the model's dtype, from an image [3, H, W] as `read_image` returns it."""
    config = model.config
    return prepare(image.to(device), config.image_size, config.max_image_size).to(model.dtype)


def detection_of(rows: dict[str, Tensor], keep: Tensor | list[int], classes: Sequence[dict[str, Any]]) -> Detection:
    """Some of the rows of one image's result of `postprocess`, on the CPU."""
    scores, labels, boxes, queries = (rows[key][keep].cpu() for key in ("scores", "labels", "boxes", "queries"))
    return Detection(scores, labels, boxes, queries, [classes[label]["name"] for label in labels.tolist()])


@contextlib.contextmanager
def _compilation_errors(model: DETR) -> Iterator[None]:
    """Turn the compiler's errors into one line, if the model is compiled."""
    if model._compiled_call_impl is None:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = " ".join(str(error).strip().partition("\n\n")[0].split())
        raise ValueError(f"compile: torch.compile cannot compile the model ({reason}): run without it.") from error


def images_ahead(batch_size: int) -> int:
    """Default number of images of a stream that are in memory."""
    return max(LEAST_AHEAD, BATCHES_AHEAD * batch_size)


def stream(inference: Inference, images: Iterable, batch_size: int, ahead: int) -> Generator[Prediction, None, None]:
    """Predictions of all images in their order; see `Detector.predict_stream`.

    The images of each batch depend on the images alone, not on the time that reading takes.
    """
    window = _Window(inference, batch_size)
    with _Reader(images) as reader:
        while True:
            while len(window.slots) < ahead:
                window.add(reader.read_next())
            window.complete_first()
            if window.slots[0].is_end:
                # Raises the error of the iterable if it failed.
                window.slots[0].taken.result()
                return
            yield window.slots.popleft().delivered()


class _Taken(NamedTuple):
    """An image that is being read."""

    source: Any
    position: int
    """In the stream, from 0."""
    image: Future[Tensor]


@dataclass
class _Slot:
    """An image in memory, or the end of the stream."""

    taken: Future[_Taken | None]
    """None at the end; an error if the iterable of the images fails."""
    image: Tensor | None = None
    shape: tuple[int, int] = (0, 0)
    """Resized shape of the image."""
    result: Detection | None = None
    is_end: bool = False
    error: BaseException | None = None
    """Why the image cannot be read."""

    @property
    def is_complete(self) -> bool:
        return self.is_end or self.error is not None or self.result is not None

    def delivered(self) -> Prediction:
        taken = self.taken.result()
        assert taken is not None
        if self.error is not None and not isinstance(self.error, Exception):
            raise self.error
        return Prediction(taken.source, taken.position, self.image, self.result, self.error)


class _Window:
    """The images in memory: those that are read and wait for a batch, and results that wait for an earlier image."""

    def __init__(self, inference: Inference, batch_size: int) -> None:
        self.slots: deque[_Slot] = deque()
        """In the order of the stream."""
        self._inference, self._batch_size = inference, batch_size
        self._unsorted: deque[_Slot] = deque()
        self._groups: dict[tuple[int, int], list[_Slot]] = {}
        """Images that wait for a batch, by resized shape."""

    def add(self, taken: Future[_Taken | None]) -> None:
        """Add the next image."""
        self.slots.append(_Slot(taken))
        self._unsorted.append(self.slots[-1])

    def complete_first(self) -> None:
        """Run batches until the first image has its result. It waits for other images of its shape in the window."""
        while not self.slots[0].is_complete:
            if self._unsorted:
                self._sort(self._unsorted.popleft())
            else:
                self._run(self.slots[0].shape)

    def _sort(self, slot: _Slot) -> None:
        """Wait until an image is read, add it to its group, and run the group if it is a full batch."""
        if slot.taken.exception() is not None or (taken := slot.taken.result()) is None:
            slot.is_end = True
            return
        slot.error = taken.image.exception()
        if slot.error is not None:
            return
        slot.image = taken.image.result()
        slot.shape = self._inference.shape(slot.image)
        group = self._groups.setdefault(slot.shape, [])
        group.append(slot)
        if len(group) == self._batch_size:
            self._run(slot.shape)

    def _run(self, shape: tuple[int, int]) -> None:
        group = self._groups.pop(shape)
        detections = self._inference.detect([slot.image for slot in group if slot.image is not None])
        for slot, detection in zip(group, detections, strict=True):
            slot.result = detection


class _Reader:
    """Takes images from an iterable in one thread and reads them in others, within a `with` block."""

    def __init__(self, images: Iterable) -> None:
        self._images = enumerate(images)
        self._taker = ThreadPoolExecutor(1, "conddetr-take")
        self._readers = ThreadPoolExecutor(min(READERS, cores()), "conddetr-read")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # In this order, because the running take starts a read.
        self._taker.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)

    def read_next(self) -> Future[_Taken | None]:
        """Start to take and read the next image."""
        return self._taker.submit(self._take)

    def _take(self) -> _Taken | None:
        for position, source in self._images:
            return _Taken(source, position, self._readers.submit(_read, source))
        return None


def _read(source: Any) -> Tensor:
    return read_image(source.image if isinstance(source, Frame) else source)
