"""Seeds of the kernels' random numbers."""

import torch
from torch import Tensor


def fresh_seed(device: torch.device) -> Tensor:
    """[1] int64 sampled on a device by torch's generator: repeatable, and replayed by checkpointing and CUDA graphs."""
    return torch.randint(2**31 - 1, (1,), device=device)


def check_one_number(seed: Tensor) -> None:
    """Raises a ValueError if a seed is not one int64 number."""
    if tuple(seed.shape) != (1,) or seed.dtype != torch.int64:
        raise ValueError(f"seed: expected shape (1,) and dtype torch.int64, got {tuple(seed.shape)} and {seed.dtype}.")
