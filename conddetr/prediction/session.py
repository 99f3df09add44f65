"""Detection on images, videos and cameras: everything is read, drawn, written to files and counted."""

import contextlib
import functools
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from conddetr import interrupt
from conddetr.detection import Detection, Frame, Prediction
from conddetr.engine.progress import Progress, say
from conddetr.prediction.results import ResultsFile
from conddetr.prediction.sources import is_video
from conddetr.prediction.video import Video, VideoError, VideoFile
from conddetr.viz.pictures import PictureFolder
from conddetr.viz.pixels import drawn_frame, drawn_photo

if TYPE_CHECKING:
    from conddetr.detector import Detector

LISTED_IMAGES = 20
"""Maximum number of images that have a line each."""
LISTED_ERRORS = 20
"""Maximum number of inputs that cannot be read and have a line each; the others are counted."""


@dataclass
class Session:
    """Detection on all inputs. It prints a line for each video, for each input that cannot be read, up to
    `LISTED_ERRORS`, and for each image if there are at most `LISTED_IMAGES`.
    """

    detector: "Detector"
    sources: Sequence[str | Path]
    """As `find_sources` returns them."""
    pictures: PictureFolder | None
    """None: nothing is drawn."""
    files: Sequence[ResultsFile]
    threshold: float = 0.5
    top_k: int = 100
    batch_size: int = 1
    every: int = 1
    """Read every n-th frame of a video."""
    max_frames: int | None = None
    """Maximum number of frames of a video."""

    images: int = field(default=0, init=False)
    """Images and frames with a result."""
    objects: int = field(default=0, init=False)
    drawn: int = field(default=0, init=False)
    """Pictures of images."""
    errors: list[Exception] = field(default_factory=list, init=False)
    """Of all inputs that cannot be read."""
    seconds: float = field(default=0.0, init=False)
    is_live: bool = field(default=False, init=False)
    """Whether the input that is being read is a camera or a stream."""

    def run(self) -> None:
        """Read all inputs; the files are complete at the end, also after an exception."""
        start = time.perf_counter()
        try:
            with contextlib.ExitStack() as stack:
                for file in self.files:
                    stack.enter_context(file)
                for are_videos, group in groupby(self.sources, is_video):
                    if are_videos:
                        for source in group:
                            self._read_video(source)
                    else:
                        self._read_images([source for source in group if isinstance(source, Path)])
        finally:
            self.seconds = time.perf_counter() - start
            self._say_rest()

    @functools.cached_property
    def _lists_images(self) -> bool:
        return sum(not is_video(source) for source in self.sources) <= LISTED_IMAGES

    def _say_rest(self) -> None:
        """Print what has no line each."""
        if self.drawn and not self._lists_images and self.pictures is not None:
            say(f"wrote {self.drawn} pictures to {self.pictures.folder}")
        if len(self.errors) > LISTED_ERRORS:
            say(f"{len(self.errors) - LISTED_ERRORS} more inputs cannot be read")

    def raise_errors(self) -> None:
        """Raise the first error of an input.

        Raises:
            ValueError: some inputs cannot be read.
        """
        if self.errors:
            total = len(self.sources)
            prefix = f"{len(self.errors)} of {total} inputs cannot be read, first: " if total > 1 else ""
            raise ValueError(f"{prefix}{self.errors[0]}")

    def _predictions(self, images: Iterable) -> contextlib.closing[Generator[Prediction, None, None]]:
        return contextlib.closing(self.detector.predict_stream(images, self.threshold, self.top_k, self.batch_size))

    def _read_images(self, paths: Sequence[Path]) -> None:
        self.is_live = False
        with Progress("predict", len(paths)) as progress, self._predictions(paths) as predictions:
            for prediction in predictions:
                self._take_image(prediction)
                progress.advance(1)

    def _take_image(self, prediction: Prediction) -> None:
        if isinstance(prediction.error, (OSError, ValueError)):
            self._fail(prediction.error, f"{prediction.name}: left out: {prediction.error}")
            return
        detection = self._count(prediction)
        line = f"{prediction.name}: {len(detection)} objects"
        if self.pictures is not None and prediction.image is not None:
            boxes = detection.boxes, detection.labels.tolist(), detection.captions
            file = self.pictures.save_pixels(drawn_photo(prediction.image, *boxes), prediction.source)
            self.drawn += 1
            line += f"; wrote {file}"
        if self._lists_images:
            say(line)

    def _count(self, prediction: Prediction) -> Detection:
        detection = prediction.detection
        # All files and counts have the same images, also after Ctrl-C.
        with interrupt.deferred():
            for file in self.files:
                file.add(prediction)
            self.images += 1
            self.objects += len(detection)
        self._check_graphs()
        return detection

    def _check_graphs(self) -> None:
        """A graph was requested, so an error says if the first batch ran without one."""
        graphs = self.detector.model.graphs
        if self.images == 1 and graphs is not None and not len(graphs):
            raise ValueError(
                f"--graphs: no CUDA graph was recorded ({graphs.refused or 'the warning above says why'})."
            )

    def _read_video(self, source: str | Path) -> None:
        try:
            with Video(source, self.every, self.max_frames) as video:
                self.is_live = video.is_live
                self._read_frames(source, video)
        # A file may vanish before its turn.
        except (VideoError, FileNotFoundError) as error:
            self._fail(error, str(error))

    def _read_frames(self, source: str | Path, video: Video) -> None:
        before, drawn = (self.images, self.objects), None
        try:
            with contextlib.ExitStack() as stack:
                progress = stack.enter_context(Progress(video.name, video.total))
                for prediction in stack.enter_context(self._predictions(video)):
                    detection = self._count(prediction)
                    if self.pictures is not None:
                        drawn = drawn or stack.enter_context(
                            _video_file(self.pictures, source, video, prediction.source)
                        )
                        drawn.add(_drawn(prediction.source, detection), prediction.source.seconds)
                    progress.advance(1)
        finally:
            frames, objects = self.images - before[0], self.objects - before[1]
            wrote = f"; wrote {drawn.path}" if drawn is not None and drawn.is_complete else ""
            say(f"{video.name}: {frames} frames, {objects} objects{wrote}")

    def _fail(self, error: Exception, line: str) -> None:
        self.errors.append(error)
        if len(self.sources) > 1 and len(self.errors) <= LISTED_ERRORS:
            say(line)


def _drawn(frame: Frame, detection: Detection) -> np.ndarray:
    return drawn_frame(frame.image, detection.boxes, detection.labels.tolist(), detection.captions)


def _video_file(pictures: PictureFolder, source: str | Path, video: Video, frame: Frame) -> VideoFile:
    height, width = frame.image.shape[-2:]
    path = pictures.video(source, video.name)
    return VideoFile(path, video.fps, height, width, video.is_live, pictures.marks(source))
