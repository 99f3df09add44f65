"""What launches of kernels are reckoned with on the host; no Triton is needed."""

REPLICAS = 256
"""Programs at most that add up one gradient of a vector: rows of its partial sums, and of the vectors' replicas.

A GPU of data centres has 132 to 148 multiprocessors: two programs of four warps on most of them, with loads of 24 KiB
each in flight, where one would leave memory idle. Each row costs its bytes twice, written and added up: at 256 channels
and three vectors 786 KB, where the gradient of 6,800 tokens moves 31 MB.
"""


def cdiv(dividend: int, divisor: int) -> int:
    """Quotient, rounded up. Triton's own costs the host more than an operator of PyTorch does."""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below a positive number; see `cdiv`."""
    return 1 << (number - 1).bit_length()
