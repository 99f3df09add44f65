"""What `auto` may take on a device, and by what that is proven."""

import logging

import torch

from conddetr.kernels.records import machine, memory
from conddetr.kernels.records.content import Verdict

log = logging.getLogger(__name__)

_NOT_CHECKED = "it is not checked on this GPU: `conddetr check` does that."
_unchecked: set[str] = set()
"""GPU models of which it was said that nothing is known."""


# torch.compile calls it while it traces, and does not trace that files are read.
@torch.compiler.assume_constant_result
def why_not(operation: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why `auto` must not take an implementation on a device, or None if it may. None on CPUs.

    Args:
        operation: name of its public function.
        backend: `triton` or `native`.
        device: of the tensors.
        dtype: of the tensors.
    """
    if device.type != "cuda":
        return None
    if device.index is None and not memory.is_pretending():
        device = torch.device("cuda", torch.cuda.current_device())
    found = verdict(operation, backend, device, dtype)
    if found is not None:
        return found.refused or None
    record = memory.load(device)
    if record is None:
        _tell_unchecked(device)
        return _NOT_CHECKED
    if record.is_short:
        return "the short check of this GPU leaves it out: `conddetr check` includes it."
    return f"`conddetr check` does not check it in {_name(dtype)}."


def _tell_unchecked(device: torch.device) -> None:
    """Once for each GPU model: nobody would look for the reason of what is only slow."""
    name = "the GPU" if memory.is_pretending() else machine.device_name(device)
    if name not in _unchecked:
        _unchecked.add(name)
        log.warning("Plain PyTorch runs on %s, as our kernels are not checked there: `conddetr check` does that.", name)


def verdict(operation: str, backend: str, device: torch.device, dtype: torch.dtype) -> Verdict | None:
    """What the record of a device says of an implementation, else the table of its architecture; None: neither does.

    The arguments are those of `why_not`.
    """
    found = _proof(operation, backend, device, dtype)
    return found and found[1]


def source(operation: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """By what an implementation is proven, for people: "checked on NVIDIA H100", "measured on sm_90".

    Empty on CPUs, and for what is not proven or refused. The arguments are those of `why_not`.
    """
    found = _proof(operation, backend, device, dtype) if device.type == "cuda" else None
    return "" if found is None or found[1].refused else found[0]


def _proof(operation: str, backend: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Verdict] | None:
    """Where a verdict is from, and the verdict."""
    key = (operation, backend, _name(dtype))
    record = memory.load(device)
    for found in record.verdicts if record else ():
        if found.key == key:
            return f"checked on {record.identity.get('device', 'this device')}", found
    table = memory.table(device)
    for found in table.verdicts if table else ():
        if found.key == key:
            return f"measured on {table.architecture}", found
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
