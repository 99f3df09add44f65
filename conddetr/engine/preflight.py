"""Runs the largest batch before training, so that too little memory shows after seconds, not after hours."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from conddetr.data.batch import Batch
from conddetr.engine import memory
from conddetr.model.detr import DETR

OBJECTS = 100
"""Objects per image of the batch, more than almost any real image has; at most one per query."""
GROWTH = (8, 4, 2)
"""On a CPU, factors between the batch sizes that are run to predict larger ones, preferred first. One and two images
alone would not do: their memory is small beside what libraries allocate once."""
MOST_TRIALS = 8
"""At most this many batch sizes are tried, unless halving alone needs more."""


def preflight(
    model: DETR,
    loss_of: Callable[[Batch], Tensor],
    optimizer: torch.optim.Optimizer,
    shape: tuple[int, int],
    batch_size: int,
    device: torch.device,
    max_targets: int = 0,
) -> str:
    """Run one forward and backward pass of the largest possible batch in training mode.

    If it does not fit into memory, smaller batches are tried, and the same batch with activation checkpointing. On a
    CPU, where a system ends processes that need too much, a batch is not tried if smaller ones predict that it does not
    fit. Weights, buffers, gradients and torch's random state do not change.

    Args:
        model: on `device`.
        loss_of: the training forward pass of one batch on `device`; returns the total loss and raises no errors itself.
        optimizer: AdamW for the model; its two moments, allocated by the first step, must fit in memory too.
        shape: (H, W) of the images, `loader.sampler.largest_shape()`.
        batch_size: images per step on this device.
        device: where training will run.
        max_targets: largest number of objects per image that the criterion takes; 0: no limit.

    Returns:
        The batch, its memory use and an estimate of the largest batch, in one line.

    Raises:
        ValueError: memory does not suffice; the message says which batch fits, whether `checkpoint_activations` helps,
            and what to lower.
    """
    objects = min(OBJECTS, model.config.num_queries, max_targets or OBJECTS)
    make_batch = partial(worst_batch, shape, objects=objects, device=device)
    # A resumed run has its moments already: they are part of the memory in use.
    parameters = [] if optimizer.state else [p for group in optimizer.param_groups for p in group["params"]]
    moments = 2 * sum(p.numel() * p.element_size() for p in parameters)
    limit = memory.limit(device)
    trials = Trials(model, loss_of, make_batch, device, moments, math.inf if limit is None else limit)
    description = f"preflight: {batch_size} images of {shape[0]}×{shape[1]} with {objects} objects each"
    with _unchanged(model, device):
        if not trials.fits(batch_size):
            raise ValueError(_too_much(description, trials, batch_size))
        if memory.peak(device) is None:
            return f"{description} fit in memory; this system does not report memory use"
        used = f"{(trials.needed(batch_size) - moments) / 2**30:.2f}"
        there = "" if limit is None else f" of {limit / 2**30:.1f}"
        return (
            f"{description} take {used}{there} GiB at most on {device}, AdamW's moments {moments / 2**30:.2f} GiB "
            f"more; {_estimate(trials, batch_size)}"
        )


@dataclass(frozen=True)
class Trials:
    """Memory that batches of several sizes need, each measured once."""

    model: DETR
    loss_of: Callable[[Batch], Tensor]
    """The training forward pass of one batch."""
    make_batch: Callable[[int], Batch]
    """Takes a number of images."""
    device: torch.device
    moments: int
    """Bytes that the optimizer will allocate."""
    limit: float
    """Bytes that may be used; infinity: not known."""
    measured: dict[int, float] = field(default_factory=dict)
    """Number of images → bytes."""

    def fits(self, size: int) -> bool:
        """Whether a batch of this many images fits."""
        return self.needed(size) <= self.limit

    def needed(self, size: int) -> float:
        """Bytes that a batch needs, with the optimizer's moments; infinity: more than there is."""
        if self.is_predicted(size):
            return self.predicted(size)
        if size not in self.measured:
            self.measured[size] = self._run(size) + self.moments
        return self.measured[size]

    def is_predicted(self, size: int) -> bool:
        """Whether this batch is not run, because it is predicted to need more memory than there is."""
        if self.device.type == "cuda" or self.limit == math.inf or size == 1:
            return False
        return not self.fits(1) or (size > 2 and self.predicted(size) > self.limit)

    def predicted(self, size: int) -> float:
        """Bytes that a batch needs, from smaller ones."""
        base, per_image = self.line(size)
        return base + size * per_image

    def line(self, size: int) -> tuple[float, float]:
        """Bytes of no image, and of each image, from two batches of fewer images than `size`.

        The batches are the largest that need less than half of the memory, if smaller ones say that `size` does not
        fit. The first is infinite if not even one or two images fit.
        """
        first, second = 1, 2
        while self.fits(first) and self.needed(second) < math.inf:
            per_image = (self.needed(second) - self.needed(first)) / (second - first)
            base = self.needed(second) - second * per_image
            following = [second * factor for factor in GROWTH if second * factor < size]
            safe = [images for images in following if base + images * per_image <= self.limit / 2]
            is_clear = base + size * per_image <= self.limit and size <= second * max(GROWTH)
            if is_clear or not safe:
                return base, per_image
            first, second = second, safe[0]
        return math.inf, 0.0

    def _run(self, size: int) -> float:
        """Peak of one step without update; infinity if the memory does not suffice, 0 if it is not reported."""
        memory.reset_peak(self.device)
        is_exhausted = False
        try:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                self.loss_of(self.make_batch(size)).backward()
        except RuntimeError as error:
            if not memory.is_exhausted(error):
                raise
            is_exhausted = True
        # Outside the except block, where no exception keeps the tensors of its frames alive.
        self.model.zero_grad(set_to_none=True)
        used = memory.peak(self.device) or 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return math.inf if is_exhausted else used


@contextmanager
def _unchanged(model: DETR, device: torch.device) -> Iterator[None]:
    """Training mode; at the end mode, buffers and recomputation are as before, and there are no gradients."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    was_training = model.training
    model.train()
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _estimate(trials: Trials, size: int) -> str:
    """The largest batch that should fit, from the line through two batches."""
    if trials.limit == math.inf:
        return "this system does not report how much there is"
    first, second = (1, size) if size > 1 else (1, 2)
    if not trials.fits(second):
        return "2 images do not fit"
    per_image = (trials.needed(second) - trials.needed(first)) / (second - first)
    if per_image <= 0:
        return f"{first} and {second} images need the same, too little to estimate the largest batch"
    most = second + int((trials.limit - trials.needed(second)) / per_image)
    return f"estimated from {first} and {second} images: up to {most} fit"


def _too_much(description: str, trials: Trials, size: int) -> str:
    """Error message for a batch that does not fit."""
    is_estimated = trials.is_predicted(size)
    amount = _gibibytes(trials.needed(size), trials.moments, is_estimated)
    smaller = _estimated_fit(trials, size) if is_estimated else _tried_fit(trials, size)
    return (
        f"{description} do not fit into the {trials.limit / 2**30:.1f} GiB of {trials.device}: they need {amount}; "
        f"{smaller}.{_with_recomputation(trials, size, is_estimated)} Lower batch_size (and accumulate gradients over "
        "as many steps more), max_image_size, or image_size, or train in bfloat16."
    )


def _gibibytes(needed: float, moments: int, is_estimated: bool) -> str:
    """What a batch needs, and how it is known."""
    if needed == math.inf:
        return "more"
    parts = [
        *(["with AdamW's moments"] if moments else []),
        *(["estimated from smaller batches"] if is_estimated else []),
    ]
    return f"{needed / 2**30:.2f} GiB" + (f" ({', '.join(parts)})" if parts else "")


def _estimated_fit(trials: Trials, size: int) -> str:
    base, per_image = trials.line(size)
    return f"an estimated {int((trials.limit - base) / per_image)} fit" if base < math.inf else "not even one fits"


def _tried_fit(trials: Trials, size: int) -> str:
    low, high = largest(trials.fits, size)
    if not low:
        return "not even one fits"
    amount = _gibibytes(trials.needed(low), trials.moments, False)
    return f"{low} take {amount} and fit{f', {high} do not' if high < size else ''}"


def largest(fits: Callable[[int], bool], size: int) -> tuple[int, int]:
    """The largest batch that fits (0: none) and the smallest that does not, as far as few trials find them.

    Args:
        fits: whether a number of images fits.
        size: a number that does not fit.
    """
    low, high, tried = size // 2, size, 1
    while low and not fits(low):
        low, high, tried = low // 2, low, tried + 1
    while low and high - low > 1 and tried < MOST_TRIALS:
        middle, tried = (low + high) // 2, tried + 1
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, high


def _with_recomputation(trials: Trials, size: int, is_estimated: bool) -> str:
    """A sentence that says whether the batch fits with activation checkpointing; empty if it is on already."""
    model = trials.model
    # A compiled model cannot have it.
    if model.recomputes or model._compiled_call_impl is not None:
        return ""
    trials = replace(trials, measured={})
    model.checkpoint_activations(True)
    try:
        needed = trials.predicted(size) if is_estimated else trials.needed(size)
        amount = _gibibytes(needed, trials.moments, is_estimated)
        verb = "fit" if needed <= trials.limit else "do not fit either"
        return f" With checkpoint_activations {size} images need {amount} and {verb}."
    finally:
        model.checkpoint_activations(False)


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
