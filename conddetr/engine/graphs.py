"""Whole training steps as CUDA graphs, one per batch shape: one launch instead of thousands.

A graph reads and writes the same memory in every replay. The inputs of a step are copied into the tensors that the
graph was recorded with; weights, optimizer state and loss sums stay where they are. Gradients exist only inside the
graph. Random numbers differ between steps, because graphs read the generators' seeds on the device.
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
"""Default of `pad_buckets` if steps are recorded."""

Step = Callable[[Sequence[Batch], Sequence[PackedTargets], Tensor, Tensor], Tensor]


def why_no_graphs(model: ModelConfig, backend: str, train: TrainConfig, device: torch.device) -> str | None:
    """Why steps of a model cannot be recorded here, as part of a sentence; None: they can.

    `auto` also excludes compiled models, which were never tested with graphs.
    """
    if device.type != "cuda":
        return f"graphs need an NVIDIA GPU, the device is {device}"
    if distributed.world_size() > 1:
        return f"graphs are recorded in one process only, there are {distributed.world_size()}"
    facts = (device, torch.float32, model.num_queries)
    matching = OPERATIONS["linear_assignment"].prefer(loss_backend(backend), *facts)
    if matching.backend == "eager":
        why = next(iter(matching.refused.values()), "backend eager").removesuffix(".")
        return f"predictions would be matched on the host, and a graph cannot wait for the host ({why})"
    if train.check_finite == "always":
        return "check_finite `always` makes the host wait for the device, which a graph cannot do"
    if train.checkpoint_activations:
        return "activations are recomputed (checkpoint_activations), which was never tested inside graphs"
    if train.cuda_graphs == "auto" and train.compile:
        return "the model is compiled"
    return None


def buckets(model: ModelConfig, backend: str, train: TrainConfig, device: torch.device) -> int:
    """The configured `pad_buckets`; if it is -1, `BUCKETS` if steps are recorded, else 0."""
    if train.pad_buckets >= 0:
        return train.pad_buckets
    return BUCKETS if train.cuda_graphs != "off" and why_no_graphs(model, backend, train, device) is None else 0


@dataclass(frozen=True)
class _Recorded:
    """The graph of one shape."""

    inputs: "_Inputs"
    replay: Run
    results: list[Tensor]
    """One tensor: the step's report, overwritten by every replay."""


class StepGraphs:
    """Runs a step on the given batches and returns its report, which the next call overwrites.

    The step must change nothing if its losses are not finite: before recording it runs with a NaN normalizer.
    """

    def __init__(self, model: nn.Module, step: Step, capture: Callable[[Run], Run], limits: "Limits") -> None:
        """
        Args:
            model: the model to train; its parameters keep their addresses.
            step: takes the batches of a step on the device, their packed targets, the normalizer and the numbers that
                change from step to step; computes gradients of the model's parameters, and returns a report.
            capture: records a function and returns a function that replays it: `CudaCapture`.
            limits: which steps are recorded.
        """
        self._model, self._step, self._capture, self._limits = model, step, capture, limits
        self._said: set[str] = set()
        self.recorded: dict[tuple, _Recorded] = {}
        self.refused = ""
        """Why nothing is recorded or replayed any more; empty: graphs are in use."""
        self.bytes = 0
        """Memory that the graphs hold."""

    def __call__(self, window: Sequence[Batch], normalizer: Tensor, numbers: Tensor) -> Tensor | None:
        """Run one step; batches, normalizer and numbers are on the host. Returns None, and does nothing, if this step
        must run without a graph.

        Raises:
            ValueError: an image has more objects than fit, and `limits` are strict; names the image.
        """
        if self.refused or not self._fit(window):
            return None
        key = tuple((tuple(batch.images.shape), batch.padded) for batch in window)
        if key not in self.recorded and len(self.recorded) == MAX_GRAPHS:
            self._say(f"{MAX_GRAPHS} kinds of steps are recorded, others run without (--pad-buckets: fewer shapes).")
            return None
        packed = [pack_targets(batch.targets, self._limits.num_classes, self._limits.objects) for batch in window]
        tensors = _tensors(window, packed, normalizer, numbers)
        if key not in self.recorded:
            self._record(key, window, packed, tensors)
            if self.refused:
                return None
        graph = self.recorded[key]
        graph.inputs.fill(*tensors)
        graph.replay()
        return graph.results[0]

    def give_up(self, reason: str) -> None:
        """Free all graphs; steps run without graphs from now on."""
        self.refused = reason
        self.clear()

    def clear(self) -> None:
        """Free all graphs; later steps are recorded again."""
        self.recorded.clear()
        self.bytes = 0

    def _fit(self, window: Sequence[Batch]) -> bool:
        # Recorded steps never read the counts on the host.
        most = min(self._limits.objects, self._limits.queries)
        for batch in window:
            for image_id, count in zip(batch.image_ids, batch.counts, strict=True):
                if count > most and self._limits.strict:
                    raise ValueError(
                        f"Image id {image_id} has {count} objects, the model has {self._limits.queries} queries, and "
                        f"max_targets is {self._limits.objects}: with cuda_graphs `on` no image may have more. Raise "
                        "num_queries and max_targets, or train with cuda_graphs `auto`."
                    )
                if count > most:
                    self._say(f"image id {image_id} has {count} objects, a graph takes {most}: such steps run without.")
                    return False
        return True

    def _say(self, line: str) -> None:
        """Log a warning once; lines that differ only in numbers count as the same."""
        pattern = "".join(letter for letter in line if not letter.isdigit())
        if pattern not in self._said:
            self._said.add(pattern)
            log.warning("CUDA graphs: %s", line)

    def _record(self, key: tuple, window: Sequence[Batch], packed: Sequence[PackedTargets], tensors: tuple) -> None:
        try:
            self.recorded[key] = self._recorded(window, packed, tensors)
        except torch.OutOfMemoryError:
            if self._limits.strict:
                raise
        if key not in self.recorded:
            # Outside the except block, where no exception keeps the tensors of its frames alive.
            self._model.zero_grad(set_to_none=True)
            self.give_up("the memory does not suffice for recording")
            torch.cuda.empty_cache()
            log.warning("CUDA graphs: %s; training continues without.", self.refused)

    def _recorded(self, window: Sequence[Batch], packed: Sequence[PackedTargets], tensors: tuple) -> _Recorded:
        inputs = _Inputs(*tensors, self._limits.device)
        window, packed, normalizer, numbers = inputs.step_inputs(window, packed)
        results: list[Tensor] = []

        def run() -> None:
            results[:] = [self._step(window, packed, normalizer, numbers)]

        normalizer.fill_(float("nan"))
        with aside(self._limits.device):
            for _ in range(WARMUP):
                run()
        # Recorded gradients are allocated in the graph's memory, which the next graph reuses: none may exist before.
        self._model.zero_grad(set_to_none=True)
        before = reserved(self._limits.device)
        replay = self._capture(run)
        self.bytes += reserved(self._limits.device) - before
        self._model.zero_grad(set_to_none=True)
        return _Recorded(inputs, replay, results)


@dataclass(frozen=True)
class Limits:
    """Which steps are recorded, and how others are handled."""

    device: torch.device
    num_classes: int
    queries: int
    objects: int
    """Objects per image to which targets are padded."""
    strict: bool
    """Whether a step that cannot be recorded is an error; otherwise it runs without a graph."""


class _Inputs:
    """Inputs of a graph: images and their sizes, and everything else in one tensor that a single copy fills."""

    def __init__(self, images: list[Tensor], others: list[Tensor], device: torch.device) -> None:
        self._pictures = [torch.empty_like(tensor, device=device) for tensor in images]
        size = bytes_of(others)
        self._flat = torch.empty(size, dtype=torch.uint8, device=device)
        self._others = views(self._flat, others)
        self.fill(images, others)

    def fill(self, images: list[Tensor], others: list[Tensor]) -> None:
        """Copy new values; does not wait if the images are pinned. `others` are on the host."""
        host = torch.empty(self._flat.shape, dtype=torch.uint8, pin_memory=self._flat.is_cuda)
        for destination, value in zip(views(host, others), others, strict=True):
            destination.copy_(value)
        self._flat.copy_(host, non_blocking=True)
        for destination, value in zip(self._pictures, images, strict=True):
            destination.copy_(value, non_blocking=True)

    def step_inputs(
        self, window: Sequence[Batch], packed: Sequence[PackedTargets]
    ) -> tuple[list[Batch], list[PackedTargets], Tensor, Tensor]:
        """The arguments of a step that reads these inputs; the inverse of `_tensors`."""
        *flat, normalizer, numbers = self._others
        count = len(window)
        batches = [
            replace(batch, images=images, sizes=sizes)
            for batch, images, sizes in zip(window, self._pictures[:count], self._pictures[count:], strict=True)
        ]
        # Counts on the host only decide whether the objects fit; a recorded step does not read them.
        targets = [
            PackedTargets(*flat[3 * index : 3 * index + 3], (0,) * len(source.counts))
            for index, source in enumerate(packed)
        ]
        return batches, targets, normalizer, numbers


def _tensors(
    window: Sequence[Batch], packed: Sequence[PackedTargets], normalizer: Tensor, numbers: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    images = [batch.images for batch in window] + [batch.sizes for batch in window]
    targets = [tensor for part in packed for tensor in (part.labels, part.boxes, part.device_counts)]
    return images, [*targets, normalizer, numbers]
