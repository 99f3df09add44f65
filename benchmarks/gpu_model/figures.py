"""What is known of one kernel from its machine code; on Hopper how long it takes, predicted."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from gpu_model import partition, pipes
from gpu_model.hot_path import PRODUCTS, Hints, HotPath, find, is_exponential
from gpu_model.machine_code import Function, Instruction

TIMED = 90
"""The architecture whose units and latencies `pipes.py` knows."""
FLOOR = 256.0
"""Clocks of a quarter for 1024 exponentials: 16 a clock and multiprocessor."""
REGISTERS = 65536
"""Of a multiprocessor, given to warps eight for each lane at a time."""
SHARED_KIB = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
"""Of a multiprocessor; a block takes 1 KiB more than it asks for (CUDA programming guide, compute capabilities)."""
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
BLOCKS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel, and what its launch says of it."""

    name: str
    form: str
    """In words: settings and variant."""
    architecture: int
    function: Function
    registers: int
    stack: int
    shared: int
    """Bytes, static and dynamic together, without the 1 KiB that a block has on top."""
    warps: int
    scores: int
    """Of a block in one trip of the main loop: queries × keys of a tile, or what else it makes."""
    hints: Hints

    @cached_property
    def path(self) -> HotPath:
        """What a warp executes."""
        return find(self.function, self.hints)

    @property
    def blocks(self) -> int:
        """That a multiprocessor has at once."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        shared = SHARED_KIB[self.architecture] * 1024 // (self.shared + 1024)
        warps = WARPS[self.architecture] // self.warps
        return min(REGISTERS // registers, shared, warps, BLOCKS[self.architecture])

    @property
    def share(self) -> float:
        """What makes numbers of one warp's trip those of 1024 scores."""
        return 1024 * self.warps / self.scores


@dataclass(frozen=True)
class Figures:
    """Of a kernel; all but registers, memory and counts of instructions is predicted."""

    name: str
    form: str
    architecture: int
    registers: int
    stack: int
    shared: int
    warps: int
    scores: int
    blocks: int
    instructions: float
    """That a warp issues for 1024 scores."""
    by_name: dict[str, float]
    """These instructions by what they are; products, and what is at least 1 % of them."""
    exponentials: float
    """Of the special-function unit, for each score."""
    needs: dict[str, float]
    """Unit → its clocks for 1024 scores."""
    clocks: dict[str, float]
    """Blocks on the multiprocessor → clocks of a quarter for 1024 scores; empty where no timing is known."""
    tail_clocks: dict[str, float]
    """The same of the loop for the edges; empty: the kernel has none."""

    @property
    def binding(self) -> str:
        """The unit that is asked for most."""
        return max(self.needs, key=self.needs.get)

    @property
    def alone(self) -> float | None:
        """Clocks with one block on the multiprocessor."""
        return self.clocks.get("1")

    @property
    def full(self) -> float | None:
        """Clocks with as many blocks as there can be."""
        return self.clocks.get(str(self.blocks))

    @property
    def ratio(self) -> float | None:
        """To the floor of exponentials."""
        return self.full and self.full / FLOOR


def of(kernel: Kernel) -> Figures:
    """Count and simulate."""
    path, share = kernel.path, kernel.share
    return Figures(
        name=kernel.name,
        form=kernel.form,
        architecture=kernel.architecture,
        registers=kernel.registers,
        stack=kernel.stack,
        shared=kernel.shared,
        warps=kernel.warps,
        scores=kernel.scores,
        blocks=kernel.blocks,
        instructions=len(path.main) * share,
        by_name=_by_name(path.main, share),
        # A warp's instruction makes 32 of them.
        exponentials=sum(map(is_exponential, path.main)) * 32 * kernel.warps / kernel.scores,
        needs={unit: clocks * share for unit, clocks in pipes.needs(path.main).items()},
        clocks=_clocks(kernel, path.main),
        tail_clocks=_clocks(kernel, path.tail),
    )


def _clocks(kernel: Kernel, path: list[Instruction]) -> dict[str, float]:
    if kernel.architecture != TIMED or not path:
        return {}
    counts = sorted({blocks for blocks in (1, 2, 3) if blocks < kernel.blocks} | {kernel.blocks})
    return {str(blocks): partition.clocks(path, kernel.warps, blocks) * kernel.share for blocks in counts}


def _by_name(path: list[Instruction], share: float) -> dict[str, float]:
    names = Counter(instruction.name for instruction in path)
    return {name: n * share for name, n in names.most_common() if n > len(path) / 100 or name in PRODUCTS}
