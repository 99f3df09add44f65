"""Names of image files as other systems and tools write them."""

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
        # A name that is there is taken as it is: nothing is decoded in it.
        ("Images/100%25.png", "Images/100%25.png"),
        ("Images/cafe\u0301.png", "Images/café.png"),
    ],
)
def test_a_file_is_found_by_its_other_names(folder, name, file):
    assert find_image(folder, name) == folder / file


def test_a_name_of_two_files_is_refused(folder):
    (folder / "Images" / "img_1.jpg").write_text("")
    if len(os.listdir(folder / "Images")) == 5:
        pytest.skip("this file system does not tell the two names apart")
    assert find_image(folder, "Images/img_1.jpg").name == "img_1.jpg"
    with pytest.raises(ValueError, match=r"more than one differs in case alone: .*IMG_1"):
        find_image(folder, "Images/Img_1.jpg")


def test_what_is_not_there_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"no\.png does not exist\.$"):
        find_image(folder, "no.png")
    with pytest.raises(FileNotFoundError, match=r"backslashes.*Nor does it as Images/no\.png"):
        find_image(folder, "Images\\no.png")
    for name in ("Images/IMG_1.JPG", "C:\\photos\\IMG_1.JPG", "http://example.org/IMG_1.JPG"):
        with pytest.raises(FileNotFoundError, match=r"IMG_1\.JPG is there: names must be relative to the folder"):
            find_image(folder / "Images", name)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        find_image(folder, "Images")


def test_a_file_that_comes_later_is_found(folder):
    with pytest.raises(FileNotFoundError):
        find_image(folder, "NEW.png")
    (folder / "new.png").write_text("")
    assert find_image(folder, "NEW.png") == folder / "new.png"
