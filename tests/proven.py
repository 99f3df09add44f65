"""Records that count kernels as proven without a check, for tests and for counts of launches."""

from datetime import datetime

import torch

from conddetr.kernels import registry
from conddetr.kernels.records import Record, Verdict, identity, save


def everything(device: torch.device, **refused: str) -> Record:
    """A record with which `auto` runs every kernel on a device.

    Args:
        device: the device that the record identifies.
        refused: operation → reason why `auto` does not run its kernels.
    """
    dtypes = ("float32", "bfloat16", "float16")
    verdicts = [
        Verdict(name, backend, dtype, refused.get(name, ""), 0.5, 2.0)
        for name, operation in registry.OPERATIONS.items()
        for backend in operation.kernels
        for dtype in dtypes
    ]
    return Record(identity(device), tuple(verdicts), False, datetime.now().isoformat(), {})


if __name__ == "__main__":
    gpu = torch.device("cuda")
    print(f"all kernels count as proven: {save(gpu, everything(gpu))}")
