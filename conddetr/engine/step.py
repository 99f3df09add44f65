"""One training step: forward, losses, backward, clipping, update, moving average.

If predictions and objects are matched on the host, it waits for the device once per batch. Fused matching does not
wait, and a whole step can be a CUDA graph. Everything else that the host needs (whether the step was finite, the
losses, whether to stop) is computed on the device and read one step later, while the next step runs.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from conddetr.capture import CudaCapture, Run
from conddetr.config.run import TrainConfig
from conddetr.data.batch import Batch
from conddetr.engine import distributed
from conddetr.engine.arrival import Arrival
from conddetr.engine.graphs import Limits, StepGraphs, why_no_graphs
from conddetr.engine.guard import NormStatistics, find_cause, poisoned_losses
from conddetr.engine.optim import MovingAverage, learning_rates, load_optimizer, make_optimizer, rates_on_device
from conddetr.engine.parameters import freeze, group_parameters
from conddetr.engine.precision import has_bfloat16, resolve_precision
from conddetr.loss.matcher import NonFiniteCostError
from conddetr.loss.targets import PackedTargets
from conddetr.model.detr import DETR
from conddetr.zoo import build_criterion

log = logging.getLogger(__name__)


class Stepper:
    """Holds everything that a step changes: weights, optimizer, moving average, and an epoch's sums of the losses."""

    def __init__(self, model: DETR, config: TrainConfig, device: torch.device, steps_per_epoch: int) -> None:
        """
        Args:
            model: on `device`.
            config: how to train; precision `auto` is resolved for this device.
            device: the model's device.
            steps_per_epoch: for the learning rate schedule.

        Raises:
            ValueError: `cuda_graphs` is `on`, and steps cannot be recorded here; the message says why. Or as
                `freeze` and `group_parameters`.
        """
        self.model, self.device = model, device
        precision = resolve_precision(config.precision, has_bfloat16(device))
        self.config = config = replace(config, precision=precision)
        self.steps_per_epoch = steps_per_epoch
        check_finite = {"auto": None, "always": True, "never": False}[config.check_finite]
        max_targets = config.max_targets or None
        model.checkpoint_activations(config.checkpoint_activations)
        criterion = build_criterion(model, max_targets=max_targets, check_finite=check_finite)
        self.criterion = criterion.to(device, non_blocking=True)
        self.frozen = freeze(model, config.freeze)
        self.groups = group_parameters(model, config)
        """Names of the trained parameters, by group of the optimizer."""
        self.optimizer = make_optimizer(model, config, self.groups)
        self.average = MovingAverage(model, config.ema_decay, config.ema_ramp) if config.ema_decay else None
        if config.compile:
            model.compile()
        self.forward = _distributed(model, device)
        self.graphs: StepGraphs | None = None
        """Graphs of whole steps; None: steps are not recorded."""
        is_off = config.cuda_graphs == "off"
        self.why_no_graphs = "" if is_off else why_no_graphs(model.config, model.backend, config, device)
        """Why steps cannot be recorded; empty: graphs are switched off; None: they can."""
        if self.why_no_graphs and config.cuda_graphs == "on":
            raise ValueError(f"Training option cuda_graphs: {self.why_no_graphs}. Train without it.")
        if self.why_no_graphs is None:
            self.record(CudaCapture(device))
        self.skipped = 0
        """Number of steps of the run that were skipped because they were not finite."""
        self.stop = 0.0
        """The most urgent request to stop of any process, as of the last step whose report was read."""
        self.means: dict[str, float] = {}
        """Mean losses of this process in this epoch, as of the last step whose report was read."""
        self._statistics = NormStatistics(model)
        self._names: list[str] = []
        self._sums = torch.zeros(0, dtype=torch.float64, device=device)
        self._report: Arrival | None = None
        self._last: tuple[Sequence[Batch], int] | None = None

    def record(self, capture: Callable[[Run], Run]) -> None:
        """Record steps with `capture` from now on."""
        objects = self.config.max_targets or self.model.config.num_queries
        is_strict = self.config.cuda_graphs == "on"
        config = self.model.config
        limits = Limits(self.device, config.num_classes, config.num_queries, objects, is_strict)
        self.graphs = StepGraphs(self.model, self._recorded_step, capture, limits)

    def __call__(self, window: Sequence[Batch], step: int, stop: float = 0.0) -> None:
        """Train on the batches of one step.

        Args:
            window: batches whose gradients are accumulated, as if they were one batch.
            step: number of the step in the whole run, from 0.
            stop: this process's request to stop, larger is more urgent; 0: none. After the next step, `self.stop` has
                the maximum over all processes.

        Raises:
            FloatingPointError: more than `max_skipped_steps` steps were not finite; the message names the cause.
        """
        rates = self.learning_rates(step)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        weight = self.average.weight(step) if self.average else 0.0
        seed_step(self.config.seed, step)
        report = None
        if self.graphs is not None:
            numbers = torch.tensor([0.0, stop, *rates, weight])
            report = self.graphs(window, self._normalizer(window, torch.device("cpu")), numbers)
        if report is None:
            window = [batch.to(self.device) for batch in window]
            report = self._plain_step(window, stop, weight)
        # After the launch, so the device has work while the host waits for the previous step's report.
        self._read()
        self._report, self._last = Arrival(report), (window, step)

    def _plain_step(self, window: Sequence[Batch], stop: float, weight: float) -> Tensor:
        flags = torch.tensor([0.0, stop]).to(self.device, non_blocking=True)
        normalizer = self._normalizer(window, self.device)
        losses = [partial(self._losses_and_last_report, batch, normalizer) for batch in window]
        return self._step(losses, flags, weight)

    def _recorded_step(
        self, window: Sequence[Batch], packed: Sequence[PackedTargets], normalizer: Tensor, numbers: Tensor
    ) -> Tensor:
        """As `_plain_step`, with everything that changes between steps on the device: [0, stop, rates, weight]."""
        parts = zip(window, packed, strict=True)
        losses = [partial(self._losses_of_packed, batch, targets, normalizer) for batch, targets in parts]
        with rates_on_device(self.optimizer, numbers[2:-1]):
            return self._step(losses, numbers[:2].clone(), numbers[-1])

    def _step(self, losses: Sequence[Callable[[], dict[str, Tensor]]], flags: Tensor, weight: float | Tensor) -> Tensor:
        """One step; each of `losses` computes the losses of a batch. Returns its report without waiting for it."""
        self._statistics.keep()
        self.optimizer.zero_grad(set_to_none=True)
        return self._update(self._backward(losses), flags, weight)

    def _normalizer(self, window: Sequence[Batch], device: torch.device) -> Tensor:
        counts = [count for batch in window for count in batch.counts]
        return self.criterion.normalizer(counts, self.model.config.num_queries, device)

    def _backward(self, losses_of: Sequence[Callable[[], dict[str, Tensor]]]) -> Tensor:
        """Accumulate the gradients; returns the values to log, float64, in the order of `_names`."""
        logged = torch.zeros((), dtype=torch.float64, device=self.device)
        for losses_of_batch in losses_of:
            with self._gradients_stay(losses_of_batch is not losses_of[-1]):
                losses = losses_of_batch()
                losses["loss"].backward()
            self._names = list(losses)
            # Losses are already divided by the number of objects in the whole window, errors by that of a batch.
            values = [v if name.startswith("loss") else v / len(losses_of) for name, v in losses.items()]
            logged = logged + torch.stack([value.detach().double() for value in values])
        return logged

    def _losses_and_last_report(self, batch: Batch, normalizer: Tensor) -> dict[str, Tensor]:
        losses = self._losses(self.forward, batch, normalizer)
        # Before the weights change, so that a failed step can be run again as it was. If matching has just waited for
        # the device, the report has arrived already.
        self._read()
        return losses

    def train_mode(self) -> None:
        """Put the model into training mode, but for frozen modules."""
        self.model.train()
        self.frozen.eval()

    def loss_of(self, batch: Batch) -> Tensor:
        """The total loss of one batch, as a step computes it, without other processes. Frozen modules stay in
        evaluation mode.
        """
        self.frozen.eval()
        normalizer = self._normalizer([batch], self.device)
        return self._losses(self.model, batch.to(self.device), normalizer)["loss"]

    def _outputs(self, forward: nn.Module, batch: Batch) -> dict:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            return forward(batch.model_input(), valid_hw=batch.valid_hw)

    def _losses_of_packed(self, batch: Batch, targets: PackedTargets, normalizer: Tensor) -> dict[str, Tensor]:
        return self.criterion(self._outputs(self.forward, batch), targets, normalizer)

    def _losses(self, forward: nn.Module, batch: Batch, normalizer: Tensor) -> dict[str, Tensor]:
        outputs = self._outputs(forward, batch)
        try:
            return self.criterion(outputs, batch.targets, normalizer)
        except NonFiniteCostError:
            return poisoned_losses(self.criterion, outputs, batch.targets, normalizer)

    def _gradients_stay(self, stay: bool) -> contextlib.AbstractContextManager:
        """Context that keeps gradients in this process if `stay`: only the last batch of a window exchanges them."""
        if stay and isinstance(self.forward, DistributedDataParallel):
            return self.forward.no_sync()
        return contextlib.nullcontext()

    def _update(self, logged: Tensor, flags: Tensor, weight: float | Tensor) -> Tensor:
        gradients = [parameter.grad for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
        flags[0] = ~(torch.isfinite(norm) & torch.isfinite(logged[0]))
        distributed.reduce_max(flags)
        if self.config.clip_max_norm > 0:
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_max_norm, norm)
        # Fused AdamW reads it on the device, and changes nothing if it is 1.
        self.optimizer.found_inf = flags[0]
        self.optimizer.step()
        self._statistics.restore(flags[0] > 0)
        if self.average is not None:
            self.average.update(self.model, weight, flags[0])
        counted = torch.cat([torch.ones_like(logged[:1]), logged])
        if len(self._sums) == 0:
            self._sums = torch.zeros_like(counted)
        # In place, because graphs add to this tensor in every replay.
        self._sums += torch.where(flags[0] > 0, 0.0, counted)
        return torch.cat([flags, self._sums])

    def _read(self) -> None:
        """Read the last step's report, if it was not read yet."""
        report, self._report = self._report, None
        if report is None:
            return
        is_bad, self.stop, *sums = report.wait().tolist()
        self.means = self._means(sums)
        if is_bad:
            self._skip()

    def _means(self, sums: Sequence[float]) -> dict[str, float]:
        """Mean of each loss, from its sums with the number of finite steps in front; `sums` may be empty."""
        count, *totals = sums or [0.0]
        return {name: total / max(count, 1.0) for name, total in zip(self._names, totals, strict=False)}

    def _skip(self) -> None:
        window, step = self._last
        window = [batch.to(self.device) for batch in window]
        normalizer = self._normalizer(window, self.device)
        self.skipped += 1
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            seed_step(self.config.seed, step)
            own_cause = find_cause(self.model, self.criterion, window, normalizer, self.config.precision == "bfloat16")
        causes = [
            f"{cause}{f' of rank {number}' if distributed.world_size() > 1 else ''}"
            for number, cause in enumerate(distributed.gather(own_cause))
            if cause
        ]
        ids = [number for batch in window for number in batch.image_ids]
        first = "; ".join(causes) or f"the norm of all gradients together, on image ids {ids}"
        allowed = self.config.max_skipped_steps
        message = f"Step {step} is not finite, first in {first}."
        if self.skipped > allowed:
            raise FloatingPointError(
                f"{message} {self.skipped} steps were not finite, at most {allowed} may be skipped."
            )
        if distributed.is_main():
            log.warning("%s Skipped, %d of at most %d.", message, self.skipped, allowed)

    def learning_rates(self, step: int) -> tuple[float, ...]:
        """Learning rates of the optimizer's groups in a step."""
        return learning_rates(self.config, step, self.steps_per_epoch)

    def flush(self) -> None:
        """Wait for the last step and read its report."""
        self._read()

    def epoch_means(self) -> dict[str, float]:
        """Mean losses of the epoch so far over all processes, without the skipped steps."""
        self.flush()
        if distributed.world_size() == 1:
            return self.means
        return self._means(distributed.reduce_mean(self._sums.clone()).tolist())

    def start_epoch(self) -> None:
        """Reset the sums of the losses."""
        self._sums.zero_()
        self.means = {}

    def state(self) -> dict:
        """Everything that a step changes, to be saved before the next step. Call `flush` before. Every process must
        call it.
        """
        return {
            # The parameters themselves: training waits for this, and detaching them would take half of the time.
            "model": self.model.state_dict(keep_vars=True),
            "ema": self.average.model.state_dict(keep_vars=True) if self.average else {},
            "optimizer": self.optimizer.state_dict(),
            "groups": self.groups,
            "skipped": self.skipped,
            # Other processes cannot read this GPU. In one process, the copy for the file is made later without waiting.
            "sums": distributed.gather(self._sums.cpu() if distributed.world_size() > 1 else self._sums),
            "names": self._names,
        }

    def load_state(self, state: dict) -> int:
        """Restore the result of `state`; arguments and errors as `load_optimizer`.

        Returns:
            The number of trained parameters that the saved optimizer did not have.
        """
        if self.graphs is not None:
            # They read the optimizer's old state.
            self.graphs.clear()
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.model.load_state_dict(state["ema"] or state["model"])
        added = load_optimizer(self.optimizer, self.groups, state["optimizer"], state.get("groups"))
        self.skipped = state["skipped"]
        # Inside an epoch a run resumes with the same number of processes. At the end of an epoch the sums are zero.
        if len(state["sums"]) == distributed.world_size():
            self._sums = state["sums"][distributed.rank()].to(self.device)
            self._names = list(state["names"])
            self.means = self._means(state["sums"][distributed.rank()].tolist())
        return added


def _distributed(model: DETR, device: torch.device) -> nn.Module:
    if distributed.world_size() == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # The first decoder layer does not use λ. If it is the only one, the MLP that predicts λ has no gradient.
        find_unused_parameters=model.config.decoder_layers == 1,
    )


def seed_step(seed: int, step: int) -> None:
    """Seed torch's generators from (seed, step, rank).

    Dropout then depends on the step alone, so an exact resume needs no saved generator state.
    """
    sequence = np.random.SeedSequence((seed, step, distributed.rank()))
    value = int(sequence.generate_state(1)[0])
    # Not `torch.manual_seed`: for absent device types it records the call with a stack trace.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)
