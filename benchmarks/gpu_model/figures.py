"""Figures of one kernel from its machine code; on Hopper with its predicted time."""

import re
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from math import prod
from pathlib import Path

from gpu_model import machine_code, partition, pipes
from gpu_model.hot_path import PRODUCTS, Hints, HotPath, find, is_exponential
from gpu_model.machine_code import Function, Instruction
from tools.cached import cached

TIMED = 90
"""The architecture whose units and latencies are in `pipes.py`."""
FLOOR = 256.0
"""Clocks of a quarter for 1024 exponentials: 16 per clock and multiprocessor."""
REGISTERS = 65536
"""Registers of a multiprocessor, allocated to warps in units of eight per lane."""
SHARED_KIB = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
"""Shared memory of a multiprocessor (CUDA programming guide, compute capabilities)."""
RESERVED = 1024
"""Bytes of shared memory that a block takes in addition to its own."""
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
BLOCKS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}


class UnknownKernelError(LookupError):
    """The model lacks facts about a kernel."""


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel and its launch."""

    name: str
    form: str
    """Settings and variant, as text."""
    architecture: int
    cubin: bytes
    symbol: str
    """Its name in the machine code."""
    shared: int
    """Bytes of dynamic shared memory."""
    warps: int
    tile: tuple[int, int]
    """Queries and keys of a block per trip; of other kernels the two sizes of the output."""
    hints: Hints
    unrolled: int = 1
    """Tiles in one trip of the main loop."""

    @cached_property
    def function(self) -> Function:
        """The machine code of this kernel."""
        return machine_code.read(self.cubin, self.symbol)[self.symbol]

    @cached_property
    def path(self) -> HotPath:
        """The instructions that a warp executes."""
        return find(self.function, self.hints)

    @property
    def scores(self) -> float:
        """Scores of a warp in one trip."""
        return prod(self.tile) * self.unrolled / self.warps

    @property
    def share(self) -> float:
        """Factor from one warp's trip to 1024 scores."""
        return 1024 / self.scores


@dataclass(frozen=True)
class Figures:
    """Figures of a kernel. Registers, memory and instruction counts are read off, the rest is predicted."""

    name: str
    form: str
    architecture: int
    registers: int
    stack: int
    shared: int
    """Bytes, static and dynamic together."""
    warps: int
    tile: tuple[int, int]
    blocks: int
    """Resident blocks of a multiprocessor."""
    instructions: float
    """Instructions that a warp issues for 1024 scores."""
    by_name: dict[str, float]
    """These instructions by name; only products, and names with at least 1 % of them."""
    exponentials: float
    """Exponentials of the special-function unit per score."""
    local: float
    """Local memory instructions (register spills) for 1024 scores."""
    overlap: float | None
    """Share of a tile's instructions between the last copy into shared memory and the wait for all copies; None: there
    is no such wait, because there are no copies or the newest may still be in flight."""
    needs: dict[str, float]
    """Unit → its clocks for 1024 scores."""
    clocks: dict[str, float]
    """Blocks on the multiprocessor → clocks of a quarter for 1024 scores; empty if the architecture has no timing."""
    tail_clocks: dict[str, float]
    """The same for the loop at the edges, with all blocks; empty: the kernel has no such loop."""

    @property
    def binding(self) -> str:
        """The unit with the most clocks."""
        return max(self.needs, key=self.needs.get)

    @property
    def alone(self) -> float | None:
        """Clocks with one block on the multiprocessor."""
        return self.clocks.get("1")

    @property
    def full(self) -> float | None:
        """Clocks with all resident blocks."""
        return self.clocks.get(str(self.blocks))

    @property
    def ratio(self) -> float | None:
        """Clocks over the floor of exponentials; None for a kernel without exponentials."""
        return self.full / FLOOR if self.full and self.exponentials else None


def of(kernel: Kernel, only_full: bool = False) -> Figures:
    """Count and simulate, or return the cached result for the same machine code.

    Args:
        kernel: compiled.
        only_full: clocks with all resident blocks only, not with fewer.
    """
    fields = {name: value for name, value in vars(kernel).items() if name in Kernel.__dataclass_fields__}
    depends_on = [*sorted(Path(__file__).parent.glob("*.py")), sha256(fields.pop("cubin")).hexdigest()]
    depends_on += [repr(fields), str(only_full)]
    return read(cached("figures", depends_on, lambda: asdict(_of(kernel, only_full))))


def read(stored: dict) -> Figures:
    """Figures from the output of `asdict`, also after JSON."""
    return Figures(**{**stored, "tile": tuple(stored["tile"])})


def _of(kernel: Kernel, only_full: bool) -> Figures:
    path, share = kernel.path, kernel.share
    usage = machine_code.resources(kernel.cubin)[kernel.symbol]
    shared = kernel.shared + max(0, usage["SHARED"] - RESERVED)
    blocks = blocks_of(kernel.architecture, kernel.warps, usage["REG"], shared)
    return Figures(
        name=kernel.name,
        form=kernel.form,
        architecture=kernel.architecture,
        registers=usage["REG"],
        stack=usage["STACK"],
        shared=shared,
        warps=kernel.warps,
        tile=kernel.tile,
        blocks=blocks,
        instructions=len(path.main) * share,
        by_name=_by_name(path.main, share),
        # One instruction of a warp computes 32.
        exponentials=sum(map(is_exponential, path.main)) * 32 / kernel.scores,
        local=sum(instruction.name in ("LDL", "STL") for instruction in path.main) * share,
        overlap=overlap(path, kernel.unrolled),
        needs={unit: clocks * share for unit, clocks in pipes.needs(path.main).items()},
        clocks=_clocks(kernel, path.main, blocks, only_full),
        tail_clocks=_clocks(kernel, path.tail, blocks, only_full=True),
    )


def blocks_of(architecture: int, warps: int, registers: int, shared: int) -> int:
    """Resident blocks of a multiprocessor; 0 if not even one fits."""
    block_registers = -(-registers // 8) * 8 * 32 * warps
    by_shared = SHARED_KIB[architecture] * 1024 // (shared + RESERVED)
    return min(REGISTERS // block_registers, by_shared, WARPS[architecture] // warps, BLOCKS[architecture])


def _clocks(kernel: Kernel, path: list[Instruction], blocks: int, only_full: bool) -> dict[str, float]:
    if kernel.architecture != TIMED or not path:
        return {}
    fewer = () if only_full else (1, 2, 3)
    counts = sorted({count for count in fewer if count < blocks} | {blocks})
    return {str(count): partition.clocks(path, kernel.warps, count) * kernel.share for count in counts}


def overlap(path: HotPath, unrolled: int = 1) -> float | None:
    """See `Figures.overlap`."""
    code = path.main
    copies = [index for index, instruction in enumerate(code) if instruction.name == "LDGSTS"]
    waits = [
        index
        for index, instruction in enumerate(code)
        if instruction.name == "DEPBAR" and re.search(r"SB0, 0x0$", instruction.operands)
    ]
    if not path.is_loop or not copies or not waits:
        return None
    return min((wait - copy) % len(code) for wait in waits for copy in copies) * unrolled / len(code)


def _by_name(path: list[Instruction], share: float) -> dict[str, float]:
    names = Counter(instruction.name for instruction in path)
    return {name: n * share for name, n in names.most_common() if n > len(path) / 100 or name in PRODUCTS}
