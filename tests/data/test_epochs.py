"""The batches of an epoch: each image once, in few shapes; ranks do not overlap; nothing is planned long before."""

import numpy as np
import pytest

from conddetr.config import resolve
from conddetr.data.annotations import Annotations, Names
from conddetr.data.coco import CocoDetection
from conddetr.data.epochs import WAITING_BATCHES, EpochBatches
from conddetr.data.loader import make_loader
from conddetr.data.transforms import EvalTransform, TrainTransform


class Wide(CocoDetection):
    """A large set of sizes without files, for tests of plans alone."""

    def __init__(self, count):
        self.transform = TrainTransform(resolve("conditional-detr-r50"))
        sizes = np.random.default_rng(3).integers(300, 641, (count, 2), dtype=np.int32)
        names, none = Names(["x.png"] * count), np.empty(0, np.int32)
        boxes = np.empty((0, 4)), np.empty(0), np.empty(0, bool)
        self._annotations = Annotations("", [], np.arange(count), names, sizes, none, none, none, *boxes)


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


def test_few_images_are_planned_before_the_first_batch():
    class Counted(Wide):
        planned = 0

        def plan(self, index, generator):
            self.planned += 1
            return super().plan(index, generator)

    dataset = Counted(5000)
    sampler = EpochBatches(dataset, 4, train=True, pad_buckets=4)
    dataset.planned = 0
    next(iter(sampler))
    # Each of five shapes may have an incomplete batch.
    assert 4 * WAITING_BATCHES <= dataset.planned <= 4 * (WAITING_BATCHES + 1) + 5 * 3


def test_batches_are_shuffled_as_far_as_they_wait():
    sampler = EpochBatches(Wide(10), 2, train=True, seed=3)
    order = list(sampler._shuffled(iter(range(500))))
    assert sorted(order) == list(range(500))
    assert all(number <= place + WAITING_BATCHES for place, number in enumerate(order))
    # Also those that come last, as the remainders of all shapes do.
    assert np.corrcoef(order[-WAITING_BATCHES:], range(WAITING_BATCHES))[0, 1] < 0.5
    assert order == list(sampler._shuffled(iter(range(500))))
    assert order != list(EpochBatches(Wide(10), 2, train=True, seed=4)._shuffled(iter(range(500))))
