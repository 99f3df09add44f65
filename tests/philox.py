"""The random number generator of all our kernels, in plain Python."""

import torch
from torch import Tensor


def philox(seed: int, counter: int) -> list[int]:
    """Philox4x32-10 as its authors define it."""
    c, k = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def is_kept(seed: int, rows: int, channels: int, p: float) -> Tensor:
    """[rows, channels] bool: the elements that dropout keeps. Each row starts with a new counter."""
    groups = -(-channels // 4)
    numbers = torch.tensor([number for counter in range(rows * groups) for number in philox(seed, counter)])
    uniform = (numbers >> 8).double() / 2**24
    return (uniform >= torch.tensor(p, dtype=torch.float32).double()).view(rows, 4 * groups)[:, :channels]
