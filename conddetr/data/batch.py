"""From samples to batches: the images of each batch, their order, the padded shape, and the workers that load them.

The main process plans a batch from (seed, epoch) and the sizes of the images. Any free worker loads it. So neither
workers nor prefetching change the training data, and (epoch, batches done) suffices to resume within an epoch.
"""

import math
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from conddetr.config.checks import check_least
from conddetr.data.augment.plans import Mosaic, Plan
from conddetr.data.images import to_model_input
from conddetr.data.transforms import augmentation_generator
from conddetr.processes import can_start_workers, ignore_interrupts, interrupts_held

PREFETCH = 2
"""Batches that a worker loads ahead."""
SHAPE_STRIDE = 32
"""Bucket shapes are multiples of this many pixels, the stride of a ResNet."""
_SHAPE_SAMPLES = 2000


@dataclass
class Batch:
    """B images padded to one shape, and their N objects in two tensors."""

    images: Tensor
    """[B, 3, H, W] uint8, zeros in the padding; a quarter of the bytes that float32 would take to copy."""
    sizes: Tensor
    """[B, 2] int32, valid height and width of each image in pixels, from the top left corner."""
    labels: Tensor
    """[N] int64; always on the CPU, where matching reads them."""
    boxes: Tensor
    """[N, 4] float32, cxcywh in [0, 1] of the valid image; always on the CPU."""
    counts: tuple[int, ...]
    """Objects per image; their sum is N."""
    image_ids: tuple[int, ...]
    original_sizes: tuple[tuple[int, int], ...]
    """Height and width of each image file, in pixels."""
    padded: bool
    """Whether any image is smaller than the batch."""
    _SMALL = ("sizes", "labels", "boxes")

    def __len__(self) -> int:
        return len(self.images)

    def __getstate__(self) -> dict[str, Any]:
        """The state for another process: small tensors by value, because sharing them costs more than a copy."""
        return {**vars(self), **{name: getattr(self, name).numpy() for name in self._SMALL}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, **{name: torch.from_numpy(state[name]) for name in self._SMALL})

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, for asynchronous copies; a `DataLoader` calls it."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in ("images", *self._SMALL)})

    def to(self, device: torch.device) -> "Batch":
        """The batch with images and sizes on the device, copied asynchronously if they are pinned."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            sizes=self.sizes.to(device, non_blocking=True),
        )

    def model_input(self) -> Tensor:
        """[B, 3, H, W] float32, normalised with ImageNet's statistics, zeros in the padding."""
        images = to_model_input(self.images)
        if self.padded:
            height, width = (torch.arange(side, device=images.device) for side in images.shape[-2:])
            rows, columns = (height >= self.sizes[:, :1])[:, None, :, None], (width >= self.sizes[:, 1:])[:, None, None]
            images.masked_fill_(rows | columns, 0)
        return images

    @property
    def valid_hw(self) -> Tensor | None:
        """The model's `valid_hw`: `sizes`, or None if nothing is padded."""
        return self.sizes if self.padded else None

    @property
    def targets(self) -> list[dict]:
        """Per image: `labels` [n], `boxes` [n, 4], `image_id`, `original_size`; views without a copy."""
        columns = (self.labels.split(self.counts), self.boxes.split(self.counts), self.image_ids, self.original_sizes)
        names = ("labels", "boxes", "image_id", "original_size")
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def collate(samples: Iterable[tuple[Tensor, dict]], pixels: Tensor | None = None) -> Batch:
    """Join samples of a data set's `load` to a batch, one after the other.

    Args:
        samples: image [3, h, w] uint8 and target, see `CocoDetection.load`.
        pixels: [B, 3, H, W] uint8 with any values: memory for the images of the batch, padded at the bottom and right;
            default: a new tensor of the largest height and width.
    """
    if pixels is None:
        samples = list(samples)
        height, width = (max(image.shape[dim] for image, _ in samples) for dim in (1, 2))
        pixels = _interleaved(torch.empty(len(samples) * 3 * height * width, dtype=torch.uint8), height, width)
    sizes, targets = [], []
    for padded, (image, target) in zip(pixels, samples, strict=True):
        rows, columns = image.shape[1:]
        padded[:, :rows, :columns] = image
        padded[:, rows:] = 0
        padded[:, :rows, columns:] = 0
        sizes.append((rows, columns))
        targets.append(target)
    return Batch(
        pixels,
        torch.tensor(sizes, dtype=torch.int32),
        torch.cat([target["labels"] for target in targets]),
        torch.cat([target["boxes"] for target in targets]),
        tuple(len(target["labels"]) for target in targets),
        tuple(target["image_id"] for target in targets),
        tuple(target["original_size"] for target in targets),
        any(size != tuple(pixels.shape[2:]) for size in sizes),
    )


def _interleaved(memory: Tensor, height: int, width: int) -> Tensor:
    """Bytes as [B, 3, H, W] with interleaved colours, as in decoded image files, so that whole rows are copied."""
    return memory.view(-1, height, width, 3).permute(0, 3, 1, 2)


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
        dataset: Dataset,
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
        plans = {index: self._plan(index) for index in indices} if self.shapes else {}
        batches = self._grouped(indices, plans, size) if self.shapes else _cut(indices, size)
        if self.train and self.shapes:
            # Batches of rare shapes fill late; the shuffle spreads them over the epoch.
            order = torch.randperm(len(batches), generator=self._generator()).tolist()
            batches = [batches[position] for position in order]
        for batch in batches[self.start :]:
            mine = batch[self.rank :: self.world] if self.train else batch
            # Buckets group all ranks' images and give them one shape, so that no rank waits for a larger shape.
            decisive = batch if self.shapes else mine
            batch_plans = {index: plans.get(index) or self._plan(index) for index in decisive}
            yield BatchPlan(mine, [batch_plans[index] for index in mine], self._shape(list(batch_plans.values())))

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

    def _plan(self, index: int) -> Plan | Mosaic:
        return self.dataset.plan(index, augmentation_generator(self.seed, self.epoch, index))

    def _shape(self, plans: list[Plan | Mosaic]) -> tuple[int, int]:
        height, width = max(plan.height for plan in plans), max(plan.width for plan in plans)
        return _smallest_fit(self.shapes, height, width) if self.shapes else (height, width)

    def _grouped(self, indices: list[int], plans: dict[int, Plan | Mosaic], size: int) -> list[list[int]]:
        """Full batches of one shape each, in the order of their last images; then the remainders by shape."""
        groups: dict[tuple[int, int], list[int]] = {shape: [] for shape in self.shapes}
        full = []
        for index in indices:
            shape = _smallest_fit(self.shapes, plans[index].height, plans[index].width)
            groups[shape].append(index)
            if len(groups[shape]) == size:
                full.append(groups[shape])
                groups[shape] = []
        # Sorted, so that at most one batch mixes landscape and portrait and needs the square.
        rest = [index for group in groups.values() for index in group]
        rest.sort(key=lambda i: (plans[i].height > plans[i].width, plans[i].height * plans[i].width))
        return full + _cut(rest, size)


class _BatchReader(Dataset):
    """Loads planned batches, in a worker process or in the main process."""

    def __init__(self, dataset: Dataset, are_copied: bool) -> None:
        """`are_copied`: whether the loader copies batches before it returns them, which frees their memory."""
        self.dataset, self._are_copied = dataset, are_copied
        self._lent: deque[Tensor] = deque()

    def __getitem__(self, batch: BatchPlan) -> Batch | Exception:
        """The batch; a worker process returns an image's error, for the calling process to raise."""
        try:
            return self._read(batch)
        except (ValueError, OSError) as error:
            if get_worker_info() is None:
                raise
            error.add_note(traceback.format_exc())
            return error

    def _read(self, batch: BatchPlan) -> Batch:
        size = len(batch.plans) * 3 * math.prod(batch.shape)
        memory = torch.empty(size, dtype=torch.uint8) if get_worker_info() is None else self._shared(size)
        samples = (self.dataset.load(index, plan) for index, plan in zip(batch.indices, batch.plans, strict=True))
        return collate(samples, _interleaved(memory, *batch.shape))

    def _shared(self, size: int) -> Tensor:
        """Bytes of shared memory, which a worker needs for the images that it sends.

        New pages can cost as much as reading the images, so old ones are reused: a loader requests `PREFETCH` batches
        from a worker, and another one when it returns the first.
        """
        memory = self._lent.popleft() if len(self._lent) == PREFETCH else torch.empty(0, dtype=torch.uint8)
        if len(memory) < size:
            memory = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size), 0, (size,))
        if self._are_copied:
            self._lent.append(memory)
        return memory[:size]


class _Loader(DataLoader):
    """A loader whose workers ignore Ctrl-C; it raises an image's own error, without pages of a worker's traceback."""

    def __iter__(self) -> Iterator[Batch]:
        with interrupts_held():
            return map(_unless_failed, super().__iter__())


def _unless_failed(batch: Batch | Exception) -> Batch:
    if isinstance(batch, Exception):
        raise batch
    return batch


def make_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    train: bool,
    workers: int = 0,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    pad_buckets: int = 0,
    device: torch.device | None = None,
) -> DataLoader:
    """A loader of `Batch`es; its `sampler` is an `EpochBatches`.

    Args:
        dataset: `CocoDetection` or `SyntheticShapes`.
        batch_size: images per step and rank.
        train: shuffled without an incomplete batch; else in order and complete; see `EpochBatches`.
        workers: processes that load, kept from epoch to epoch; 0: the calling process loads, as it does if no other
            process can be started (`can_start_workers`).
        seed: for order and augmentation, which depend on seed and epoch alone.
        rank, world: this process, and the number of processes that share the epoch.
        pad_buckets: pad to one of this many shapes (plus the square, for the one batch per epoch that mixes the
            remaining images), so that compiled code runs with few shapes; 0: pad to the largest image of the batch.
        device: the batches' destination; memory is pinned for a CUDA device.

    Raises:
        ValueError: `batch_size` below 1, `workers` below 0, or fewer training images than one batch on every rank.
    """
    check_loading(batch_size, workers)
    workers = workers if workers == 0 or can_start_workers() else 0
    is_pinned = device is not None and device.type == "cuda"
    return _Loader(
        _BatchReader(dataset, are_copied=is_pinned),
        batch_size=None,
        sampler=EpochBatches(dataset, batch_size, train, seed, rank, world, pad_buckets),
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=ignore_interrupts,
        pin_memory=is_pinned,
        # Otherwise every pass would advance torch's global generator and so change dropout.
        generator=torch.Generator(),
    )


def check_loading(batch_size: int, workers: int) -> None:
    """Raise a ValueError for numbers that `make_loader` refuses; callers check before they read a data set."""
    check_least("batch_size", batch_size, 1)
    check_least("workers", workers, 0)


def _cut(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _smallest_fit(shapes: list[tuple[int, int]], height: int, width: int) -> tuple[int, int]:
    """The first and so smallest shape that holds height × width; the last one holds every image."""
    return next(shape for shape in shapes if shape[0] >= height and shape[1] >= width)


def _bucket_shapes(dataset: Dataset, seed: int, count: int) -> list[tuple[int, int]]:
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


def _sample_plans(dataset: Dataset, seed: int) -> list[Plan | Mosaic]:
    step = max(1, len(dataset) // _SHAPE_SAMPLES)
    return [dataset.plan(index, augmentation_generator(seed, 0, index)) for index in range(0, len(dataset), step)]


def _round_up(side: int) -> int:
    return -(-side // SHAPE_STRIDE) * SHAPE_STRIDE
