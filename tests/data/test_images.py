"""Images of every kind: right pixels, or an error that names the file."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from conddetr.data.images import prepare, read_image, resized_shape


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def chw(array):
    return torch.from_numpy(np.array(array)).permute(2, 0, 1)


def test_all_sources_agree(pixels, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    expected = chw(pixels)
    for source in (path, str(path), Image.fromarray(pixels), pixels, expected):
        assert torch.equal(read_image(source), expected)
    scaled = read_image(expected / 255)
    torch.testing.assert_close(scaled, expected / 255)


def test_grayscale(pixels, tmp_path):
    gray = pixels[..., 0]
    path = tmp_path / "gray.png"
    Image.fromarray(gray).save(path)
    expected = chw(np.stack([gray] * 3, axis=-1))
    for source in (path, gray, gray[..., None], torch.from_numpy(gray)[None]):
        assert torch.equal(read_image(source), expected)


def test_sixteen_bit_keeps_its_range(tmp_path):
    ramp = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    path = tmp_path / "deep.png"
    Image.fromarray(ramp).save(path)
    for source in (path, ramp, torch.from_numpy(ramp)[None]):
        found = read_image(source)
        assert torch.equal(found[0], torch.from_numpy((ramp // 257).astype(np.uint8)))


def test_cmyk_palette_and_alpha(pixels, tmp_path):
    image = Image.fromarray(pixels)
    for mode, name in (("CMYK", "c.jpg"), ("P", "p.png"), ("RGBA", "a.png"), ("LA", "la.png"), ("1", "b.png")):
        path = tmp_path / name
        converted = image.convert(mode)
        converted.save(path)
        with Image.open(path) as saved:
            expected = chw(np.asarray(saved.convert("RGB")))
        assert torch.equal(read_image(path), expected)


def test_exif_rotation_is_applied(pixels, tmp_path):
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # stored rotated: turn 90° clockwise to see it upright
    path = tmp_path / "rotated.png"
    image.save(path, exif=exif)
    assert torch.equal(read_image(path), chw(np.rot90(pixels, k=-1)))


@pytest.mark.parametrize("orientation", range(1, 10))
def test_every_orientation_is_that_of_pillow(pixels, orientation):
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = orientation
    expected = chw(np.asarray(ImageOps.exif_transpose(image)))
    assert torch.equal(read_image(image), expected)


def test_a_damaged_tag_beside_the_orientation_changes_nothing(pixels, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    content = exif.tobytes()
    # Read as another type than it was written, the resolution can not be written again.
    entry = content.index(b"\x01\x1a\x00\x05")
    path = tmp_path / "tag.jpg"
    for kind in range(16):
        changed = content[: entry + 3] + bytes([kind]) + content[entry + 4 :]
        Image.fromarray(pixels).save(path, quality=100, subsampling=0, exif=changed)
        with Image.open(path) as saved:
            stored = np.asarray(saved)
        assert torch.equal(read_image(path), chw(np.rot90(stored, k=-1))), kind


@pytest.mark.parametrize("length", [8, 12])
def test_exif_that_can_not_be_read_is_named(pixels, tmp_path, length):
    path = tmp_path / "exif.png"
    Image.fromarray(pixels).save(path, exif=b"Exif\0\0MXMXMXMX"[:length])
    with pytest.raises(ValueError, match=r"Image file .*exif\.png: .*its EXIF data can not be read"):
        read_image(path)


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_truncated_files_are_named(pixels, tmp_path, keep, kind):
    path = tmp_path / f"cut.{kind}"
    Image.fromarray(np.tile(pixels, (10, 10, 1))).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=rf"Image file .*cut\.{kind}: (truncated or damaged|not an image)"):
        read_image(path)


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Image file .*nowhere\.jpg does not exist"):
        read_image(tmp_path / "nowhere.jpg")
    note = tmp_path / "note.jpg"
    note.write_text("no image")
    with pytest.raises(ValueError, match=r"note\.jpg: not an image in a known format"):
        read_image(note)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), ValueError, r"expected \[H, W\] or .* got shape \(4, 4, 2\)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "expected at least one pixel"),
        (torch.zeros(2, 4, 4), ValueError, r"expected \[1 \| 3, H, W\], got shape \(2, 4, 4\)"),
        (torch.full((3, 4, 4), 3.0), ValueError, r"expected floating values in \[0, 1\], got 3…3"),
        (torch.full((3, 4, 4), float("nan")), ValueError, r"in \[0, 1\], got nan"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), ValueError, "expected uint8, uint16 or floating values"),
        (7, TypeError, "expected a path, PIL image, numpy array or torch tensor, got int"),
    ],
)
def test_bad_sources_are_named(source, error, message):
    with pytest.raises(error, match=message):
        read_image(source)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1067)),
        ((640, 480), (1067, 800)),
        ((500, 1500), (444, 1333)),
        ((1, 1), (800, 800)),
        ((1, 5000), (1, 1333)),
    ],
)
def test_resized_shape(size, expected):
    assert resized_shape(*size, 800, 1333) == expected


def test_prepare_normalises():
    found = prepare(torch.full((3, 10, 10), 255, dtype=torch.uint8), 8, 16)
    assert found.shape == (3, 8, 8)
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(found.mean((1, 2)), expected)
