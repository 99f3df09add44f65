"""Conditional DETR (Meng et al., ICCV 2021): train and run it fast. This is the whole public API.

Names are loaded when they are used: `import conddetr` alone imports no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# First, because it changes how Ctrl-C acts.
from conddetr import (
    interrupt,  # noqa: F401
    lazy,
)

if TYPE_CHECKING:
    from conddetr.config import ModelConfig
    from conddetr.detection import Detection, Prediction
    from conddetr.detector import Detector
    from conddetr.interop.accelerate import accelerate, accelerated, decelerate
    from conddetr.interop.huggingface.attention_interface import register_attention
    from conddetr.interop.report import AccelerationReport
    from conddetr.kernels.paths import record_paths
    from conddetr.model.detr import DETR
    from conddetr.model.postprocess import postprocess
    from conddetr.weights.load import LoadReport, load_weights
    from conddetr.zoo import Preset, build, build_criterion, presets

__all__ = [
    "DETR",
    "AccelerationReport",
    "Detection",
    "Detector",
    "LoadReport",
    "ModelConfig",
    "Prediction",
    "Preset",
    "accelerate",
    "accelerated",
    "build",
    "build_criterion",
    "decelerate",
    "load_weights",
    "postprocess",
    "presets",
    "record_paths",
    "register_attention",
]
__version__ = "0.1.0"

_HOMES = {
    "DETR": "model.detr",
    "AccelerationReport": "interop.report",
    "Detection": "detection",
    "Detector": "detector",
    "LoadReport": "weights.load",
    "ModelConfig": "config",
    "Prediction": "detection",
    "Preset": "zoo",
    "accelerate": "interop.accelerate",
    "accelerated": "interop.accelerate",
    "build": "zoo",
    "build_criterion": "zoo",
    "decelerate": "interop.accelerate",
    "load_weights": "weights.load",
    "postprocess": "model.postprocess",
    "presets": "zoo",
    "record_paths": "kernels.paths",
    "register_attention": "interop.huggingface.attention_interface",
}
"""The module of each public name."""


def __getattr__(name: str) -> Any:
    """A public name from its module, or a module of the package: `conddetr.kernels` needs no import of its own."""
    if name in _HOMES or name.startswith("_"):
        return lazy.load(__name__, _HOMES, name)
    try:
        return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
