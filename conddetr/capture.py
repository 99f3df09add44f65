"""Recording CUDA graphs, and memory that they read and write: always the same."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from conddetr.kernels import addresses

WARMUP = 3
"""Runs before recording: libraries choose their algorithms in the first."""
MAX_GRAPHS = 32
"""Kinds of inputs that one holder of graphs records; others run without."""
ALIGNMENT = 64
"""Bytes: kernels are compiled for aligned tensors."""

Run = Callable[[], None]


class CudaCapture:
    """Recording on a GPU. All graphs of one share memory: no two run at once."""

    def __init__(self, device: torch.device) -> None:
        """`device`: of all that is recorded; it need not be the current one."""
        # Not PyTorch's own, which one device has for all.
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """Record what a function does on the device; returns what does it again."""
        graph = torch.cuda.CUDAGraph()
        # Around it, because older PyTorch leaves the stream of the capture current after an error.
        current = torch.cuda.stream(torch.cuda.current_stream(self._stream.device))
        # Of this thread alone: meanwhile the data loader's thread goes on pinning memory, which a capture of all
        # threads forbids.
        capture = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
        with addresses.collected() as tables, current, capture:
            run()
        return partial(_replay, graph, tables)


def _replay(graph: torch.cuda.CUDAGraph, tables: list[Tensor]) -> None:
    """Do again what was recorded; `tables` are read by it, so that they live as long as this function is wanted."""
    graph.replay()


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """The random generators are afterwards what they were.

    On a GPU what is done inside runs on a stream of its own, as libraries want it before recording.
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
    """Bytes that PyTorch holds on a GPU and cannot give back."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of one tensor that has room for all of these; see `views`."""
    return sum(map(_aligned, tensors))


def views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous tensors of these shapes and dtypes one after the other in a flat one of bytes."""
    pieces = flat.split([_aligned(tensor) for tensor in like])
    return [
        piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)
    ]


def _aligned(tensor: Tensor) -> int:
    """Bytes of a tensor, rounded up."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
