"""Loading: training data depend on seed, epoch and index alone, whoever loads them; padding is zero."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from conddetr.config import resolve
from conddetr.data.augment.plans import Plan
from conddetr.data.batch import collate
from conddetr.data.coco import coco_split
from conddetr.data.images import to_model_input
from conddetr.data.loader import _BatchReader, make_loader
from conddetr.data.synthetic import SyntheticShapes
from conddetr.data.transforms import EvalTransform, TrainTransform, augmentation_generator

CONFIG = resolve("conditional-detr-tiny")
SIZES = ((60, 90), (90, 60), (50, 120), (70, 70))


@pytest.fixture
def mixed(small_coco):
    """24 training images in four sizes, one object each."""
    small_coco.content.update(images=[], annotations=[])
    rng = np.random.default_rng(1)
    for index in range(24):
        height, width = SIZES[index % 4]
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
            small_coco.images / f"{index}.png"
        )
        small_coco.content["images"].append(
            {"id": index, "file_name": f"{index}.png", "height": height, "width": width}
        )
        small_coco.annotate(index, [5.0, 5.0, 40.0, 30.0], 3)
    small_coco.write()
    return coco_split(small_coco.root, "train", TrainTransform(CONFIG))


def same(first, second):
    """Whether two batches are bit for bit equal."""
    return (
        torch.equal(first.images, second.images)
        and torch.equal(first.sizes, second.sizes)
        and torch.equal(first.boxes, second.boxes)
        and first.image_ids == second.image_ids
    )


def epoch_of(loader, epoch, start=0):
    loader.sampler.set_epoch(epoch, start)
    return list(loader)


@pytest.mark.parametrize("pad_buckets", [0, 3])
def test_batches_do_not_depend_on_workers_or_random_states(mixed, pad_buckets):
    whole = make_loader(mixed, 4, train=True, seed=5, pad_buckets=pad_buckets)
    with_workers = make_loader(mixed, 4, train=True, seed=5, pad_buckets=pad_buckets, workers=2)
    for epoch in (0, 1):
        expected = epoch_of(whole, epoch)
        torch.manual_seed(epoch + 100)
        state = torch.get_rng_state()
        assert all(same(a, b) for a, b in zip(expected, epoch_of(with_workers, epoch), strict=True))
        assert torch.equal(torch.get_rng_state(), state)
    # From the middle of an epoch, in a new loader: the same images with the same augmentation.
    resumed = epoch_of(make_loader(mixed, 4, train=True, seed=5, pad_buckets=pad_buckets), 1, start=4)
    assert all(same(a, b) for a, b in zip(expected[4:], resumed, strict=True))
    assert not same(epoch_of(whole, 2)[0], expected[0])
    other = make_loader(mixed, 4, train=True, seed=6, pad_buckets=pad_buckets)
    assert not same(epoch_of(other, 1)[0], expected[0])


def test_an_endless_set_never_repeats():
    loader = make_loader(SyntheticShapes(10, seed=1), 5, train=True)
    seen = [image_id for epoch in range(3) for batch in epoch_of(loader, epoch) for image_id in batch.image_ids]
    assert sorted(seen) == list(range(30))


def test_padding_is_zero_and_targets_match_their_images(mixed):
    for batch in epoch_of(make_loader(mixed, 4, train=True, pad_buckets=2), 0):
        pixels = batch.model_input()
        for index, target in enumerate(batch.targets):
            height, width = batch.sizes[index].tolist()
            valid = to_model_input(batch.images[index, :, :height, :width])
            torch.testing.assert_close(pixels[index, :, :height, :width], valid, atol=0, rtol=0)
            assert not pixels[index, :, height:].any()
            assert not pixels[index, :, :, width:].any()
            assert target["image_id"] == batch.image_ids[index]
            assert len(target["boxes"]) == len(target["labels"]) == batch.counts[index]
        assert torch.equal(torch.cat([target["boxes"] for target in batch.targets]), batch.boxes)


def test_reused_memory_keeps_no_old_pixels(mixed):
    samples = [mixed.load(index, mixed.plan(index, augmentation_generator(0, 0, index))) for index in range(4)]
    expected = collate(samples)
    pixels = torch.full_like(expected.images, 255)
    batch = collate(iter(samples), pixels)
    assert batch.images is pixels
    assert same(batch, expected)


@pytest.mark.parametrize("are_copied", [False, True])
def test_workers_reuse_memory_of_copied_batches(are_copied):
    reader = _BatchReader(SyntheticShapes(4, seed=1), are_copied)
    memory = [reader._shared(size) for size in (100, 100, 80, 120, 90)]
    assert [len(part) for part in memory] == [100, 100, 80, 120, 90]
    assert all(part.is_shared() for part in memory)
    addresses = [part.data_ptr() for part in memory]
    # As many as a worker may have sent ahead; too small ones are replaced.
    assert (addresses[2] == addresses[0]) == (addresses[4] == addresses[2]) == are_copied
    assert len(set(addresses)) == (3 if are_copied else 5)


def test_equal_sizes_have_no_padding():
    batch = next(iter(make_loader(SyntheticShapes(4, seed=1), 4, train=True)))
    assert batch.valid_hw is None
    assert torch.equal(batch.model_input(), to_model_input(batch.images))


def test_too_few_images_for_one_batch_are_an_error():
    with pytest.raises(ValueError, match="batch_size: 4 on each of 3 ranks is more than the 10 training images"):
        make_loader(SyntheticShapes(10, seed=1), 4, train=True, world=3)


def test_an_error_in_a_worker_is_one_line(small_coco):
    (small_coco.images / "1.jpg").write_text("no image")
    for workers in (0, 1):
        loader = make_loader(
            coco_split(small_coco.root, "train", EvalTransform(CONFIG)), 1, train=False, workers=workers
        )
        with pytest.raises(ValueError, match="not an image") as caught:
            list(loader)
        assert re.fullmatch(r"Image file \S+1\.jpg: not an image.*image id is 101 in \S+\.", str(caught.value))


class Stripes:
    """A data set of one's own, which inherits nothing: image i has i + 1 objects."""

    endless = False

    def __len__(self):
        return 6

    def largest_shape(self):
        return 8, 16

    def plan(self, index, generator):
        return Plan(False, None, 8, 8 + index)

    def load(self, index, plan):
        target = {"labels": torch.arange(index + 1), "boxes": torch.full((index + 1, 4), 0.5)}
        image = torch.full((3, plan.height, plan.width), index, dtype=torch.uint8)
        return image, {**target, "image_id": index, "original_size": (80, 80)}


@pytest.mark.parametrize("workers", [0, 1])
def test_any_class_with_the_members_of_an_image_set_is_loaded(workers):
    batches = list(make_loader(Stripes(), 3, train=False, workers=workers))
    assert [batch.counts for batch in batches] == [(1, 2, 3), (4, 5, 6)]
    assert [batch.images.shape for batch in batches] == [(3, 3, 8, 10), (3, 3, 8, 13)]
    assert batches[1].images[:, 0, 0, 0].tolist() == [3, 4, 5]
