"""From samples to batches."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from conddetr.model.detr import pad_images


def collate(samples: list[tuple[Tensor, dict]]) -> tuple[Tensor, Tensor | None, list[dict]]:
    """Samples of a data set -> batch [B, 3, H, W], valid_hw [B, 2] or None, targets (kept on the CPU)."""
    images, targets = zip(*samples, strict=True)
    return *pad_images(list(images)), list(targets)


class EpochSampler(Sampler[int]):
    """A seeded permutation per epoch; call `set_epoch` before each.

    For an endless data set every epoch draws new indices, past those of the epochs before.
    """

    def __init__(self, length: int, seed: int, endless: bool) -> None:
        self.length, self.seed, self.endless = length, seed, endless
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        offset = self.epoch * self.length if self.endless else 0
        return (offset + index for index in torch.randperm(self.length, generator=generator).tolist())
