"""Our operations in a detector that somebody already has, in place."""

import dataclasses
from dataclasses import dataclass, field
from io import StringIO

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from conddetr.kernels import registry
from conddetr.model import resnet
from conddetr.model.backbone import ResNetBody
from conddetr.model.detr import DETR
from conddetr.model.layers import FeedForward, is_native_on_cpu
from conddetr.model.transformer import (
    ConditionalCrossAttention,
    ConditionalDecoder,
    EncoderSelfAttention,
    ProjectedSelfAttention,
)


@dataclass(frozen=True)
class Part:
    """One kind of module of a model."""

    name: str
    count: int
    """How many of them the model has."""
    note: str
    """What runs now, or why nothing else does."""


@dataclass
class AccelerationReport:
    """What `accelerate` did; `print` shows it as a table."""

    replaced: list[Part] = field(default_factory=list)
    left: list[Part] = field(default_factory=list)
    """As they were, with the reason."""

    def __rich__(self) -> Table:
        table = Table(box=None, header_style="bold")
        for title in ("", "part", "count", "note"):
            table.add_column(title, justify="right" if title == "count" else "left")
        for title, parts in (("accelerated", self.replaced), ("left as it was", self.left)):
            for part in parts:
                table.add_row(title, part.name, str(part.count), part.note)
        return table

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=120).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def accelerate(model: nn.Module, backend: str = "auto") -> AccelerationReport:
    """Make a model run on our operations, in place. Weights, state dict, outputs and training interface stay.

    Args:
        model: transformers' `ConditionalDetrForObjectDetection`; the official repository's model, and by itself its
            `SetCriterion`, which is a module beside the model there; or ours. Doing it again only changes the backend.
        backend: `auto` takes, in every call, the best that can run on the device of that call, so the model may move
            after this; where no kernel can, transformers' own runs. Any other name of
            `conddetr.kernels.registry.BACKENDS` is an error where it can not run.

    Returns:
        What was replaced, what was left, and why.

    Raises:
        TypeError: another model.
        ValueError: no such backend.
        RuntimeError: the requested backend can not run where the model is now; says why.
    """
    from conddetr.interop.accelerated import official

    report = AccelerationReport()
    if official.is_criterion(model):
        official.accelerate_criterion(model, backend, report)
        return report
    parameter = parameter_of(model)
    choice = registry.choose(backend, parameter.device, parameter.dtype)
    if isinstance(model, DETR):
        return _switch_backend(model, backend, choice)
    if official.is_model(model):
        official.accelerate_model(model, backend, choice, report)
        return report
    if not _is_huggingface(model):
        raise TypeError(
            f"model: expected transformers' ConditionalDetrForObjectDetection, the official repository's "
            f"ConditionalDETR or SetCriterion, or a conddetr model, got "
            f"{type(model).__module__}.{type(model).__qualname__}. Out of DistributedDataParallel it is model.module; "
            f"weights go into ours by conddetr.load_weights(conddetr.build(preset), state_dict)."
        )
    from conddetr.interop.accelerated import huggingface

    huggingface.accelerate(model, backend, choice, report)
    return report


def _is_huggingface(model: nn.Module) -> bool:
    """By name, so that transformers is imported by those who use it only."""
    return any(
        base.__name__ == "ConditionalDetrForObjectDetection" and base.__module__.startswith("transformers.")
        for base in type(model).__mro__
    )


def _switch_backend(model: DETR, backend: str, choice: registry.Choice) -> AccelerationReport:
    model.config = dataclasses.replace(model.config, backend=backend)
    report = AccelerationReport()
    for module in model.modules():
        if isinstance(module, ResNetBody):
            module.backend = backend
    for name, kind in (("decoder", ConditionalDecoder), ("cross-attention", ConditionalCrossAttention)):
        modules = [module for module in model.modules() if isinstance(module, kind)]
        for module in modules:
            module.backend = backend
        if modules:
            report.replaced.append(Part(name, len(modules), f"backend {describe(choice, parameter_of(model))}"))
    if not report.replaced:
        report.left.append(Part("decoder", 1, "the original DETR has no conditional attention"))
    for name, kind in (
        ("self-attention", EncoderSelfAttention | ProjectedSelfAttention),
        ("dropout of layers", FeedForward),
    ):
        modules = [module for module in model.modules() if isinstance(module, kind)]
        for module in modules:
            module.backend = backend
        if modules and is_native_on_cpu(backend, parameter_of(model)):
            report.replaced.append(Part(name, len(modules), describe(choice, parameter_of(model))))
    return report


def report_backbone(body: nn.Module, report: AccelerationReport) -> None:
    """Which parts of a ResNet are fused from now on, as far as they stay plain modules, and which are not, and why."""
    parts = resnet.survey(body)
    left = {name: reason for name, reason in parts.items() if reason is not None}
    fused = len(parts) - len(left)
    if fused:
        some = f" of {fused} of {len(parts)} parts" if left else ""
        report.replaced.append(Part("backbone", 1, f"batch norms folded into the convolutions{some}, channels-last"))
    title = "part of the backbone" if fused else "backbone"
    for reason in dict.fromkeys(left.values()):
        names = [name for name in left if left[name] == reason]
        report.left.append(Part(title, len(names), f"{', '.join(names)}: {reason}"))


def parameter_of(model: nn.Module) -> torch.Tensor:
    """Any parameter: it stands for the model's device and dtype."""
    return next(model.parameters())


def describe(choice: registry.Choice, parameter: torch.Tensor) -> str:
    """One phrase: which backend runs where, and what kept the others out."""
    refused = "".join(f"; {name}: {reason}" for name, reason in choice.refused.items())
    return f"{choice.backend} on {parameter.device.type}{refused}"
