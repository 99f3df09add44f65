"""What an instruction asks of a quarter of one of Hopper's multiprocessors: which unit, for how many clocks, and after
how many its result is there.

Sources: the throughput of instructions in the CUDA programming guide (results per clock and multiprocessor, compute
capability 9.0), the units as Nsight Compute names them, published microbenchmarks for latencies. Four numbers are no
more than assumed, because they agree with published rates of whole kernels: HMMA, IMAD_WIDE, LATENCY["LDGSTS"] and
LATENCY["HGMMA"].
"""

import re
from collections import Counter
from collections.abc import Iterable

from gpu_model.machine_code import Instruction

HMMA = 6.5
"""Clocks of one product of 16 × 8 × 16 by a warp: on Hopper it does not reach the rate of HGMMA."""
IMAD_WIDE = 2.0
BYTES = 128
"""That shared memory moves in a clock, for all four quarters."""
UNITS = ("issue", "fma", "alu", "xu", "tensor", "shared")
"""`fma` has two halves, of which one alone multiplies integers. `xu`: special functions and conversions. `shared`:
shared memory and the load-store unit, which four quarters share."""

LATENCY = {
    "MUFU": 18, "F2F": 18, "F2I": 18, "I2F": 18, "POPC": 18, "FLO": 18, "BREV": 18,
    "LDS": 29, "LDSM": 33, "STS": 12, "STSM": 12, "ATOMS": 60, "SHFL": 24,
    "LDG": 280, "LD": 280, "ATOM": 280, "ATOMG": 280, "LDGSTS": 500, "LDL": 35,
    "LDC": 30, "LDCU": 30, "ULDC": 30, "S2R": 24, "S2UR": 24, "R2UR": 12, "VOTE": 8, "VOTEU": 8,
    "HMMA": 33, "HGMMA": 50,
}  # fmt: skip
"""Clocks from when the unit begins until what waits for the result may go on, of those whose time is not fixed. Of
copies to shared memory (LDGSTS) from the beginning of the last of a group; LDG from the L2 cache, LDL from the L1."""
OTHER_LATENCY = 6
BARRIER, FENCE, FENCE_OF_GPU, OPERANDS = 25, 20, 500, 10
"""Clocks until a barrier opens after its last warp, until a fence within the block lets go, until one lets go behind
which all blocks see what was written, until operands have been read."""

_FMA = ("FFMA", "FMUL", "FADD", "FFMA32I", "FMUL32I", "FADD32I", "FFMA2", "FMUL2", "FADD2")
_HALVES = ("HADD2", "HFMA2", "HMUL2", "HSETP2", "HSET2", "HMNMX2")
_XU = ("MUFU", "F2F", "F2I", "I2F", "POPC", "FLO", "BREV")
_SHARED = ("LDS", "STS", "LDSM", "STSM", "ATOMS")
_GLOBAL = ("LDG", "STG", "LDGSTS", "LD", "ST", "RED", "REDG", "ATOM", "ATOMG", "LDL", "STL")
_CONTROL = (
    "BAR", "DEPBAR", "LDGDEPBAR", "SYNCS", "MEMBAR", "FENCE", "ERRBAR", "CCTL", "NANOSLEEP", "WARPGROUP",
    "WARPGROUPSET", "WARPSYNC", "BRA", "EXIT", "BSSY", "BSYNC", "CALL", "RET", "BRX", "BREAK", "NOP", "BPT", "YIELD",
    "LDC", "VOTE", "VOTEU", "S2R", "CS2R", "S2UR", "R2UR", "ELECT", "PREEXIT", "ACQBULK",
)  # fmt: skip
"""These ask for little beside their turn."""


def unit(instruction: Instruction) -> str:
    """The unit that works for it: one of `UNITS`, `heavy` for the half of `fma` with integers, "" for none."""
    name = instruction.name
    if instruction.is_never or name in _CONTROL:
        return ""
    if name in _FMA or name in _HALVES:
        return "fma"
    if name == "IMAD":
        return "heavy"
    if name in ("HMMA", "HGMMA"):
        return "tensor"
    if name in _XU:
        return "xu"
    if name in _SHARED or name in _GLOBAL or name == "SHFL":
        return "shared"
    # The uniform datapath serves a warp, not its lanes.
    return "" if name.startswith("U") else "alu"


def clocks(instruction: Instruction) -> float:
    """So long it keeps its unit; shared memory four times its own, for all quarters do the same at the same time."""
    of = unit(instruction)
    if of == "tensor":
        return _of_warpgroup(instruction) if instruction.name == "HGMMA" else _of_warp(instruction)
    if of == "xu":
        return 8.0
    if of == "shared":
        return 4.0 * _wavefronts(instruction)
    if of == "heavy" and {"WIDE", "HI"} & set(instruction.parts):
        return IMAD_WIDE
    return 2.0 if of else 0.0


def shared_clocks(instruction: Instruction) -> float:
    """So long it keeps shared memory: a warpgroup's product reads its tiles once for four warps."""
    if instruction.name != "HGMMA" or instruction.is_never:
        return clocks(instruction) if unit(instruction) == "shared" else 0.0
    rows = 0 if _left_is_in_registers(instruction) else 64
    return (rows + _columns(instruction)) * 32 / BYTES


def latency(instruction: Instruction) -> float:
    """Clocks from when its unit begins until its result may be used."""
    found = LATENCY.get(instruction.name, OTHER_LATENCY)
    return found + _wavefronts(instruction) if instruction.name in _SHARED else found


def _of_warp(instruction: Instruction) -> float:
    """Of HMMA: 16 × 8 rows and columns by the last digits of `16816`, `1688`; TF32 at half the rate."""
    depth = int(re.match(r"168(\d+)", instruction.parts[0])[1])
    return HMMA * depth / 16 * (2 if "TF32" in instruction.parts else 1)


def _of_warpgroup(instruction: Instruction) -> float:
    """64 rows, of which each quarter has 16, in steps of 32 bytes: a column each half clock."""
    return max(_columns(instruction) / 2, shared_clocks(instruction))


def _columns(instruction: Instruction) -> int:
    """Of HGMMA, whose shape is `64x32x16`."""
    return int(re.search(r"64x(\d+)x\d+", instruction.operation + instruction.operands)[1])


def _left_is_in_registers(instruction: Instruction) -> bool:
    """Then it names two of them before the description of shared memory: sum and left operand."""
    return len(re.findall(r"\bR\d+", instruction.operands.split("gdesc")[0])) > 1


def _wavefronts(instruction: Instruction) -> int:
    """Passes over shared memory that a warp's access takes without bank conflicts, 128 bytes each."""
    name, parts = instruction.name, instruction.parts
    if name in ("LDSM", "STSM"):
        return next((int(part) for part in parts if part in ("4", "2")), 1)
    wide = 4 if "128" in parts else 2 if "64" in parts else 1
    # Of copies and of loads of less than 16 bytes a lane it is the addresses that take time.
    return wide if name in _SHARED else 4 if "128" in parts else 1


def needs(path: Iterable[Instruction]) -> dict[str, float]:
    """Clocks of each of `UNITS` for one warp to go through; no warp is faster, and none is ever so fast alone."""
    path = list(path)
    kept: Counter[str] = Counter()
    for instruction in path:
        kept[unit(instruction)] += clocks(instruction)
    shared = sum(map(shared_clocks, path))
    heavy, light = kept["heavy"], kept["fma"]
    found = {"issue": float(len(path)), "fma": max(heavy, (heavy + light) / 2), "shared": shared}
    found |= {name: kept[name] for name in ("alu", "xu", "tensor")}
    return {name: found[name] for name in UNITS}
