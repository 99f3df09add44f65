"""Frames of video files, cameras and network streams, and videos written from frames, by OpenCV."""

import contextlib
import itertools
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
import torch

from conddetr import interrupt
from conddetr.config.checks import check_least
from conddetr.detection import Frame
from conddetr.files import KeptFile
from conddetr.viz.marks import mark_mp4

log = logging.getLogger(__name__)

FALLBACK_FPS = 25.0
"""Frames per second of a written video if its source does not state them."""
HIGHEST_FPS = 500.0
"""Largest stated frames per second that are used. Some streams state the rate of their clock instead: 1000, 90000."""
MISSING_FRAMES = 0.02
"""Fraction of the announced frames that may be missing: some formats announce an estimate."""
CAMERA = re.compile(r"camera:\d+", re.IGNORECASE)
"""Name of the N-th camera of this machine, from 0."""


class VideoError(ValueError):
    """A video cannot be opened, is damaged, or has frames of several sizes."""


def opencv() -> ModuleType:
    """OpenCV's module.

    Raises:
        ImportError: not installed.
    """
    # FFmpeg's own messages would precede ours on the standard error.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    try:
        import cv2
    except ImportError as error:
        raise ImportError("Videos and cameras need OpenCV: pip install 'conddetr[video]'.") from error
    return cv2


def shown_name(source: str | Path) -> str:
    """The name of a source without the user and the password of an address."""
    return re.sub(r"://[^/]*@", "://", str(source))


def _encoded_path(path: str | Path) -> bytes:
    """A file's path for OpenCV: FFmpeg takes a colon in a relative path for the end of a protocol's name, and OpenCV
    crashes on a `str` that is not Unicode.
    """
    return os.fsencode(os.path.abspath(path))


class Video:
    """The frames of a video file, a camera or a network stream, as an iterable of `Frame`, once.

    Close it, or use it in a `with` block.
    """

    def __init__(self, source: str | Path, every: int = 1, max_frames: int | None = None) -> None:
        """
        Args:
            source: a file; `camera:N`, the N-th camera from 0; or an address that OpenCV reads, such as `rtsp://…`. A
                `Path` is always a file.
            every: yield every n-th frame, from the first one on.
            max_frames: yield at most this many frames; default: all.

        Raises:
            ImportError: OpenCV is not installed: `pip install 'conddetr[video]'`.
            FileNotFoundError: no such file.
            VideoError: OpenCV cannot open it.
            ValueError: a number below 1.
        """
        check_least("every", every, 1)
        if max_frames is not None:
            check_least("max_frames", max_frames, 1)
        self.name = shown_name(source)
        """The source without a password."""
        self._every, self._max_frames = every, max_frames
        self._cv2 = opencv()
        self._is_camera = isinstance(source, str) and CAMERA.fullmatch(source) is not None
        self._is_file = isinstance(source, Path) or not (self._is_camera or "://" in source)
        self._capture = self._opened(source)
        announced = self._capture.get(self._cv2.CAP_PROP_FRAME_COUNT)
        self._announced = int(announced) if math.isfinite(announced) and announced > 0 else None
        fps = self._capture.get(self._cv2.CAP_PROP_FPS)
        is_usable = 0 < fps <= HIGHEST_FPS
        if self._is_file and not is_usable:
            log.warning("Video %s states %g frames per second: %g are used instead.", self.name, fps, FALLBACK_FPS)
        self.fps = (fps if is_usable else FALLBACK_FPS) / every
        """Yielded frames per second, as the source states them; `FALLBACK_FPS / every` if it does not."""
        self.read = 0
        """Frames read so far, with those that `every` skips."""

    @property
    def is_live(self) -> bool:
        """Whether it has no known end: a camera or a stream."""
        return not self._is_file and self._announced is None

    @property
    def total(self) -> int | None:
        """Number of frames that will be yielded, as announced; None: not known."""
        if self._announced is None:
            return self._max_frames
        total = -(-self._announced // self._every)
        return total if self._max_frames is None else min(total, self._max_frames)

    def __iter__(self) -> Iterator[Frame]:
        """
        Raises:
            VideoError: no frame can be read, fewer than announced, or a camera stops before `max_frames`.
        """
        start, seconds = 0.0, -1 / self.fps
        for yielded in itertools.count():
            if yielded == self._max_frames:
                return
            pixels = self._next_pixels()
            if pixels is None:
                break
            now = time.monotonic()
            start = start if yielded else now
            seconds = now - start if self.is_live else self._stored_time(seconds)
            rgb = torch.from_numpy(self._cv2.cvtColor(pixels, self._cv2.COLOR_BGR2RGB)).permute(2, 0, 1)
            yield Frame(self.name, self.read, seconds, rgb)
            self.read += 1
        self._check_complete()

    def _next_pixels(self) -> np.ndarray | None:
        """The next frame that is yielded, [H, W, 3] BGR; None at the end."""
        # Frames in between are not decoded.
        while self.read % self._every:
            if not self._capture.grab():
                return None
            self.read += 1
        is_read, pixels = self._capture.read()
        return pixels if is_read else None

    def _stored_time(self, previous: float) -> float:
        """Time of the current frame in seconds, from the time of the frame that was yielded before it."""
        stored = float(self._capture.get(self._cv2.CAP_PROP_POS_MSEC)) / 1000
        # OpenCV returns 0 if a frame has no time, such as the last one of an MPEG-1 file.
        return stored if stored > previous else previous + 1 / self.fps

    def _check_complete(self) -> None:
        if not self.read:
            raise VideoError(f"Video {self.name}: no frame can be read.")
        if self._is_camera:
            raise VideoError(f"Video {self.name}: the camera stopped after {self.read} frames.")
        if self._announced and self.read < min(self._announced - 1, (1 - MISSING_FRAMES) * self._announced):
            raise VideoError(
                f"Video {self.name}: truncated or damaged: {self.read} of about {self._announced} frames can be read."
            )

    def _opened(self, source: str | Path) -> Any:
        if self._is_camera:
            address: int | bytes = int(str(source).partition(":")[2])
        elif self._is_file and not Path(source).is_file():
            raise FileNotFoundError(f"Video file {source} does not exist.")
        else:
            address = _encoded_path(source) if self._is_file else os.fsencode(source)
        capture = self._cv2.VideoCapture(address)
        if not capture.isOpened():
            kind = "a video" if self._is_file else "a camera or a stream"
            raise VideoError(f"Video {self.name}: OpenCV cannot open it: expected {kind} that it can read.")
        return capture

    def close(self) -> None:
        """Free the file or the camera."""
        self._capture.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class VideoFile(KeptFile):
    """A video in an MP4 file, written frame by frame; also complete after an interruption."""

    def __init__(
        self, path: Path, fps: float, height: int, width: int, is_live: bool, marks: Mapping[str, str]
    ) -> None:
        """
        Args:
            path: ending in `.mp4`.
            fps: frames per second.
            height, width: of every frame, in pixels. OpenCV leaves out the last row or column of an odd size.
            is_live: repeat frames such that the video has the speed of their times: a detector may be slower than a
                camera.
            marks: for `conddetr.viz.marks.has_marks`.
        """
        super().__init__(path, path.with_name(f"{path.stem}.partial.mp4"))
        self._fps, self._size, self._is_live, self._marks = fps, (width, height), is_live, marks
        self._cv2 = opencv()
        self._written = 0

    def _open(self, partial: Path, stack: contextlib.ExitStack) -> None:
        stack.callback(mark_mp4, partial, dict(self._marks))
        codec = self._cv2.VideoWriter_fourcc(*"mp4v")
        self._writer = self._cv2.VideoWriter(_encoded_path(partial), codec, self._fps, self._size)
        stack.callback(self._writer.release)
        if not self._writer.isOpened():
            raise OSError(f"{self.path} could not be written: OpenCV cannot write MP4 files here.")

    def add(self, pixels: np.ndarray, seconds: float) -> None:
        """Append a frame.

        Args:
            pixels: [H, W, 3] uint8, RGB.
            seconds: its time since the first frame; only of live sources.

        Raises:
            VideoError: another size than the file's.
        """
        height, width = pixels.shape[:2]
        if (width, height) != self._size:
            expected = f"{self._size[1]}×{self._size[0]}"
            raise VideoError(f"{self.path}: expected frames of {expected} pixels as the first, got {height}×{width}.")
        repeats = max(1, round(seconds * self._fps) + 1 - self._written) if self._is_live else 1
        bgr = self._cv2.cvtColor(pixels, self._cv2.COLOR_RGB2BGR)
        with interrupt.deferred():
            for _ in range(repeats):
                self._writer.write(bgr)
            self._written += repeats
