"""PyTorch's own memory-efficient attention for Hopper, out of its library.

It is the only fused attention there that takes values narrower than keys, and dropout: what ours are compared with. The
library is 500 MB and has its kernels for every architecture; to take them out needs a folder of 1 GB for a while.
"""

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from gpu_model import machine_code
from gpu_model.figures import TIMED, Kernel
from gpu_model.hot_path import Hints
from tools.aot_cuda import find_cuobjdump

TILE = 64
"""Queries, and keys, of a tile of both."""


@dataclass(frozen=True)
class Peer:
    """One kernel in one use: which way it goes depends on what it is called with."""

    name: str
    form: str
    """What it is called with; of `forms`."""
    symbol: str
    """What its name in the machine code contains."""
    shared: int
    """Bytes of dynamic shared memory, as PyTorch launches it."""
    hints: Hints


FORWARD = "fmha_cutlassF_bf16_aligned_64x64_rf_sm80"
BACKWARD = "fmha_cutlassB_bf16_aligned_64x64_k64_dropout_sm80"
# Products go over 64 channels or keys in steps of 32: two trips of their loops; those with 32 channels of values one.
# Weights are drawn four at a time, 32 by each thread.
_FORWARD_TRIPS, _FORWARD_DRAWS = (2, 1, 2), (2, 8, 2)
_BACKWARD_TRIPS = (2, 8, 2, 1, 1, 2, 2)


def _forward(form: str, hints: Hints) -> Peer:
    return Peer("memory-efficient forward", form, FORWARD, 18944, hints)


def _backward(form: str, hints: Hints) -> Peer:
    return Peer("memory-efficient backward", form, BACKWARD, 51456, hints)


# Sums so far are scaled by FMUL. What draws weights has products of 64 bits and conversions (I2FP); what adds a mask
# begins with a load, and what writes a mask's gradient, or that of queries for the last time, packs it (F2FP). In
# backward a block waits for its turn to add up, and shows its sums to others (MEMBAR).
_ADDS_UP = ("LDGSTS", "FMUL", "IMAD.WIDE", "MEMBAR", "CCTL")
PEERS = (
    _forward("", Hints(seeks=("LDGSTS", "FMUL"), avoids=("LDG", "BAR"), trips=_FORWARD_TRIPS)),
    _forward("mask", Hints(seeks=("LDGSTS", "FMUL", "LDG"), avoids=("I2FP",), trips=_FORWARD_TRIPS)),
    _forward("dropout", Hints(seeks=("LDGSTS", "FMUL", "IMAD.WIDE"), avoids=("LDG",), trips=_FORWARD_DRAWS)),
    _forward("dropout, mask", Hints(seeks=("LDGSTS", "FMUL", "IMAD.WIDE", "LDG"), trips=_FORWARD_DRAWS)),
    _backward("dropout", Hints(seeks=_ADDS_UP, avoids=("LDG", "F2FP"), depth=1, trips=_BACKWARD_TRIPS)),
    _backward("dropout, mask", Hints(seeks=(*_ADDS_UP, "LDG"), avoids=("F2FP",), depth=1, trips=_BACKWARD_TRIPS)),
)


def kernels() -> list[Kernel]:
    """All of `PEERS`.

    Raises:
        ValueError: this PyTorch has no such kernel for Hopper.
    """
    wanted = sorted({peer.symbol for peer in PEERS})
    cubins = dict(zip(wanted, _taken_out(wanted), strict=True))
    found = []
    for peer in PEERS:
        cubin = cubins[peer.symbol]
        [symbol] = [name for name in machine_code.resources(cubin) if peer.symbol in name]
        found.append(Kernel(peer.name, peer.form, TIMED, cubin, symbol, peer.shared, 4, (TILE, TILE), peer.hints))
    return found


def _taken_out(symbols: list[str]) -> list[bytes]:
    """Machine code that has each of the kernels."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    with tempfile.TemporaryDirectory() as folder:
        command = [find_cuobjdump(), "-xelf", f".sm_{TIMED}.cubin", str(library)]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        cubins = [path.read_bytes() for path in sorted(Path(folder).iterdir())]
    found = [next((cubin for cubin in cubins if symbol.encode() in cubin), None) for symbol in symbols]
    missing = [symbol for symbol, cubin in zip(symbols, found, strict=True) if cubin is None]
    if missing:
        raise ValueError(f"{library} of PyTorch {torch.__version__} has no {', '.join(missing)} for sm_{TIMED}.")
    return found
