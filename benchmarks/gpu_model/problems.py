"""Predictions of whole problems on an H100: the launches of an implementation, each predicted from machine code."""

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
"""FLOP/s of tensor cores in 16 bits, from the data sheet; for floors."""
DROPOUT = 0.1


@dataclass(frozen=True)
class Walk:
    """The trips that the blocks of a kernel make."""

    over: str
    """`keys`: a block has some queries of one head and image, and visits all keys; `queries`: it has some keys, and
    visits all queries; `bits`: blocks share the words of dropout bits."""
    with_padding: bool = False
    """Whether keys outside the valid rectangle are visited too."""


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
    # They read the gradient of dense spatial keys for rows and for columns, the second time from the L2 cache.
    "backward_grid_kernel": lambda problem: problem.batch * _cells(problem) * HEADS * WIDTH * 2,
    "attn backward_lines_kernel": lambda problem: problem.batch * _cells(problem) * HEADS * WIDTH * 2,
}
"""Kernels bound by reads and writes → function from a problem to bytes."""


def problems() -> list[Problem]:
    """The predicted problems: forward without dropout, and forward + backward with it."""
    sizes = [("r50", batch) for batch in (1, 2, 8, 32)] + [("dc5", 32)]
    return [
        Problem(grid, batch, torch.bfloat16, DROPOUT if backward else 0.0, padded, backward)
        for backward in (False, True)
        for padded in (False, True)
        for grid, batch in sizes
    ]


def call(problem: Problem, implementation: str) -> Callable[[], object]:
    """The call to record. Ours get the valid rectangle, as in the model, even if it is the whole grid."""
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
        problem: the problem to compute.
        implementation: of `IMPLEMENTATIONS`.
        peers: figures of `peer_code`.

    Raises:
        UnknownKernelError: one of our operators launches a kernel that is neither in `WALKS` nor in `STREAMS`.
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
    """Each launch of an operator whose kernels are known, else the operator; never less time than its bytes need."""
    known_figures = [_figures(launch, problem, recording, peers) for launch in operation.launches]
    if not any(known_figures):
        if "attention" in operation.name and operation.launches:
            names = ", ".join(short_name(launch.kernel) for launch in operation.launches)
            raise UnknownKernelError(f"{operation.name} launches {names}: gpu_model has none of them.")
        return [Part(operation.name, operation.seconds)]
    parts = []
    for launch, (implementation, known) in zip(
        operation.launches, (f or ("", None) for f in known_figures), strict=True
    ):
        if known is None:
            parts.append(Part(short_name(launch.kernel), LAUNCH + _bytes(launch, problem) / BANDWIDTH))
        else:
            work = block_scores(launch, known, WALKS[implementation][known.name], problem)
            clocks = {int(count): clocks for count, clocks in known.clocks.items()}
            parts.append(Part(known.name, LAUNCH + blocks.seconds(work, known.blocks, clocks)))
    missing = operation.bytes / BANDWIDTH - sum(part.seconds for part in parts)
    return [*parts, Part(f"{operation.name}, bytes", missing)] if missing > 0 else parts


def _bytes(launch: Launch, problem: Problem) -> int:
    """Bytes that a launch without a loop of products moves."""
    if launch.kernel == "memset":
        return launch.bytes
    name = cuda_code.name_of(launch.kernel)[0] if "conddetr" in launch.kernel else launch.kernel
    if name in STREAMS:
        return STREAMS[name](problem)
    raise UnknownKernelError(
        f"{short_name(launch.kernel)} with grid {launch.grid}: an attention operator launches it, but "
        "gpu_model/problems.py has neither the walk of its blocks (WALKS) nor the bytes that it moves (STREAMS)."
    )


def _figures(
    launch: Launch, problem: Problem, recording: Recording, peers: list[Figures]
) -> tuple[str, Figures] | None:
    """Implementation and figures of a kernel with a walk; None for other kernels."""
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
            known = next(peer for peer in peers if (peer.name, peer.form) == (name, used))
            if launch.bytes != known.shared:
                raise UnknownKernelError(
                    f"{name}: expected {known.shared} bytes of shared memory (PEERS), got {launch.bytes}."
                )
            return PEER, known
    return None


def _cuda_kernel(launch: Launch, problem: Problem) -> Kernel:
    kernel = cuda_code.kernel(launch.kernel, _cubin(launch.kernel), TIMED, problem.dropout > 0)
    if launch.block != (32 * kernel.warps, 1, 1):
        raise UnknownKernelError(
            f"{kernel.name}: expected {kernel.warps} warps (LAUNCHES), got blocks of {launch.block} threads."
        )
    if problem.grid == "r50" and launch.bytes != kernel.shared:
        raise UnknownKernelError(
            f"{kernel.name}: expected {kernel.shared} bytes of shared memory (LAUNCHES), got {launch.bytes}."
        )
    return replace(kernel, shared=launch.bytes)


@cache
def _cubin(symbol: str) -> bytes:
    """Machine code that contains one of our CUDA kernels."""
    for source in aot_cuda.sources():
        cubin, _ = aot_cuda.build(source, aot_cuda.HOPPER)
        if symbol in machine_code.resources(cubin):
            return cubin
    raise UnknownKernelError(f"{symbol} is in no csrc/*/cuda.cu: the package was built from other sources; rebuild it.")


def block_scores(launch: Launch, known: Figures, walk: Walk, problem: Problem) -> list[float]:
    """Scores of each block in launch order, in whole tiles; a tile at the edge counts as one.

    If a separate loop handles the tile at the edge, it counts by the time of that loop.
    """
    scores = known.tile[0] * known.tile[1]
    tail = known.tail_clocks and known.tail_clocks[str(known.blocks)] / known.clocks[str(known.blocks)]

    def amount(items: int, size: int) -> float:
        """Trips over this many queries or keys, times scores."""
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
            head_work = columns * [amount(visited, known.tile[1])]
        else:
            # If the grid is smaller than the number of key tiles, blocks take several.
            tiles = [len(range(column, -(-visited // known.tile[1]), columns)) for column in range(columns)]
            head_work = [count * amount(problem.queries, known.tile[0]) for count in tiles]
        work += heads * head_work
    return work


def _cells(problem: Problem) -> int:
    height, width = attn.GRIDS[problem.grid]
    return height * width


def floor(problem: Problem) -> float:
    """Minimal seconds of any implementation: exponentials, bytes or products of the valid keys."""
    passes, products = (2, 7) if problem.backward else (1, 2)
    exponentials = problem.scores() * passes / (blocks.MULTIPROCESSORS * 16 * blocks.HERTZ)
    return max(exponentials, problem.size() / BANDWIDTH, 2 * problem.scores() * WIDTH * products / PRODUCTS)
