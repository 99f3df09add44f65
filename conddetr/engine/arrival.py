"""Values on their way from the device to the host, which does not wait until it wants them."""

import torch
from torch import Tensor


class Arrival:
    """A copy of a tensor in host memory, started at once."""

    def __init__(self, values: Tensor) -> None:
        """`values`: as they are by now in their device's order of work; they may change afterwards, on a GPU only."""
        self._values, self._event = values, None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.current_stream(values.device).record_event()

    def wait(self) -> Tensor:
        """The values, on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._values
