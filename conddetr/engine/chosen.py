"""What really runs: a check of the GPU's kernels before a run, one line at its start, and what checkpoints keep."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from conddetr.config import ModelConfig
from conddetr.engine import distributed
from conddetr.engine.precision import float32_products
from conddetr.engine.progress import Steps, say
from conddetr.kernels import native, records
from conddetr.kernels.registry import OPERATIONS

PYTORCH = "PyTorch"
"""In place of a backend, where it is `eager`."""
_TRAINED = {"matching": "linear_assignment", "loss": "focal_loss"}
"""Parts of a training alone → operation that stands for them."""


@dataclass(frozen=True)
class Part:
    """One part of a run."""

    by: str
    """What computes it: a backend, or `PyTorch`."""
    note: str = ""
    """By what it is proven, or why nothing faster runs, if something could be expected to."""
    speedup: str = ""
    """Beside the best of PyTorch's, where it was checked, e.g. 2.1×."""


@dataclass(frozen=True)
class Chosen:
    """What a run computes with."""

    parts: dict[str, Part]
    precision: str
    """`float32` or `bfloat16`."""
    products: str
    """What PyTorch's switches make of float32, in words; empty: they change nothing."""

    def line(self) -> str:
        """All of it; what several parts have in common is said of the first."""
        said, notes = [], set()
        for name, part in self.parts.items():
            details = ", ".join(filter(None, ("" if part.note in notes else part.note, part.speedup)))
            notes.add(part.note)
            said.append(f"{name}: {part.by}{f' ({details})' if details else ''}")
        return ", ".join(filter(None, (*said, self.precision, self.products)))

    def to_dict(self) -> dict[str, str]:
        """As kept in a checkpoint."""
        return {**{name: part.by for name, part in self.parts.items()}, "precision": self.precision}

    def changes(self, saved: dict[str, str]) -> list[str]:
        """What is computed by something else than in the run of `to_dict`, with the reason, a line each."""
        return [
            f"{name} was by {saved[name]}, is by {part.by}{f': {part.note}' if part.note else ''}"
            for name, part in self.parts.items()
            if saved.get(name, part.by) != part.by
        ]


def chosen(model: ModelConfig, device: torch.device, precision: str, *, trains: bool, compiled: bool = False) -> Chosen:
    """What a model runs on a device.

    Args:
        model: whose backend counts.
        device: where it runs.
        precision: `float32` or `bfloat16`.
        trains: with matching and losses.
        compiled: by torch.compile, which takes PyTorch's convolutions.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    attention = "conditional_attention" if model.family == "conditional-detr" else "self_attention"
    parts = {"attention": _part(attention, model.backend, device, dtype)}
    if trains:
        # As `build_criterion` has it.
        backend = "auto" if model.backend == "native" else model.backend
        parts |= {name: _part(operation, backend, device, torch.float32) for name, operation in _TRAINED.items()}
    parts["backbone"] = Part(f"{PYTORCH}, compiled") if compiled else _backbone(model, device, dtype)
    return Chosen(parts, precision, float32_products(device))


def _part(operation: str, backend: str, device: torch.device, dtype: torch.dtype) -> Part:
    if backend == "eager":
        return Part(PYTORCH, "backend eager")
    choice = OPERATIONS[operation].prefer(backend, device, dtype)
    if choice.backend != "eager":
        note, found = (ask(operation, choice.backend, device, dtype) for ask in (records.source, records.verdict))
        return Part(choice.backend, note, "" if found is None or found.speedup is None else f"{found.speedup:.1f}×")
    # On a CPU the answer is expected, unless the native kernels are missing.
    refused = choice.refused if device.type == "cuda" or native.NOT_LOADED is not None else {}
    reason = next((why for name, why in refused.items() if device.type == "cuda" or name == "native"), "")
    return Part(PYTORCH, reason.removesuffix("."))


def _backbone(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> Part:
    if model.backbone == "tiny":
        return Part(PYTORCH)
    if model.backend == "eager":
        return Part(PYTORCH, "backend eager")
    if device.type != "cuda":
        return _part("convolution", "auto", device, dtype)
    # A model whose backend is given by name takes them unproven.
    backend = "auto" if model.backend == "auto" else "triton"
    part = _part("convolution", backend, device, dtype)
    return part if part.by == PYTORCH else replace(part, by="channels-last")


def prove(device: torch.device, backend: str, precision: str) -> None:
    """Before a run with backend `auto`: check the kernels of a GPU of which nothing is known, in the short form.

    With several processes one of each kind of GPU checks; all of them then go by what was found on all kinds.

    Args:
        device: of this process.
        backend: of the model.
        precision: `float32` or `bfloat16`.
    """
    if backend != "auto" or device.type != "cuda":
        return
    dtypes = [torch.float32, *([torch.bfloat16] if precision == "bfloat16" else [])]
    kind = records.identity(device)
    kinds, known = zip(*distributed.gather_on_host((kind, records.known(device) is not None)), strict=True)
    first = kinds.index(kind)
    if first == distributed.rank() and not known[first]:
        _check(device, dtypes)
    if distributed.world_size() > 1:
        _agree(device, kind)


def _check(device: torch.device, dtypes: Sequence[torch.dtype]) -> None:
    from conddetr.kernels.check import examine
    from conddetr.kernels.check.table import summary

    with Steps("check of the kernels") as steps:
        report = examine(device, short=True, dtypes=dtypes, progress=steps.tell)
    for line in summary(report):
        say(line)


def _agree(device: torch.device, kind: dict[str, str]) -> None:
    """Take what the records of all kinds of GPU let run; a process may not see the file of another."""
    found = [pair for pair in distributed.gather_on_host((kind, records.known(device))) if pair[1] is not None]
    own = next(record for other, record in found if other == kind)
    others = {record.identity["device"]: record for other, record in found if other != kind}
    if others or records.known(device) is None:
        records.adopt(device, records.restricted(own, list(others.values())))
