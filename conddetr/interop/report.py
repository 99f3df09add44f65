"""The report that `accelerate` returns."""

from dataclasses import dataclass, field
from io import StringIO

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from conddetr.kernels import registry
from conddetr.model import resnet


@dataclass(frozen=True)
class Part:
    """One kind of module in a model."""

    name: str
    count: int
    """Number of these modules in the model."""
    note: str
    """The code that runs now, or why the modules stayed as they were."""


@dataclass
class AccelerationReport:
    """Accelerated and other parts of a model; `print` shows them as a table."""

    replaced: list[Part] = field(default_factory=list)
    left: list[Part] = field(default_factory=list)
    """Unchanged parts, with the reason."""
    hooks: list[Part] = field(default_factory=list)
    """Modules with hooks, parametrizations or their own `forward`; the note says which part falls back."""

    def __rich__(self) -> Table:
        table = Table(box=None, header_style="bold")
        for title in ("", "part", "count", "note"):
            table.add_column(title, justify="right" if title == "count" else "left")
        groups = {"accelerated": self.replaced, "left as it was": self.left, "has hooks": self.hooks}
        for title, parts in groups.items():
            for part in parts:
                # Plain text, because rich would read brackets in names as markup.
                table.add_row(title, Text(part.name), str(part.count), Text(part.note))
        return table

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=120).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def report_backbone(body: nn.Module, report: AccelerationReport) -> None:
    """Report which parts of a ResNet are fused, as long as they stay plain modules, and why the others are not."""
    parts = resnet.survey(body)
    left = {name: reason for name, reason in parts.items() if reason is not None}
    fused = len(parts) - len(left)
    if fused:
        share = f" of {fused} of {len(parts)} parts" if left else ""
        report.replaced.append(Part("backbone", 1, f"batch norms folded into the convolutions{share}, channels-last"))
    title = "part of the backbone" if fused else "backbone"
    for reason in dict.fromkeys(left.values()):
        names = [name for name in left if left[name] == reason]
        report.left.append(Part(title, len(names), f"{', '.join(names)}: {reason}"))


def parameter_of(model: nn.Module) -> torch.Tensor:
    """A floating-point parameter: it has the model's device and dtype, whichever layers are quantised."""
    return next(parameter for parameter in model.parameters() if parameter.is_floating_point())


def describe(choice: registry.Choice, parameter: torch.Tensor) -> str:
    """One phrase: the backend, its device, and why the others were refused."""
    refused = "".join(f"; {name}: {reason}" for name, reason in choice.refused.items())
    return f"{choice.backend} on {parameter.device.type}{refused}"
