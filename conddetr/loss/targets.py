"""The objects of a batch, packed into a few tensors of one shape."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedTargets:
    """Objects of B images, padded to N each. The host keeps their counts."""

    labels: Tensor
    """[B, N] int64; padding is class 0."""
    boxes: Tensor
    """[B, N, 4] float32 or float64, (cx, cy, w, h) in [0, 1]; padding is an empty box."""
    device_counts: Tensor
    """[B] int32, objects per image, on the device of the other tensors."""
    counts: tuple[int, ...]
    """The same on the host."""

    def to(self, device: torch.device) -> "PackedTargets":
        """Copy to a device; the host does not wait for the copies."""
        names = ("labels", "boxes", "device_counts")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def pack_targets(targets: Sequence[dict], num_classes: int, max_targets: int | None = None) -> PackedTargets:
    """Check the objects of a batch and pack them on their device: best on the host, before they are copied.

    Values on a GPU are checked there, because the host would have to wait for them: wrong ones stop the device.

    Args:
        targets: per image `labels` [n] int64 in [0, num_classes) and `boxes` [n, 4] cxcywh, finite, sizes ≥ 0.
        num_classes: of the model.
        max_targets: pad to this many objects, so that every batch has one shape, as CUDA graphs require; None: to
            those of the fullest image.

    Raises:
        ValueError: a target is invalid; names the image, the expected and the actual value.
    """
    _check_shapes(targets)
    counts = tuple(len(target["labels"]) for target in targets)
    capacity = max(counts, default=0) if max_targets is None else max_targets
    for image, count in enumerate(counts):
        if count > capacity:
            raise ValueError(
                f"targets[{image}]: {count} objects, max_targets is {max_targets}: build the criterion with a larger "
                "max_targets (in training: --max-targets)."
            )
    labels = torch.cat([target["labels"] for target in targets])
    boxes = torch.cat([target["boxes"].reshape(-1, 4) for target in targets])
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    _check_values(labels, boxes, counts, num_classes)
    positions = torch.cat([torch.arange(count) + image * capacity for image, count in enumerate(counts)])
    positions = positions.to(labels.device, non_blocking=True)
    size = len(counts) * capacity
    return PackedTargets(
        labels.new_zeros(size).index_copy(0, positions, labels).view(len(counts), capacity),
        boxes.new_zeros(size, 4).index_copy(0, positions, boxes).view(len(counts), capacity, 4),
        torch.tensor(counts, dtype=torch.int32).to(labels.device, non_blocking=True),
        counts,
    )


def _check_shapes(targets: Sequence[dict]) -> None:
    if not targets:
        raise ValueError("targets: expected at least one image, got none.")
    for image, target in enumerate(targets):
        labels, boxes = target["labels"], target["boxes"]
        if labels.dim() != 1 or labels.dtype != torch.int64:
            raise ValueError(
                f"targets[{image}]['labels']: expected [n] int64, got {tuple(labels.shape)} {labels.dtype}."
            )
        if tuple(boxes.shape) != (len(labels), 4) and (len(labels) or boxes.numel()):
            raise ValueError(f"targets[{image}]['boxes']: expected shape {(len(labels), 4)}, got {tuple(boxes.shape)}.")


def _check_values(labels: Tensor, boxes: Tensor, counts: tuple[int, ...], num_classes: int) -> None:
    """Check all values at once; the images are searched for the first wrong one only to name it."""
    is_label = (labels >= 0) & (labels < num_classes)
    is_box = torch.isfinite(boxes).all(1) & (boxes[:, 2:] >= 0).all(1)
    if labels.device.type != "cpu":
        message = f"targets: expected labels in [0, {num_classes}) and finite boxes with sizes ≥ 0."
        torch._assert_async(torch.all(is_label & is_box), message)
        return
    if bool((is_label & is_box).all()):
        return
    split = [part.split(counts) for part in (labels, boxes, is_label, is_box)]
    for image, (image_labels, image_boxes, image_is_label, image_is_box) in enumerate(zip(*split, strict=True)):
        if not image_is_label.all():
            raise ValueError(
                f"targets[{image}]['labels']: expected values in [0, {num_classes}), got "
                f"{int(image_labels.min())}…{int(image_labels.max())}. Build the model with a larger num_classes."
            )
        if not image_is_box.all():
            values = image_boxes.tolist()
            raise ValueError(f"targets[{image}]['boxes']: expected finite cxcywh with sizes ≥ 0, got {values}.")
