"""What a model computes in: float32, or bfloat16 by autocast. Heads, losses and matching are float32 in both."""

import contextlib
from typing import get_args

import torch

from conddetr.config import Precision, nearest
from conddetr.kernels import registry
from conddetr.model.detr import DETR

WITHOUT_BFLOAT16 = "bfloat16 is taken by itself on NVIDIA GPUs of compute capability 8.0 and newer"
"""Why `auto` is float32 elsewhere."""


def check_precision(precision: str) -> None:
    """Raise a ValueError for what is no `Precision`."""
    if precision not in (known := get_args(Precision)):
        raise ValueError(f"precision: unknown value {precision!r}.{nearest(precision, list(known))}")


def has_bfloat16(device: torch.device) -> bool:
    """Whether `auto` means bfloat16 there: on NVIDIA GPUs of compute capability 8.0 and newer."""
    return device.type == "cuda" and torch.version.hip is None and registry.capability(device) >= (8, 0)


def resolve_precision(precision: str, has_bfloat16: bool, trained: str | None = None) -> str:
    """`float32` or `bfloat16`.

    Args:
        precision: one of `config.Precision`; all but `auto` are their own answer.
        has_bfloat16: of the device, or of those of all processes.
        trained: what the weights were trained in, which `auto` keeps; None: not known.
    """
    if precision != "auto":
        return precision
    return "bfloat16" if has_bfloat16 and trained != "float32" else "float32"


def autocast(model: DETR, precision: str) -> contextlib.AbstractContextManager:
    """For calls of a model in inference, in `float32` or `bfloat16`. A model that was cast computes in its own dtype,
    and so does a frozen copy that was made for one.
    """
    if precision != "bfloat16":
        return contextlib.nullcontext()
    weight = next(model.parameters())
    return torch.autocast(weight.device.type, torch.bfloat16, enabled=weight.dtype == torch.float32)


def for_inference(model: DETR, precision: str) -> DETR:
    """What to call for many images: a frozen copy (`DETR.fused`), in bfloat16 where that is the precision.

    The model itself where it is such a copy already or was compiled, and with backend `eager`, of which nothing is
    folded.
    """
    if model.fusion is not None or model._compiled_call_impl is not None or model.backend == "eager":
        return model
    is_half = precision == "bfloat16" and model.dtype == torch.float32
    return model.fused(dtype=torch.bfloat16 if is_half else None)


def float32_products(device: torch.device) -> str:
    """What PyTorch's own switches make of float32 products and convolutions, in words; empty on a CPU, without TF32."""
    if device.type != "cuda":
        return ""
    # The newer switches: once they were set, PyTorch refuses to read the older ones, `allow_tf32`.
    switches = {"products": torch.backends.cuda.matmul, "convolutions": torch.backends.cudnn.conv}
    states = (f"{of}: TF32 {'on' if switch.fp32_precision == 'tf32' else 'off'}" for of, switch in switches.items())
    return f"float32 {', '.join(states)}"
