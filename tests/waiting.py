"""Checks that a step never makes the host wait for the device."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RefusesToWait(TorchDispatchMode):
    """Raises at every operation that would make the host wait for a GPU, because it needs a value."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        needs_values = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags)
        if needs_values:
            raise AssertionError(f"{function} waits for the device")
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if isinstance(result, torch.Tensor) and result.device.type == "cpu":
            assert all(x.device.type == "cpu" for x in tensors), f"{function} copies to the host"
        return result


@contextlib.contextmanager
def no_synchronisation():
    """Make PyTorch raise an error at every synchronisation, if there is a GPU."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
