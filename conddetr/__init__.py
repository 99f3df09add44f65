"""Conditional DETR (Meng et al., ICCV 2021): train and run it fast. This is the whole public API."""

# First, for what it does to Ctrl-C.
from conddetr import interrupt  # noqa: F401
from conddetr.config import ModelConfig
from conddetr.detector import Detection, Detector
from conddetr.interop.accelerate import AccelerationReport, accelerate, accelerated, decelerate
from conddetr.interop.huggingface.attention_interface import register_attention
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
