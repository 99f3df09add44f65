"""The kernels that `auto` may use on a device, and the source of their proof."""

import logging

import torch

from conddetr.kernels.records import machine, memory
from conddetr.kernels.records.content import Verdict

log = logging.getLogger(__name__)

_NOT_CHECKED = "it is not checked on this GPU: run `conddetr check`."
_unchecked: set[str] = set()
"""GPU models without records that were reported."""


# torch.compile calls this during tracing, and does not trace the reading of files.
@torch.compiler.assume_constant_result
def why_not(operation: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why `auto` must not use an implementation on a device, or None if it may. None on CPUs.

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
    result = verdict(operation, backend, device, dtype)
    if result is not None:
        return result.refused or None
    record = memory.load(device)
    if record is None:
        _report_unchecked(device)
        return _NOT_CHECKED
    if record.is_short:
        return "the short check of this GPU does not include it: run `conddetr check`."
    return f"`conddetr check` does not check it in {_name(dtype)}."


def _report_unchecked(device: torch.device) -> None:
    """Warn once for each GPU model, because slow runs alone would not be noticed."""
    name = "the GPU" if memory.is_pretending() else machine.device_name(device)
    if name not in _unchecked:
        _unchecked.add(name)
        log.warning("Plain PyTorch runs on %s, because our kernels are not checked there: run `conddetr check`.", name)


def verdict(operation: str, backend: str, device: torch.device, dtype: torch.dtype) -> Verdict | None:
    """The verdict on an implementation in the device's record, else in its architecture's table; None: in neither.

    The arguments are those of `why_not`.
    """
    proof = _proof(operation, backend, device, dtype)
    return proof and proof[1]


def source(operation: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The proof of an implementation, for display: "checked on NVIDIA H100", "measured on sm_90".

    Empty on CPUs, and for implementations that are not proven or refused. The arguments are those of `why_not`.
    """
    proof = _proof(operation, backend, device, dtype) if device.type == "cuda" else None
    return "" if proof is None or proof[1].refused else proof[0]


def _proof(operation: str, backend: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Verdict] | None:
    """The source of a verdict, and the verdict."""
    key = (operation, backend, _name(dtype))
    record, table = memory.load(device), memory.table(device)
    proofs: list[tuple[str, Verdict]] = []
    if record is not None:
        device_name = record.identity.get("device", "this device")
        proofs += [(f"checked on {device_name}", verdict) for verdict in record.verdicts]
    if table is not None:
        proofs += [(f"measured on {table.architecture}", verdict) for verdict in table.verdicts]
    return next((proof for proof in proofs if proof[1].key == key), None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
