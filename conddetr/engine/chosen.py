"""What really runs: a check of the GPU's kernels before a run, one line at its start, and what checkpoints keep."""

from dataclasses import dataclass, replace

import torch

from conddetr.config import ModelConfig
from conddetr.engine import distributed
from conddetr.engine.precision import float32_products
from conddetr.engine.progress import Steps, say
from conddetr.kernels import records
from conddetr.kernels.registry import OPERATIONS
from conddetr.loss.criterion import loss_backend
from conddetr.model.families.table import PARTS

PYTORCH = "PyTorch"
"""In place of a backend, where it is `eager`."""


_IN_THE_LINE = ("conditional_attention", "self_attention", "linear_assignment", "focal_loss", "convolution")
"""Operations that stand for its parts."""


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
    left_out: tuple[str, ...] = ()
    """Other operations whose kernels a check of this GPU refused, with the reason."""

    def line(self) -> str:
        """All of it; what several parts have in common is said of the first."""
        said, notes = [], set()
        for name, part in self.parts.items():
            details = ", ".join(filter(None, ("" if part.note in notes else part.note, part.speedup)))
            notes.add(part.note)
            said.append(f"{name}: {part.by}{f' ({details})' if details else ''}")
        left_out = f"not taken: {', '.join(self.left_out)}" if self.left_out else ""
        return ", ".join(filter(None, (*said, self.precision, self.products, left_out)))

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


def chosen(
    model: ModelConfig, backend: str, device: torch.device, precision: str, *, trains: bool, compiled: bool = False
) -> Chosen:
    """What a model runs on a device.

    Args:
        model: its configuration.
        backend: of the model.
        device: where it runs.
        precision: `float32` or `bfloat16`.
        trains: with matching and losses.
        compiled: by torch.compile, which takes PyTorch's convolutions.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    parts = {"attention": _attention(model, backend, device, dtype)}
    if trains:
        of_losses = loss_backend(backend)
        parts["matching"] = _part("linear_assignment", of_losses, device, torch.float32, model.num_queries)
        parts["loss"] = _part(PARTS[model.family].loss_operation, of_losses, device, torch.float32)
    parts["backbone"] = Part(f"{PYTORCH}, compiled") if compiled else _backbone(model, backend, device, dtype)
    left_out = _left_out(device, dtype) if backend == "auto" else ()
    return Chosen(parts, precision, float32_products(device), left_out)


def _left_out(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Operations that are no part of the line, in a GPU's record refused and so PyTorch's."""
    if device.type != "cuda" or records.known(device) is None:
        return ()
    found = []
    for name, operation in OPERATIONS.items():
        backends = () if name in _IN_THE_LINE else operation.kernels
        verdicts = [records.verdict(name, backend, device, dtype) for backend in backends]
        refused = [verdict.refused for verdict in verdicts if verdict is not None and verdict.refused]
        if refused and operation.choose("auto", device, dtype).backend == "eager":
            found.append(f"{name} ({refused[0].removesuffix('.')})")
    return tuple(found)


def _attention(model: ModelConfig, backend: str, device: torch.device, dtype: torch.dtype) -> Part:
    heads, width = model.num_heads, model.hidden_dim // model.num_heads
    # What `conditional_attention` wants to know of its inputs; self-attention does not ask.
    facts = (device, (1, 1, heads, width), (width,) * 3)
    return _part(PARTS[model.family].attention_operation, backend, device, dtype, *facts)


def _part(operation: str, backend: str, device: torch.device, dtype: torch.dtype, *facts: object) -> Part:
    if backend == "eager":
        return Part(PYTORCH, "backend eager")
    choice = OPERATIONS[operation].prefer(backend, device, dtype, *facts)
    if choice.backend != "eager":
        note, found = (ask(operation, choice.backend, device, dtype) for ask in (records.source, records.verdict))
        return Part(choice.backend, note, "" if found is None or found.speedup is None else f"{found.speedup:.1f}×")
    # Of `auto` each kind of device has kernels that are expected there; where an operation has none, nothing is amiss.
    if backend == "auto":
        backend = "triton" if device.type == "cuda" else "native"
    return Part(PYTORCH, choice.refused.get(backend, "").removesuffix("."))


def _backbone(model: ModelConfig, backend: str, device: torch.device, dtype: torch.dtype) -> Part:
    if model.backbone == "tiny":
        return Part(PYTORCH)
    if backend == "eager":
        return Part(PYTORCH, "backend eager")
    if device.type != "cuda":
        return _part("convolution", "auto", device, dtype)
    # A model whose backend is given by name takes them unproven.
    part = _part("convolution", "auto" if backend == "auto" else "triton", device, dtype)
    return part if part.by == PYTORCH else replace(part, by="channels-last")


def prove(device: torch.device, backend: str) -> None:
    """Before a run with backend `auto`: check the kernels of a GPU of which nothing is known, in the short form.

    With several processes one of each kind of GPU checks, if none of that kind has a record; all of them then go by
    what was found on all kinds.

    Args:
        device: of this process.
        backend: of the model.
    """
    if backend != "auto" or device.type != "cuda":
        return
    kind = records.identity(device)
    found = distributed.gather_on_host((kind, records.known(device) is not None))
    # The same on every process.
    is_known = any(known for other, known in found if other == kind)
    if not is_known and [other for other, _ in found].index(kind) == distributed.rank():
        if reason := records.why_ignored(device):
            say(f"the kernels of {kind['device']} are checked again, as the record does not hold: {reason}")
        _check(device)
    if distributed.world_size() > 1:
        _agree(device, kind)


def _check(device: torch.device) -> None:
    from conddetr.kernels.check import examine
    from conddetr.kernels.check.table import summary

    with Steps("check of the kernels") as steps:
        # Both precisions, whichever this run has: the next one finds a record, and does not check.
        report = examine(device, short=True, dtypes=(torch.float32, torch.bfloat16), progress=steps.tell)
    for line in summary(report):
        say(line)


def _agree(device: torch.device, kind: dict[str, str]) -> None:
    """Take what the records of all kinds of GPU let run; a process may not see the file of another, or another one."""
    mine = records.known(device)
    by_kind: dict[tuple, records.Record] = {}
    for other, record in distributed.gather_on_host((kind, mine)):
        if record is not None:
            by_kind.setdefault(tuple(other.items()), record)
    own = by_kind.pop(tuple(kind.items()))
    agreed = records.restricted(own, list(by_kind.values()))
    if mine is None or mine.verdicts != agreed.verdicts:
        records.adopt(device, agreed)
