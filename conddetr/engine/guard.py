"""Handling of losses and gradients that are not finite: undo the step on the device, and name the cause."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from conddetr.data.batch import Batch
from conddetr.loss.criterion import Criterion
from conddetr.loss.matcher import NonFiniteCostError
from conddetr.model.detr import DETR


class NormStatistics:
    """Running statistics of trainable batch norms: a skipped step must not leave NaN in them."""

    def __init__(self, model: nn.Module) -> None:
        norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
        self.live = [buffer for norm in norms for buffer in norm.buffers()]
        self.kept = [buffer.clone() for buffer in self.live]

    def keep(self) -> None:
        """Save the current statistics."""
        if self.live:
            torch._foreach_copy_(self.kept, self.live)

    def restore(self, condition: Tensor | bool = True) -> None:
        """Restore the statistics that `keep` saved if the scalar `condition` is true; does not wait for the device."""
        for live, kept in zip(self.live, self.kept, strict=True):
            live.copy_(torch.where(torch.as_tensor(condition, device=live.device), kept, live))


def poisoned_losses(criterion: Criterion, outputs: dict, targets: list[dict], normalizer: Tensor) -> dict[str, Tensor]:
    """Losses and gradients that are all NaN, for predictions that cannot be matched because they are not finite.

    With several processes each must run its backward pass, or the others wait forever. All processes then get NaN in
    the averaged gradients and skip the step.
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

    Does not write to weights, gradients or statistics, not even temporarily, because the autograd graph of the next
    step may still need them for its backward pass. The caller seeds the random generators as for the step and restores
    them.

    Args:
        model: not wrapped for several processes.
        criterion: the matching cost is checked first, then each of its losses.
        window: the batches of the step, on the device.
        normalizer: the step's normalizer.
        autocast: whether the step ran in bfloat16.

    Returns:
        The tensor and the ids of the images in that batch, as the subject of a sentence; empty: all are finite.
    """
    strict = copy.copy(criterion)
    strict.check_finite = True
    with torch.compiler.set_stance("force_eager"):
        for batch in window:
            cause = _first_in_batch(model, strict, batch, normalizer, autocast)
            if cause:
                return f"{cause}, on image ids {list(batch.image_ids)}"
    return ""


def _first_in_batch(model: DETR, criterion: Criterion, batch: Batch, normalizer: Tensor, autocast: bool) -> str:
    images = batch.model_input()
    cause = _first(("the input images", images), *((f"the weight {name}", p) for name, p in model.named_parameters()))
    if cause:
        return cause
    causes: list[str] = []
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    # The hooks stay until the gradients exist: recomputed activations must take the same path as in the forward pass.
    with _watched(model, causes):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            outputs = torch.func.functional_call(model, buffers, (images,), {"valid_hw": batch.valid_hw})
        return causes[0] if causes else _first_in_losses(model, criterion, batch, normalizer, outputs)


@contextmanager
def _watched(model: DETR, causes: list[str]) -> Iterator[None]:
    """Append each output of a module that is not finite to `causes`."""
    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: causes.extend(_bad_output(name, output)))
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _first_in_losses(model: DETR, criterion: Criterion, batch: Batch, normalizer: Tensor, outputs: dict) -> str:
    try:
        losses = criterion(outputs, batch.targets, normalizer)
    except NonFiniteCostError as error:
        return f"the matching cost ({error})"
    # The total comes first in the dict, but is a consequence of the others.
    cause = _first(*((f"the loss term {name}", value) for name, value in reversed(losses.items())))
    if cause:
        return cause
    names, parameters = zip(*[item for item in model.named_parameters() if item[1].requires_grad], strict=True)
    # Not `backward`: it would change the gradients and wait for other processes.
    gradients = torch.autograd.grad(losses["loss"], parameters, allow_unused=True)
    pairs = [pair for pair in zip(names, gradients, strict=True) if pair[1] is not None]
    return _first(*((f"the gradient of {name}", gradient) for name, gradient in reversed(pairs)))


def _first(*tensors: tuple[str, Tensor]) -> str:
    """`name (n of m values)` for the first tensor with values that are not finite; empty: all are finite."""
    for name, tensor in tensors:
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            return f"{name} ({bad} of {tensor.numel()} values)"
    return ""


def _bad_output(name: str, output: object) -> Iterable[str]:
    parts = output if isinstance(output, (list, tuple)) else [output]
    tensors = [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
    cause = _first(*((f"the output of module {name}", tensor) for tensor in tensors))
    return [cause] if cause else []
