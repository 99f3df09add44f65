"""Which attention weights dropout keeps: the public function, its checks, and the operator behind the kernels.

Each weight has one bit, generated once and read by forward and backward: generating a random number for each weight
twice took longer than the rest of attention. Every backend generates the same bits from the same seed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from conddetr.kernels import operators, paths, registry
from conddetr.kernels.bits import reference
from conddetr.kernels.common.seed import check_one_number

OPERATION = registry.declare("dropout_bits", triton=registry.Kernels(), native=registry.Kernels())


def dropout_bits(seed: Tensor, shape: Sequence[int], p: float, backend: str = "auto") -> Tensor:
    """Random bits, 32 in each word; each is 0 with probability `drawn_probability(p)`.

    Args:
        seed: [1] int64; the bits are generated on its device.
        shape: of the result.
        p: probability, in [0, 1), that a bit is 0: dropped. It is rounded to a multiple of 2⁻¹⁶.
        backend: `auto`, `triton`, `native` or `eager`; the bits are the same.

    Returns:
        `shape` int32. Bit j of word i, words counted through the whole shape, depends only on the seed, i, j and p.

    Raises:
        ValueError: p is out of range, or the seed is not one int64.
        RuntimeError: the requested backend cannot run here; says why.
    """
    check_one_number(seed)
    threshold = _threshold(p)
    count = 1
    for size in shape:
        count = count * size
    choice = OPERATION.choose(backend, seed.device, torch.float32)
    paths.note("dropout_bits", choice.backend, choice.refused)
    if choice.backend == "eager":
        words = reference.dropout_bits(seed, count, threshold)
    else:
        words = operators.of(choice.backend).dropout_bits(seed, count, threshold)
    return words.view(*shape)


def drawn_probability(p: float) -> float:
    """The actual probability with which `dropout_bits` drops for p: a multiple of 2⁻¹⁶, below 1.

    Raises:
        ValueError: p is not in [0, 1).
    """
    return _threshold(p) / 2**reference.BITS


def _threshold(p: float) -> int:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p: expected a probability in [0, 1), got {p}.")
    return min(round(p * 2**reference.BITS), 2**reference.BITS - 1)


def _fake(seed: Tensor, count: int, threshold: int) -> Tensor:
    return seed.new_empty(count, dtype=torch.int32)


operators.register(
    "dropout_bits",
    "(Tensor seed, SymInt count, int threshold) -> Tensor",
    launch=operators.launcher(__package__, "forward"),
    fake=_fake,
)
