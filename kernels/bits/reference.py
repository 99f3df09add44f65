"""Random bits of a given probability, bit-sliced, in plain PyTorch: every backend generates the same.

A word is 32 decisions. Sixteen random words form 32 numbers of 16 bits, one in each column: the first word has their
lowest bits. All 32 are compared with the threshold at once, from the lowest bit up, by `and` and `or`.

Source of the random words: Philox4x32-10 (Salmon et al., SC 2011).
"""

import torch
from torch import Tensor

BITS = 16
"""Resolution of the probability: it is a multiple of 2⁻¹⁶."""

_LOWER = 0xFFFFFFFF


def philox(seed: Tensor, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random numbers of 32 bits for each counter.

    Args:
        seed: [1] int64.
        counter: int64, not negative.

    Returns:
        Four tensors of the shape of `counter`, int64 from 0 to 2³² - 1.
    """
    c0, c1 = counter & _LOWER, counter >> 32
    c2, c3 = torch.zeros_like(counter), torch.zeros_like(counter)
    k0, k1 = seed & _LOWER, seed >> 32 & _LOWER
    for _ in range(10):
        # Products wrap round at 64 bits, as they should; only their sign differs from that of the unsigned number.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & _LOWER) ^ c1 ^ k0, b & _LOWER, (a >> 32 & _LOWER) ^ c3 ^ k1, a & _LOWER
        k0, k1 = k0 + 0x9E3779B9 & _LOWER, k1 + 0xBB67AE85 & _LOWER
    return c0, c1, c2, c3


def dropout_bits(seed: Tensor, count: int, threshold: int) -> Tensor:
    """[count] int32; a bit is 1, kept, if its number of 16 bits is not below `threshold`. See `op.py`."""
    index = torch.arange(count, device=seed.device)
    below = torch.zeros_like(index)
    for call in range(BITS // 4):
        for lane, word in enumerate(philox(seed, 4 * index + call)):
            # A number is below if its highest bit that differs from the threshold's is 0.
            is_one = threshold >> (4 * call + lane) & 1
            below = ~word | below if is_one else ~word & below
    kept = ~below & _LOWER
    return (kept - ((kept >> 31) << 32)).to(torch.int32)


def unpacked(words: Tensor) -> Tensor:
    """[..., n] int32 -> [..., n, 32] bool, bit 0 first."""
    return (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=words.device) & 1).bool()
