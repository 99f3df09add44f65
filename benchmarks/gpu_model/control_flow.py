"""Loops of a kernel, and the way through a loop that a warp takes nearly always."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from gpu_model.machine_code import Function, Instruction

_LEAVES = ("EXIT", "RET", "BRX")
_CALL = 1000
"""Instructions that a call counts as: those of divisions and of what is not in the loop are for rare operands."""
Value = tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    """Blocks that are gone through again and again; `head` is in all trips the first."""

    head: int
    body: frozenset[int]

    def holds(self, other: "Loop") -> bool:
        """Whether the other one is inside."""
        return self.body > other.body


class Flow:
    """Blocks of instructions without a jump between them, and where they lead to.

    A branch for lanes of a warp that have parted (BRA.DIV) is not taken, a call comes back.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        code, places = function.code, function.places
        starts = {0}
        for place, instruction in enumerate(code):
            if instruction.name in ("BRA", *_LEAVES):
                starts.add(place + 1)
            if instruction.name == "BRA" and instruction.target in places:
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
        if last.name != "BRA" or last.operation == "BRA.DIV":
            return after
        target = self._block_at[self.function.places[last.target]]
        return (target,) if last.is_always else tuple(dict.fromkeys((*after, target)))

    def instructions(self, blocks: list[int]) -> list[Instruction]:
        """Of blocks one after the other."""
        return [self.function.code[place] for block in blocks for place in self.blocks[block]]

    def _reached(self, without: int | None = None) -> set[int]:
        """Blocks that can be reached from the beginning without passing one."""
        found, rest = set(), [0]
        while rest:
            block = rest.pop()
            if block not in found and block != without:
                found.add(block)
                rest += self.next[block]
        return found

    @cached_property
    def back_edges(self) -> list[tuple[int, int]]:
        """Jumps to a block that is on every way to where they start."""
        reached = self._reached()
        edges = [(block, target) for block in reached for target in self.next[block] if target <= block]
        # A block behind the loop, for something rare, jumps back too; it can be reached without its target.
        return [(block, head) for block, head in edges if block == head or block not in self._reached(head)]

    @cached_property
    def loops(self) -> list[Loop]:
        """In the order of their heads. The jump to itself that fills up the code is none, it is never reached."""
        before: dict[int, set[int]] = {}
        for block in self._reached():
            for target in self.next[block]:
                before.setdefault(target, set()).add(block)
        bodies: dict[int, set[int]] = {}
        for latch, head in self.back_edges:
            body, rest = bodies.setdefault(head, {head}), [latch]
            while rest:
                block = rest.pop()
                if block not in body:
                    body.add(block)
                    rest += before[block]
        return [Loop(head, frozenset(body)) for head, body in sorted(bodies.items())]

    def way(self, loop: Loop, value: Callable[[Instruction], Value]) -> list[int]:
        """Blocks of one trip: of all ways from the head back to it those of most value, inner loops once.

        Args:
            loop: one of `loops`.
            value: instruction → what one that is passed is worth; the first number counts most.
        """
        backwards = set(self.back_edges)
        worth = {block: self._worth(block, value) for block in loop.body}
        best: dict[int, tuple[Value, int | None] | None] = {}

        def visit(block: int) -> tuple[Value, int | None] | None:
            if block in best:
                return best[block]
            found = [(worth[block], None)] if (block, loop.head) in backwards else []
            for target in self.next[block]:
                if target in loop.body and (block, target) not in backwards and visit(target) is not None:
                    found.append((_sum(worth[block], visit(target)[0]), target))
            best[block] = max(found, key=lambda choice: choice[0], default=None)
            return best[block]

        if visit(loop.head) is None:
            raise ValueError(f"{self.function.name}: no way through the loop at {self.address(loop):#x}.")
        way, block = [], loop.head
        while block is not None:
            way.append(block)
            block = best[block][1]
        return way

    def _worth(self, block: int, value: Callable[[Instruction], Value]) -> Value:
        code = self.instructions([block])
        *most, instructions = map(sum, zip(*map(value, code), strict=True))
        return *most, instructions - _CALL * sum(instruction.name == "CALL" for instruction in code)

    def address(self, loop: Loop) -> int:
        """Where the loop begins."""
        return self.function.code[self.blocks[loop.head].start].address

    def unrolled(
        self, loop: Loop, value: Callable[[Instruction], Value], trips: Callable[[Loop], int]
    ) -> Iterator[int]:
        """Blocks of one trip, inner loops as often as `trips` says."""
        inner = [other for other in self.loops if loop.holds(other)]
        yield from self._expanded(self.way(loop, value), inner, value, trips)

    def _expanded(self, way: list[int], inner: list[Loop], value: Callable, trips: Callable) -> Iterator[int]:
        heads = {loop.head: loop for loop in inner}
        for index, block in enumerate(way):
            if block in heads:
                loop = heads[block]
                # The last trip is on the way already, if the loop is left at its end and not at its head.
                is_left_at_its_end = any((b, loop.head) in self.back_edges for b in way[index:] if b in loop.body)
                for _ in range(trips(loop) - is_left_at_its_end):
                    yield from self.unrolled(loop, value, trips)
            yield block


def _sum(a: Value, b: Value) -> Value:
    return tuple(x + y for x, y in zip(a, b, strict=True))
