"""Forward, losses and backward of a batch as one CUDA graph for each shape: the host launches one thing, not thousands.

A graph reads and writes the same memory every time, so a batch is copied into the tensors that its graph was recorded
with. Every graph adds to the same gradients, which stay where they are from step to step; the update, few launches, is
made outside. Random numbers differ from step to step: graphs read the generators' seeds on the device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conddetr.config import ModelConfig
from conddetr.data.batch import Batch
from conddetr.engine import distributed
from conddetr.engine.guard import NormStatistics
from conddetr.kernels.match.op import choose
from conddetr.loss.targets import PackedTargets
from conddetr.model.detr import DETR

WARMUP = 3
"""Runs before recording: libraries choose their algorithms in the first."""

Losses = Callable[[Batch, PackedTargets, Tensor], dict[str, Tensor]]
Run = Callable[[], None]


def refuse_graphs(config: ModelConfig, device: torch.device) -> None:
    """Check that whole steps can be recorded here.

    Raises:
        ValueError: they can not; says why and what to do.
    """
    reason = None
    if device.type != "cuda":
        reason = f"graphs need an NVIDIA GPU, the device is {device}"
    elif distributed.world_size() > 1:
        reason = f"graphs are recorded in one process, there are {distributed.world_size()}"
    elif choose("eager" if config.backend == "eager" else "auto", device, torch.float32, config.num_queries) == "eager":
        reason = "predictions would be matched on the host: train with backend auto or triton"
    if reason is not None:
        raise ValueError(f"Training option cuda_graphs: {reason}. Train without it.")


@dataclass(frozen=True)
class _Recorded:
    """The graph of one shape."""

    inputs: list[Tensor]
    losses: dict[str, Tensor]
    replay: Run


class StepGraphs:
    """Call it with a batch: adds to the gradients, and returns the losses, which the next call overwrites."""

    def __init__(self, model: DETR, losses: Losses, capture: Callable[[Run], Run]) -> None:
        """
        Args:
            model: to be trained; its parameters and gradients stay where they are in memory.
            losses: of a batch on the device, its packed targets and the normalizer.
            capture: records what a function does, and returns what does it again: `CudaCapture`.
        """
        self._model, self._losses, self._capture = model, losses, capture
        self.recorded: dict[tuple, _Recorded] = {}

    def __call__(self, batch: Batch, targets: PackedTargets, normalizer: Tensor) -> dict[str, Tensor]:
        """Batch on the device, targets of a capacity that is always the same, normalizer of the step.

        Raises:
            ValueError: an image has more objects than the model queries; names it.
        """
        self._refuse_more_than_queries(batch, targets)
        key = (tuple(batch.images.shape), batch.padded, tuple(targets.labels.shape))
        if key not in self.recorded:
            self.recorded[key] = self._record(batch, targets, normalizer)
        found = self.recorded[key]
        for own, value in zip(found.inputs, _inputs(batch, targets, normalizer), strict=True):
            own.copy_(value, non_blocking=True)
        found.replay()
        return found.losses

    def _refuse_more_than_queries(self, batch: Batch, targets: PackedTargets) -> None:
        # The criterion matches those on the host; what is recorded never looks at the counts there.
        queries = self._model.config.num_queries
        for image_id, count in zip(batch.image_ids, targets.counts, strict=True):
            if count > queries:
                raise ValueError(
                    f"Image id {image_id} has {count} objects, the model {queries} queries: with cuda_graphs none may "
                    "have more. Raise num_queries, or train without cuda_graphs."
                )

    def _record(self, batch: Batch, targets: PackedTargets, normalizer: Tensor) -> _Recorded:
        images, sizes, labels, boxes, counts, normalizer = (
            tensor.clone() for tensor in _inputs(batch, targets, normalizer)
        )
        batch = replace(batch, images=images, sizes=sizes)
        # Counts of the host only decide whether the objects fit.
        fitting = (min(labels.shape[1], self._model.config.num_queries),) * len(batch)
        targets = PackedTargets(labels, boxes, counts, fitting)
        losses: dict[str, Tensor] = {}

        def run() -> None:
            found = self._losses(batch, targets, normalizer)
            found["loss"].backward()
            losses.update({name: value.detach() for name, value in found.items()})

        with _unchanged(self._model, images.device):
            for _ in range(WARMUP):
                run()
        return _Recorded(_inputs(batch, targets, normalizer), losses, self._capture(run))


class CudaCapture:
    """Recording on a GPU. All graphs share memory: no two run at once."""

    def __init__(self, device: torch.device) -> None:
        """`device`: of all that is recorded; it need not be the current one."""
        # Not PyTorch's own, which one device has for all.
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._stream.device)
        # Of this thread alone: meanwhile the data loader's thread goes on pinning memory, which a capture of all
        # threads forbids.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay


def _inputs(batch: Batch, targets: PackedTargets, normalizer: Tensor) -> list[Tensor]:
    """What a graph reads."""
    return [batch.images, batch.sizes, targets.labels, targets.boxes, targets.device_counts, normalizer]


@contextmanager
def _unchanged(model: DETR, device: torch.device) -> Iterator[None]:
    """Gradients, statistics of batch norms and random generators are afterwards what they were.

    Gradients that are made inside stay, as zeros. Parameters that the losses do not depend on keep None: AdamW decays
    no weight without gradient.

    On a GPU what is done inside runs on a stream of its own, as libraries want it before recording.
    """
    kept = {parameter: parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None}
    statistics = NormStatistics(model)
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if is_cuda else []):
        if is_cuda:
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                yield
            torch.cuda.current_stream(device).wait_stream(stream)
        else:
            yield
    statistics.restore()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.copy_(kept.get(parameter, 0.0))
