"""One step of training: forward, losses, backward, clipping, update, moving average.

Where predictions and objects are matched on the host, it waits for the device once per batch; fused matching waits for
nothing, and a whole step can be a CUDA graph. All else that the host wants to know (was the step sound, the losses,
whether to stop) is decided on the device and read one step later, when the next one is under way.
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
from conddetr.engine.optim import MovingAverage, learning_rates, make_optimizer, rates_on_device
from conddetr.engine.precision import has_bfloat16, resolve_precision
from conddetr.loss.matcher import NonFiniteCostError
from conddetr.loss.targets import PackedTargets
from conddetr.model.detr import DETR
from conddetr.zoo import build_criterion

log = logging.getLogger(__name__)


class Stepper:
    """Holds all that a step changes: weights, optimizer, moving average, and the sums of the losses of an epoch."""

    def __init__(self, model: DETR, config: TrainConfig, device: torch.device, steps_per_epoch: int) -> None:
        """
        Args:
            model: on `device`.
            config: how to train; a precision `auto` is that of this device.
            device: of the model.
            steps_per_epoch: for the schedule.

        Raises:
            ValueError: `cuda_graphs` is `on`, and steps cannot be recorded here; says why.
        """
        self.model, self.device = model, device
        precision = resolve_precision(config.precision, has_bfloat16(device))
        self.config = config = replace(config, precision=precision)
        self.steps_per_epoch = steps_per_epoch
        check_finite = {"auto": None, "always": True, "never": False}[config.check_finite]
        max_targets = config.max_targets or None
        criterion = build_criterion(model, max_targets=max_targets, check_finite=check_finite)
        self.criterion = criterion.to(device, non_blocking=True)
        self.optimizer = make_optimizer(model, config)
        self.average = MovingAverage(model, config.ema_decay, config.ema_ramp) if config.ema_decay else None
        if config.compile:
            model.compile()
        self.forward = _distributed(model, device)
        self.graphs: StepGraphs | None = None
        """Of whole steps, where they are recorded."""
        is_off = config.cuda_graphs == "off"
        self.why_no_graphs = "" if is_off else why_no_graphs(model.config, model.backend, config, device)
        """What forbids to record steps; empty: the configuration; None: nothing."""
        if self.why_no_graphs and config.cuda_graphs == "on":
            raise ValueError(f"Training option cuda_graphs: {self.why_no_graphs}. Train without it.")
        if self.why_no_graphs is None:
            self.record(CudaCapture(device))
        self.skipped = 0
        """Steps of the run that changed nothing because they were not finite."""
        self.stop = 0.0
        """The most urgent wish to stop of any process, as of the last step that was read."""
        self.means: dict[str, float] = {}
        """Mean losses of this process in this epoch, as of the last step that was read."""
        self._statistics = NormStatistics(model)
        self._names: list[str] = []
        self._sums = torch.zeros(0, dtype=torch.float64, device=device)
        self._report: Arrival | None = None
        self._last: tuple[Sequence[Batch], int] | None = None

    def record(self, capture: Callable[[Run], Run]) -> None:
        """From now on steps are recorded by `capture`."""
        objects = self.config.max_targets or self.model.config.num_queries
        is_strict = self.config.cuda_graphs == "on"
        config = self.model.config
        limits = Limits(self.device, config.num_classes, config.num_queries, objects, is_strict)
        self.graphs = StepGraphs(self.model, self._recorded_step, capture, limits)

    def __call__(self, window: Sequence[Batch], step: int, stop: float = 0.0) -> None:
        """Train on the batches of one step.

        Args:
            window: batches whose gradients are added up, as if they were one.
            step: its number in the whole run, from 0.
            stop: this process's wish to stop, the larger the more urgent; 0: none. The answer is in `self.stop`
                after the next step.

        Raises:
            FloatingPointError: more than `max_skipped_steps` steps were not finite; names the cause.
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
        # Behind the step: the device has work while the host waits for what the last one reported.
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
        """As `_plain_step`, with all that changes from step to step on the device: [0, stop, rates, weight]."""
        parts = zip(window, packed, strict=True)
        losses = [partial(self._losses_of_packed, batch, targets, normalizer) for batch, targets in parts]
        with rates_on_device(self.optimizer, numbers[2:4]):
            return self._step(losses, numbers[:2].clone(), numbers[4])

    def _step(self, losses: Sequence[Callable[[], dict[str, Tensor]]], flags: Tensor, weight: float | Tensor) -> Tensor:
        """The step of which `losses` gives those of each batch; returns what it reports, which nobody waits for."""
        self._statistics.keep()
        self.optimizer.zero_grad(set_to_none=True)
        return self._update(self._backward(losses), flags, weight)

    def _normalizer(self, window: Sequence[Batch], device: torch.device) -> Tensor:
        counts = [count for batch in window for count in batch.counts]
        return self.criterion.normalizer(counts, self.model.config.num_queries, device)

    def _backward(self, losses_of: Sequence[Callable[[], dict[str, Tensor]]]) -> Tensor:
        """Add up the gradients; returns the values to log in the order of `_names`, float64."""
        logged = torch.zeros((), dtype=torch.float64, device=self.device)
        for losses_of_batch in losses_of:
            with self._gradients_stay(losses_of_batch is not losses_of[-1]):
                losses = losses_of_batch()
                losses["loss"].backward()
            self._names = list(losses)
            # Losses are divided by the objects of the whole window already, errors by those of a batch.
            values = [v if name.startswith("loss") else v / len(losses_of) for name, v in losses.items()]
            logged = logged + torch.stack([value.detach().double() for value in values])
        return logged

    def _losses_and_last_report(self, batch: Batch, normalizer: Tensor) -> dict[str, Tensor]:
        losses = self._losses(self.forward, batch, normalizer)
        # Before the weights change: a failed step is then run again as it was. Where matching has just waited for the
        # device, the report is here already.
        self._read()
        return losses

    def loss_of(self, batch: Batch) -> Tensor:
        """The total loss of one batch, as a step computes it, without any other process."""
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
        """Whether gradients stay in this process for now: only the last batch of a window exchanges them."""
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
        # Fused AdamW looks at it on the device, and changes nothing where it is 1.
        self.optimizer.found_inf = flags[0]
        self.optimizer.step()
        self._statistics.restore(flags[0] > 0)
        if self.average is not None:
            self.average.update(self.model, weight, flags[0])
        counted = torch.cat([torch.ones_like(logged[:1]), logged])
        if len(self._sums) == 0:
            self._sums = torch.zeros_like(counted)
        # In place: graphs go on adding to it.
        self._sums += torch.where(flags[0] > 0, 0.0, counted)
        return torch.cat([flags, self._sums])

    def _read(self) -> None:
        """Take in what the last step reported, once."""
        report, self._report = self._report, None
        if report is None:
            return
        is_bad, self.stop, *sums = report.wait().tolist()
        self.means = self._means(sums)
        if is_bad:
            self._skip()

    def _means(self, sums: Sequence[float]) -> dict[str, float]:
        """Of each loss; sums with the number of sound steps in front, or nothing."""
        count, *totals = sums or [0.0]
        return {name: total / max(count, 1.0) for name, total in zip(self._names, totals, strict=False)}

    def _skip(self) -> None:
        window, step = self._last
        window = [batch.to(self.device) for batch in window]
        normalizer = self._normalizer(window, self.device)
        self.skipped += 1
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            seed_step(self.config.seed, step)
            cause = find_cause(self.model, self.criterion, window, normalizer, self.config.precision == "bfloat16")
        causes = [
            f"{found}{f' of rank {number}' if distributed.world_size() > 1 else ''}"
            for number, found in enumerate(distributed.gather(cause))
            if found
        ]
        ids = [number for batch in window for number in batch.image_ids]
        what = "; ".join(causes) or f"the norm of all gradients together, on image ids {ids}"
        allowed = self.config.max_skipped_steps
        message = f"Step {step} is not finite: first {what}."
        if self.skipped > allowed:
            raise FloatingPointError(f"{message} It is step number {self.skipped} to be skipped, {allowed} may be.")
        if distributed.is_main():
            log.warning("%s Skipped, %d of at most %d.", message, self.skipped, allowed)

    def learning_rates(self, step: int) -> tuple[float, float]:
        """Of the transformer and of the backbone in a step."""
        return learning_rates(self.config, step, self.steps_per_epoch)

    def flush(self) -> None:
        """Wait for the last step, and take in its report."""
        self._read()

    def epoch_means(self) -> dict[str, float]:
        """Mean losses of the epoch so far over all processes, without the skipped steps."""
        self.flush()
        if distributed.world_size() == 1:
            return self.means
        return self._means(distributed.reduce_mean(self._sums.clone()).tolist())

    def start_epoch(self) -> None:
        """Begin new sums of the losses."""
        self._sums.zero_()
        self.means = {}

    def state(self) -> dict:
        """All that a step changes, to be saved before the next one; call `flush` before. Every process must call it."""
        return {
            # The parameters themselves: training waits for this, and half of the time would go to detaching them.
            "model": self.model.state_dict(keep_vars=True),
            "ema": self.average.model.state_dict(keep_vars=True) if self.average else {},
            "optimizer": self.optimizer.state_dict(),
            "skipped": self.skipped,
            # Other processes cannot read this one's GPU; the file's copy is made without waiting.
            "sums": distributed.gather(self._sums.cpu() if distributed.world_size() > 1 else self._sums),
            "names": self._names,
        }

    def load_state(self, state: dict) -> None:
        """Back to what `state` returned; the options of the optimizer stay those of the configuration."""
        if self.graphs is not None:
            # They hold the optimizer's state of before.
            self.graphs.clear()
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.model.load_state_dict(state["ema"] or state["model"])
        own, saved = self.optimizer.state_dict()["param_groups"], state["optimizer"]["param_groups"]
        groups = [{**a, "lr": b["lr"], "params": b["params"]} for a, b in zip(own, saved, strict=True)]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        self.skipped = state["skipped"]
        # Inside an epoch a run goes on with as many processes; at its end nothing is summed up yet.
        if len(state["sums"]) == distributed.world_size():
            self._sums = state["sums"][distributed.rank()].to(self.device)
            self._names = list(state["names"])
            self.means = self._means(state["sums"][distributed.rank()].tolist())


def _distributed(model: DETR, device: torch.device) -> nn.Module:
    if distributed.world_size() == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # The first decoder layer does not use λ: alone, it leaves the MLP that predicts it without gradient.
        find_unused_parameters=model.config.decoder_layers == 1,
    )


def seed_step(seed: int, step: int) -> None:
    """Seed torch's generators from (seed, step, rank).

    So dropout is a function of the step alone, and no state of a generator need be saved to go on exactly.
    """
    sequence = np.random.SeedSequence((seed, step, distributed.rank()))
    value = int(sequence.generate_state(1)[0])
    # Not `torch.manual_seed`: for kinds of devices that are not there it notes the call, with a trace of the stack.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)
