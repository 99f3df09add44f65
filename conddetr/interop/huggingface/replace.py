"""Replaces modules of transformers' models.

A module gets our subclass of its own class: parameters, hooks, copies, pickles and data parallelism work as before, and
the package itself is not changed.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import transformers
from torch import nn
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
from transformers.models.conditional_detr import modeling_conditional_detr as modeling

from conddetr.interop.changes import change
from conddetr.interop.hooks import has_own_forward, report_hooks
from conddetr.interop.huggingface import kinds
from conddetr.interop.huggingface.backbone import ConvEncoder, misfit, timm_model
from conddetr.interop.huggingface.graphs import graph_body
from conddetr.interop.huggingface.loss import MATCHING_ALPHA, detection_loss
from conddetr.interop.report import AccelerationReport, Part, describe, parameter_of, report_backbone
from conddetr.kernels import registry
from conddetr.model.attention import attends_natively
from conddetr.model.fast.plan import can_run

FUSED_ATTENTION = "PyTorch's fused attention; ours on a CPU"
NO_WAIT = "fused operations on a GPU, where the host never waits"


@dataclass(frozen=True)
class Replacement:
    """Our subclass of one of transformers' classes."""

    name: str
    ours: type[nn.Module]
    note: str = ""
    """The faster code, if it does not depend on a backend."""
    is_meant: Callable[[nn.Module], bool] = lambda _: True
    """Selects the modules of that class to replace."""

    @property
    def needs_kernel(self) -> bool:
        """Whether the original runs if `auto` finds no kernel."""
        return not self.note

    @property
    def original(self) -> type[nn.Module]:
        """transformers' class."""
        return self.ours.__base__

    def find(self, model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
        """The modules to replace, and those of other subclasses, which stay."""
        candidates = [m for m in model.modules() if isinstance(m, self.original) and self.is_meant(m)]
        replaceable = [module for module in candidates if type(module) in (self.original, self.ours)]
        return replaceable, [module for module in candidates if type(module) not in (self.original, self.ours)]

    def misfit(self) -> str | None:
        """The reason against it: the arguments of transformers' `forward` differ from ours; None if they are equal."""
        actual, expected = (_arguments(kind.forward) for kind in (self.original, self.ours))
        if actual == expected:
            return None
        return f"forward of transformers {transformers.__version__}: expected {expected}, got {actual}"


def _arguments(function: object) -> list[str]:
    """Names of the arguments of a method, without self and further keywords."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]


def replacements(model: nn.Module) -> list[Replacement]:
    """The replacements for the structure of the installed version."""
    if _is_dab(model):
        from conddetr.interop.huggingface import dab_detr

        return [
            Replacement("encoder self-attention", dab_detr.EncoderSelfAttention, FUSED_ATTENTION),
            Replacement("cross-attention", dab_detr.CrossAttention, is_meant=dab_detr.is_cross_attention),
        ]
    if hasattr(modeling, "ConditionalDetrDecoderCrossAttention"):
        from conddetr.interop.huggingface import attention_v5 as structure

        attention = [
            Replacement("encoder", structure.Encoder, NO_WAIT),
            Replacement("encoder layer", structure.EncoderLayer, NO_WAIT),
            Replacement("cross-attention", structure.CrossAttention),
        ]
    elif hasattr(modeling, "ConditionalDetrAttention") and hasattr(modeling, "DetrAttention"):
        from conddetr.interop.huggingface import attention_v4 as structure

        attention = [
            Replacement("encoder self-attention", structure.EncoderSelfAttention, FUSED_ATTENTION),
            Replacement("decoder attention", structure.DecoderAttention),
        ]
    else:
        return []
    return [*attention, Replacement("sine embedding, λ ⊙ p_s", structure.Decoder)]


def _is_dab(model: nn.Module) -> bool:
    return kinds.is_model(model, kinds.DAB_DETR)


def accelerate_model(
    model: nn.Module, backend: str, choice: registry.Choice, report: AccelerationReport, graphs: bool
) -> None:
    """Replace the supported parts, and list all parts in the report.

    Args:
        model: `ConditionalDetrForObjectDetection` or `DabDetrForObjectDetection`, changed in place.
        backend: as requested; `choice` is the backend that it selects on the model's current device.
        graphs: replay the body in training; only for the former model.
    """
    applicable = replacements(model)
    for replacement in applicable:
        _replace_modules(model, replacement, backend, choice, report)
    if not applicable:
        layers = len(model.model.decoder.layers)
        report.left.append(
            Part("decoder", layers, f"its structure in transformers {transformers.__version__} is unknown")
        )
    _replace_loss(model, backend, report)
    _replace_backbone(model, backend, report)
    if not _is_dab(model):
        graph_body(model, graphs, report)
    if _is_dab(model):
        _report_dab(model, report)
    elif hasattr(modeling, "ConditionalDetrSelfAttention"):
        _replace_self_attention(model, backend, choice, report)
    report_hooks(model, report, _fallback(model, backend))


def _fallback(model: nn.Module, backend: str) -> Callable[[str, nn.Module], str | None]:
    """For `report_hooks`: returns a note on the part that runs as shipped because something is attached to a module."""
    encoder_class = _conv_encoder(model)
    ours = (*(replacement.ours for replacement in (*replacements(model), *_self_attention())), encoder_class)
    encoders = [encoder for encoder in model.modules() if type(encoder) is encoder_class]
    backbone = {module for encoder in encoders for module in encoder.model.modules()}
    layers = _layer_notes(model, backend)

    def fallback(name: str, module: nn.Module) -> str | None:
        if has_own_forward(module) and type(module) in ours:
            return "it runs instead of ours"
        return "its part of the backbone runs as shipped" if module in backbone else layers.get(module)

    return fallback


def _layer_notes(model: nn.Module, backend: str) -> dict[nn.Module, str]:
    """The modules that are called only if something is attached to them, on the model's current device → a note."""
    parameter = parameter_of(model)
    if not _self_attention() or not can_run(backend, parameter.device, parameter.dtype):
        return {}
    notes = {}
    for name in ("encoder", "decoder"):
        container = getattr(model.model, name)
        parts = [container.layers, *(getattr(container, part, None) for part in ("query_scale", "layernorm"))]
        note = f"the layers of the {name} are called as modules"
        notes |= {module: note for part in parts if part is not None for module in part.modules()}
    return notes


def _report_dab(model: nn.Module, report: AccelerationReport) -> None:
    layers = len(model.model.decoder.layers)
    report.left += [
        Part("decoder self-attention", layers, "transformers requests its attention map in every call"),
        Part("sine embedding", layers, "embeds boxes, scaled by their size, in every layer"),
    ]


def _self_attention() -> list[Replacement]:
    if not hasattr(modeling, "ConditionalDetrSelfAttention"):
        return []
    from conddetr.interop.huggingface import attention_v5 as structure

    return [
        Replacement("encoder self-attention", structure.EncoderSelfAttention),
        Replacement("decoder self-attention", structure.DecoderSelfAttention),
    ]


def _replace_self_attention(
    model: nn.Module, backend: str, choice: registry.Choice, report: AccelerationReport
) -> None:
    """On a CPU, where PyTorch has no fused attention with dropout; elsewhere `attn_implementation` stays."""
    for replacement in _self_attention():
        if attends_natively(backend, parameter_of(model)):
            _replace_modules(model, replacement, backend, choice, report)
            continue
        modules, others = replacement.find(model)
        for module in modules:
            if type(module) is replacement.ours:
                change(module, backend=backend)
        attention = f"transformers' {model.config._attn_implementation} attention (attn_implementation)"
        report.left.append(Part(replacement.name, len(modules) + len(others), attention))


def _replace_backbone(model: nn.Module, backend: str, report: AccelerationReport) -> None:
    """Replace the plain parts of each ResNet; every call checks that they are still plain."""
    replacement = Replacement("backbone", _conv_encoder(model))
    classes = (replacement.original, replacement.ours)
    for encoder in (module for module in model.modules() if type(module) in classes):
        reason = replacement.misfit() or misfit(encoder)
        if reason is not None:
            report.left.append(Part("backbone", 1, reason))
            continue
        change(encoder, replacement.ours, backend=backend)
        report_backbone(timm_model(encoder), report)


def _conv_encoder(model: nn.Module) -> type[nn.Module]:
    if not _is_dab(model):
        return ConvEncoder
    from conddetr.interop.huggingface import dab_detr

    return dab_detr.ConvEncoder


def _replace_modules(
    model: nn.Module, replacement: Replacement, backend: str, choice: registry.Choice | None, report: AccelerationReport
) -> None:
    modules, others = replacement.find(model)
    for class_name, count in Counter(type(module).__name__ for module in others).items():
        report.left.append(Part(replacement.name, count, f"{class_name} is another class and stays"))
    reason = replacement.misfit()
    if reason is None and not modules and not others:
        reason = f"no module is a {replacement.original.__name__}"
    if reason is not None:
        report.left.append(Part(replacement.name, len(modules), reason))
        return
    for module in modules:
        change(module, replacement.ours, backend=backend)
    overridden = [module for module in modules if has_own_forward(module)]
    if overridden:
        report.left.append(Part(replacement.name, len(overridden), "their own forward runs"))
    count = len(modules) - len(overridden)
    if not count:
        return
    note = replacement.note
    if replacement.needs_kernel:
        note = describe(choice, parameter_of(model))
        if backend == "auto" and choice.backend == "eager":
            note = f"no kernel here, so transformers' own runs ({note})"
            report.left.append(Part(replacement.name, count, note))
            return
    report.replaced.append(Part(replacement.name, count, note))


def _replace_loss(model: nn.Module, backend: str, report: AccelerationReport) -> None:
    name = "matcher and loss"
    is_ours = getattr(model.loss_function, "func", None) is detection_loss
    if not is_ours and model.loss_function is not DeformableDetrForObjectDetectionLoss:
        report.left.append(Part(name, 1, "the model has its own loss function"))
    elif model.config.focal_alpha != MATCHING_ALPHA:
        reason = f"focal_alpha {model.config.focal_alpha}: transformers always uses {MATCHING_ALPHA} for matching"
        report.left.append(Part(name, 1, reason))
    else:
        change(model, _loss_function=partial(detection_loss, backend=backend))
        report.replaced.append(Part(name, 1, "all layers at once"))
