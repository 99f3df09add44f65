"""Building models and criteria, and the table of presets."""

import copy
from dataclasses import dataclass
from typing import Any

from conddetr import config as configs
from conddetr.loss.criterion import Criterion, loss_backend
from conddetr.model.detr import DETR


@dataclass(frozen=True)
class Preset:
    """One row of the table of presets, with the default 91 classes."""

    name: str
    parameters: int
    """Total number of parameters."""
    trainable_parameters: int
    gflops: float
    """Multiply-adds, in 10⁹, of the forward pass of one image of 800×1066 pixels (tiny: 128×128)."""


# Counted by torch's FLOP counter over all matrix products and convolutions; a test counts them again.
_MEASURED = {
    "conditional-detr-r18": (30737185, 30580321, 46.00),
    "conditional-detr-r34": (40837921, 40607329, 77.65),
    "conditional-detr-r50": (43418401, 43196001, 85.25),
    "conditional-detr-dc5-r50": (43418401, 43196001, 180.92),
    "conditional-detr-r101": (62358305, 62135905, 148.69),
    "conditional-detr-dc5-r101": (62358305, 62135905, 244.37),
    "conditional-detr-tiny": (553393, 553393, 0.0402),
    "detr-r18": (28843552, 28686688, 42.00),
    "detr-r34": (38944288, 38713696, 73.65),
    "detr-r50": (41524768, 41302368, 81.25),
    "detr-dc5-r50": (41524768, 41302368, 173.25),
    "detr-r101": (60464672, 60242272, 144.69),
    "detr-dc5-r101": (60464672, 60242272, 236.70),
    "detr-tiny": (503408, 503408, 0.0384),
}


def presets() -> dict[str, Preset]:
    """The presets by name, with their counted size and cost."""
    return {name: Preset(name, *_MEASURED[name]) for name in configs.PRESETS}


def build(preset: str, *, backend: str = "auto", pretrained_backbone: bool = False, **overrides: Any) -> DETR:
    """A detector with random weights, in training mode.

    Args:
        preset: a name from `presets()`, or a family with a backbone of timm: `conditional-detr-timm:convnext_tiny`.
        backend: implementation of the operations: `auto` (the best that can run), `triton`, `native` or `eager` (plain
            PyTorch).
        pretrained_backbone: start the backbone from pretrained weights, downloaded on first use: torchvision's of
            ImageNet, or timm's own.
        overrides: fields of `ModelConfig`, e.g. `num_classes=20`, `csq="I"`.

    Raises:
        ValueError: unknown preset or override (with the nearest name), or a value out of range.
        ImportError: the backbone is timm's, and timm is not installed.
        OSError: `pretrained_backbone=True` and the weights cannot be downloaded.
    """
    return DETR(configs.resolve(preset, **overrides), backend=backend, pretrained_backbone=pretrained_backbone)


def build_criterion(
    config: configs.ModelConfig | DETR,
    backend: str | None = None,
    max_targets: int | None = None,
    check_finite: bool | None = None,
) -> Criterion:
    """The training loss of a model: `build_criterion(model)`.

    Args:
        config: the model's configuration, or the model.
        backend: of matching and losses; default: the model's backend if a model is given, with `auto` instead of
            `native`; else `auto`.
        max_targets, check_finite: see `Criterion`.
    """
    default = "auto"
    if isinstance(config, DETR):
        default, config = loss_backend(config.backend), config.config
    return Criterion(config, default if backend is None else backend, max_targets, check_finite)


def gflops(model: configs.ModelConfig | DETR) -> float:
    """Multiply-adds, in 10⁹, of the forward pass of one image of the configuration's `image_size` by 4/3 of it.

    Tiny presets: a square. Counted by torch without computing anything; 800×1066 for the large presets.

    Args:
        model: a model, or a configuration, of which one is built.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    if not isinstance(model, DETR):
        model = DETR(model, backend="eager")
    fakes = FakeTensorMode()
    with FakeCopyMode(fakes):
        counted = copy.deepcopy(model).eval()
    counted.set_backend("eager")
    short = model.config.image_size
    long = short if model.config.backbone == "tiny" else short * 4 // 3
    with fakes, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        counted(torch.empty(1, 3, short, long))
    return counter.get_total_flops() / 2e9
