"""Machine code of kernels as the assembler wrote it: instructions with their control codes."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from tools.aot_cuda import find_cuobjdump

_LINE = re.compile(
    r"\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:(?P<predicate>@!?U?P\w+)\s+)?(?P<operation>[A-Z][\w.]*)\s*"
    r"(?P<operands>[^;]*?)\s*;"
)
_ENCODED = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")
_TARGET = re.compile(r"(?:^|, |\s)(0x[0-9a-f]+)$")
_NONE = 7
"""The number that stands for no scoreboard."""


@dataclass(frozen=True)
class Control:
    """What the assembler has found out for the scheduler; the hardware checks no dependence by itself."""

    stall: int
    """Clocks until the warp may issue its next instruction."""
    sets: int | None
    """Scoreboard that is busy until the result is there."""
    reads: int | None
    """Scoreboard that is busy until the operands have been read."""
    waits: tuple[int, ...]
    """Scoreboards that must not be busy."""

    @classmethod
    def of(cls, upper: int) -> "Control":
        """From the upper half of an instruction's 128 bits, of which they are bits 105 to 121."""
        bits = upper >> 41
        sets, reads = bits >> 5 & 7, bits >> 8 & 7
        waits = tuple(number for number in range(6) if bits >> 11 + number & 1)
        return cls(bits & 15, None if sets == _NONE else sets, None if reads == _NONE else reads, waits)


@dataclass(frozen=True)
class Instruction:
    """One instruction."""

    address: int
    predicate: str
    """For example `@!P0`; empty: none."""
    operation: str
    """With all that follows it: `HMMA.16816.F32.BF16`."""
    operands: str
    control: Control

    @property
    def name(self) -> str:
        """`HMMA`."""
        return self.operation.split(".")[0]

    @property
    def parts(self) -> list[str]:
        """Of the operation after its name: `16816`, `F32`, `BF16`."""
        return self.operation.split(".")[1:]

    @property
    def is_never(self) -> bool:
        """Whether it only takes its turn: the assembler left it with a predicate that is false."""
        return self.predicate == "@!PT"

    @property
    def target(self) -> int | None:
        """Address that a jump goes to."""
        found = _TARGET.search(self.operands) if self.name in ("BRA", "CALL", "BSSY") else None
        return int(found[1], 16) if found else None

    @property
    def is_always(self) -> bool:
        """Whether a jump is taken without a condition."""
        return self.predicate in ("", "@PT", "@UPT") and _TARGET.sub("", self.operands).strip() == ""


@dataclass(frozen=True)
class Function:
    """The machine code of one kernel."""

    name: str
    code: list[Instruction]

    @cached_property
    def places(self) -> dict[int, int]:
        """Address → place in `code`."""
        return {instruction.address: place for place, instruction in enumerate(self.code)}


def read(cubin: bytes, function: str | None = None) -> dict[str, Function]:
    """Functions of a compiled file by their names, or the one that is asked for.

    Raises:
        RuntimeError: cuobjdump cannot read it; with its words.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        one = [] if function is None else ["-fun", function]
        run = subprocess.run([find_cuobjdump(), "-sass", *one, file.name], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"cuobjdump cannot read the machine code: {run.stderr.strip()}")
    return parse(run.stdout)


def parse(listing: str) -> dict[str, Function]:
    """Functions in a listing of cuobjdump."""
    parts = re.split(r"^\s*Function : (\S+)\n", listing, flags=re.MULTILINE)
    return {
        name: Function(name, list(_instructions(text))) for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def _instructions(listing: str) -> Iterator[Instruction]:
    """An instruction's second line has the upper half of its bits."""
    found = None
    for line in listing.splitlines():
        match = _LINE.match(line)
        if match:
            address, predicate, operation, operands = match.groups()
            found = Instruction(int(address, 16), predicate or "", operation, operands, Control.of(0))
        elif found and (encoded := _ENCODED.search(line)):
            yield replace(found, control=Control.of(int(encoded[1], 16)))
            found = None


def resources(cubin: bytes) -> dict[str, dict[str, int]]:
    """Function → `REG`, `STACK` and what else cuobjdump tells of it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [find_cuobjdump(), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"Function (\S+):\n(.*)", usage)
    return {name: {key: int(count) for key, count in re.findall(r"(\w+):(\d+)", line)} for name, line in lines}
