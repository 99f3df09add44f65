"""AdamW and its parameter groups, the learning rate schedule, and the moving average of the weights."""

import contextlib
import copy
import math
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from conddetr.config.lists import rates
from conddetr.config.run import TrainConfig
from conddetr.engine.parameters import Groups, group_parameters
from conddetr.model.detr import DETR


def base_rates(config: TrainConfig) -> list[float]:
    """Learning rates of the groups of `group_parameters`, before the schedule."""
    return [config.lr, config.lr_backbone, *rates("Training option lr_patterns", config.lr_patterns).values()]


def make_optimizer(model: DETR, config: TrainConfig, groups: Groups | None = None) -> torch.optim.AdamW:
    """Fused AdamW with a learning rate for each group of parameters.

    Args:
        model: the model to train.
        config: how to train.
        groups: from `group_parameters`, computed if not given.
    """
    parameters = dict(model.named_parameters())
    groups = group_parameters(model, config) if groups is None else groups
    return torch.optim.AdamW(
        [
            {"params": [parameters[name] for name in names], "lr": rate}
            for names, rate in zip(groups, base_rates(config), strict=True)
        ],
        lr=config.lr,
        weight_decay=config.weight_decay,
        fused=True,
    )


def load_optimizer(optimizer: torch.optim.AdamW, groups: Groups, saved: dict, saved_groups: Groups | None) -> int:
    """Restore the state that was saved for each parameter's name; options stay those of the configuration.

    Args:
        optimizer: from `make_optimizer`.
        groups: its groups.
        saved: `state_dict` of an optimizer that may have other groups.
        saved_groups: the groups of that one; None: not known, from a checkpoint of before they were stored.

    Returns:
        The number of parameters that the saved optimizer did not have, which start without moments.

    Raises:
        ValueError: the saved groups are not known and cannot be the optimizer's.
    """
    current, before = optimizer.state_dict()["param_groups"], saved["param_groups"]
    if saved_groups is None:
        sizes, saved_sizes = ([len(group["params"]) for group in part] for part in (current, before))
        if sizes != saved_sizes:
            raise ValueError(
                f"The saved optimizer has groups of {saved_sizes} parameters, this one of {sizes}, and the checkpoint "
                "does not name them: resume without freeze and lr_patterns, or start a new run from its weights."
            )
        saved_groups = groups
    indices = dict(zip(chain(*saved_groups), chain(*(group["params"] for group in before)), strict=True))
    names = list(chain(*groups))
    saved_states = ((number, saved["state"].get(indices.get(name))) for number, name in enumerate(names))
    state = {number: values for number, values in saved_states if values is not None}
    if groups == saved_groups:
        # As it was saved, so that a run resumed before its next step saves the same.
        current = [{**group, "lr": old["lr"]} for group, old in zip(current, before, strict=True)]
    optimizer.load_state_dict({**saved, "state": state, "param_groups": current})
    return sum(name not in indices for name in names)


@contextlib.contextmanager
def rates_on_device(optimizer: torch.optim.AdamW, current: Tensor) -> Iterator[None]:
    """Let the optimizer read its learning rates from a device tensor, [groups] float32, so that a recorded step uses
    the current ones. Afterwards they are numbers again, as checkpoints store them.
    """
    is_captured = current.is_cuda and torch.cuda.is_current_stream_capturing()
    before = [{name: group[name] for name in ("lr", "capturable")} for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, current.unbind(), strict=True):
        group.update(lr=rate, capturable=is_captured)
    try:
        yield
    finally:
        for group, values in zip(optimizer.param_groups, before, strict=True):
            group.update(values)


def schedule_factor(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Factor of all learning rates in step `step`, counted from 0 over the whole run.

    It depends on the step alone, so there is no state to save.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "step":
        return warmup * 0.1 ** (step // steps_per_epoch // config.lr_drop)
    total = max(1, config.epochs * steps_per_epoch - config.warmup_steps)
    done = min(1.0, max(0, step - config.warmup_steps) / total)
    return warmup * 0.5 * (1 + math.cos(math.pi * done))


def learning_rates(config: TrainConfig, step: int, steps_per_epoch: int) -> tuple[float, ...]:
    """Learning rates of the groups of `group_parameters` in a step; arguments as `schedule_factor`."""
    factor = schedule_factor(config, step, steps_per_epoch)
    return tuple(rate * factor for rate in base_rates(config))


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
