"""Images from all sources: correct pixels, or an error that names the file."""

import errno
import inspect
import io
import runpy
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin

from conddetr.data import images
from conddetr.data.images import ImageTooLargeError, image_sizes, prepare, read_image, read_reduced, resized_shape


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


def test_grayscale_images_become_rgb(pixels, tmp_path):
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
        image = read_image(source)
        assert torch.equal(image[0], torch.from_numpy((ramp // 257).astype(np.uint8)))


@pytest.mark.parametrize("high", [65535, 900])
def test_32_bit_integers_are_read_as_16_bit(tmp_path, high):
    values = np.linspace(0, high, 600).astype(np.int32).reshape(20, 30)
    path = tmp_path / "deep.tif"
    Image.fromarray(values).save(path)
    for source in (path, Image.fromarray(values)):
        assert torch.equal(read_image(source)[1], torch.from_numpy((values // 257).astype(np.uint8)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 200000]], np.int32), r"32-bit integers in 0…65535, got 0…200000\. Scale them"),
        (np.array([[-3, 40]], np.int32), r"32-bit integers in 0…65535, got -3…40\. Scale them"),
        (np.array([[0, 255]], np.float32), r"floating values in \[0, 1\], got 0…255\. Scale them"),
        (np.array([[0, 1.00001]], np.float32), r"floating values in \[0, 1\], got 0…1\.00001"),
        (np.array([[0, np.nan]], np.float32), r"floating values in \[0, 1\], got nan"),
        (np.array([[0, np.inf]], np.float32), r"floating values in \[0, 1\], got 0…inf"),
    ],
)
def test_values_outside_their_range_are_refused(tmp_path, values, message):
    path = tmp_path / "values.tif"
    Image.fromarray(values).save(path)
    with pytest.raises(ValueError, match=rf"^Image file .*values\.tif: expected {message}"):
        read_image(path)
    with pytest.raises(ValueError, match=f"^Image: expected {message}"):
        read_image(Image.fromarray(values))


def test_float_files_stay_float(tmp_path):
    values = np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)
    path = tmp_path / "float.tif"
    Image.fromarray(values).save(path)
    for source in (path, Image.fromarray(values)):
        assert torch.equal(read_image(source), torch.from_numpy(values).expand(3, -1, -1))


@pytest.mark.parametrize("dtype", ["uint8", "<u2", ">u2", "<f4", ">f4", ">f8", "float16"])
@pytest.mark.parametrize("layout", ["read-only", "negative strides", "alpha", "gray"])
def test_arrays_of_any_dtype_and_memory_layout(pixels, dtype, layout):
    scale = {"u": 257 if np.dtype(dtype).itemsize == 2 else 1, "f": 1 / 255}[np.dtype(dtype).kind]
    array = (pixels.astype(np.float64) * scale).astype(dtype)
    expected = array
    if layout == "negative strides":
        array = np.ascontiguousarray(array[::-1, ::-1, ::-1])[::-1, ::-1, ::-1]
    elif layout == "alpha":
        array = np.concatenate([array, array[..., :1]], 2)
    elif layout == "gray":
        array, expected = array[..., 0], array[..., :1].repeat(3, 2)
    array.flags.writeable = layout != "read-only"
    before = array.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(array)
    if np.dtype(dtype).kind == "f":
        assert torch.equal(image, chw(expected.astype(np.float32)))
    else:
        assert torch.equal(image, chw((expected // scale).astype(np.uint8)))
    assert np.array_equal(array, before)


def test_palette_with_transparency_keeps_its_colours(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    path = tmp_path / "p.png"
    image.save(path, transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(path)[:, 0].T.tolist() == [[10, 20, 30], [200, 100, 50]]


def test_modes_that_pillow_cannot_convert_are_named():
    with pytest.raises(ValueError, match=r"Image: its pixels \(mode La\) cannot be read as RGB"):
        read_image(Image.new("La", (3, 2)))


@pytest.mark.parametrize("read", [read_image, image_sizes])
def test_images_beyond_pillows_limit_are_refused(pixels, tmp_path, monkeypatch, read):
    path = tmp_path / "wide.png"
    Image.fromarray(pixels).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 299)
    with pytest.raises(ImageTooLargeError) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith(f"Image file {path}: too large.")
    for part in ("(600 pixels)", "limit of 598 ", "PIL.Image.MAX_IMAGE_PIXELS = 600", "CONDDETR_MAX_PIXELS=600"):
        assert part in text
    # With the limit from the message.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    read(path)
    # Between the limit and twice the limit Pillow warns; a program may turn the warning into an error.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageTooLargeError, match="limit of 400 "):
            read(path)


def test_the_pixel_limit_comes_from_the_environment(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    monkeypatch.setattr(warnings, "filters", [])
    monkeypatch.setenv("CONDDETR_MAX_PIXELS", "123456")
    runpy.run_path(images.__file__)
    assert Image.MAX_IMAGE_PIXELS == 123456
    # Images over the limit that Pillow reads anyway cause no warnings.
    with warnings.catch_warnings(record=True) as caught:
        Image.MAX_IMAGE_PIXELS = 4
        Image.new("L", (3, 2)).resize((3, 2))
        warnings.warn("too many", Image.DecompressionBombWarning, stacklevel=1)
    assert not caught


@pytest.mark.parametrize("value", ["0", "-5", "1e9", "none"])
def test_an_invalid_pixel_limit_is_an_error(monkeypatch, value):
    monkeypatch.setenv("CONDDETR_MAX_PIXELS", value)
    with pytest.raises(ValueError, match=f"CONDDETR_MAX_PIXELS: expected a positive whole number, got '{value}'"):
        runpy.run_path(images.__file__)


def test_cmyk_palette_and_alpha_become_rgb(pixels, tmp_path):
    image = Image.fromarray(pixels)
    for mode, name in (("CMYK", "c.jpg"), ("P", "p.png"), ("RGBA", "a.png"), ("LA", "la.png"), ("1", "b.png")):
        path = tmp_path / name
        converted = image.convert(mode)
        converted.save(path)
        with Image.open(path) as saved:
            expected = chw(np.asarray(saved.convert("RGB")))
        assert torch.equal(read_image(path), expected)


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
    9: lambda a: a,
}
"""The turn of each value of the orientation tag (EXIF 2.3, 0x0112); 9 has no meaning."""


def save_with_orientation(path, pixels, orientation):
    """Save in the format of the file's suffix; JPEG changes pixels by a few levels."""
    image = Image.fromarray(pixels)
    if path.name.endswith("tif"):
        # libtiff does not write a value without a meaning.
        compression = "tiff_lzw" if path.name == "lzw.tif" and orientation <= 8 else None
        image.save(path, tiffinfo={0x0112: orientation}, compression=compression)
        return
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"png": {}, "webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
    image.save(path, exif=exif, **lossless[path.suffix[1:]])


@pytest.mark.parametrize("name", ["a.tif", "lzw.tif", "a.png", "a.jpg", "a.webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_upright_for_every_orientation_and_format(tmp_path, name, orientation):
    # Smooth, so that JPEG changes pixels only slightly.
    stored = np.stack(np.broadcast_arrays(np.arange(20)[:, None] * 9, np.arange(30) * 7, 50), -1).astype(np.uint8)
    upright = UPRIGHT[orientation](stored)
    path = tmp_path / name
    save_with_orientation(path, stored, orientation)
    tolerance = {"rtol": 0, "atol": 3 if name == "a.jpg" else 0}

    torch.testing.assert_close(read_image(path), chw(upright), **tolerance)
    with Image.open(path) as lazy:
        torch.testing.assert_close(read_image(lazy), chw(upright), **tolerance)
        lazy.load()
        torch.testing.assert_close(read_image(lazy), chw(upright), **tolerance)
    for turned, expected in ((True, upright), (False, stored)):
        image, size = read_reduced(path, 1000, 1000, upright=turned)
        assert size == expected.shape[:2]
        torch.testing.assert_close(image, chw(expected), **tolerance)
    tag = orientation if orientation <= 8 else None
    assert image_sizes(path) == images.ImageSizes(upright.shape[:2], stored.shape[:2], tag)


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_a_tiff_that_pillow_does_not_turn_is_upright(pixels, tmp_path, monkeypatch, orientation):
    if "exif_transpose" not in inspect.getsource(TiffImagePlugin.TiffImageFile.load_end):
        pytest.skip("this version of Pillow turns TIFFs with its own code")
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda image, in_place: None)
    path = tmp_path / "a.tif"
    save_with_orientation(path, pixels, orientation)
    assert torch.equal(read_image(path), chw(UPRIGHT[orientation](pixels)))
    assert torch.equal(read_reduced(path, 20, 30, upright=False)[0], chw(pixels))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_the_first_of_several_frames_is_read(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    frames = [Image.new("RGB", (3, 2), (value, value, value)) for value in (10, 200)]
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {}))
    assert read_image(path).unique().tolist() == [10]
    assert image_sizes(path).upright == (2, 3)


@pytest.mark.parametrize(
    ("upright", "size", "decoded"), [(True, (400, 240), (100, 60)), (False, (240, 400), (60, 100))]
)
def test_reduced_decoding_follows_the_orientation(tmp_path, upright, size, decoded):
    path = tmp_path / "a.jpg"
    save_with_orientation(path, np.zeros((240, 400, 3), np.uint8), 6)
    # A quarter of the file's size is twice the target.
    target = (decoded[0] // 2, decoded[1] // 2)
    image, file_size = read_reduced(path, *target, upright=upright)
    assert (file_size, image.shape[-2:]) == (size, decoded)


@pytest.mark.parametrize("orientation", range(1, 10))
def test_every_orientation_matches_pillow(pixels, orientation):
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = orientation
    expected = chw(np.asarray(ImageOps.exif_transpose(image)))
    assert torch.equal(read_image(image), expected)


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_sizes_of_a_png_with_its_tag_after_the_pixels(pixels, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    content, end = buffer.getvalue()[:-12], buffer.getvalue()[-12:]
    path = tmp_path / "late.png"
    path.write_bytes(content + png_chunk(b"eXIf", exif.tobytes()[6:]) + end)
    assert image_sizes(path) == images.ImageSizes((30, 20), (20, 30), 6)
    assert torch.equal(read_image(path), chw(np.rot90(pixels, -1)))


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "bmp", "webp"])
def test_sizes_are_read_from_the_header_alone(pixels, tmp_path, kind, monkeypatch):
    path = tmp_path / f"a.{kind}"
    Image.fromarray(pixels).save(path)

    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert image_sizes(path) == images.ImageSizes((20, 30), (20, 30), None)


def test_sizes_of_missing_and_foreign_files_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Image file .*nowhere\.jpg does not exist"):
        image_sizes(tmp_path / "nowhere.jpg")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_image(tmp_path)
    note = tmp_path / "note.jpg"
    note.write_text("no image")
    with pytest.raises(ValueError, match=r"note\.jpg: not an image in a known format"):
        image_sizes(note)


def test_a_damaged_tag_beside_the_orientation_changes_nothing(pixels, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    content = exif.tobytes()
    # The resolution is damaged: read as another type, it cannot be written again.
    entry = content.index(b"\x01\x1a\x00\x05")
    path = tmp_path / "tag.jpg"
    for kind in range(16):
        changed = content[: entry + 3] + bytes([kind]) + content[entry + 4 :]
        Image.fromarray(pixels).save(path, quality=100, subsampling=0, exif=changed)
        with Image.open(path) as saved:
            stored = np.asarray(saved)
        assert torch.equal(read_image(path), chw(np.rot90(stored, k=-1))), kind


@pytest.mark.parametrize("length", [8, 12])
def test_unreadable_exif_data_are_an_error(pixels, tmp_path, length):
    path = tmp_path / "exif.png"
    Image.fromarray(pixels).save(path, exif=b"Exif\0\0MXMXMXMX"[:length])
    with pytest.raises(ValueError, match=r"Image file .*exif\.png: .*its EXIF data cannot be read"):
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


def test_a_file_without_permission_is_not_called_damaged(pixels, tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path)

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    # Not by its mode, because root may read every file.
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ValueError, match=r"x\.png: cannot be read \(Permission denied\)"):
        read_image(path)


def test_a_tensor_with_gradients_is_read_without_a_warning():
    image = torch.rand(3, 4, 4, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(read_image(image), image)


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
        (torch.full((3, 4, 4), float("nan")), ValueError, r"in \[0, 1\], got nan: replace it with a number"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), ValueError, "expected uint8, uint16 or floating values"),
        (np.zeros((4, 4), np.int32), ValueError, "expected uint8, uint16 or floating values, got int32"),
        (np.zeros((4, 4), bool), ValueError, "expected uint8, uint16 or floating values, got bool"),
        (np.zeros((4, 4), object), ValueError, "expected uint8, uint16 or floating values, got object"),
        (Image.new("RGB", (0, 4)), ValueError, "expected at least one pixel, got height × width 4×0"),
        (7, TypeError, "expected a path, PIL image, numpy array or torch tensor, got int"),
    ],
)
def test_invalid_sources_are_named(source, error, message):
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
    result = prepare(torch.full((3, 10, 10), 255, dtype=torch.uint8), 8, 16)
    assert result.shape == (3, 8, 8)
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(result.mean((1, 2)), expected)
