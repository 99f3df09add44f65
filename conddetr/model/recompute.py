"""Activation checkpointing: units of a model whose activations are not kept for backward, but computed again there.

Source: T. Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016; `torch.utils.checkpoint`.

Backward needs the activations of the forward pass. Without those inside the units it needs less memory, and computes
each unit a second time. Results and gradients do not change: dropout drops the same values again, because random
states and seeds are repeated, autocast and the choice of kernels are those of the forward pass, and statistics of batch
norms are updated once.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from conddetr.kernels import paths, registry
from conddetr.model.attention import attention_kernels

Result = TypeVar("Result")


def recomputed(owner: nn.Module, unit: str, run: Callable[..., Result], *inputs: Tensor | object) -> Result:
    """`run(*inputs)`; if `owner.recomputes` is true and gradients are recorded, backward runs it again.

    `run` is called completely both times, so every hook inside fires twice.

    Args:
        owner: the module that contains everything that `run` uses.
        unit: name for `record_paths`, which counts each run.
        run: returns tensors, also in tuples; has no effect but on statistics of batch norms.
        inputs: tensors first; random states are repeated on their devices.
    """
    if not getattr(owner, "recomputes", False) or not torch.is_grad_enabled():
        return run(*inputs)
    if registry.transforms():
        reason = f"{registry.transforms()[0]} is active"
        paths.note(f"activations of {unit}", "kept", {"recomputed": reason})
        return run(*inputs)
    demand, was_training, is_again = registry.present_demand(), owner.training, False

    def run_unit(*inputs: object) -> Result:
        nonlocal is_again
        if owner.training != was_training:
            raise RuntimeError(
                f"The {unit} is recomputed in backward, but the model's mode changed since the forward pass: expected "
                f"training={was_training}, got {owner.training}. Call train() or eval() after backward()."
            )
        paths.note(f"activations of {unit}", "recomputed")
        with ExitStack() as stack:
            stack.enter_context(demand())
            stack.enter_context(attention_kernels(inputs[0].device))
            if is_again:
                stack.enter_context(_statistics_stay(owner))
            is_again = True
            return run(*inputs)

    # Without early stop, because otherwise the hooks at the end of a unit would fire once and the others twice.
    return checkpoint(run_unit, *inputs, use_reentrant=False, early_stop=False)


def switch_recomputation(part: nn.Module, on: bool) -> str:
    """Switch recomputation in a part of a model; returns why the part cannot do it, empty: it can.

    Args:
        part: a module of ours, or a backbone of another library with `set_grad_checkpointing`, as timm's have.
        on: recompute activations, or keep them.
    """
    owners = [module for module in part.modules() if isinstance(getattr(module, "recomputes", None), bool)]
    for owner in owners:
        owner.recomputes = on
    foreign = next((module for module in part.modules() if hasattr(module, "set_grad_checkpointing")), None)
    if owners or foreign is None:
        return "" if owners else "it has no recomputation"
    if on and any(isinstance(module, _BatchNorm) for module in foreign.modules()):
        return "its batch norms would update their statistics twice in each step"
    try:
        foreign.set_grad_checkpointing(on)
    except AssertionError as error:
        # timm's refusal.
        return str(error) or "it has no recomputation"
    return ""


@contextmanager
def _statistics_stay(owner: nn.Module) -> Iterator[None]:
    """Batch norms in training compute as usual, but do not update their running statistics a second time."""
    norms = [module for module in owner.modules() if isinstance(module, _BatchNorm) and module.training]
    momenta = [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked for norm in norms]
    for norm in norms:
        # Not `track_running_stats`, without which autograd would save fewer tensors than in the forward pass.
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
