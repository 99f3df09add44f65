"""Batches: images padded to one shape, with their objects."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from conddetr.data.images import to_model_input


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
        pixels = interleaved(torch.empty(len(samples) * 3 * height * width, dtype=torch.uint8), height, width)
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


def interleaved(memory: Tensor, height: int, width: int) -> Tensor:
    """Bytes as [B, 3, H, W] with interleaved colours, as in decoded image files, so that whole rows are copied."""
    return memory.view(-1, height, width, 3).permute(0, 3, 1, 2)
