"""Decoding on a device: the same batches as from workers, for every kind of file; damaged files are errors."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from conddetr.config import resolve
from conddetr.config.augment import AugmentConfig
from conddetr.data import device_decoder
from conddetr.data.augment.colour import Colour, _adjusted, apply_colour
from conddetr.data.coco import coco_split
from conddetr.data.device_decoder import DeviceDecoder
from conddetr.data.encoded import read_jpeg
from conddetr.data.loader import make_loader
from conddetr.data.transforms import TrainTransform

CONFIG = resolve("conditional-detr-tiny")
CPU = torch.device("cpu")


def exif(orientation):
    """EXIF data with an orientation tag."""
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def photo(height, width, seed=0):
    """A smooth picture with a gradient in every direction and colour."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


DECODED_BY_DEVICE = {
    "baseline": {},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "grey": {"mode": "L"},
    **{f"orientation {tag}": {"exif": exif(tag)} for tag in range(1, 9)},
}
DECODED_BY_WORKERS = {"RGB": {"keep_rgb": True}, "CMYK": {"mode": "CMYK"}, "PNG": {"format": "png"}}


def save(path, height, width, mode="RGB", format="jpeg", **options):
    photo(height, width, seed=height + width).convert(mode).save(path, format, **options)


@pytest.fixture
def files(small_coco):
    """A training set with one image of each kind; the annotations of the last are those of the image as stored."""
    small_coco.content.update(images=[], annotations=[])
    kinds = {**DECODED_BY_DEVICE, **DECODED_BY_WORKERS, "as stored": {"exif": exif(6)}}
    for index, (name, options) in enumerate(kinds.items()):
        height, width = 70 + index, 50
        file = f"{index}.{options.get('format', 'jpeg')}"
        save(small_coco.images / file, height, width, **options)
        if name in [f"orientation {tag}" for tag in (5, 6, 7, 8)]:
            height, width = width, height
        small_coco.content["images"].append({"id": index, "file_name": file, "height": height, "width": width})
        # The box of the last fits only into the image as stored.
        small_coco.annotate(index, [5.0, 5.0, 30.0, 60.0 if name == "as stored" else 20.0], 3)
    small_coco.write()
    return small_coco


def training_set(root, augment):
    """Files are decoded at their whole size, as on a device."""
    transform = TrainTransform(CONFIG, augment)
    transform.reduced_decoding = False
    return coco_split(root, "train", transform)


@pytest.mark.parametrize(
    ("augment", "workers"),
    [("none", 0), ("paper", 0), ("strong", 0), (AugmentConfig("strong", mosaic=0.7), 1)],
    ids=["none", "paper", "strong", "mosaic, read by a worker"],
)
def test_batches_are_those_of_workers(files, augment, workers):
    dataset = training_set(files.root, augment)
    options = {"train": True, "pad_buckets": 2}
    expected = list(make_loader(dataset, 4, **options))
    batches = list(make_loader(dataset, 4, workers=workers, decoder=DeviceDecoder(CPU), **options))
    for ours, theirs in zip(batches, expected, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.boxes, theirs.boxes)
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.sizes, theirs.sizes)
        assert (ours.counts, ours.image_ids, ours.padded) == (theirs.counts, theirs.image_ids, theirs.padded)
        assert ours.original_sizes == theirs.original_sizes


def test_real_photos_are_those_of_workers(coco_path):
    dataset = training_set(coco_path, "paper")
    loaders = [make_loader(dataset, 8, train=True, decoder=decoder) for decoder in (None, DeviceDecoder(CPU))]
    for expected, ours in zip(*loaders, strict=True):
        assert torch.equal(ours.images, expected.images)


@pytest.mark.parametrize("name", DECODED_BY_DEVICE)
def test_common_jpegs_are_sent_as_they_are(tmp_path, name):
    path = tmp_path / "x.png"
    save(path, 30, 20, **DECODED_BY_DEVICE[name])
    file = read_jpeg(path)
    assert file.content == path.read_bytes()
    assert file.stored == (30, 20)
    assert file.size == ((20, 30) if name[-1] in "5678" else (30, 20))


@pytest.mark.parametrize("name", DECODED_BY_WORKERS)
def test_other_files_are_not(tmp_path, name):
    path = tmp_path / "x.jpg"
    save(path, 30, 20, **DECODED_BY_WORKERS[name])
    assert read_jpeg(path) is None


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_file_that_ends_early_is_an_error(small_coco, orientation):
    """Also if it contains a thumbnail, which has an end of its own."""
    thumbnail = io.BytesIO()
    photo(16, 16).save(thumbnail, "jpeg")
    path = small_coco.images / "1.jpg"
    photo(70, 90).save(path, exif=exif(orientation), comment=thumbnail.getvalue())
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"\xff\xda") + 200])
    assert read_jpeg(path) is None
    loader = make_loader(training_set(small_coco.root, "none"), 4, train=True, workers=1, decoder=DeviceDecoder(CPU))
    with pytest.raises(ValueError, match=r"1\.jpg: .*truncated.* Its image id is 101 in"):
        list(loader)


def refuse(monkeypatch, width, error):
    """Make a device that cannot decode files of one width."""
    decode = device_decoder.decode_jpeg

    def refusing(contents, mode, device):
        results = decode(contents, mode, device)
        if any(pixels.shape[2] == width for pixels in results):
            raise error
        return results

    monkeypatch.setattr(device_decoder, "decode_jpeg", refusing)


def test_the_host_decodes_what_the_device_cannot(files, monkeypatch, caplog):
    dataset = training_set(files.root, "none")
    [expected] = make_loader(dataset, 16, train=True)
    refuse(monkeypatch, 50, RuntimeError("nvjpegDecode failed: 9.\nsecond line"))
    [batch] = make_loader(dataset, 16, train=True, decoder=DeviceDecoder(CPU))
    assert torch.equal(batch.images, expected.images)
    [message] = caplog.messages
    assert "cannot be decoded on cpu (nvjpegDecode failed: 9): it is decoded on the host" in message


def test_a_damaged_file_is_named(small_coco, monkeypatch):
    """Its header is whole, so that only decoding finds the damage."""

    def damaged(path, *_, **__):
        raise ValueError(f"{path}: damaged.")

    dataset = training_set(small_coco.root, "none")
    decoder = DeviceDecoder(CPU)
    refuse(monkeypatch, 90, RuntimeError("nvjpegDecode failed: 9"))
    monkeypatch.setattr(device_decoder, "read_reduced", damaged)
    with pytest.raises(ValueError, match=r"\d\.jpg: damaged\. Its image id is 10\d in"):
        list(make_loader(dataset, 1, train=True, decoder=decoder))


def test_too_little_memory_is_not_taken_for_damage(small_coco, monkeypatch):
    decoder = DeviceDecoder(CPU)
    refuse(monkeypatch, 90, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        list(make_loader(training_set(small_coco.root, "none"), 4, train=True, decoder=decoder))


def test_a_device_without_a_decoder_is_refused(monkeypatch):
    refuse(monkeypatch, 16, RuntimeError("not compiled with nvJPEG support"))
    with pytest.raises(ValueError, match="cannot be decoded on cpu: not compiled with nvJPEG support"):
        DeviceDecoder(CPU)


@pytest.mark.parametrize(
    "colour",
    [
        Colour(brightness=0.9),
        Colour(contrast=1.4),
        Colour(saturation=0.6),
        Colour(hue=0.04),
        Colour(1.1, 0.6, 1.3, -0.05, True),
    ],
    ids=["brightness", "contrast", "saturation", "hue", "all"],
)
def test_colours_on_a_device_are_those_of_the_host(colour):
    image = torch.from_numpy(np.array(photo(40, 60))).permute(2, 0, 1)
    difference = (_adjusted(image, colour).int() - apply_colour(image, colour).int()).abs()
    # PIL rounds the hue to 1/255 of the circle, and every step to whole levels.
    assert difference.max() <= (8 if colour.hue else 1)
    assert difference.float().mean() < (1 if colour.hue else 0.3)
    assert not torch.equal(apply_colour(image, colour), image)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="decoding by nvJPEG needs an NVIDIA GPU")
@pytest.mark.compares_numbers.with_args(ValueError)
def test_a_gpu_decodes_and_augments_as_the_host(files):
    """Within rounding: of the cosine transform, of the chroma planes' interpolation, and of the resize."""
    dataset = training_set(files.root, AugmentConfig("strong", mosaic=0.3))
    expected = list(make_loader(dataset, 4, train=True))
    batches = list(make_loader(dataset, 4, train=True, workers=1, decoder=DeviceDecoder(torch.device("cuda"))))
    for ours, theirs in zip(batches, expected, strict=True):
        difference = (ours.images.cpu().float() - theirs.images.float()).abs()
        assert difference.mean() < 3
        assert torch.equal(ours.boxes, theirs.boxes)
