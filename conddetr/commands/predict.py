"""`conddetr predict`."""

import argparse
import contextlib
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np

from conddetr.commands.shared import print_chosen
from conddetr.config.checks import check_fraction, check_least
from conddetr.data.annotations import Annotations, read_annotations
from conddetr.data.sources import find_sources, is_video
from conddetr.data.video import Video, VideoError, VideoFile, opencv, shown_name
from conddetr.detection import Detection, Frame, Prediction
from conddetr.detector import Detector
from conddetr.devices import find_device
from conddetr.engine.categories import category_ids_of
from conddetr.engine.progress import Progress, say
from conddetr.files import refuse_overwriting
from conddetr.results import (
    CocoDatasetFile,
    CocoResultsFile,
    CsvFile,
    ImageIds,
    ResultsFile,
    check_target,
    common_folder,
)
from conddetr.viz.boxes import detections_figure
from conddetr.viz.frames import drawn_frame
from conddetr.viz.pictures import PictureFolder

PICTURES = "runs/predict"
"""Default folder for pictures."""


def run(options: argparse.Namespace) -> None:
    _check_values(options)
    sources = find_sources(options.images)
    _check_videos(options, [source for source in sources if is_video(source)])
    _check_files(options, sources)
    pictures = None if options.no_pictures else PictureFolder(options.out or PICTURES, "predict", sources)
    annotations = options.annotations and _annotations(options.annotations, sources)
    detector = _load(options)
    files = [_results_file(path, detector, sources, annotations, options) for path in options.results]
    session = _Session(detector, options, sources, pictures, files)
    try:
        session.run()
    except KeyboardInterrupt:
        # The usual end of a camera.
        if not session.is_live:
            raise
    finally:
        session.report()
    session.raise_errors()


def _check_values(options: argparse.Namespace) -> None:
    check_fraction("threshold", options.threshold)
    check_least("top_k", options.top_k, 1)
    check_least("batch_size", options.batch_size, 1)
    for name in ("every", "max_frames"):
        if getattr(options, name) is not None:
            check_least(name, getattr(options, name), 1)
    if options.no_pictures and options.out:
        raise ValueError(f"--out {options.out}: nothing is written there with --no-pictures.")
    if options.annotations and not any(path.lower().endswith(".json") for path in options.results):
        raise ValueError("--annotations: it gives the image ids of --results FILE.json, which is not given.")
    if options.classes_by_name and not options.annotations:
        raise ValueError("--classes-by-name: it matches the classes of --annotations, which is not given.")
    if options.graphs and options.compile:
        raise ValueError("--graphs and --compile: expected at most one of them.")
    for name in ("graphs", "compile"):
        if getattr(options, name) and options.backend == "eager":
            raise ValueError(f"--{name}: expected another backend than eager, the reference in plain PyTorch.")
    if options.graphs and (device := find_device(options.device)).type != "cuda":
        raise ValueError(f"--graphs: CUDA graphs need an NVIDIA GPU, got the device {device}.")


def _check_videos(options: argparse.Namespace, videos: Sequence[str | Path]) -> None:
    if videos:
        opencv()
    for name in ("every", "max_frames"):
        if getattr(options, name) is not None and not videos:
            raise ValueError(f"--{name.replace('_', '-')}: expected a video or a camera, got only images.")
    if videos and options.annotations:
        raise ValueError(f"--annotations: {shown_name(videos[0])} has no image ids: it is for images only.")


def _check_files(options: argparse.Namespace, sources: Sequence[str | Path]) -> None:
    live = [source for source in sources[:-1] if isinstance(source, str)]
    if live and options.max_frames is None:
        raise ValueError(
            f"{shown_name(live[0])}: expected a camera or a stream as the last input, because Ctrl-C ends it and the "
            "command; or add --max-frames."
        )
    read = [options.checkpoint, options.annotations, *(source for source in sources if isinstance(source, Path))]
    for number, path in enumerate(options.results):
        check_target("--results", path)
        refuse_overwriting("--results", path, [*read, *options.results[:number]])


def _annotations(file: str, sources: Sequence[str | Path]) -> Annotations:
    """The annotations, which must have every image."""
    annotations = read_annotations(file, needs_boxes=False)
    ids = ImageIds(annotations)
    for source in sources:
        ids.of(str(source))
    return annotations


def _load(options: argparse.Namespace) -> Detector:
    source = options.checkpoint, options.preset, options.device, options.backend, options.precision
    detector = Detector.from_checkpoint(*source)
    print_chosen(detector, detector.device)
    if options.backend == "eager":
        return detector
    return detector.fused(graphs=options.graphs, compile=options.compile)


def _results_file(
    path: str,
    detector: Detector,
    sources: Sequence[str | Path],
    annotations: Annotations | None,
    options: argparse.Namespace,
) -> ResultsFile:
    if path.lower().endswith(".csv"):
        return CsvFile(path)
    if annotations is None:
        images = [source for source in sources if isinstance(source, Path) and not is_video(source)]
        return CocoDatasetFile(path, detector.classes, common_folder(images))
    category_ids = category_ids_of(detector.classes, annotations.categories, options.classes_by_name)
    return CocoResultsFile(path, ImageIds(annotations), category_ids)


@dataclass
class _Session:
    """Detection on all inputs: what is read, drawn, written and counted."""

    detector: Detector
    options: argparse.Namespace
    sources: Sequence[str | Path]
    pictures: PictureFolder | None
    files: Sequence[ResultsFile]
    images: int = 0
    """Images and frames with a result."""
    objects: int = 0
    errors: list[Exception] = field(default_factory=list)
    """Of the inputs that cannot be read."""
    seconds: float = 0.0
    is_live: bool = False
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

    def _predictions(self, images: Iterable) -> contextlib.closing[Generator[Prediction, None, None]]:
        options = self.options
        return contextlib.closing(
            self.detector.predict_stream(images, options.threshold, options.top_k, options.batch_size)
        )

    def _read_images(self, paths: Sequence[Path]) -> None:
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
            file = self.pictures.save(detections_figure(prediction.image, *boxes), prediction.source)
            line += f"; wrote {file}"
        say(line)

    def _count(self, prediction: Prediction) -> Detection:
        detection = prediction.detection
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
            with Video(source, self.options.every or 1, self.options.max_frames) as video:
                self.is_live = video.is_live
                self._read_frames(source, video)
        except VideoError as error:
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
        if len(self.sources) > 1:
            say(line)

    def report(self) -> None:
        """Print what was done, also after an exception."""
        for file in self.files:
            if file.is_complete:
                say(f"wrote {file.path}")
        timed = ["reading", "model"]
        timed += ["compilation"] if self.options.compile else []
        timed += ["drawing"] if self.pictures else []
        kind = "images and frames" if any(map(is_video, self.sources)) else "images"
        rate = self.images / self.seconds if self.seconds else 0.0
        counts = f"{self.images} {kind}, {self.objects} objects, {len(self.errors)} unreadable"
        say(f"{counts}; {rate:.1f} images/s ({', '.join(timed)})")

    def raise_errors(self) -> None:
        """Raise the first error of an input."""
        if self.errors:
            total = len(self.sources)
            prefix = f"{len(self.errors)} of {total} inputs cannot be read, first: " if total > 1 else ""
            raise ValueError(f"{prefix}{self.errors[0]}")


def _drawn(frame: Frame, detection: Detection) -> np.ndarray:
    return drawn_frame(frame.image, detection.boxes, detection.labels.tolist(), detection.captions)


def _video_file(pictures: PictureFolder, source: str | Path, video: Video, frame: Frame) -> VideoFile:
    height, width = frame.image.shape[-2:]
    path = pictures.video(source, video.name)
    return VideoFile(path, video.fps, height, width, video.is_live, pictures.marks(source))
