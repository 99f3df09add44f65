"""`conddetr predict`: detect objects in images and videos, draw them, write them to files, and print counts."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from conddetr.commands.shared import print_chosen
from conddetr.config.checks import check_fraction, check_least
from conddetr.data.annotations import Annotations, read_annotations
from conddetr.detector import Detector
from conddetr.devices import find_device
from conddetr.engine.categories import category_ids_of
from conddetr.engine.progress import say
from conddetr.files import refuse_overwriting
from conddetr.prediction.results import (
    CocoDatasetFile,
    CocoResultsFile,
    CsvFile,
    ImageIds,
    ResultsFile,
    check_target,
    common_folder,
)
from conddetr.prediction.session import Session
from conddetr.prediction.sources import find_sources, is_video
from conddetr.prediction.video import opencv, shown_name
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
    session = Session(
        detector,
        sources,
        pictures,
        files,
        threshold=options.threshold,
        top_k=options.top_k,
        batch_size=options.batch_size,
        every=options.every or 1,
        max_frames=options.max_frames,
    )
    try:
        session.run()
    except KeyboardInterrupt:
        # The usual end of a camera.
        if not session.is_live:
            raise
    finally:
        _report(session, options)
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


def _report(session: Session, options: argparse.Namespace) -> None:
    """Print what was done, also after an exception."""
    for file in session.files:
        if file.is_complete:
            say(f"wrote {file.path}")
    timed = ["reading", "model"]
    timed += ["compilation"] if options.compile else []
    timed += ["drawing"] if session.pictures else []
    kind = "images and frames" if any(map(is_video, session.sources)) else "images"
    rate = session.images / session.seconds if session.seconds else 0.0
    counts = f"{session.images} {kind}, {session.objects} objects, {len(session.errors)} unreadable"
    say(f"{counts}; {rate:.1f} images/s ({', '.join(timed)})")
