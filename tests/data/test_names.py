"""Names of image files in the spellings of other systems and tools."""

import os

import pytest

from conddetr.data.names import find_image


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "Images" / "a b").mkdir(parents=True)
    for name in ("IMG_1.JPG", "a b/x.png", "100%25.png", "café.png", "ß.png"):
        (tmp_path / "Images" / name).write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("Images/IMG_1.JPG", "Images/IMG_1.JPG"),
        ("images/img_1.jpg", "Images/IMG_1.JPG"),
        ("Images\\IMG_1.JPG", "Images/IMG_1.JPG"),
        ("images\\img_1.jpg", "Images/IMG_1.JPG"),
        ("Images/a%20b/x.png", "Images/a b/x.png"),
        ("images\\A%20B\\X.png", "Images/a b/x.png"),
        # An existing name is used as it is: nothing in it is decoded.
        ("Images/100%25.png", "Images/100%25.png"),
        ("Images/cafe\u0301.png", "Images/café.png"),
    ],
)
def test_a_file_is_found_by_other_spellings(folder, name, file):
    assert find_image(folder, name) == folder / file


def test_an_ambiguous_name_is_refused(folder):
    (folder / "Images" / "img_1.jpg").write_text("")
    if len(os.listdir(folder / "Images")) == 5:
        pytest.skip("this file system does not distinguish the two names")
    assert find_image(folder, "Images/img_1.jpg").name == "img_1.jpg"
    with pytest.raises(ValueError, match=r"several files differ from it only in case: .*IMG_1"):
        find_image(folder, "Images/Img_1.jpg")


def test_missing_files_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"no\.png does not exist\.$"):
        find_image(folder, "no.png")
    with pytest.raises(FileNotFoundError, match=r"backslashes.*Nor does Images/no\.png"):
        find_image(folder, "Images\\no.png")
    for name in ("Images/IMG_1.JPG", "C:\\photos\\IMG_1.JPG", "http://example.org/IMG_1.JPG"):
        with pytest.raises(FileNotFoundError, match=r"IMG_1\.JPG exists: names must be relative to the folder"):
            find_image(folder / "Images", name)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        find_image(folder, "Images")


def test_a_new_file_is_found(folder):
    with pytest.raises(FileNotFoundError):
        find_image(folder, "NEW.png")
    (folder / "new.png").write_text("")
    assert find_image(folder, "NEW.png") == folder / "new.png"
