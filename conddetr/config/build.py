"""Options of building and running a model. They do not change the function that it computes."""

from typing import Literal

from conddetr.config.checks import check_value

Backend = Literal["eager", "triton", "native", "auto"]
Precision = Literal["auto", "float32", "bfloat16"]

BUILD_OPTIONS = ("backend", "pretrained_backbone")
"""Options of `build` that were formerly fields of `ModelConfig`; older configurations still have them there."""


def check_backend(backend: str) -> None:
    """Raise a ValueError if `backend` is not a `Backend`."""
    check_value("Model option backend", backend, Backend)


def check_build(backbone: str, backend: str = "auto", pretrained_backbone: bool = False) -> None:
    """Raise a ValueError for options of `build` that have a wrong value or that the backbone does not support."""
    check_backend(backend)
    check_value("Model option pretrained_backbone", pretrained_backbone, bool)
    if backbone == "tiny" and pretrained_backbone:
        raise ValueError("pretrained_backbone: the backbone 'tiny' has no pretrained weights.")
