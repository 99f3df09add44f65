"""Frames of videos and cameras: numbers, times, damage, and videos written from frames."""

import itertools
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conddetr.prediction import video
from conddetr.prediction.video import Video, VideoError, VideoFile, shown_name
from conddetr.viz.marks import has_marks, marks

cv2 = pytest.importorskip("cv2", reason="videos need OpenCV (pip install 'conddetr[video]')")
FPS = 10.0
LOSS = 5
"""Largest error of a gray value by a codec, less than half the difference of two frames."""


def gray(index):
    return 10 + 12 * index


def write_video(path, count=20, codec="mp4v", size=(64, 48)):
    """Frame `index` is a uniform gray of `gray(index)`."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), FPS, size)
    assert writer.isOpened()
    for index in range(count):
        writer.write(np.full((size[1], size[0], 3), gray(index), np.uint8))
    writer.release()
    return path


def cut(path, fraction):
    """Remove the end of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    return path


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "mp4v"), ("a.avi", "MJPG"), ("a.mkv", "mp4v"), ("a.mov", "mp4v")]
)
def test_every_frame_is_read_with_its_number_and_time(name, codec, tmp_path):
    with Video(write_video(tmp_path / name, 20, codec)) as source:
        assert (source.total, source.is_live, source.fps) == (20, False, pytest.approx(FPS))
        frames = list(source)
    assert [frame.index for frame in frames] == list(range(20))
    assert [frame.seconds for frame in frames] == pytest.approx([index / FPS for index in range(20)], abs=1e-3)
    for frame in frames:
        assert frame.image.shape == (3, 48, 64)
        assert frame.image.float().mean() == pytest.approx(gray(frame.index), abs=LOSS)


@pytest.mark.parametrize("name", ["10:30.mp4", "http:a.mp4", "a%03d.mp4", "caf\udce9.mp4"])
def test_a_file_may_have_any_name(name, tmp_path, monkeypatch):
    """Also one that FFmpeg takes for an address, and one that is not Unicode."""
    monkeypatch.chdir(tmp_path)
    assert len(written(Path(name), [0.0] * 5, is_live=False)) == 5
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_frames_without_a_stored_time_follow_each_other(tmp_path):
    """A file of JPEG images has neither times nor a number of frames, and the last frame of MPEG-1 has no time."""
    images = (cv2.imencode(".jpg", np.full((48, 64, 3), gray(index), np.uint8))[1] for index in range(8))
    (tmp_path / "a.mjpeg").write_bytes(b"".join(image.tobytes() for image in images))
    with Video(tmp_path / "a.mjpeg", every=2) as source:
        assert (source.is_live, source.total) == (False, None)
        assert [frame.seconds for frame in source] == pytest.approx([index / source.fps for index in range(4)])
    writer = cv2.VideoWriter(str(tmp_path / "a.mpg"), cv2.VideoWriter_fourcc(*"PIM1"), 25.0, (64, 48))
    for _ in range(20):
        writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    with Video(tmp_path / "a.mpg") as source:
        assert [frame.seconds for frame in source] == pytest.approx([index / 25 for index in range(20)], abs=1e-3)


def test_frames_are_upright(tmp_path):
    """A phone stores how it was held as a matrix in the header of a track."""
    content = bytearray(write_video(tmp_path / "a.mp4").read_bytes())
    matrix = content.index(b"tkhd") + 44
    quarter_turn = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    content[matrix : matrix + len(quarter_turn)] = quarter_turn
    (tmp_path / "a.mp4").write_bytes(content)
    with Video(tmp_path / "a.mp4", max_frames=1) as source:
        assert [frame.image.shape for frame in source] == [(3, 64, 48)]


def test_frames_are_rgb(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "red.avi"), cv2.VideoWriter_fourcc(*"MJPG"), FPS, (64, 48))
    writer.write(np.full((48, 64, 3), (0, 0, 255), np.uint8))
    writer.release()
    with Video(tmp_path / "red.avi") as source:
        [frame] = source
    red, green, blue = frame.image.float().mean((1, 2))
    assert red > 240 > 20 > max(green, blue)


@pytest.mark.parametrize(
    ("every", "max_frames", "expected"),
    [(3, None, [0, 3, 6, 9, 12, 15, 18]), (1, 4, [0, 1, 2, 3]), (6, 2, [0, 6]), (50, None, [0]), (1, 99, range(20))],
)
def test_some_frames_are_read(every, max_frames, expected, tmp_path):
    with Video(write_video(tmp_path / "a.mp4"), every, max_frames) as source:
        assert source.total == len(expected)
        frames = list(source)
    assert [frame.index for frame in frames] == list(expected)
    assert all(frame.image.float().mean() == pytest.approx(gray(frame.index), abs=LOSS) for frame in frames)


def test_a_truncated_video_gives_its_frames_and_then_an_error(tmp_path):
    source = Video(cut(write_video(tmp_path / "a.avi", 20, "MJPG"), 0.8))
    frames = []
    with source, pytest.raises(VideoError, match=r"a\.avi: truncated or damaged: (\d+) of about 20 frames") as error:
        frames.extend(source)
    assert f"{len(frames)} of about" in str(error.value)
    assert 3 < len(frames) < 18
    # Frames before the damage are whole.
    with Video(tmp_path / "a.avi", max_frames=3) as source:
        assert [frame.index for frame in source] == [0, 1, 2]


def test_what_is_no_video_is_an_error(tmp_path):
    with pytest.raises(VideoError, match=r"a\.mp4: OpenCV cannot open it: expected a video"):
        Video(cut(write_video(tmp_path / "a.mp4"), 0.6))
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(VideoError, match="OpenCV cannot open it"):
        Video(tmp_path / "text.mp4")
    with pytest.raises(FileNotFoundError, match=r"none\.mp4 does not exist"):
        Video(tmp_path / "none.mp4")
    with pytest.raises(VideoError, match="camera:99: OpenCV cannot open it: expected a camera"):
        Video("camera:99")
    with pytest.raises(ValueError, match="every: expected at least 1, got 0"):
        Video(tmp_path / "text.mp4", every=0)
    with pytest.raises(ValueError, match="max_frames: expected at least 1, got 0"):
        Video(tmp_path / "text.mp4", max_frames=0)


def test_a_video_without_frames_is_an_error(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4")
    source = Video(path)
    monkeypatch.setattr(source, "_capture", Camera([]))
    with pytest.raises(VideoError, match=r"a\.mp4: no frame can be read"):
        list(source)


class Camera:
    """Stands in for OpenCV's `VideoCapture` of a camera."""

    def __init__(self, frames, fps=0.0):
        self.frames, self.fps, self.is_released = iter(frames), fps, False

    def isOpened(self):  # noqa: N802
        return True

    def get(self, prop):
        return {cv2.CAP_PROP_FRAME_COUNT: -1.0, cv2.CAP_PROP_FPS: self.fps}.get(prop, 0.0)

    def grab(self):
        return next(self.frames, None) is not None

    def read(self):
        frame = next(self.frames, None)
        return frame is not None, frame

    def release(self):
        self.is_released = True


def test_a_camera_has_no_known_end(monkeypatch):
    opened = []

    def capture(source):
        opened.append(source)
        return Camera(np.full((48, 64, 3), index, np.uint8) for index in range(1000))

    monkeypatch.setattr(cv2, "VideoCapture", capture)
    with Video("camera:2", max_frames=5, every=2) as source:
        assert (source.name, source.is_live, source.total, source.fps) == ("camera:2", True, 5, video.FALLBACK_FPS / 2)
        frames = list(source)
        device = source._capture
    assert opened == [2]
    assert [frame.index for frame in frames] == [0, 2, 4, 6, 8]
    assert [frame.image[0, 0, 0].item() for frame in frames] == [0, 2, 4, 6, 8]
    seconds = [frame.seconds for frame in frames]
    assert seconds == sorted(seconds)
    assert seconds[0] == 0
    assert device.is_released


def test_time_begins_with_the_first_frame_of_a_camera(monkeypatch):
    """A camera may need seconds for its first frame."""
    clock = itertools.count()
    monkeypatch.setattr(video.time, "monotonic", lambda: float(next(clock)))

    def slow_frames():
        for _ in range(10):
            next(clock)
        for _ in range(3):
            yield np.zeros((48, 64, 3), np.uint8)

    monkeypatch.setattr(cv2, "VideoCapture", lambda _: Camera(slow_frames()))
    assert [frame.seconds for frame in Video("camera:0", max_frames=3)] == [0, 1, 2]


def test_a_camera_that_stops_is_an_error(monkeypatch):
    monkeypatch.setattr(cv2, "VideoCapture", lambda _: Camera([np.zeros((48, 64, 3), np.uint8)] * 5))
    frames = []
    with pytest.raises(VideoError, match="camera:0: the camera stopped after 5 frames"):
        frames.extend(Video("camera:0"))
    assert len(frames) == 5
    # A stream may end.
    assert len(list(Video("rtsp://host/a"))) == 5


@pytest.mark.parametrize(
    ("stated", "used"), [(30.0, 30.0), (0.0, 25.0), (float("nan"), 25.0), (-1.0, 25.0), (90000.0, 25.0)]
)
def test_frames_per_second_that_no_camera_has_are_not_used(stated, used, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cv2, "VideoCapture", lambda _: Camera([], stated))
    assert Video("camera:0").fps == used
    # Frames of a camera have the time of the clock; those of a file have none but this.
    assert not caplog.messages
    (tmp_path / "a.mp4").touch()
    assert Video(tmp_path / "a.mp4").fps == used
    assert len(caplog.messages) == (stated != used)


def test_a_password_is_not_shown():
    assert shown_name("rtsp://user:secret@host:554/path") == "rtsp://host:554/path"
    assert shown_name("rtsp://user:p@ss@host/path@2") == "rtsp://host/path@2"
    assert shown_name("camera:0") == "camera:0"


def test_a_missing_opencv_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"pip install 'conddetr\[video\]'"):
        Video(tmp_path / "a.mp4")


def written(path, times, is_live, fail_at=None):
    """Write a frame for each time, and return the gray values of all frames in the file."""
    texts = marks("predict", path)
    with VideoFile(path, FPS, 48, 64, is_live, texts) as file:
        for index, seconds in enumerate(times):
            if index == fail_at:
                raise KeyboardInterrupt
            file.add(np.full((48, 64, 3), gray(index), np.uint8), seconds)
    return grays(path)


def grays(path):
    with Video(path) as source:
        return [frame.image.float().mean().item() for frame in source]


def test_a_written_video_has_the_frames(tmp_path):
    path = tmp_path / "out" / "a.mp4"
    assert written(path, [0.0] * 12, is_live=False) == pytest.approx([gray(index) for index in range(12)], abs=LOSS)
    assert has_marks(path, marks("predict", path))
    assert [file.name for file in path.parent.iterdir()] == ["a.mp4"]


def test_frames_of_odd_sizes_are_written(tmp_path):
    with VideoFile(tmp_path / "a.mp4", FPS, 49, 65, False, {}) as file:
        for index in range(4):
            file.add(np.full((49, 65, 3), gray(index), np.uint8), 0.0)
    assert grays(tmp_path / "a.mp4") == pytest.approx([gray(index) for index in range(4)], abs=LOSS)


def test_frames_of_a_slow_detector_are_repeated(tmp_path):
    """The video of a camera has the camera's speed."""
    values = written(tmp_path / "a.mp4", [0.0, 0.31, 0.35, 0.8], is_live=True)
    assert values == pytest.approx([gray(index) for index in (0, 1, 1, 1, 2, 3, 3, 3, 3)], abs=LOSS)


def test_an_interrupted_video_is_complete(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "a.mp4", [0.0] * 12, is_live=False, fail_at=7)
    assert len(grays(tmp_path / "a.mp4")) == 7


def test_frames_of_another_size_are_refused(tmp_path):
    """OpenCV would leave them out silently."""
    with VideoFile(tmp_path / "a.mp4", FPS, 48, 64, False, {}) as file:
        file.add(np.zeros((48, 64, 3), np.uint8), 0.0)
        with pytest.raises(VideoError, match=r"expected frames of 48×64 pixels as the first, got 50×64"):
            file.add(np.zeros((50, 64, 3), np.uint8), 0.0)


def test_frames_are_images_of_a_stream(tmp_path, tiny_model):
    import conddetr

    detector = conddetr.Detector(tiny_model, [{"id": number, "name": str(number)} for number in range(3)], "cpu")
    with Video(write_video(tmp_path / "a.mp4", 5), every=2) as source:
        predictions = list(detector.predict_stream(source, 0.0, batch_size=2))
    assert [prediction.source.index for prediction in predictions] == [0, 2, 4]
    assert {prediction.name for prediction in predictions} == {str(tmp_path / "a.mp4")}
    image = torch.full((3, 48, 64), gray(2), dtype=torch.uint8)
    assert (predictions[1].image.float() - image.float()).abs().max() <= LOSS
    assert len(predictions[1].detection) == 75
