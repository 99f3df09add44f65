"""AdamW and its parameter groups, the learning rate schedule, and the moving average of the weights."""

import contextlib
import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from conddetr.config.run import TrainConfig
from conddetr.model.detr import DETR


def make_optimizer(model: DETR, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW with one learning rate for the backbone and another for the rest; frozen parameters left out."""
    groups: dict[bool, list[Tensor]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name.startswith("backbone.")].append(parameter)
    return torch.optim.AdamW(
        [{"params": groups[False]}, {"params": groups[True], "lr": config.lr_backbone}],
        lr=config.lr,
        weight_decay=config.weight_decay,
        fused=True,
    )


@contextlib.contextmanager
def rates_on_device(optimizer: torch.optim.AdamW, rates: Tensor) -> Iterator[None]:
    """Let the optimizer read its learning rates from a device tensor, [groups] float32, so that a recorded step uses
    the current ones. Afterwards they are numbers again, as checkpoints store them.
    """
    is_captured = rates.is_cuda and torch.cuda.is_current_stream_capturing()
    before = [{name: group[name] for name in ("lr", "capturable")} for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates.unbind(), strict=True):
        group.update(lr=rate, capturable=is_captured)
    try:
        yield
    finally:
        for group, values in zip(optimizer.param_groups, before, strict=True):
            group.update(values)


def schedule_factor(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Factor of both learning rates in step `step`, counted from 0 over the whole run.

    It depends on the step alone, so there is no state to save.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "step":
        return warmup * 0.1 ** (step // steps_per_epoch // config.lr_drop)
    total = max(1, config.epochs * steps_per_epoch - config.warmup_steps)
    done = min(1.0, max(0, step - config.warmup_steps) / total)
    return warmup * 0.5 * (1 + math.cos(math.pi * done))


def learning_rates(config: TrainConfig, step: int, steps_per_epoch: int) -> tuple[float, float]:
    """Learning rates of transformer and backbone, the groups of `make_optimizer`; arguments as `schedule_factor`."""
    factor = schedule_factor(config, step, steps_per_epoch)
    return config.lr * factor, config.lr_backbone * factor


class MovingAverage:
    """Exponential moving average of a model's weights; buffers are copied. `model` is ready for evaluation."""

    def __init__(self, model: DETR, decay: float, ramp: int) -> None:
        """
        Args:
            model: the model that is trained.
            decay: decay of the average per step, in [0, 1).
            ramp: the decay of step t is decay · (1 - exp(-t / ramp)): at first the weights change fast.
        """
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.ramp = decay, ramp

    def weight(self, step: int) -> float:
        """Weight of the model in the average after step `step`, counted from 0: 1 - decay."""
        return 1 - self.decay * (1 - math.exp(-(step + 1) / self.ramp))

    @torch.no_grad()
    def update(self, model: nn.Module, weight: float | Tensor, skipped: Tensor) -> None:
        """Update the average after a step.

        Args:
            model: the model that is trained.
            weight: its weight in the average: a number, or a scalar on the model's device.
            skipped: scalar on the model's device: 1 if the step was skipped, then the average does not change; else 0.
        """
        average = list(self.model.parameters())
        # Not `_foreach_lerp_`: it takes its weight as a number, for which the host would wait.
        change = torch._foreach_sub(list(model.parameters()), average)
        torch._foreach_mul_(change, weight * (1 - skipped))
        torch._foreach_add_(average, change)
        if buffers := list(self.model.buffers()):
            torch._foreach_copy_(buffers, list(model.buffers()))
