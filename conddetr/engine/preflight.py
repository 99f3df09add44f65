"""Runs the largest batch before training, so that too little memory shows after seconds, not after hours."""

import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

try:
    import resource
except ImportError:
    # Windows lacks it.
    resource = None

from conddetr.data.batch import Batch

OBJECTS = 100
"""Objects per image of the batch, more than almost any real image has; at most one per query."""


def preflight(
    model: nn.Module,
    loss_of: Callable[[Batch], Tensor],
    optimizer: torch.optim.Optimizer,
    shape: tuple[int, int],
    batch_size: int,
    device: torch.device,
    max_targets: int = 0,
) -> str:
    """Run one forward and backward pass of the largest possible batch in training mode.

    Weights, buffers, gradients and torch's random state do not change.

    Args:
        model: a `DETR` on `device`.
        loss_of: the training forward pass of one batch on `device`; returns the total loss and raises no errors itself.
        optimizer: AdamW for the model; its two moments, allocated by the first step, must fit in memory too.
        shape: (H, W) of the images, `loader.sampler.largest_shape()`.
        batch_size: images per step on this device.
        device: where training will run.
        max_targets: largest number of objects per image that the criterion takes; 0: no limit.

    Returns:
        The batch and its memory use, in one line.

    Raises:
        ValueError: memory does not suffice; the message says how much is needed and what to lower.
    """
    objects = min(OBJECTS, model.config.num_queries, max_targets or OBJECTS)
    batch = worst_batch(shape, batch_size, objects, device)
    description = f"{batch_size} images of {shape[0]}×{shape[1]} with {batch.counts[0]} objects each"
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng([device] if is_cuda else []):
            loss_of(batch).backward()
        used = torch.cuda.max_memory_allocated(device) if is_cuda else _peak_bytes()
    except torch.OutOfMemoryError as error:
        raise ValueError(_too_much(description, _total(device), device)) from error
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        if is_cuda:
            torch.cuda.empty_cache()
    # A resumed run has its moments already: they are part of the memory in use.
    parameters = [] if optimizer.state else [p for group in optimizer.param_groups for p in group["params"]]
    moments = 2 * sum(p.numel() * p.element_size() for p in parameters)
    if used is None:
        return f"preflight: {description} fit in memory; this system does not report memory use"
    total = _total(device)
    if used + moments > total:
        needed = f"which take {used / 2**30:.2f} GiB, and AdamW's moments, {moments / 2**30:.2f} GiB more,"
        raise ValueError(_too_much(f"{description}, {needed}", total, device))
    limit = f" of {total / 2**30:.1f}" if is_cuda else ""
    return (
        f"preflight: {description} take {used / 2**30:.2f}{limit} GiB at most on {device}, "
        f"AdamW's moments {moments / 2**30:.2f} GiB more"
    )


def _total(device: torch.device) -> float:
    """Bytes of memory of a GPU; infinity on other devices, where a process's limit is unknown."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf


def _too_much(description: str, total: float, device: torch.device) -> str:
    return (
        f"preflight: {description} do not fit into the {total / 2**30:.1f} GiB of {device}. Lower batch_size (and "
        "accumulate gradients over as many steps more), max_image_size, or image_size, or train in bfloat16."
    )


def worst_batch(shape: tuple[int, int], batch_size: int, objects: int, device: torch.device) -> Batch:
    """Noise images of one shape, the last with padding, with `objects` objects each; images on `device`."""
    height, width = shape
    generator = torch.Generator().manual_seed(0)
    # One byte repeated down the rows: cheap to make at any size.
    images = torch.randint(256, (batch_size, 3, 1, width), dtype=torch.uint8, generator=generator)
    sizes = torch.tensor([shape] * batch_size, dtype=torch.int32)
    # With padding, because padded batches take other code paths through the model.
    sizes[-1] = torch.tensor([max(1, height - 1), max(1, width - 1)], dtype=torch.int32)
    count = batch_size * objects
    batch = Batch(
        images.expand(-1, -1, height, -1).contiguous(memory_format=torch.channels_last),
        sizes,
        torch.zeros(count, dtype=torch.int64),
        torch.rand(count, 4, generator=generator) * 0.2 + 0.4,
        (objects,) * batch_size,
        (-1,) * batch_size,
        (shape,) * batch_size,
        padded=True,
    )
    return batch.to(device)


def _peak_bytes() -> int | None:
    """Peak memory of this process in bytes; None: not known."""
    if resource is None:
        return None
    # In KiB, but on macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
