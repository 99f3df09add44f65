"""The implementations that a run uses: a check of the GPU's kernels before it, one line at its start, and a record in
checkpoints.
"""

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
"""Shown instead of the backend `eager`."""


_IN_THE_LINE = ("conditional_attention", "self_attention", "linear_assignment", "focal_loss", "convolution")
"""Operations that represent the parts of a run in that line."""


@dataclass(frozen=True)
class Part:
    """One part of a run."""

    by: str
    """The implementation: a backend, or `PyTorch`."""
    note: str = ""
    """The record that proves it; or why nothing faster runs, if a faster backend is expected on the device."""
    speedup: str = ""
    """Against PyTorch's best implementation, if it was checked, e.g. 2.1×."""


@dataclass(frozen=True)
class Chosen:
    """The implementations and the precision of a run."""

    parts: dict[str, Part]
    precision: str
    """`float32` or `bfloat16`."""
    products: str
    """PyTorch's TF32 switches in words; empty: they do not apply."""
    left_out: tuple[str, ...] = ()
    """Other operations whose kernels the check of this GPU refused, with the reason."""

    def line(self) -> str:
        """Everything in one line; a note that several parts share is printed with the first."""
        parts, notes = [], set()
        for name, part in self.parts.items():
            details = ", ".join(filter(None, ("" if part.note in notes else part.note, part.speedup)))
            notes.add(part.note)
            parts.append(f"{name}: {part.by}{f' ({details})' if details else ''}")
        left_out = f"not used: {', '.join(self.left_out)}" if self.left_out else ""
        return ", ".join(filter(None, (*parts, self.precision, self.products, left_out)))

    def to_dict(self) -> dict[str, str]:
        """As kept in a checkpoint."""
        return {**{name: part.by for name, part in self.parts.items()}, "precision": self.precision}

    def changes(self, saved: dict[str, str]) -> list[str]:
        """One line for each part whose implementation differs from that in `saved`, with the reason."""
        return [
            f"{name} ran on {saved[name]}, now runs on {part.by}{f': {part.note}' if part.note else ''}"
            for name, part in self.parts.items()
            if saved.get(name, part.by) != part.by
        ]


def chosen(
    model: ModelConfig, backend: str, device: torch.device, precision: str, *, trains: bool, compiled: bool = False
) -> Chosen:
    """The implementations that a model uses on a device.

    Args:
        model: its configuration.
        backend: the model's backend.
        device: where it runs.
        precision: `float32` or `bfloat16`.
        trains: include matching and losses.
        compiled: whether the model is compiled by torch.compile, which uses PyTorch's convolutions.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    parts = {"attention": _attention(model, backend, device, dtype)}
    if trains:
        loss_choice = loss_backend(backend)
        parts["matching"] = _part("linear_assignment", loss_choice, device, torch.float32, model.num_queries)
        parts["loss"] = _part(PARTS[model.family].loss_operation, loss_choice, device, torch.float32)
    parts["backbone"] = Part(f"{PYTORCH}, compiled") if compiled else _backbone(model, backend, device, dtype)
    left_out = _left_out(device, dtype) if backend == "auto" else ()
    return Chosen(parts, precision, float32_products(device), left_out)


def _left_out(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Operations outside the line that run on PyTorch because the GPU's record refuses their kernels."""
    if device.type != "cuda" or records.known(device) is None:
        return ()
    entries = []
    for name, operation in OPERATIONS.items():
        backends = () if name in _IN_THE_LINE else operation.kernels
        verdicts = [records.verdict(name, backend, device, dtype) for backend in backends]
        refused = [verdict.refused for verdict in verdicts if verdict is not None and verdict.refused]
        if refused and operation.choose("auto", device, dtype).backend == "eager":
            entries.append(f"{name} ({refused[0].removesuffix('.')})")
    return tuple(entries)


def _attention(model: ModelConfig, backend: str, device: torch.device, dtype: torch.dtype) -> Part:
    heads, width = model.num_heads, model.hidden_dim // model.num_heads
    # The facts that `conditional_attention` needs of its inputs; self-attention ignores them.
    facts = (device, (1, 1, heads, width), (width,) * 3)
    return _part(PARTS[model.family].attention_operation, backend, device, dtype, *facts)


def _part(operation: str, backend: str, device: torch.device, dtype: torch.dtype, *facts: object) -> Part:
    if backend == "eager":
        return Part(PYTORCH, "backend eager")
    choice = OPERATIONS[operation].prefer(backend, device, dtype, *facts)
    if choice.backend != "eager":
        note, verdict = (
            lookup(operation, choice.backend, device, dtype) for lookup in (records.source, records.verdict)
        )
        return Part(
            choice.backend, note, "" if verdict is None or verdict.speedup is None else f"{verdict.speedup:.1f}×"
        )
    # `auto` is expected to run Triton kernels on GPUs and native ones on CPUs. No note if an operation has none.
    if backend == "auto":
        backend = "triton" if device.type == "cuda" else "native"
    return Part(PYTORCH, choice.refused.get(backend, "").removesuffix("."))


def _backbone(model: ModelConfig, backend: str, device: torch.device, dtype: torch.dtype) -> Part:
    if not model.backbone.startswith("resnet"):
        return Part(PYTORCH)
    if backend == "eager":
        return Part(PYTORCH, "backend eager")
    if device.type != "cuda":
        return _part("convolution", "auto", device, dtype)
    # A backend requested by name runs its kernels unproven.
    part = _part("convolution", "auto" if backend == "auto" else "triton", device, dtype)
    return part if part.by == PYTORCH else replace(part, by="channels-last")


def prove(device: torch.device, backend: str) -> None:
    """Check a GPU's kernels, in the short form, before a run with backend `auto` if the GPU has no record.

    With several processes, one process per GPU model checks if no process with that GPU model has a record. All
    processes then use only kernels that the records of all GPU models allow.

    Args:
        device: this process's device.
        backend: the model's backend.
    """
    if backend != "auto" or device.type != "cuda":
        return
    identity = records.identity(device)
    known_by_rank = distributed.gather_on_host((identity, records.known(device) is not None))
    # The same result on every process.
    is_known = any(known for model, known in known_by_rank if model == identity)
    if not is_known and [model for model, _ in known_by_rank].index(identity) == distributed.rank():
        if reason := records.why_ignored(device):
            say(f"the kernels of {identity['device']} are checked again, because the record is not valid: {reason}")
        _check(device)
    if distributed.world_size() > 1:
        _agree(device, identity)


def _check(device: torch.device) -> None:
    from conddetr.kernels.check import examine
    from conddetr.kernels.check.table import summary

    with Steps("check of the kernels") as steps:
        # Both precisions, so that a later run in the other precision need not check again.
        report = examine(device, short=True, dtypes=(torch.float32, torch.bfloat16), progress=steps.tell)
    for line in summary(report):
        say(line)


def _agree(device: torch.device, identity: dict[str, str]) -> None:
    """Use the kernels that the records of all GPU models allow. Processes may not share a file system, so their record
    files may be absent or differ.
    """
    own_record = records.known(device)
    by_identity: dict[tuple, records.Record] = {}
    for model, record in distributed.gather_on_host((identity, own_record)):
        if record is not None:
            by_identity.setdefault(tuple(model.items()), record)
    model_record = by_identity.pop(tuple(identity.items()))
    agreed = records.restricted(model_record, list(by_identity.values()))
    if own_record is None or own_record.verdicts != agreed.verdicts:
        records.adopt(device, agreed)
