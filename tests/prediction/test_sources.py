"""The files, folders, patterns and cameras that a command's words name."""

import pytest
from PIL import Image

from conddetr.prediction.sources import find_sources, is_video
from conddetr.viz.marks import has_marks, mark_mp4, marks


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder with images, a video, and other files, in subfolders too; it is in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos/b.jpg", "photos/a.PNG", "photos/[x].jpg", "photos/deep/er/c.jpg", "photos/.hidden.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    for name in ("photos/clip.mp4", "photos/notes.txt"):
        (tmp_path / name).write_bytes(b"not an image")
    return tmp_path / "photos"


def names(*words):
    return [source.as_posix() if not isinstance(source, str) else source for source in find_sources(words)]


def test_a_pattern_is_the_images_and_videos_that_it_matches(photos, capsys):
    assert names("photos/*.jpg") == ["photos/[x].jpg", "photos/b.jpg"]
    assert names("photos/**/*.jpg") == ["photos/[x].jpg", "photos/b.jpg", "photos/deep/er/c.jpg"]
    assert capsys.readouterr().out == ""
    every = ["photos/[x].jpg", "photos/a.PNG", "photos/b.jpg", "photos/clip.mp4", "photos/deep/er/c.jpg"]
    assert names("photos/**") == every
    assert capsys.readouterr().out == "photos/**: of 6 files, 1 are no images or videos and are skipped\n"
    assert [is_video(source) for source in find_sources(["photos/clip.mp4", "photos/b.jpg"])] == [True, False]
    # A file with brackets in its name is no pattern.
    assert names("photos/[x].jpg") == ["photos/[x].jpg"]


def test_videos_of_a_folder_are_counted_and_not_read(photos, capsys):
    assert names("photos") == ["photos/[x].jpg", "photos/a.PNG", "photos/b.jpg"]
    assert capsys.readouterr().out == "photos: 1 videos are not read, first clip.mp4: name them to read them\n"


def test_links_without_a_file_are_counted(photos, capsys):
    (photos / "deep/a.jpg").symlink_to("er/c.jpg")
    (photos / "deep/b.jpg").symlink_to("none.jpg")
    for word in ("photos/deep", "photos/deep/*.jpg"):
        assert names(word) == ["photos/deep/a.jpg"]
        assert capsys.readouterr().out == f"{word}: 1 links whose files do not exist are skipped\n"


def test_a_folder_of_videos_says_how_to_read_them(photos):
    (photos / "deep/clip.mp4").write_bytes(b"a video")
    with pytest.raises(FileNotFoundError, match="1 files, 1 of them videos: name those to read them"):
        find_sources(["photos/deep"])


def test_an_input_is_read_once(photos, capsys):
    assert names("photos/b.jpg", "photos/*.jpg", "photos/b.jpg") == ["photos/b.jpg", "photos/[x].jpg"]
    assert capsys.readouterr().out == "2 of 4 inputs are named twice: they are read once\n"


def test_drawings_of_predict_are_skipped(photos, capsys):
    mark_mp4(photos / "clip.mp4", marks("predict", photos / "source.avi"))
    assert has_marks(photos / "clip.mp4", marks("predict"))
    assert has_marks(photos / "clip.mp4", marks("predict", photos / "source.avi"))
    assert not has_marks(photos / "clip.mp4", marks("predict", photos / "other.avi"))
    assert names("photos/*p*") == ["photos/[x].jpg", "photos/b.jpg"]
    assert "photos/*p*: of 3 images and videos, 1 drawn by predict are skipped" in capsys.readouterr().out
    for content in (b"", b"free", b"free[1]", b"free\xff", b"free{}"):
        (photos / "clip.mp4").write_bytes(content)
        assert not has_marks(photos / "clip.mp4", marks("predict"))
    # As a file that may not be read.
    assert not any(has_marks(photos / name, marks("predict")) for name in ("none.mp4", "none.png"))


def test_cameras_and_addresses_are_kept_as_they_are(photos):
    words = ["camera:0", "rtsp://user:secret@host/path*", "http://host/a.mp4?x=[1]", "srt://host:9000"]
    assert names(*words) == words
    assert all(is_video(word) for word in find_sources(words))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("photos/none.jpg", r"Image file photos/none\.jpg does not exist"),
        ("photos/*.webp", r"Pattern photos/\*\.webp matches no image or video: 0 files"),
        ("photos/*.txt", r"Pattern photos/\*\.txt matches no image or video: 1 files"),
        ("photos/deep", "Folder photos/deep contains no image: 0 files"),
        ("camera:front", "Camera 'camera:front': expected camera:N with a number N"),
    ],
)
def test_a_word_without_a_source_is_an_error(photos, word, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        find_sources(["photos/b.jpg", word])
