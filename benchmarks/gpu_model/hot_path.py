"""The main loop of a kernel, in which it spends its time, and the instructions of a warp in one trip."""

from collections.abc import Callable
from dataclasses import dataclass

from gpu_model.control_flow import Flow, Loop, Value
from gpu_model.machine_code import Function, Instruction

PRODUCTS = ("HMMA", "IMMA", "HGMMA", "UTCHMMA", "OMMA", "QMMA")
"""Tensor core instructions: of warps, of Hopper's warpgroups, of Blackwell and its consumer variants."""
FEW = 0.5
"""Share of the expected exponentials below which the loop is the wrong one. Some exponentials may be computed by
series, which look like other products."""


class HotPathError(ValueError):
    """The rules find no main loop in a kernel, or no path through it."""


@dataclass(frozen=True)
class Hints:
    """Facts about a kernel that its machine code does not contain."""

    exponentials: float = 0.0
    """Per thread in one trip of the main loop: inner loops are repeated until there are this many."""
    seeks: tuple[str, ...] = ("LDGSTS", "STS")
    """Operations that are on the hot path: copies of the next tile."""
    avoids: tuple[str, ...] = ()
    """Operations that are not on the hot path."""
    depth: int = 0
    """Number of loops with products and exponentials around the main loop."""
    trips: tuple[int, ...] = ()
    """Trips of the inner loops in the order of their addresses, if the exponentials do not determine them."""


@dataclass(frozen=True)
class HotPath:
    """Instructions of a warp in one trip."""

    main: list[Instruction]
    tail: list[Instruction]
    """Instructions of a second loop of the same kind, for the edges; empty: there is none."""
    is_loop: bool = True
    """If false, the kernel has no loop and runs once from start to end."""


def is_product(instruction: Instruction) -> bool:
    """Whether it is a tensor core instruction."""
    return instruction.name in PRODUCTS


def is_exponential(instruction: Instruction) -> bool:
    """Whether it is a base-2 exponential of the special-function unit."""
    return instruction.operation == "MUFU.EX2"


def _is_one_of(instruction: Instruction, operations: tuple[str, ...]) -> bool:
    """Compares the beginning of the operation: `IMAD.WIDE` matches `IMAD.WIDE.U32` too."""
    return any(f"{instruction.operation}.".startswith(f"{operation}.") for operation in operations)


def find(function: Function, hints: Hints) -> HotPath:
    """The main loop is the outermost one with products and exponentials; of two, the first, and the second is the tail.

    Without exponentials it is the outermost loop with products, else the largest loop; without any loop, the whole
    kernel. The path through it has the most products, then the most exponentials, then the fewest operations that the
    hints avoid and the most that they seek, then the fewest instructions: copies of the next tile are hot, masks at
    the edge of the grid are not.

    Raises:
        HotPathError: there are more than two such loops, inner loops with unknown trips, or too few exponentials in a
            trip.
    """
    flow = Flow(function)
    outermost = _main_loops(flow, hints.depth)
    if not outermost:
        return HotPath(_straight(flow), [], is_loop=False)
    if len(outermost) > 2:
        addresses = ", ".join(f"{flow.address(loop):#x}" for loop in outermost)
        raise HotPathError(
            f"{function.name}: expected one main loop, or one and one for the edges, got main loops at {addresses}."
        )
    main, *tail = (_trip(flow, loop, hints) for loop in outermost)
    return HotPath(main, tail[0] if tail else [])


def _main_loops(flow: Flow, depth: int) -> list[Loop]:
    code = {loop: flow.instructions(sorted(loop.body)) for loop in flow.loops}

    def have(*tests: Callable[[Instruction], bool]) -> list[Loop]:
        matches = [loop for loop in flow.loops if all(any(map(test, code[loop])) for test in tests)]
        return [loop for loop in matches if sum(other.holds(loop) for other in matches) == depth]

    loops = have(is_product, is_exponential) or have(is_product)
    largest = sorted(have(), key=lambda loop: sum(len(flow.blocks[block]) for block in loop.body))
    return loops or largest[-1:]


def _straight(flow: Flow) -> list[Instruction]:
    """Path of a kernel without loops: from the first instruction to the first unconditional EXIT."""
    code = flow.function.code
    end = next(
        index for index, instruction in enumerate(code) if instruction.name == "EXIT" and not instruction.predicate
    )
    return code[: end + 1]


def _trip(flow: Flow, loop: Loop, hints: Hints) -> list[Instruction]:
    inner = [other for other in flow.loops if loop.holds(other)]

    def value(instruction: Instruction) -> Value:
        avoided = _is_one_of(instruction, hints.avoids)
        sought = not avoided and _is_one_of(instruction, hints.seeks)
        return is_product(instruction), is_exponential(instruction), -avoided, sought, -1

    more = _more_trips(flow, loop, inner, value, hints)
    trip = flow.instructions(list(flow.unrolled(loop, value, lambda other: more[other])))
    exponentials = sum(map(is_exponential, trip))
    if exponentials < FEW * hints.exponentials:
        raise HotPathError(
            f"{flow.function.name}: expected {hints.exponentials:.0f} exponentials in a trip of the loop at "
            f"{flow.address(loop):#x}, got {exponentials}."
        )
    return trip


def _more_trips(flow: Flow, loop: Loop, inner: list[Loop], value: Callable, hints: Hints) -> dict[Loop, int]:
    """Trips of each inner loop in one trip of the outer loop, beyond those on its path."""
    if hints.trips:
        if len(hints.trips) != len(inner):
            addresses = ", ".join(f"{flow.address(other):#x}" for other in inner)
            raise HotPathError(f"{flow.function.name}: expected {len(hints.trips)} inner loops, got {addresses}.")
        path = flow.path(loop, value)
        on_path = (flow.goes_through(path, other, value) for other in inner)
        return {other: trips - is_on for other, trips, is_on in zip(inner, hints.trips, on_path, strict=True)}

    def exponentials(of: Loop) -> int:
        return sum(map(is_exponential, flow.instructions(flow.path(of, value))))

    counted = [other for other in inner if exponentials(other) and not any(o.holds(other) for o in inner)]
    inside = sum(map(exponentials, counted))
    missing = hints.exponentials - exponentials(loop)
    more = max(0, round(missing / inside)) if inside else 0
    for other in inner:
        has_products = any(map(is_product, flow.instructions(sorted(other.body))))
        if has_products and not any(other == o or o.holds(other) or other.holds(o) for o in counted):
            raise HotPathError(
                f"{flow.function.name}: the trips of the loop of products at {flow.address(other):#x} are unknown."
            )
    return {other: more if other in counted else 0 for other in inner}
