"""Precision of a model: float32, or bfloat16 by autocast. Heads, losses and matching are float32 in both."""

import contextlib
from typing import get_args

import torch

from conddetr.config import Precision, nearest
from conddetr.kernels import registry
from conddetr.model.detr import DETR

WITHOUT_BFLOAT16 = "`auto` means bfloat16 only on NVIDIA GPUs of compute capability 8.0 and newer"
"""Why `auto` is float32 on other devices."""


def check_precision(precision: str) -> None:
    """Raise a ValueError if `precision` is not a `Precision`."""
    if precision not in (known := get_args(Precision)):
        raise ValueError(f"precision: unknown value {precision!r}.{nearest(precision, list(known))}")


def has_bfloat16(device: torch.device) -> bool:
    """Whether `auto` means bfloat16 on a device: on NVIDIA GPUs of compute capability 8.0 and newer."""
    return device.type == "cuda" and torch.version.hip is None and registry.capability(device) >= (8, 0)


def resolve_precision(precision: str, has_bfloat16: bool, trained: str | None = None) -> str:
    """The precision to use, `float32` or `bfloat16`.

    Args:
        precision: one of `config.Precision`; anything but `auto` is returned as it is.
        has_bfloat16: of the device, or of the devices of all processes together.
        trained: precision in which the weights were trained, which `auto` keeps; None: not known.
    """
    if precision != "auto":
        return precision
    return "bfloat16" if has_bfloat16 and trained != "float32" else "float32"


def autocast(model: DETR, precision: str) -> contextlib.AbstractContextManager:
    """Autocast context for inference in `float32` or `bfloat16`. A cast model, and a frozen copy in another dtype,
    computes in its own dtype.
    """
    if precision != "bfloat16":
        return contextlib.nullcontext()
    weight = next(model.parameters())
    return torch.autocast(weight.device.type, torch.bfloat16, enabled=weight.dtype == torch.float32)


def for_inference(model: DETR, precision: str) -> DETR:
    """The model to call for many images: a frozen copy (`DETR.fused`), in bfloat16 if that is the precision.

    The model itself if it is such a copy or compiled, or if its backend is `eager`, which folds nothing.
    """
    if model.fusion is not None or model._compiled_call_impl is not None or model.backend == "eager":
        return model
    is_half = precision == "bfloat16" and model.dtype == torch.float32
    return model.fused(dtype=torch.bfloat16 if is_half else None)


def float32_products(device: torch.device) -> str:
    """PyTorch's TF32 switches for float32 products and convolutions, in words; empty on a CPU, which has no TF32."""
    if device.type != "cuda":
        return ""
    # The newer switches: after they are set, PyTorch refuses to read the older ones, `allow_tf32`.
    switches = {"products": torch.backends.cuda.matmul, "convolutions": torch.backends.cudnn.conv}
    states = (f"{name}: TF32 {'on' if switch.fp32_precision == 'tf32' else 'off'}" for name, switch in switches.items())
    return f"float32 {', '.join(states)}"
