"""Where models run: on a CPU, or on NVIDIA GPUs."""

import torch


def find_device(name: str | torch.device | None = None) -> torch.device:
    """The device of a name, as torch writes it (`cpu`, `cuda`, `cuda:1`); default: CUDA where there is one.

    Raises:
        ValueError: another kind of device, or a GPU that is not here; says what is supported.
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
    numbered = f"cuda or cuda:0 to cuda:{gpus - 1}" if gpus else "or cuda on a machine that has it, as this one has not"
    raise ValueError(f"device: expected cpu, {numbered}, got {str(name)!r}.")
