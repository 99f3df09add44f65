"""A quarter of one of Hopper's multiprocessors, which executes the main loop of a kernel instruction by instruction.

A warp issues in order: after the stall of its last instruction, when the scoreboards that it waits for are free, and
when the unit accepts the instruction. One warp issues per clock. All four quarters are assumed to do the same, so
shared units cost four times their time. Not modelled: the instruction cache, bank and register conflicts, atomics in
shared memory, contention for the L2 cache.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from gpu_model import pipes
from gpu_model.machine_code import Instruction

TRIPS = 10
"""Trips of a simulation; the first two are not counted."""
STAGGERS = (37.0, 150.0, 400.0)
"""Clocks between the starts of blocks. They are unknown, so the mean over a few values is taken."""
QUEUE = 8.0
"""Clocks of work that may queue before the special-function unit."""


@dataclass(frozen=True, slots=True)
class _Step:
    """An instruction, decoded for the simulation."""

    unit: str
    clocks: float
    shared: float
    latency: float
    stall: int
    sets: int | None
    reads: int | None
    waits: tuple[int, ...]
    event: str
    """A further effect, see `_EVENTS`; empty: none."""
    pending: int
    """Groups of copies that may still be in flight after a wait for groups."""


_EVENTS = {
    "LDGSTS": "copy",
    "LDGDEPBAR": "end of copies",
    "DEPBAR": "wait for copies",
    "HGMMA": "product",
    "WARPGROUP.DEPBAR": "wait for products",
    "BAR": "barrier",
    "MEMBAR": "fence",
    "FENCE": "fence",
}


def _decode(instruction: Instruction) -> _Step:
    control = instruction.control
    event = "" if instruction.is_never else _EVENTS.get(instruction.name, "")
    if instruction.operation.startswith("WARPGROUP.DEPBAR"):
        event = _EVENTS["WARPGROUP.DEPBAR"]
    pending = re.search(r", (0x[0-9a-f]+)", instruction.operands) if event.startswith("wait") else None
    if event == "product" and "gsb0" in instruction.operands:
        event = "end of products"
    fence = pipes.FENCE_OF_GPU if {"GPU", "SYS"} & set(instruction.parts) else pipes.FENCE
    return _Step(
        unit=pipes.unit(instruction),
        clocks=fence if event == "fence" else pipes.clocks(instruction),
        shared=pipes.shared_clocks(instruction),
        latency=pipes.OTHER_LATENCY if instruction.is_never else pipes.latency(instruction),
        stall=max(1, control.stall),
        sets=control.sets,
        reads=control.reads,
        waits=control.waits,
        event=event,
        pending=int(pending[1], 16) if pending else 0,
    )


@dataclass(slots=True)
class _Groups:
    """Copies or products that are waited for by groups: completion times of the groups."""

    done: list[float] = field(default_factory=list)
    open: float = 0.0
    """Completion time of the last one in the group that is still open."""

    def add(self, at: float) -> None:
        self.open = max(self.open, at)

    def end(self, now: float) -> None:
        self.done.append(self.open or now)
        self.open = 0.0

    def free(self, pending: int) -> float:
        """Time from which at most `pending` groups are in flight; groups complete in order."""
        return self.done[-1 - pending] if len(self.done) > pending else 0.0


@dataclass(slots=True, eq=False)
class _Warp:
    number: int
    block: int
    ready: float
    position: int = 0
    boards: list[float] = field(default_factory=lambda: [0.0] * 6)
    """When each scoreboard is free."""
    copies: _Groups = field(default_factory=_Groups)
    products: _Groups = field(default_factory=_Groups)
    at_barrier: float | None = None
    trips: list[float] = field(default_factory=list)
    """End of each trip."""


class _Partition:
    """Warps and units of a quarter."""

    def __init__(self, path: Iterable[Instruction], warps: list[_Warp], trips: int) -> None:
        self.path = [_decode(instruction) for instruction in path]
        self.warps, self.trips = warps, trips
        self.free: dict[str, float] = defaultdict(float)
        """Unit → time at which it accepts the next instruction."""
        self.now = 0.0
        self.turn = 0

    def run(self) -> None:
        """Simulate until every warp has made its trips."""
        for _ in range(self.trips * len(self.path) * len(self.warps)):
            self._issue(*self._next())

    def _next(self) -> tuple[_Warp, float]:
        """The warp that issues first, and its time; among warps that are ready now, round robin decides."""
        best, first = None, 0.0
        for offset in range(len(self.warps)):
            warp = self.warps[(self.turn + offset) % len(self.warps)]
            if warp.at_barrier is not None or len(warp.trips) == self.trips:
                continue
            at = self._earliest(warp)
            if best is None or at < first:
                best, first = warp, at
            if at <= self.now:
                break
        if best is None:
            raise RuntimeError("all warps wait at barriers that no other warp reaches.")
        return best, first

    def _earliest(self, warp: _Warp) -> float:
        step = self.path[warp.position]
        at = max(self.now, warp.ready)
        for board in step.waits:
            at = max(at, warp.boards[board])
        if step.event == "wait for copies":
            at = max(at, warp.copies.free(step.pending))
        elif step.event == "wait for products":
            at = max(at, warp.products.free(step.pending))
        if not step.unit:
            return at
        if step.unit == "fma":
            return max(at, min(self.free["heavy"], self.free["light"]))
        if step.unit == "xu":
            return max(at, self.free["xu"] - QUEUE)
        # Memory instructions and warpgroup products wait in queues after the issue.
        waits_here = step.unit in ("heavy", "alu") or (step.unit == "tensor" and "product" not in step.event)
        return max(at, self.free[step.unit]) if waits_here else at

    def _issue(self, warp: _Warp, at: float) -> None:
        step = self.path[warp.position]
        done = self._work(step, at) + step.latency
        if step.event:
            self._note(warp, step, at, done)
        if step.sets is not None:
            warp.boards[step.sets] = max(warp.boards[step.sets], done)
        if step.reads is not None:
            read = at + pipes.OPERANDS
            # A warpgroup's product reads its left operand from registers during execution.
            until = max(read, min(done, at + 60)) if "product" in step.event else read
            warp.boards[step.reads] = max(warp.boards[step.reads], until)
        warp.ready = max(warp.ready, at + step.stall)
        self.now = at + 1
        self.turn = warp.number + 1
        warp.position += 1
        if warp.position == len(self.path):
            warp.position = 0
            warp.trips.append(self.now)

    def _work(self, step: _Step, at: float) -> float:
        """Occupy the unit and return the start time; of a warpgroup's product the end time."""
        if not step.unit:
            return at
        unit = step.unit
        if unit == "fma":
            unit = "light" if self.free["light"] <= self.free["heavy"] else "heavy"
        begin = max(at, self.free[unit])
        self.free[unit] = begin + step.clocks
        if "product" in step.event:
            self.free["shared"] = max(at, self.free["shared"]) + step.shared
            return begin + step.clocks
        return begin

    def _note(self, warp: _Warp, step: _Step, at: float, done: float) -> None:
        match step.event:
            case "copy":
                warp.copies.add(done)
            case "end of copies":
                warp.copies.end(at)
            case "product" | "end of products":
                warp.products.add(done)
                if step.event == "end of products":
                    warp.products.end(at)
            case "fence":
                warp.ready = max(warp.ready, at + step.clocks)
            case "barrier":
                self._arrive(warp, at)

    def _arrive(self, warp: _Warp, at: float) -> None:
        """The barrier of a block opens some time after its last warp has arrived."""
        warp.at_barrier = at
        block = [member for member in self.warps if member.block == warp.block]
        if all(member.at_barrier is not None for member in block):
            opens = max(member.at_barrier for member in block) + pipes.BARRIER
            for member in block:
                member.ready, member.at_barrier = max(member.ready, opens), None


def simulate(path: list[Instruction], warps: int, blocks: int, stagger: float, trips: int = TRIPS) -> float:
    """Clocks of the quarter per trip of one warp, in the steady state.

    Args:
        path: the instructions of one trip.
        warps: of a block, in all four quarters: 4, 8, ...
        blocks: on the multiprocessor.
        stagger: clocks between the starts of blocks.
        trips: of every warp.
    """
    per_quarter = -(-warps // 4)
    # Blocks of fewer than four warps are spread over the quarters.
    blocks_here = -(-blocks * warps // 4) if warps < 4 else blocks
    numbers = range(blocks_here * per_quarter)
    here = [_Warp(number, number // per_quarter, stagger * (number // per_quarter)) for number in numbers]
    _Partition(path, here, trips).run()
    begin, end = (sum(warp.trips[trip] for warp in here) / len(here) for trip in (1, -1))
    return (end - begin) / (trips - 2) / len(here)


def clocks(path: list[Instruction], warps: int, blocks: int) -> float:
    """Mean of `simulate` over some staggers."""
    return sum(simulate(path, warps, blocks, stagger) for stagger in STAGGERS) / len(STAGGERS)
