"""Batches: training data depend on seed, epoch and index alone; there are few shapes; ranks do not overlap."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from conddetr.config import resolve
from conddetr.data.annotations import Annotations, Names
from conddetr.data.batch import _BatchReader, collate, make_loader
from conddetr.data.coco import CocoDetection, coco_split
from conddetr.data.images import to_model_input
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


class Wide(CocoDetection):
    """A large set of sizes without files, for tests of plans alone."""

    def __init__(self, count):
        self.transform = TrainTransform(resolve("conditional-detr-r50"))
        sizes = np.random.default_rng(3).integers(300, 641, (count, 2), dtype=np.int32)
        names, none = Names(["x.png"] * count), np.empty(0, np.int32)
        boxes = np.empty((0, 4)), np.empty(0), np.empty(0, bool)
        self._annotations = Annotations("", [], np.arange(count), names, sizes, none, none, none, *boxes)


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


@pytest.mark.parametrize("pad_buckets", [0, 1, 2, 6])
def test_an_epoch_has_each_image_once_in_few_shapes(pad_buckets):
    dataset = Wide(1003)
    sampler = make_loader(dataset, 8, train=True, pad_buckets=pad_buckets).sampler
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        seen = [index for batch in batches for index in batch.indices]
        assert len(batches) == len(sampler) == 1003 // 8
        assert len(seen) == len(set(seen)) == 8 * (1003 // 8)
        largest = sampler.largest_shape()
        for batch in batches:
            assert all(plan.height <= batch.shape[0] and plan.width <= batch.shape[1] for plan in batch.plans)
            assert batch.shape[0] <= largest[0]
            assert batch.shape[1] <= largest[1]
        if pad_buckets:
            shapes = [batch.shape for batch in batches]
            assert len(set(shapes)) <= pad_buckets + 1
            assert shapes.count((1344, 1344)) <= (1 if pad_buckets > 1 else len(shapes))


def test_more_buckets_need_less_padding():
    def padding(buckets):
        sampler = make_loader(Wide(1000), 8, train=True, pad_buckets=buckets).sampler
        batches = list(sampler)
        valid = sum(plan.height * plan.width for batch in batches for plan in batch.plans)
        return sum(8 * batch.shape[0] * batch.shape[1] for batch in batches) / valid

    assert padding(2) > padding(4) > padding(8)
    # Eight fixed shapes need less padding than the official code, where every batch has its own shape.
    assert padding(8) < padding(0)


def test_ranks_share_global_batches():
    dataset = Wide(101)
    single = make_loader(dataset, 8, train=True, seed=2, pad_buckets=4).sampler
    ranks = [make_loader(dataset, 4, train=True, seed=2, pad_buckets=4, rank=r, world=2).sampler for r in range(2)]
    for sampler in (single, *ranks):
        sampler.set_epoch(3)
    for whole, first, second in zip(single, *ranks, strict=True):
        assert whole.indices[0::2] == first.indices
        assert whole.indices[1::2] == second.indices
        assert whole.shape == first.shape == second.shape


@pytest.mark.parametrize("size", [1, 3])
def test_without_buckets_a_rank_pads_to_its_own_images(size):
    samplers = [make_loader(Wide(100), size, train=True, rank=rank, world=2).sampler for rank in range(2)]
    for sampler in samplers:
        largest = sampler.largest_shape()
        for batch in sampler:
            assert batch.shape == (max(p.height for p in batch.plans), max(p.width for p in batch.plans))
            assert np.prod(batch.shape) <= np.prod(largest)
    assert any(first.shape != second.shape for first, second in zip(*samplers, strict=True))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("pad_buckets", [0, 4])
def test_evaluation_sees_every_image_once(world, pad_buckets):
    dataset = Wide(13)
    dataset.transform = EvalTransform(resolve("conditional-detr-r50"))
    seen = []
    for rank in range(world):
        sampler = make_loader(dataset, 2, train=False, rank=rank, world=world, pad_buckets=pad_buckets).sampler
        batches = list(sampler)
        assert len(batches) == len(sampler)
        seen += [index for batch in batches for index in batch.indices]
    assert sorted(seen) == list(range(13))


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
