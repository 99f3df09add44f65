"""Losses and gradients that are not finite: the step is undone on the device, and its cause is found and named."""

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from conddetr.data.batch import Batch
from conddetr.loss.criterion import Criterion
from conddetr.loss.matcher import NonFiniteCostError
from conddetr.model.detr import DETR


class NormStatistics:
    """The running statistics of trainable batch norms: a step that is skipped must not leave NaN in them."""

    def __init__(self, model: nn.Module) -> None:
        norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
        self.live = [buffer for norm in norms for buffer in norm.buffers()]
        self.kept = [buffer.clone() for buffer in self.live]

    def keep(self) -> None:
        """Remember the statistics as they are."""
        if self.live:
            torch._foreach_copy_(self.kept, self.live)

    def restore(self, condition: Tensor | bool = True) -> None:
        """Back to what `keep` remembered, where the scalar `condition` holds; does not wait for the device."""
        for live, kept in zip(self.live, self.kept, strict=True):
            live.copy_(torch.where(torch.as_tensor(condition, device=live.device), kept, live))


def poisoned_losses(criterion: Criterion, outputs: dict, targets: list[dict], normalizer: Tensor) -> dict[str, Tensor]:
    """Losses and gradients that are all NaN, from predictions too broken to be matched.

    With several processes every one must go through its backward pass, or the others wait for ever; and every one
    then finds NaN in the averaged gradients and skips the step.
    """

    def clean(value: Tensor | list | dict) -> Tensor | list | dict:
        if isinstance(value, Tensor):
            return value.nan_to_num(0.0, 0.0, 0.0)
        if isinstance(value, list):
            return [clean(item) for item in value]
        return {key: clean(item) for key, item in value.items()}

    losses = criterion(clean(outputs), targets, normalizer)
    return {name: value * float("nan") for name, value in losses.items()}


def find_cause(model: DETR, criterion: Criterion, window: Sequence[Batch], normalizer: Tensor, autocast: bool) -> str:
    """Run the batches of a failed step again and name the first tensor that is not finite.

    Changes neither weights, gradients nor statistics, and writes to none of them: the graph of the next step may wait
    for its backward pass. The caller seeds the random generators as for the step, and puts them back.

    Args:
        model: not wrapped for several processes.
        criterion: its losses are looked at in turn, and the matching cost before them.
        window: the batches of the step, on the device.
        normalizer: of the step.
        autocast: whether the step ran in bfloat16.

    Returns:
        What was found and the ids of the images in that batch, as the subject of a sentence; empty: nothing.
    """
    strict = copy.copy(criterion)
    strict.check_finite = True
    with torch.compiler.set_stance("force_eager"):
        for batch in window:
            found = _first_in_batch(model, strict, batch, normalizer, autocast)
            if found:
                return f"{found}, on image ids {list(batch.image_ids)}"
    return ""


def _first_in_batch(model: DETR, criterion: Criterion, batch: Batch, normalizer: Tensor, autocast: bool) -> str:
    images = batch.model_input()
    found = _first(("the input images", images), *((f"the weight {name}", p) for name, p in model.named_parameters()))
    if found:
        return found
    seen: list[str] = []
    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: seen.extend(_bad_output(name, output)))
        for name, module in model.named_modules()
    ]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            outputs = torch.func.functional_call(model, buffers, (images,), {"valid_hw": batch.valid_hw})
    finally:
        for hook in hooks:
            hook.remove()
    if seen:
        return seen[0]
    try:
        losses = criterion(outputs, batch.targets, normalizer)
    except NonFiniteCostError as error:
        return f"the matching cost ({error})"
    # The total comes first in the dict, and is the consequence of the others.
    found = _first(*((f"the loss term {name}", value) for name, value in reversed(losses.items())))
    if found:
        return found
    names, parameters = zip(*[item for item in model.named_parameters() if item[1].requires_grad], strict=True)
    # Not `backward`: that would touch the gradients, and wait for other processes.
    gradients = torch.autograd.grad(losses["loss"], parameters, allow_unused=True)
    pairs = [pair for pair in zip(names, gradients, strict=True) if pair[1] is not None]
    return _first(*((f"the gradient of {name}", gradient) for name, gradient in reversed(pairs)))


def _first(*tensors: tuple[str, Tensor]) -> str:
    """`name (how many of how many values)` of the first tensor with a value that is not finite, or nothing."""
    for name, tensor in tensors:
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            return f"{name} ({bad} of {tensor.numel()} values)"
    return ""


def _bad_output(name: str, output: object) -> Iterable[str]:
    parts = output if isinstance(output, (list, tuple)) else [output]
    tensors = [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
    found = _first(*((f"the output of module {name}", tensor) for tensor in tensors))
    return [found] if found else []
