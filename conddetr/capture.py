"""Recording CUDA graphs, and the fixed memory that they read and write."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from conddetr.kernels import addresses

WARMUP = 3
"""Runs before recording: libraries choose their algorithms in the first one."""
MAX_GRAPHS = 32
"""Largest number of graphs per `Graphs` or `StepGraphs`; further kinds of inputs run without."""
ALIGNMENT = 64
"""Bytes: kernels are compiled for aligned tensors."""

Run = Callable[[], None]


class CudaCapture:
    """Records graphs on a GPU. Graphs of one object share memory, so no two may run at the same time."""

    def __init__(self, device: torch.device) -> None:
        """`device`: where the recorded work runs; it need not be the current device."""
        # Not PyTorch's capture stream, which is shared by all captures and belongs to one device.
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """Record the device work of a function; returns a function that replays it."""
        graph = torch.cuda.CUDAGraph()
        # Restores the current stream, because older PyTorch leaves the capture stream current after an error.
        current = torch.cuda.stream(torch.cuda.current_stream(self._stream.device))
        # Only this thread is captured: the data loader's thread pins memory meanwhile, which a capture of all threads
        # forbids.
        capture = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
        with addresses.collected() as tables, current, capture:
            run()
        return partial(_replay, graph, tables)


def _replay(graph: torch.cuda.CUDAGraph, tables: list[Tensor]) -> None:
    """Replay a graph; `tables` is an argument because the graph reads them, so they must live as long as it."""
    graph.replay()


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Restore the random generators at the end.

    On a GPU the code inside runs on a separate stream, as libraries require before recording.
    """
    if device.type != "cuda":
        with torch.random.fork_rng([]):
            yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.random.fork_rng([device]), torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def reserved(device: torch.device) -> int:
    """Bytes that PyTorch holds on a GPU and cannot release; 0 on other devices."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Size in bytes of a flat tensor that holds all of these; see `views`."""
    return sum(map(_aligned, tensors))


def views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous views of a flat tensor of bytes, one after the other, with the shapes and dtypes of `like`."""
    pieces = flat.split([_aligned(tensor) for tensor in like])
    return [
        piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)
    ]


def _aligned(tensor: Tensor) -> int:
    """Size of a tensor in bytes, rounded up to `ALIGNMENT`."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
