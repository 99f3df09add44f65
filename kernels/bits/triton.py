"""Random bits of a given probability: a thread computes whole words of 32 decisions, each from 16 random words."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from conddetr.kernels.common.launch import cdiv
from conddetr.kernels.common.triton import SEED, own_block

SIZES = ("count", "threshold")
"""Not specialised (`operators.py` says why)."""
SETTINGS = {"BLOCK": 512, "num_warps": 4}
ONES = tl.constexpr(0xFFFFFFFF)
"""For `^`, because Triton's interpreter does not support `~` on unsigned numbers."""


@triton.jit
def philox(seed, counter):
    """Philox4x32-10 for counters of 64 bits. Products of 64 bits are one instruction, and `tl.umulhi` another."""
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, b.to(tl.uint32)
        c2, c3 = (a >> 32).to(tl.uint32) ^ c3 ^ k1, a.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def compare(below, word, threshold, BIT: tl.constexpr):
    """Adds one bit to 32 comparisons: where it differs from the threshold's bit, it decides."""
    # All ones or all zeros.
    of_threshold = (0 - ((threshold >> BIT) & 1)).to(tl.uint32)
    return ((word ^ ONES) & (of_threshold | below)) | (of_threshold & below)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SEED)
def dropout_bits_kernel(words, seed_pointer, count, threshold, BLOCK: tl.constexpr):
    """words [count] int32."""
    index = own_block(BLOCK)
    seed = tl.load(seed_pointer)
    below = tl.zeros((BLOCK,), tl.uint32)
    for call in tl.static_range(4):
        a, b, c, d = philox(seed, 4 * index + call)
        below = compare(below, a, threshold, 4 * call)
        below = compare(below, b, threshold, 4 * call + 1)
        below = compare(below, c, threshold, 4 * call + 2)
        below = compare(below, d, threshold, 4 * call + 3)
    tl.store(words + index, (below ^ ONES).to(tl.int32, bitcast=True), mask=index < count)


def forward(seed: Tensor, count: int, threshold: int) -> Tensor:
    """[count] int32; see `op.py`."""
    words = torch.empty(count, dtype=torch.int32, device=seed.device)
    if count == 0:
        return words
    dropout_bits_kernel[(cdiv(count, SETTINGS["BLOCK"]),)](words, seed, count, threshold, **SETTINGS)
    return words
