"""Cost of an instruction on a quarter of one of Hopper's multiprocessors: its unit, the clocks that it occupies the
unit, and the latency of its result.

Sources: instruction throughput in the CUDA programming guide (results per clock and multiprocessor, compute
capability 9.0), the units as Nsight Compute names them, published microbenchmarks for latencies. Four numbers are
assumptions that agree with published rates of whole kernels: HMMA, IMAD_WIDE, LATENCY["LDGSTS"] and LATENCY["HGMMA"].
"""

import re
from collections import Counter
from collections.abc import Iterable

from gpu_model.machine_code import Instruction

HMMA = 6.5
"""Clocks of one 16 × 8 × 16 product of a warp: on Hopper it does not reach the rate of HGMMA."""
IMAD_WIDE = 2.0
BYTES = 128
"""Bytes per clock of shared memory, for all four quarters."""
UNITS = ("issue", "fma", "alu", "xu", "tensor", "shared")
"""`fma` has two halves, and only one of them multiplies integers. `xu`: special functions and conversions. `shared`:
shared memory and the load-store unit, which four quarters share."""

LATENCY = {
    "MUFU": 18, "F2F": 18, "F2I": 18, "I2F": 18, "POPC": 18, "FLO": 18, "BREV": 18,
    "LDS": 29, "LDSM": 33, "STS": 12, "STSM": 12, "ATOMS": 60, "SHFL": 24,
    "LDG": 280, "LD": 280, "ATOM": 280, "ATOMG": 280, "LDGSTS": 500, "LDL": 35,
    "LDC": 30, "LDCU": 30, "ULDC": 30, "S2R": 24, "S2UR": 24, "R2UR": 12, "VOTE": 8, "VOTEU": 8,
    "HMMA": 33, "HGMMA": 50,
}  # fmt: skip
"""Clocks from the start on the unit until a waiting instruction may issue, for instructions of variable latency. For
copies to shared memory (LDGSTS) from the start of the last of a group. LDG reads the L2 cache, LDL the L1."""
OTHER_LATENCY = 6
BARRIER, FENCE, FENCE_OF_GPU, OPERANDS = 25, 20, 500, 10
"""Clocks until a barrier opens after its last warp arrives, until a fence within the block completes, until a fence for
the whole GPU completes, and until operands have been read."""

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
"""Instructions that cost little beside their issue."""


def unit(instruction: Instruction) -> str:
    """The unit of an instruction: one of `UNITS`, `heavy` for the half of `fma` with integers, "" for none."""
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
    """Clocks that it occupies its unit; shared memory counts four times, because all quarters do the same at once."""
    kind = unit(instruction)
    if kind == "tensor":
        return _warpgroup_clocks(instruction) if instruction.name == "HGMMA" else _warp_clocks(instruction)
    if kind == "xu":
        return 8.0
    if kind == "shared":
        return 4.0 * _wavefronts(instruction)
    if kind == "heavy" and {"WIDE", "HI"} & set(instruction.parts):
        return IMAD_WIDE
    return 2.0 if kind else 0.0


def shared_clocks(instruction: Instruction) -> float:
    """Clocks that it occupies shared memory: a warpgroup's product reads its tiles once for four warps."""
    if instruction.name != "HGMMA" or instruction.is_never:
        return clocks(instruction) if unit(instruction) == "shared" else 0.0
    rows = 0 if _left_is_in_registers(instruction) else 64
    return (rows + _columns(instruction)) * 32 / BYTES


def latency(instruction: Instruction) -> float:
    """Clocks from the start on its unit until its result may be used."""
    base = LATENCY.get(instruction.name, OTHER_LATENCY)
    return base + _wavefronts(instruction) if instruction.name in _SHARED else base


def _warp_clocks(instruction: Instruction) -> float:
    """Clocks of HMMA: 16 × 8 rows and columns, depth from the last digits of `16816`, `1688`; TF32 at half the rate."""
    depth = int(re.match(r"168(\d+)", instruction.parts[0])[1])
    return HMMA * depth / 16 * (2 if "TF32" in instruction.parts else 1)


def _warpgroup_clocks(instruction: Instruction) -> float:
    """Clocks of HGMMA: 64 rows, 16 per quarter, in steps of 32 bytes; a column per half clock."""
    return max(_columns(instruction) / 2, shared_clocks(instruction))


def _columns(instruction: Instruction) -> int:
    """Columns of HGMMA, for example 32 of the shape `64x32x16`."""
    return int(re.search(r"64x(\d+)x\d+", instruction.operation + instruction.operands)[1])


def _left_is_in_registers(instruction: Instruction) -> bool:
    """Whether it names two registers before the shared memory descriptor: sum and left operand."""
    return len(re.findall(r"\bR\d+", instruction.operands.split("gdesc")[0])) > 1


def _wavefronts(instruction: Instruction) -> int:
    """Passes over shared memory of a warp's access without bank conflicts, 128 bytes each."""
    name, parts = instruction.name, instruction.parts
    if name in ("LDSM", "STSM"):
        return next((int(part) for part in parts if part in ("4", "2")), 1)
    wide = 4 if "128" in parts else 2 if "64" in parts else 1
    # Copies and loads of less than 16 bytes per lane are bound by their addresses.
    return wide if name in _SHARED else 4 if "128" in parts else 1


def needs(path: Iterable[Instruction]) -> dict[str, float]:
    """Clocks of each of `UNITS` for one pass of one warp: a lower bound that a single warp never reaches."""
    path = list(path)
    occupied: Counter[str] = Counter()
    for instruction in path:
        occupied[unit(instruction)] += clocks(instruction)
    shared = sum(map(shared_clocks, path))
    heavy, light = occupied["heavy"], occupied["fma"]
    clocks_by_unit = {"issue": float(len(path)), "fma": max(heavy, (heavy + light) / 2), "shared": shared}
    clocks_by_unit |= {name: occupied[name] for name in ("alu", "xu", "tensor")}
    return {name: clocks_by_unit[name] for name in UNITS}
