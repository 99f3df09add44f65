"""Where a kernel spends its time: its main loop, and what a warp executes in one trip of it."""

from collections.abc import Callable
from dataclasses import dataclass

from gpu_model.control_flow import Flow, Loop, Value
from gpu_model.machine_code import Function, Instruction

PRODUCTS = ("HMMA", "IMMA", "HGMMA", "UTCHMMA", "OMMA", "QMMA")
"""Instructions of tensor cores: of warps, of Hopper's warpgroups, of Blackwell's and its consumer variants."""
FEW = 0.5
"""Share of the exponentials under which the loop is a wrong one. Some may be series, which look like other products."""


class HotPathError(ValueError):
    """A rule does not know a kernel's main loop, or the way through it."""


@dataclass(frozen=True)
class Hints:
    """What is known of a kernel that its machine code does not tell."""

    exponentials: float = 0.0
    """Of a thread in one trip of the main loop: inner loops are gone through until there are so many."""
    seeks: tuple[str, ...] = ("LDGSTS", "STS")
    """Operations that the hot path goes for: copies of the next tile."""
    avoids: tuple[str, ...] = ()
    """Operations in front of which it turns away."""
    depth: int = 0
    """Of the main loop: so many loops with products and exponentials are around it."""
    trips: tuple[int, ...] = ()
    """Of the inner loops in the order of their addresses, where the exponentials do not tell."""


@dataclass(frozen=True)
class HotPath:
    """What a warp executes in one trip."""

    main: list[Instruction]
    tail: list[Instruction]
    """Of a second loop of the same kind, which takes what is left at the edges; empty: there is none."""
    is_loop: bool = True
    """Else the kernel has no loop and is gone through once."""


def is_product(instruction: Instruction) -> bool:
    """Whether it is one of tensor cores."""
    return instruction.name in PRODUCTS


def is_exponential(instruction: Instruction) -> bool:
    """Whether it is one of the special-function unit, of the base 2."""
    return instruction.operation == "MUFU.EX2"


def _is_one_of(instruction: Instruction, operations: tuple[str, ...]) -> bool:
    """By the beginning of its operation: `IMAD.WIDE` is `IMAD.WIDE.U32` too."""
    return any(f"{instruction.operation}.".startswith(f"{operation}.") for operation in operations)


def find(function: Function, hints: Hints) -> HotPath:
    """The main loop is the outermost one with products and exponentials; of two the first, the second is the tail.

    Kernels without exponentials: the outermost loop with products, else the largest; without any loop, all of it.
    Through it goes the way with most products, then exponentials, then least of what the hints avoid and most of what
    they seek, and then with fewest instructions: copies of the next tile are hot, masks at the edge of the grid not.

    Raises:
        HotPathError: there are more than two such loops, or inner loops whose trips nothing tells, or too few
            exponentials in a trip.
    """
    flow = Flow(function)
    outermost = _main_loops(flow, hints.depth)
    if not outermost:
        return HotPath(_straight(flow), [], is_loop=False)
    if len(outermost) > 2:
        places = ", ".join(f"{flow.address(loop):#x}" for loop in outermost)
        raise HotPathError(f"{function.name}: main loops at {places}; expected one, or one and one for the edges.")
    main, *tail = (_trip(flow, loop, hints) for loop in outermost)
    return HotPath(main, tail[0] if tail else [])


def _main_loops(flow: Flow, depth: int) -> list[Loop]:
    code = {loop: flow.instructions(sorted(loop.body)) for loop in flow.loops}

    def have(*kinds: Callable[[Instruction], bool]) -> list[Loop]:
        found = [loop for loop in flow.loops if all(any(map(kind, code[loop])) for kind in kinds)]
        return [loop for loop in found if sum(other.holds(loop) for other in found) == depth]

    loops = have(is_product, is_exponential) or have(is_product)
    largest = sorted(have(), key=lambda loop: sum(len(flow.blocks[block]) for block in loop.body))
    return loops or largest[-1:]


def _straight(flow: Flow) -> list[Instruction]:
    """Of a kernel without loops: from the first instruction to the first EXIT that ends all of it."""
    code = flow.function.code
    end = next(place for place, found in enumerate(code) if found.name == "EXIT" and not found.predicate)
    return code[: end + 1]


def _trip(flow: Flow, loop: Loop, hints: Hints) -> list[Instruction]:
    inner = [other for other in flow.loops if loop.holds(other)]

    def value(instruction: Instruction) -> Value:
        avoided = _is_one_of(instruction, hints.avoids)
        wanted = not avoided and _is_one_of(instruction, hints.seeks)
        return is_product(instruction), is_exponential(instruction), -avoided, wanted, -1

    more = _more_trips(flow, loop, inner, value, hints)
    trip = flow.instructions(list(flow.unrolled(loop, value, lambda other: more[other])))
    found = sum(map(is_exponential, trip))
    if found < FEW * hints.exponentials:
        raise HotPathError(
            f"{flow.function.name}: {found} exponentials in a trip of the loop at {flow.address(loop):#x}, expected "
            f"{hints.exponentials:.0f}."
        )
    return trip


def _more_trips(flow: Flow, loop: Loop, inner: list[Loop], value: Callable, hints: Hints) -> dict[Loop, int]:
    """How often each inner loop is gone through in one trip of the outer one, beside what is on its way."""
    if hints.trips:
        if len(hints.trips) != len(inner):
            places = ", ".join(f"{flow.address(other):#x}" for other in inner)
            raise HotPathError(f"{flow.function.name}: trips of {len(hints.trips)} inner loops, found {places}.")
        way = flow.way(loop, value)
        on_way = (flow.goes_through(way, other, value) for other in inner)
        return {other: trips - is_on for other, trips, is_on in zip(inner, hints.trips, on_way, strict=True)}

    def exponentials(of: Loop) -> int:
        return sum(map(is_exponential, flow.instructions(flow.way(of, value))))

    counted = [other for other in inner if exponentials(other) and not any(o.holds(other) for o in inner)]
    inside = sum(map(exponentials, counted))
    missing = hints.exponentials - exponentials(loop)
    more = max(0, round(missing / inside)) if inside else 0
    for other in inner:
        has_products = any(map(is_product, flow.instructions(sorted(other.body))))
        if has_products and not any(other == o or o.holds(other) or other.holds(o) for o in counted):
            raise HotPathError(
                f"{flow.function.name}: nothing tells the trips of the loop of products at {flow.address(other):#x}."
            )
    return {other: more if other in counted else 0 for other in inner}
