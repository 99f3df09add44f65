"""Loops of a kernel, and the path through a loop that warps nearly always take."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from gpu_model.machine_code import Function, Instruction

_LEAVES = ("EXIT", "RET", "BRX")
_CALL = 1000
"""Instructions that a call counts as: divisions and code outside the loop are called for rare operands only."""
Value = tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    """Blocks of a loop; `head` is the first block of every trip."""

    head: int
    body: frozenset[int]

    def holds(self, other: "Loop") -> bool:
        """Whether the other loop is inside this one."""
        return self.body > other.body


class Flow:
    """Basic blocks of instructions, and their successors.

    A branch for diverged lanes of a warp (BRA.DIV) is not taken. A call either returns or is a jump: for some
    architectures nvcc leaves loops by a call.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        code, places = function.code, function.places
        starts = {0}
        for place, instruction in enumerate(code):
            if instruction.name in ("BRA", "CALL", *_LEAVES):
                starts.add(place + 1)
            if instruction.name in ("BRA", "CALL") and instruction.target in places:
                starts.add(places[instruction.target])
        bounds = sorted(starts - {len(code)})
        self.blocks = [range(*ends) for ends in zip(bounds, [*bounds[1:], len(code)], strict=True)]
        self._block_at = {block.start: index for index, block in enumerate(self.blocks)}
        self.next = [self._successors(block) for block in self.blocks]

    def _successors(self, block: range) -> tuple[int, ...]:
        last = self.function.code[block[-1]]
        after = (self._block_at[block.stop],) if block.stop in self._block_at else ()
        if last.name in _LEAVES:
            return after if last.predicate else ()
        place = self.function.places.get(last.target) if last.name in ("BRA", "CALL") else None
        if place is None or last.operation == "BRA.DIV":
            return after
        target = self._block_at[place]
        is_jump = last.name == "BRA" and last.is_always
        return (target,) if is_jump else tuple(dict.fromkeys((*after, target)))

    def instructions(self, blocks: list[int]) -> list[Instruction]:
        """Instructions of the blocks, in order."""
        return [self.function.code[place] for block in blocks for place in self.blocks[block]]

    def _reached(self, without: int | None = None) -> set[int]:
        """Blocks that can be reached from the start, without passing through the given block."""
        reached, pending = set(), [0]
        while pending:
            block = pending.pop()
            if block not in reached and block != without:
                reached.add(block)
                pending += self.next[block]
        return reached

    @cached_property
    def back_edges(self) -> list[tuple[int, int]]:
        """Jumps to a block that is on every path to the jump."""
        reached = self._reached()
        edges = [(block, target) for block in reached for target in self.next[block] if target <= block]
        # A block after the loop, for a rare case, jumps back too; it can be reached without its target.
        return [(block, head) for block, head in edges if block == head or block not in self._reached(head)]

    @cached_property
    def loops(self) -> list[Loop]:
        """Loops in the order of their heads. The jump to itself that pads the code is no loop: it is never reached."""
        predecessors: dict[int, set[int]] = {}
        for block in self._reached():
            for target in self.next[block]:
                predecessors.setdefault(target, set()).add(block)
        bodies: dict[int, set[int]] = {}
        for latch, head in self.back_edges:
            body, pending = bodies.setdefault(head, {head}), [latch]
            while pending:
                block = pending.pop()
                if block not in body:
                    body.add(block)
                    pending += predecessors[block]
        return [Loop(head, frozenset(body)) for head, body in sorted(bodies.items())]

    def path(self, loop: Loop, value: Callable[[Instruction], Value]) -> list[int]:
        """Blocks of one trip: the path of highest value from the head back to it, inner loops once.

        Args:
            loop: one of `loops`.
            value: instruction → its value on a path; the first number counts most.
        """
        backwards = set(self.back_edges)
        worth = {block: self._worth(block, value) for block in loop.body}
        best: dict[int, tuple[Value, int | None] | None] = {}

        def visit(block: int) -> tuple[Value, int | None] | None:
            if block in best:
                return best[block]
            choices = [(worth[block], None)] if (block, loop.head) in backwards else []
            for target in self.next[block]:
                if target in loop.body and (block, target) not in backwards and visit(target) is not None:
                    choices.append((_sum(worth[block], visit(target)[0]), target))
            best[block] = max(choices, key=lambda choice: choice[0], default=None)
            return best[block]

        if visit(loop.head) is None:
            raise ValueError(f"{self.function.name}: no path through the loop at {self.address(loop):#x}.")
        path, block = [], loop.head
        while block is not None:
            path.append(block)
            block = best[block][1]
        return path

    def _worth(self, block: int, value: Callable[[Instruction], Value]) -> Value:
        code = self.instructions([block])
        *most, instructions = map(sum, zip(*map(value, code), strict=True))
        return *most, instructions - _CALL * sum(instruction.name == "CALL" for instruction in code)

    def address(self, loop: Loop) -> int:
        """Address of the loop's first instruction."""
        return self.function.code[self.blocks[loop.head].start].address

    def goes_through(self, path: list[int], inner: Loop, value: Callable[[Instruction], Value]) -> bool:
        """Whether a path makes a trip of an inner loop; otherwise it passes the head and leaves the loop."""
        passed = sum(len(self.blocks[block]) for block in path if block in inner.body)
        return 2 * passed > sum(len(self.blocks[block]) for block in self.path(inner, value))

    def unrolled(self, loop: Loop, value: Callable[[Instruction], Value], more: Callable[[Loop], int]) -> Iterator[int]:
        """Blocks of one trip.

        Args:
            loop: one of `loops`.
            value: as in `path`.
            more: inner loop → its trips beyond those on the path.
        """
        heads = {other.head: other for other in self.loops if loop.holds(other)}
        for block in self.path(loop, value):
            if block in heads:
                for _ in range(more(heads[block])):
                    yield from self.unrolled(heads[block], value, more)
            yield block


def _sum(a: Value, b: Value) -> Value:
    return tuple(x + y for x, y in zip(a, b, strict=True))
