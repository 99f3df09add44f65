"""Devices that models run on: a CPU, or NVIDIA GPUs."""

import torch


def find_device(name: str | torch.device | None = None) -> torch.device:
    """The device with a name as torch writes it (`cpu`, `cuda`, `cuda:1`); default: CUDA if available.

    Raises:
        ValueError: an unsupported device type, or a GPU that this machine lacks; the message lists valid names.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not name:
        return torch.device("cuda" if gpus else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    indices = {"cpu": 1, "cuda": gpus}
    if device is not None and (device.index or 0) < indices.get(device.type, 0):
        return device
    numbered = f"cuda or cuda:0 to cuda:{gpus - 1}" if gpus else "or cuda, which this machine lacks"
    raise ValueError(f"device: expected cpu, {numbered}, got {str(name)!r}.")
