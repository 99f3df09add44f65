"""Asynchronous copies from the device to the host, which waits only when it reads the values."""

import torch
from torch import Tensor


class Arrival:
    """A copy of a tensor in host memory, started at once."""

    def __init__(self, values: Tensor) -> None:
        """`values`: copied in stream order, as queued work leaves them. On a GPU, and only there, they may change
        afterwards.
        """
        self._values, self._event = values, None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.current_stream(values.device).record_event()

    def wait(self) -> Tensor:
        """Wait for the copy; returns the values on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._values
