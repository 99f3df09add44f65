"""Weights and models of other implementations."""

from conddetr.interop.convert import (
    ParityReport,
    convert_from_huggingface,
    convert_from_official,
    convert_to_huggingface,
    convert_to_official,
    parity,
)
from conddetr.interop.huggingface import from_huggingface, to_huggingface

__all__ = [
    "ParityReport",
    "convert_from_huggingface",
    "convert_from_official",
    "convert_to_huggingface",
    "convert_to_official",
    "from_huggingface",
    "parity",
    "to_huggingface",
]
