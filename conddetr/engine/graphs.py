"""A whole step of training as one CUDA graph for each shape of a batch: the host launches one thing, not thousands.

A graph reads and writes the same memory every time: what a step needs is copied into the tensors that its graph was
recorded with, and the weights, the optimizer's state and the sums of the losses stay where they are. Gradients live
inside the graph alone. Random numbers differ from step to step: graphs read the generators' seeds on the device.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from conddetr.capture import MAX_GRAPHS, WARMUP, Run, aside, bytes_of, reserved, views
from conddetr.config import ModelConfig
from conddetr.config.run import TrainConfig
from conddetr.data.batch import Batch
from conddetr.engine import distributed
from conddetr.kernels.registry import OPERATIONS
from conddetr.loss.criterion import loss_backend
from conddetr.loss.targets import PackedTargets, pack_targets

log = logging.getLogger(__name__)

BUCKETS = 4
"""`pad_buckets` where steps are recorded and nothing else is asked for."""

Step = Callable[[Sequence[Batch], Sequence[PackedTargets], Tensor, Tensor], Tensor]


def why_no_graphs(model: ModelConfig, backend: str, train: TrainConfig, device: torch.device) -> str | None:
    """What forbids to record steps of a model on a backend here, in half a sentence; None: nothing.

    `auto` also leaves alone what was never tried together.
    """
    if device.type != "cuda":
        return f"graphs need an NVIDIA GPU, the device is {device}"
    if distributed.world_size() > 1:
        return f"graphs are recorded in one process, there are {distributed.world_size()}"
    facts = (device, torch.float32, model.num_queries)
    matching = OPERATIONS["linear_assignment"].prefer(loss_backend(backend), *facts)
    if matching.backend == "eager":
        why = next(iter(matching.refused.values()), "backend eager").removesuffix(".")
        return f"predictions would be matched on the host, for which a graph cannot wait ({why})"
    if train.check_finite == "always":
        return "check_finite `always` waits for the device, which a graph cannot"
    if train.cuda_graphs == "auto" and train.compile:
        return "the model is compiled"
    return None


def buckets(model: ModelConfig, backend: str, train: TrainConfig, device: torch.device) -> int:
    """`pad_buckets` as asked for, or else so many that there are few graphs, and none where nothing is recorded."""
    if train.pad_buckets >= 0:
        return train.pad_buckets
    return BUCKETS if train.cuda_graphs != "off" and why_no_graphs(model, backend, train, device) is None else 0


@dataclass(frozen=True)
class _Recorded:
    """The graph of one shape."""

    inputs: "_Inputs"
    replay: Run
    results: list[Tensor]
    """One: what the step returned, overwritten by every replay."""


class StepGraphs:
    """Call it with the batches of a step: does the step, and returns what it reports, which the next call overwrites.

    The step must change nothing where it is not finite: before recording it runs with a normalizer that is NaN.
    """

    def __init__(self, model: nn.Module, step: Step, capture: Callable[[Run], Run], limits: "Limits") -> None:
        """
        Args:
            model: to be trained; its parameters stay where they are in memory.
            step: takes the batches of a step on the device, their packed targets, the normalizer and the numbers that
                change from step to step; gives the model's parameters gradients, and returns a report.
            capture: records what a function does, and returns what does it again: `CudaCapture`.
            limits: of what is recorded.
        """
        self._model, self._step, self._capture, self._limits = model, step, capture, limits
        self._said: set[str] = set()
        self.recorded: dict[tuple, _Recorded] = {}
        self.refused = ""
        """Why nothing more is recorded or replayed; empty: it is."""
        self.bytes = 0
        """Memory that the graphs hold."""

    def __call__(self, window: Sequence[Batch], normalizer: Tensor, numbers: Tensor) -> Tensor | None:
        """Batches, normalizer and numbers on the host; None, and nothing done: this step must run without a graph.

        Raises:
            ValueError: an image has more objects than fit, and `limits` are strict; names it.
        """
        if self.refused or not self._fit(window):
            return None
        key = tuple((tuple(batch.images.shape), batch.padded) for batch in window)
        if key not in self.recorded and len(self.recorded) == MAX_GRAPHS:
            self._say(
                f"{MAX_GRAPHS} kinds of steps are recorded, further ones run without (--pad-buckets: fewer shapes)."
            )
            return None
        packed = [pack_targets(batch.targets, self._limits.num_classes, self._limits.objects) for batch in window]
        tensors = _tensors(window, packed, normalizer, numbers)
        if key not in self.recorded:
            self._record(key, window, packed, tensors)
            if self.refused:
                return None
        found = self.recorded[key]
        found.inputs.fill(*tensors)
        found.replay()
        return found.results[0]

    def give_up(self, reason: str) -> None:
        """Free all graphs; steps run without from now on."""
        self.refused = reason
        self.clear()

    def clear(self) -> None:
        """Free all graphs; what comes next is recorded anew."""
        self.recorded.clear()
        self.bytes = 0

    def _fit(self, window: Sequence[Batch]) -> bool:
        # What is recorded never looks at the counts on the host.
        most = min(self._limits.objects, self._limits.queries)
        for batch in window:
            for image_id, count in zip(batch.image_ids, batch.counts, strict=True):
                if count > most and self._limits.strict:
                    raise ValueError(
                        f"Image id {image_id} has {count} objects, the model {self._limits.queries} queries, and "
                        f"max_targets is {self._limits.objects}: with cuda_graphs `on` none may have more. Raise "
                        "num_queries and max_targets, or train with cuda_graphs `auto`."
                    )
                if count > most:
                    self._say(f"image id {image_id} has {count} objects, a graph takes {most}: such steps run without.")
                    return False
        return True

    def _say(self, line: str) -> None:
        """Once, whatever the numbers in it."""
        kind = "".join(letter for letter in line if not letter.isdigit())
        if kind not in self._said:
            self._said.add(kind)
            log.warning("CUDA graphs: %s", line)

    def _record(self, key: tuple, window: Sequence[Batch], packed: Sequence[PackedTargets], tensors: tuple) -> None:
        try:
            self.recorded[key] = self._recorded(window, packed, tensors)
        except torch.OutOfMemoryError:
            if self._limits.strict:
                raise
        if key not in self.recorded:
            # Here, where no exception holds what it was raised amid.
            self._model.zero_grad(set_to_none=True)
            self.give_up("the memory does not suffice for recording")
            torch.cuda.empty_cache()
            log.warning("CUDA graphs: %s; going on without.", self.refused)

    def _recorded(self, window: Sequence[Batch], packed: Sequence[PackedTargets], tensors: tuple) -> _Recorded:
        inputs = _Inputs(*tensors, self._limits.device)
        window, packed, normalizer, numbers = inputs.of_step(window, packed)
        results: list[Tensor] = []

        def run() -> None:
            results[:] = [self._step(window, packed, normalizer, numbers)]

        normalizer.fill_(float("nan"))
        with aside(self._limits.device):
            for _ in range(WARMUP):
                run()
        # Recorded gradients are made in the graph's memory, and left to the next graph: none may be there before.
        self._model.zero_grad(set_to_none=True)
        before = reserved(self._limits.device)
        replay = self._capture(run)
        self.bytes += reserved(self._limits.device) - before
        self._model.zero_grad(set_to_none=True)
        return _Recorded(inputs, replay, results)


@dataclass(frozen=True)
class Limits:
    """What is recorded, and what is done with the rest."""

    device: torch.device
    num_classes: int
    queries: int
    objects: int
    """Per image, to which targets are padded."""
    strict: bool
    """Whether a step that cannot be recorded is an error; else it runs without a graph."""


class _Inputs:
    """What a graph reads: images and their sizes, and all else in one tensor, which one copy fills."""

    def __init__(self, pictures: list[Tensor], others: list[Tensor], device: torch.device) -> None:
        self._pictures = [torch.empty_like(tensor, device=device) for tensor in pictures]
        size = bytes_of(others)
        self._flat = torch.empty(size, dtype=torch.uint8, device=device)
        self._others = views(self._flat, others)
        self.fill(pictures, others)

    def fill(self, pictures: list[Tensor], others: list[Tensor]) -> None:
        """Copy, without waiting where the pictures are pinned; `others` are on the host."""
        host = torch.empty(self._flat.shape, dtype=torch.uint8, pin_memory=self._flat.is_cuda)
        for own, value in zip(views(host, others), others, strict=True):
            own.copy_(value)
        self._flat.copy_(host, non_blocking=True)
        for own, value in zip(self._pictures, pictures, strict=True):
            own.copy_(value, non_blocking=True)

    def of_step(
        self, window: Sequence[Batch], packed: Sequence[PackedTargets]
    ) -> tuple[list[Batch], list[PackedTargets], Tensor, Tensor]:
        """The arguments of a step that reads them; the reverse of `_tensors`."""
        *targets, normalizer, numbers = self._others
        count = len(window)
        batches = [
            replace(batch, images=images, sizes=sizes)
            for batch, images, sizes in zip(window, self._pictures[:count], self._pictures[count:], strict=True)
        ]
        # Counts of the host only decide whether the objects fit.
        own = [
            PackedTargets(*targets[3 * place : 3 * place + 3], (0,) * len(old.counts))
            for place, old in enumerate(packed)
        ]
        return batches, own, normalizer, numbers


def _tensors(
    window: Sequence[Batch], packed: Sequence[PackedTargets], normalizer: Tensor, numbers: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    pictures = [batch.images for batch in window] + [batch.sizes for batch in window]
    targets = [tensor for part in packed for tensor in (part.labels, part.boxes, part.device_counts)]
    return pictures, [*targets, normalizer, numbers]
