"""Whole problems on an H100, predicted: what an implementation launches, each kernel by its machine code."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from null_gpu.counts import Launch
from torch import Tensor
from torch.nn.attention import SDPBackend

from counts.counting import BANDWIDTH, LAUNCH, short_name
from gpu_model import blocks, cuda_code, figures, machine_code, peer_code, triton_code
from gpu_model.figures import TIMED, Figures, Kernel, UnknownKernelError
from gpu_model.launches import Operation, Recording, record
from gpu_model.stored import Part, Prediction
from ops import attn
from ops.attn import HEADS, WIDTH, Implementation, Problem, Tensors
from tools import aot_cuda

PEER = "memory-efficient"
IMPLEMENTATIONS = ("triton", "native", PEER)
PRODUCTS = 990e12
"""FLOP/s of tensor cores with 16-bit numbers, by the data sheet: for floors."""
DROPOUT = 0.1


@dataclass(frozen=True)
class Walk:
    """Which trips the blocks of a kernel make."""

    over: str
    """`keys`: a block has some queries of one head and image, and all their keys go by; `queries`: the other way round;
    `bits`: blocks share the words that say which weights are kept."""
    with_padding: bool = False
    """Whether keys outside the valid rectangle go by too."""


WALKS = {
    "triton": {
        "forward_kernel": Walk("keys"),
        "backward_query_kernel": Walk("keys"),
        "backward_key_kernel": Walk("queries"),
        "dropout_bits_kernel": Walk("bits"),
    },
    "native": {
        "attn forward_kernel": Walk("keys"),
        "attn hopper_forward_kernel": Walk("keys"),
        "attn backward_query_kernel": Walk("keys"),
        "attn hopper_backward_query_kernel": Walk("keys"),
        "attn backward_key_kernel": Walk("queries"),
        "attn hopper_backward_key_kernel": Walk("queries"),
        "bits fill_kernel": Walk("bits"),
    },
    PEER: {
        "memory-efficient forward": Walk("keys", with_padding=True),
        "memory-efficient backward": Walk("queries", with_padding=True),
    },
}
"""Implementation → kernel → its walk."""
STREAMS: dict[str, Callable[[Problem], int]] = {
    # They read the gradient of dense spatial keys, for rows and for columns; the second time out of the L2 cache.
    "backward_grid_kernel": lambda problem: problem.batch * _cells(problem) * HEADS * WIDTH * 2,
    "attn backward_lines_kernel": lambda problem: problem.batch * _cells(problem) * HEADS * WIDTH * 2,
}
"""Kernels that do little but read and write: problem → bytes."""


def problems() -> list[Problem]:
    """What is predicted: forward without dropout, and forward + backward with it."""
    sizes = [("r50", batch) for batch in (1, 2, 8, 32)] + [("dc5", 32)]
    return [
        Problem(grid, batch, torch.bfloat16, DROPOUT if backward else 0.0, padded, backward)
        for backward in (False, True)
        for padded in (False, True)
        for grid, batch in sizes
    ]


def call(problem: Problem, implementation: str) -> Callable[[], object]:
    """What to record. Ours are told the valid rectangle, as the model does, even if it is all of the grid."""
    tensors = problem.make()
    if implementation == PEER:
        return Implementation(attn.forced(SDPBackend.EFFICIENT_ATTENTION, problem, tensors), tensors)
    valid = problem.valid_cells().to(tensors.v.device)
    return Implementation(lambda: _ours(problem, tensors, valid, implementation), tensors, separable=True)


def _ours(problem: Problem, tensors: Tensors, valid: Tensor, backend: str) -> Tensor:
    content = (tensors.q_content, tensors.q_spatial, tensors.k_content)
    options = {"valid_cells": valid, "dropout_p": problem.dropout, "backend": backend}
    return attn.conditional_attention(*content, (tensors.rows, tensors.columns), tensors.v, **options)


def predict(problem: Problem, implementation: str, peers: list[Figures]) -> Prediction:
    """Record one call, and predict each launch.

    Args:
        problem: what is computed.
        implementation: of `IMPLEMENTATIONS`.
        peers: figures of `peer_code`.

    Raises:
        UnknownKernelError: an operator of ours launches something that is neither in `WALKS` nor in `STREAMS`.
    """
    recording = record(call(problem, implementation))
    parts = [part for operation in recording.operations for part in _parts(operation, problem, recording, peers)]
    return Prediction(
        implementation=implementation,
        grid=problem.grid,
        batch=problem.batch,
        padded=problem.padded,
        backward=problem.backward,
        seconds=sum(part.seconds for part in parts),
        floor=floor(problem),
        launches=sum(len(operation.launches) for operation in recording.operations),
        parts=tuple(parts),
    )


def _parts(operation: Operation, problem: Problem, recording: Recording, peers: list[Figures]) -> list[Part]:
    """Of an operator with kernels that are known each launch; it takes no less time than its bytes."""
    found = [_figures(launch, problem, recording, peers) for launch in operation.launches]
    if not any(found):
        if "attention" in operation.name and operation.launches:
            names = ", ".join(short_name(launch.kernel) for launch in operation.launches)
            raise UnknownKernelError(f"{operation.name} launches {names}: gpu_model knows none of them.")
        return [Part(operation.name, operation.seconds)]
    parts = []
    for launch, (implementation, known) in zip(operation.launches, (f or ("", None) for f in found), strict=True):
        if known is None:
            parts.append(Part(short_name(launch.kernel), LAUNCH + _bytes(launch, problem) / BANDWIDTH))
        else:
            work = block_scores(launch, known, WALKS[implementation][known.name], problem)
            clocks = {int(count): clocks for count, clocks in known.clocks.items()}
            parts.append(Part(known.name, LAUNCH + blocks.seconds(work, known.blocks, clocks)))
    missing = operation.bytes / BANDWIDTH - sum(part.seconds for part in parts)
    return [*parts, Part(f"{operation.name}, bytes", missing)] if missing > 0 else parts


def _bytes(launch: Launch, problem: Problem) -> int:
    """That a launch without a loop of products moves."""
    if launch.kernel == "memset":
        return launch.bytes
    name = cuda_code.name_of(launch.kernel)[0] if "conddetr" in launch.kernel else launch.kernel
    if name in STREAMS:
        return STREAMS[name](problem)
    raise UnknownKernelError(
        f"{short_name(launch.kernel)} with grid {launch.grid}: an attention operator launches it, and "
        "gpu_model/problems.py knows neither how its blocks walk (WALKS) nor how much it moves (STREAMS)."
    )


def _figures(
    launch: Launch, problem: Problem, recording: Recording, peers: list[Figures]
) -> tuple[str, Figures] | None:
    """Implementation and figures of a kernel that has a walk."""
    if launch.kernel in recording.triton and launch.kernel in WALKS["triton"]:
        built, options = recording.triton[launch.kernel]
        return "triton", figures.of(triton_code.kernel_of(launch.kernel, built, options, TIMED))
    if "conddetr" in launch.kernel:
        if cuda_code.name_of(launch.kernel)[0] not in WALKS["native"]:
            return None
        return "native", figures.of(_cuda_kernel(launch, problem))
    used = ", ".join(word for word, is_so in (("dropout", problem.dropout), ("mask", problem.padded)) if is_so)
    for symbol, name in (
        (peer_code.FORWARD, "memory-efficient forward"),
        (peer_code.BACKWARD, "memory-efficient backward"),
    ):
        if symbol in launch.kernel:
            known = next(found for found in peers if (found.name, found.form) == (name, used))
            if launch.bytes != known.shared:
                raise UnknownKernelError(f"{name}: {launch.bytes} bytes of shared memory, PEERS says {known.shared}.")
            return PEER, known
    return None


def _cuda_kernel(launch: Launch, problem: Problem) -> Kernel:
    kernel = cuda_code.kernel(launch.kernel, _cubin(launch.kernel), TIMED, problem.dropout > 0)
    if launch.block != (32 * kernel.warps, 1, 1):
        raise UnknownKernelError(
            f"{kernel.name}: blocks of {launch.block} threads, LAUNCHES says {kernel.warps} warps."
        )
    if problem.grid == "r50" and launch.bytes != kernel.shared:
        raise UnknownKernelError(
            f"{kernel.name}: {launch.bytes} bytes of shared memory, LAUNCHES says {kernel.shared}."
        )
    return replace(kernel, shared=launch.bytes)


@cache
def _cubin(symbol: str) -> bytes:
    """Machine code of one of our CUDA kernels."""
    for source in aot_cuda.sources():
        cubin, _ = aot_cuda.build(source, aot_cuda.HOPPER)
        if symbol in machine_code.resources(cubin):
            return cubin
    raise UnknownKernelError(f"{symbol} is in no csrc/*/cuda.cu: the package was built from others; build it anew.")


def block_scores(launch: Launch, known: Figures, walk: Walk, problem: Problem) -> list[float]:
    """Scores of each block, in the order of launches: those of whole tiles, that at the edge counted as one.

    Where a loop of its own has the tile at the edge, it counts by how long that takes.
    """
    scores = known.tile[0] * known.tile[1]
    tail = known.tail_clocks and known.tail_clocks[str(known.blocks)] / known.clocks[str(known.blocks)]

    def amount(items: int, size: int) -> float:
        """Trips over so many queries or keys, times scores."""
        if not known.tail_clocks:
            return scores * -(-items // size)
        return scores * (items // size + (tail if items % size else 0.0))

    columns, heads, images = launch.grid
    if walk.over == "bits":
        weights = problem.batch * HEADS * problem.queries * -(-_cells(problem) // 64) * 64
        return columns * heads * images * [weights / (columns * heads * images)]
    if heads != HEADS or images != problem.batch:
        raise UnknownKernelError(f"{known.name}: grid {launch.grid}, expected (·, {HEADS}, {problem.batch}).")
    work: list[float] = []
    for height, width in problem.valid_cells().tolist():
        visited = _cells(problem) if walk.with_padding else height * width
        if walk.over == "keys":
            of_head = columns * [amount(visited, known.tile[1])]
        else:
            # Blocks of a grid that is smaller than the keys take several tiles.
            tiles = [len(range(column, -(-visited // known.tile[1]), columns)) for column in range(columns)]
            of_head = [count * amount(problem.queries, known.tile[0]) for count in tiles]
        work += heads * of_head
    return work


def _cells(problem: Problem) -> int:
    height, width = attn.GRIDS[problem.grid]
    return height * width


def floor(problem: Problem) -> float:
    """Seconds under which no implementation comes: of exponentials, bytes and products of what is valid."""
    passes, products = (2, 7) if problem.backward else (1, 2)
    exponentials = problem.scores() * passes / (blocks.MULTIPROCESSORS * 16 * blocks.HERTZ)
    return max(exponentials, problem.size() / BANDWIDTH, 2 * problem.scores() * WIDTH * products / PRODUCTS)
