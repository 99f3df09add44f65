"""The batches of an epoch before they are loaded: their images, their order, and the shape to pad to.

Every process plans them from (seed, epoch) and the sizes of the images. Any free worker loads a batch. So neither
workers nor prefetching change the training data, and (epoch, batches done) suffices to resume within an epoch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import Sampler

from conddetr.data.augment.plans import Mosaic, Plan
from conddetr.data.sets import ImageSet
from conddetr.data.transforms import augmentation_generator

SHAPE_STRIDE = 32
"""Bucket shapes are multiples of this many pixels, the stride of a ResNet."""
WAITING_BATCHES = 64
"""Batches that are planned ahead, to be shuffled."""
_SHAPE_SAMPLES = 2000

Planned = tuple[int, Plan | Mosaic]
"""Index of an image, and its plan."""
T = TypeVar("T")


@dataclass(frozen=True)
class BatchPlan:
    """One batch before it is loaded."""

    indices: list[int]
    plans: list[Plan | Mosaic]
    shape: tuple[int, int]
    """(H, W) to pad to."""


class EpochBatches(Sampler[BatchPlan]):
    """The batches of one epoch for one rank; call `set_epoch` before each epoch.

    Training: a seeded permutation, cut into global batches (all ranks together). Rank r takes every `world`-th image
    of a global batch, from r on. An incomplete global batch at the end is left out, as in the official code: a smaller
    batch would weigh its images more. The number of batches is the same in every epoch and on every rank. An endless
    data set has new images in every epoch.

    Evaluation: the images r, r + world, r + 2·world, … in order, each once.

    With `pad_buckets`, images are grouped by padded shape, and training shuffles the batches; a global batch has one
    shape. Without it, every rank pads to its own largest image, as in the official code.
    """

    def __init__(
        self,
        dataset: ImageSet,
        batch_size: int,
        train: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        pad_buckets: int = 0,
    ) -> None:
        """Arguments and errors as those of `make_loader`."""
        if train and len(dataset) < batch_size * world:
            ranks = f" on each of {world} ranks" if world > 1 else ""
            raise ValueError(
                f"batch_size: {batch_size}{ranks} is more than the {len(dataset)} training images: lower it."
            )
        self.dataset, self.batch_size, self.train = dataset, batch_size, train
        self.seed, self.rank, self.world = seed, rank, world
        self.shapes = _bucket_shapes(dataset, seed, pad_buckets) if pad_buckets else []
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and the number of its batches to skip because they are done."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        if self.train:
            return len(self.dataset) // (self.batch_size * self.world)
        mine = len(range(self.rank, len(self.dataset), self.world))
        return -(-mine // self.batch_size)

    def __iter__(self) -> Iterator[BatchPlan]:
        size = self.batch_size * (self.world if self.train else 1)
        # An epoch leaves out random images, not images of rare shapes.
        indices = self._order()[: len(self) * size]
        if not self.shapes:
            for numbers in _cut(indices, size)[self.start :]:
                yield self._batch([self._plan(index) for index in self._mine(numbers)])
            return
        batches = self._grouped(indices, size)
        for batch in islice(self._shuffled(batches) if self.train else batches, self.start, None):
            # All ranks' images decide the shape, so that no rank waits for a larger one.
            yield self._batch(self._mine(batch), self._smallest_fit([plan for _, plan in batch]))

    def largest_shape(self) -> tuple[int, int]:
        """(H, W) of the largest possible batch, which must fit into memory."""
        if self.shapes:
            return self.shapes[-1]
        short, long = self.dataset.largest_shape()
        # One image is in landscape or portrait format and takes the same memory; a batch of both needs a square.
        return (short, long) if self.batch_size == 1 else (long, long)

    def _order(self) -> list[int]:
        """Images of this epoch: all ranks' for training, this rank's for evaluation."""
        if not self.train:
            return list(range(self.rank, len(self.dataset), self.world))
        offset = self.epoch * len(self.dataset) if self.dataset.endless else 0
        permutation = torch.randperm(len(self.dataset), generator=self._generator())
        return (permutation + offset).tolist()

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)

    def _mine(self, batch: list[T]) -> list[T]:
        """This rank's part of a global batch."""
        return batch[self.rank :: self.world] if self.train else batch

    def _plan(self, index: int) -> Planned:
        return index, self.dataset.plan(index, augmentation_generator(self.seed, self.epoch, index))

    def _batch(self, images: list[Planned], shape: tuple[int, int] | None = None) -> BatchPlan:
        plans = [plan for _, plan in images]
        return BatchPlan([index for index, _ in images], plans, shape or _largest(plans))

    def _smallest_fit(self, plans: list[Plan | Mosaic]) -> tuple[int, int]:
        """The smallest shape that holds all of them; the last shape holds every image."""
        height, width = _largest(plans)
        return next(shape for shape in self.shapes if shape[0] >= height and shape[1] >= width)

    def _grouped(self, indices: list[int], size: int) -> Iterator[list[Planned]]:
        """Full batches of one shape each, in the order of their last images; then the remainders by shape.

        Images are planned when they are needed: to plan a whole epoch first takes many seconds for a large data set.
        """
        groups: dict[tuple[int, int], list[Planned]] = {shape: [] for shape in self.shapes}
        for index in indices:
            image = self._plan(index)
            shape = self._smallest_fit([image[1]])
            groups[shape].append(image)
            if len(groups[shape]) == size:
                yield groups[shape]
                groups[shape] = []
        # Sorted, so that at most one batch mixes landscape and portrait and needs the square.
        rest = [image for group in groups.values() for image in group]
        rest.sort(key=lambda image: (image[1].height > image[1].width, image[1].height * image[1].width))
        yield from _cut(rest, size)

    def _shuffled(self, batches: Iterator[list[Planned]]) -> Iterator[list[Planned]]:
        """The batches, each exchanged with a random one of those that wait; at most `WAITING_BATCHES` wait.

        Batches of rare shapes fill late, and remainders come last: this spreads them.
        """
        generator, waiting = self._generator(), list(islice(batches, WAITING_BATCHES))
        while waiting:
            chosen = int(torch.randint(len(waiting), (), generator=generator))
            following = next(batches, None)
            batch = waiting[chosen]
            if following is None:
                waiting[chosen] = waiting[-1]
                waiting.pop()
            else:
                waiting[chosen] = following
            yield batch


def _cut(images: list[T], size: int) -> list[list[T]]:
    return [images[start : start + size] for start in range(0, len(images), size)]


def _largest(plans: list[Plan | Mosaic]) -> tuple[int, int]:
    """Largest height and largest width."""
    return max(plan.height for plan in plans), max(plan.width for plan in plans)


def _bucket_shapes(dataset: ImageSet, seed: int, count: int) -> list[tuple[int, int]]:
    """`count` shapes by area, then the square that holds every image.

    Landscape and portrait of the largest image are always included. Each further shape is the multiple of the stride
    that saves the most padded pixels on a sample of the data set.
    """
    short, long = (_round_up(side) for side in dataset.largest_shape())
    shapes = [(long, long)]
    if count > 1:
        shapes += [(short, long), (long, short)]
    sizes = np.array([_round_up(side) for plan in _sample_plans(dataset, seed) for side in (plan.height, plan.width)])
    sizes = sizes.reshape(-1, 2)
    candidates = np.array([(h, w) for h in np.unique(sizes[:, 0]) for w in np.unique(sizes[:, 1])])
    # cost[c, i]: pixels of image i in candidate c.
    fits = (candidates[:, None] >= sizes[None]).all(-1)
    cost = np.where(fits, candidates.prod(1)[:, None], long * long)
    best = np.array([[h * w if h >= y and w >= x else long * long for y, x in sizes] for h, w in shapes]).min(0)
    while len(shapes) <= count:
        totals = np.minimum(cost, best).sum(1)
        if totals.min() >= best.sum():
            break
        shapes.append(tuple(candidates[totals.argmin()].tolist()))
        best = np.minimum(best, cost[totals.argmin()])
    return sorted(set(shapes), key=lambda shape: (shape[0] * shape[1], shape))


def _sample_plans(dataset: ImageSet, seed: int) -> list[Plan | Mosaic]:
    step = max(1, len(dataset) // _SHAPE_SAMPLES)
    return [dataset.plan(index, augmentation_generator(seed, 0, index)) for index in range(0, len(dataset), step)]


def _round_up(side: int) -> int:
    return -(-side // SHAPE_STRIDE) * SHAPE_STRIDE
