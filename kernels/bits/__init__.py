"""Which attention weights dropout keeps, one bit each."""

from conddetr.kernels.bits.op import drawn_probability, dropout_bits

__all__ = ["drawn_probability", "dropout_bits"]
