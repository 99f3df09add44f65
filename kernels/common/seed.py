"""What random numbers of kernels start from."""

import torch
from torch import Tensor


def fresh_seed(device: torch.device) -> Tensor:
    """[1] int64 drawn on a device from torch's generator: repeatable, and replayed by checkpointing and CUDA graphs."""
    return torch.randint(2**31 - 1, (1,), device=device)
