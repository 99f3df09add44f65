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
"""Encodes "no scoreboard"."""


@dataclass(frozen=True)
class Control:
    """Dependences that the assembler encodes for the scheduler; the hardware checks none."""

    stall: int
    """Clocks until the warp may issue its next instruction."""
    sets: int | None
    """Scoreboard that is busy until the result is available."""
    reads: int | None
    """Scoreboard that is busy until the operands have been read."""
    waits: tuple[int, ...]
    """Scoreboards that must be free first."""

    @classmethod
    def of(cls, upper: int) -> "Control":
        """Decode bits 105 to 121 of an instruction, from the upper half of its 128 bits."""
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
    """With its suffixes: `HMMA.16816.F32.BF16`."""
    operands: str
    control: Control

    @property
    def name(self) -> str:
        """The operation without suffixes: `HMMA`."""
        return self.operation.split(".")[0]

    @property
    def parts(self) -> list[str]:
        """Suffixes of the operation: `16816`, `F32`, `BF16`."""
        return self.operation.split(".")[1:]

    @property
    def is_never(self) -> bool:
        """Whether it only takes an issue slot: the assembler gave it a predicate that is always false."""
        return self.predicate == "@!PT"

    @property
    def target(self) -> int | None:
        """Target address of a jump."""
        match = _TARGET.search(self.operands) if self.name in ("BRA", "CALL", "BSSY") else None
        return int(match[1], 16) if match else None

    @property
    def is_always(self) -> bool:
        """Whether a jump is unconditional."""
        return self.predicate in ("", "@PT", "@UPT") and _TARGET.sub("", self.operands).strip() == ""


@dataclass(frozen=True)
class Function:
    """The machine code of one kernel."""

    name: str
    code: list[Instruction]

    @cached_property
    def places(self) -> dict[int, int]:
        """Address → index in `code`."""
        return {instruction.address: index for index, instruction in enumerate(self.code)}


def read(cubin: bytes, function: str | None = None) -> dict[str, Function]:
    """Functions of a compiled file by name, or only the requested selection.

    Raises:
        RuntimeError: cuobjdump cannot read the file; with its message.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        selection = [] if function is None else ["-fun", function]
        run = subprocess.run([find_cuobjdump(), "-sass", *selection, file.name], capture_output=True, text=True)
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
    """Instructions of a listing; the second line of each has the upper half of its bits."""
    instruction = None
    for line in listing.splitlines():
        match = _LINE.match(line)
        if match:
            address, predicate, operation, operands = match.groups()
            instruction = Instruction(int(address, 16), predicate or "", operation, operands, Control.of(0))
        elif instruction and (encoded := _ENCODED.search(line)):
            yield replace(instruction, control=Control.of(int(encoded[1], 16)))
            instruction = None


def resources(cubin: bytes) -> dict[str, dict[str, int]]:
    """Function → `REG`, `STACK` and the other resources that cuobjdump reports."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [find_cuobjdump(), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"Function (\S+):\n(.*)", usage)
    return {name: {key: int(count) for key, count in re.findall(r"(\w+):(\d+)", line)} for name, line in lines}
