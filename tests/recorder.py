"""A substitute for CUDA graphs in tests without a GPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conddetr.capture import CudaCapture


class Recorder(TorchDispatchMode):
    """Records operations with their tensors; a replay writes to the memory of the first run."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, out))
        return out

    def replay(self):
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for operator, args, kwargs, out in self.calls:
                again = operator(*args, **kwargs)
                for recorded, value in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(recorded, torch.Tensor):
                        recorded.copy_(value)


def record(device):
    """`CudaCapture` for a CPU."""

    def capture(run):
        with torch.random.fork_rng([]), Recorder() as recorder:
            run()
        return recorder.replay

    return capture


CAPTURE = CudaCapture if torch.cuda.is_available() else record
