"""Random inputs of a problem, the same on every run and on every device."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
"""The tensors of a problem by name."""
PERIOD = 1_000_003
"""Random numbers repeat after this many, a multiple of no size: the host samples more slowly than a GPU computes."""


def normal(generator: torch.Generator, shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal numbers, float32, on a device; sampled on the host, whose generator is the same everywhere."""
    count = math.prod(shape)
    sample = torch.randn(min(count, PERIOD), generator=generator, dtype=torch.float32).to(device)
    return sample.repeat(-(-count // PERIOD))[:count].view(shape) if count else sample.view(shape)


class Maker:
    """Creates tensors on a device in the dtype that is checked."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Standard normal numbers times `scale`."""
        return self._placed(scale * normal(self._generator, shape, self.device), dtype)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Numbers in [0, 1)."""
        return self._placed(torch.rand(shape, generator=self._generator, dtype=torch.float32), dtype)

    def integers(self, below: int, *shape: int, low: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
        """Numbers from `low` up to, not including, `below`."""
        return torch.randint(low, below, shape, generator=self._generator, dtype=dtype).to(self.device)

    def booleans(self, share: float, *shape: int) -> Tensor:
        """Booleans that are True with probability `share`."""
        return (torch.rand(shape, generator=self._generator) < share).to(self.device)

    def exactly(self, values: list, dtype: torch.dtype) -> Tensor:
        """A tensor of the given values."""
        return torch.tensor(values, dtype=dtype, device=self.device)

    def order(self, *shape: int) -> Tensor:
        """A random permutation of each last dimension, int64."""
        return torch.rand(shape, generator=self._generator).argsort(-1).to(self.device)

    def _placed(self, made: Tensor, dtype: torch.dtype | None) -> Tensor:
        return made.to(self.device, dtype or self.dtype)


def channels_last(x: Tensor) -> Tensor:
    """A map [B, C, H, W] in channels-last memory format."""
    return x.contiguous(memory_format=torch.channels_last)


def strided(x: Tensor) -> Tensor:
    """The same numbers with gaps in memory and the first two dimensions transposed there."""
    return x.transpose(0, 1).repeat_interleave(2, dim=1)[:, ::2].transpose(0, 1)


def widened(inputs: Inputs) -> Inputs:
    """Floating-point tensors in float64, the others unchanged."""
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
