"""Weights and models of other implementations: `official` and `huggingface`.

Names load when they are first used: reading weights needs only the parameter names of both implementations.
"""

from typing import TYPE_CHECKING, Any

from conddetr import lazy

if TYPE_CHECKING:
    from conddetr.interop.compare import ParityReport, parity
    from conddetr.interop.huggingface.convert import convert_from_huggingface, convert_to_huggingface
    from conddetr.interop.huggingface.weights import from_huggingface, to_huggingface
    from conddetr.interop.official.convert import convert_from_official, convert_to_official

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
_HOMES = {
    "ParityReport": "compare",
    "convert_from_huggingface": "huggingface.convert",
    "convert_from_official": "official.convert",
    "convert_to_huggingface": "huggingface.convert",
    "convert_to_official": "official.convert",
    "from_huggingface": "huggingface.weights",
    "parity": "compare",
    "to_huggingface": "huggingface.weights",
}


def __getattr__(name: str) -> Any:
    return lazy.load(__name__, _HOMES, name)
