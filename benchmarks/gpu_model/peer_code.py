"""PyTorch's memory-efficient attention for Hopper, extracted from its library.

It is PyTorch's only fused attention that supports values narrower than keys, and dropout; ours are compared with it.
The library has 500 MB and contains the kernels of every architecture; extracting them needs 1 GB of disk temporarily.
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
"""Queries, and also keys, of a tile."""


@dataclass(frozen=True)
class Peer:
    """One kernel in one use: the path through it depends on its arguments."""

    name: str
    form: str
    """Its arguments: `dropout`, `mask`, both or none."""
    symbol: str
    """Part of its name in the machine code."""
    shared: int
    """Bytes of dynamic shared memory, as PyTorch launches it."""
    hints: Hints


FORWARD = "fmha_cutlassF_bf16_aligned_64x64_rf_sm80"
BACKWARD = "fmha_cutlassB_bf16_aligned_64x64_k64_dropout_sm80"
# Products over 64 channels or keys take two steps of 32, each a trip of their loops; 32 value channels take one.
# Dropout samples four weights at a time, 32 per thread.
_FORWARD_TRIPS, _FORWARD_DRAWS = (2, 1, 2), (2, 8, 2)
_BACKWARD_TRIPS = (2, 8, 2, 1, 1, 2, 2)


def _forward(form: str, hints: Hints) -> Peer:
    return Peer("memory-efficient forward", form, FORWARD, 18944, hints)


def _backward(form: str, hints: Hints) -> Peer:
    return Peer("memory-efficient backward", form, BACKWARD, 51456, hints)


# FMUL rescales the partial sums. Code that samples dropout has 64-bit products and conversions (I2FP). Code that adds a
# mask begins with a load. Code that writes the mask's gradient, or the final gradient of queries, packs it (F2FP). In
# backward a block waits for its turn to add its sums, and publishes them (MEMBAR).
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
    """The kernels of all `PEERS`.

    Raises:
        ValueError: this PyTorch has no such kernel for Hopper.
    """
    symbols = sorted({peer.symbol for peer in PEERS})
    cubins = dict(zip(symbols, _extracted(symbols), strict=True))
    extracted = []
    for peer in PEERS:
        cubin = cubins[peer.symbol]
        [symbol] = [name for name in machine_code.resources(cubin) if peer.symbol in name]
        extracted.append(Kernel(peer.name, peer.form, TIMED, cubin, symbol, peer.shared, 4, (TILE, TILE), peer.hints))
    return extracted


def _extracted(symbols: list[str]) -> list[bytes]:
    """The machine code that contains each of the kernels."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    with tempfile.TemporaryDirectory() as folder:
        command = [find_cuobjdump(), "-xelf", f".sm_{TIMED}.cubin", str(library)]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        cubins = [path.read_bytes() for path in sorted(Path(folder).iterdir())]
    matches = [next((cubin for cubin in cubins if symbol.encode() in cubin), None) for symbol in symbols]
    missing = [symbol for symbol, cubin in zip(symbols, matches, strict=True) if cubin is None]
    if missing:
        raise ValueError(f"{library} of PyTorch {torch.__version__} has no {', '.join(missing)} for sm_{TIMED}.")
    return matches
