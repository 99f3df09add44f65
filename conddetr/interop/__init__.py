"""Weights and models of other implementations, by owner: `official` and `huggingface`.

What is named here loads when it is used: reading weights needs the names of both owners and nothing else of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conddetr.interop.convert import (
        ParityReport,
        convert_from_huggingface,
        convert_from_official,
        convert_to_huggingface,
        convert_to_official,
        parity,
    )
    from conddetr.interop.huggingface.weights import from_huggingface, to_huggingface

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


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    is_names = name in ("from_huggingface", "to_huggingface")
    return getattr(import_module(f"{__name__}.huggingface.weights" if is_names else f"{__name__}.convert"), name)
