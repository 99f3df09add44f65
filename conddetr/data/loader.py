"""Loads the batches of an epoch, in worker processes or in this one."""

import math
import traceback
from collections import deque
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from conddetr.config.checks import check_least
from conddetr.data.batch import Batch, collate, interleaved
from conddetr.data.device_decoder import DeviceDecoder
from conddetr.data.encoded import EncodedBatch
from conddetr.data.epochs import BatchPlan, EpochBatches
from conddetr.data.sets import HasFiles, ImageSet
from conddetr.processes import can_start_workers, ignore_interrupts, interrupts_held

PREFETCH = 2
"""Batches that a worker loads ahead."""


class _BatchReader(Dataset):
    """Loads planned batches, in a worker process or in the main process."""

    def __init__(self, dataset: ImageSet, are_copied: bool, decodes: bool = True) -> None:
        """
        Args:
            dataset: where `load` reads images.
            are_copied: whether the loader copies batches before it returns them, which frees their memory.
            decodes: decode JPEG files and apply the plans; if not, batches are `EncodedBatch`es.
        """
        self.dataset, self._are_copied, self._decodes = dataset, are_copied, decodes
        self._lent: deque[Tensor] = deque()

    def __getitem__(self, batch: BatchPlan) -> Batch | EncodedBatch | Exception:
        """The batch; a worker process returns an image's error, for the calling process to raise."""
        try:
            return self._read(batch) if self._decodes else self._read_encoded(batch)
        except (ValueError, OSError) as error:
            if get_worker_info() is None:
                raise
            error.add_note(traceback.format_exc())
            return error

    def _read(self, batch: BatchPlan) -> Batch:
        size = len(batch.plans) * 3 * math.prod(batch.shape)
        memory = torch.empty(size, dtype=torch.uint8) if get_worker_info() is None else self._shared(size)
        samples = (self.dataset.load(index, plan) for index, plan in zip(batch.indices, batch.plans, strict=True))
        return collate(samples, interleaved(memory, *batch.shape))

    def _read_encoded(self, batch: BatchPlan) -> EncodedBatch:
        assert isinstance(self.dataset, HasFiles)
        parts = zip(batch.indices, batch.plans, strict=True)
        images, targets = zip(*(self.dataset.load_encoded(index, plan) for index, plan in parts), strict=True)
        return EncodedBatch(images, batch.plans, targets, batch.shape)

    def _shared(self, size: int) -> Tensor:
        """Bytes of shared memory, which a worker needs for the images that it sends.

        New pages can cost as much as reading the images, so old ones are reused: a loader requests `PREFETCH` batches
        from a worker, and another one when it returns the first.
        """
        memory = self._lent.popleft() if len(self._lent) == PREFETCH else torch.empty(0, dtype=torch.uint8)
        if len(memory) < size:
            memory = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
        if self._are_copied:
            self._lent.append(memory)
        return memory[:size]


class _Loader(DataLoader):
    """A loader whose workers ignore Ctrl-C; it raises an image's own error, without pages of a worker's traceback."""

    decoder: DeviceDecoder | None = None
    """Decodes the batches of the workers; None: they are decoded."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        with interrupts_held():
            batches = map(_unless_failed, super().__iter__())
        return map(self.decoder, batches) if self.decoder else batches


T = TypeVar("T")


def _unless_failed(batch: T | Exception) -> T:
    if isinstance(batch, Exception):
        raise batch
    return batch


def make_loader(
    dataset: ImageSet,
    batch_size: int,
    *,
    train: bool,
    workers: int = 0,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    pad_buckets: int = 0,
    device: torch.device | None = None,
    decoder: DeviceDecoder | None = None,
) -> DataLoader:
    """A loader of `Batch`es; its `sampler` is an `EpochBatches`.

    Args:
        dataset: `CocoDetection`, `SyntheticShapes`, or another `ImageSet`.
        batch_size: images per step and rank.
        train: shuffled without an incomplete batch; else in order and complete; see `EpochBatches`.
        workers: processes that load, kept from epoch to epoch; 0: the calling process loads, as it does if no other
            process can be started (`can_start_workers`).
        seed: for order and augmentation, which depend on seed and epoch alone.
        rank, world: this process, and the number of processes that share the epoch.
        pad_buckets: pad to one of this many shapes (plus the square, for the one batch per epoch that mixes the
            remaining images), so that compiled code runs with few shapes; 0: pad to the largest image of the batch.
        device: the batches' destination; memory is pinned for a CUDA device.
        decoder: decodes and augments JPEG files in this process, on its device; workers only read them. Default: the
            workers do all. Only for data sets of files.

    Raises:
        ValueError: `batch_size` below 1, `workers` below 0, or fewer training images than one batch on every rank.
    """
    check_loading(batch_size, workers)
    workers = workers if workers == 0 or can_start_workers() else 0
    is_pinned = decoder is None and device is not None and device.type == "cuda"
    loader = _Loader(
        _BatchReader(dataset, are_copied=is_pinned, decodes=decoder is None),
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
    loader.decoder = decoder
    return loader


def check_loading(batch_size: int, workers: int) -> None:
    """Raise a ValueError for numbers that `make_loader` refuses; callers check before they read a data set."""
    check_least("batch_size", batch_size, 1)
    check_least("workers", workers, 0)
