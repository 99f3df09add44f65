"""Which modules of transformers' Conditional DETR have a replacement, and the replacing.

A module gets our subclass of its own class: parameters, hooks, copies, pickles and data parallelism go on as they were,
and nothing of the package itself is touched.
"""

import inspect
from dataclasses import dataclass
from functools import partial

import transformers
from torch import nn
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
from transformers.models.conditional_detr import modeling_conditional_detr as theirs

from conddetr.interop.accelerate import AccelerationReport, Part, describe, parameter_of, report_backbone
from conddetr.interop.accelerated.backbone import ConvEncoder, misfit
from conddetr.interop.accelerated.loss import MATCHING_ALPHA, detection_loss
from conddetr.kernels import registry
from conddetr.model.layers import is_native_on_cpu


@dataclass(frozen=True)
class Replacement:
    """Our subclass of one of their classes."""

    name: str
    ours: type[nn.Module]
    note: str = ""
    """What is faster, where that does not depend on a backend."""

    @property
    def needs_kernel(self) -> bool:
        """Whether it gives way to the original where `auto` finds no kernel."""
        return not self.note

    @property
    def original(self) -> type[nn.Module]:
        """Their class."""
        return self.ours.__base__

    def misfit(self) -> str | None:
        """The reason against it: their `forward` takes other arguments than the one that ours was written for."""
        found, expected = (_arguments(kind.forward) for kind in (self.original, self.ours))
        if found == expected:
            return None
        return f"forward of transformers {transformers.__version__} takes {found}, expected {expected}"


def _arguments(function: object) -> list[str]:
    """Names of the arguments of a method, without self and further keywords."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]


def replacements() -> list[Replacement]:
    """Those that the structure of the installed version has."""
    found = []
    if hasattr(theirs, "ConditionalDetrDecoderCrossAttention"):
        from conddetr.interop.accelerated import projections_in_attention as structure

        found.append(Replacement("cross-attention", structure.CrossAttention))
    elif hasattr(theirs, "ConditionalDetrAttention") and hasattr(theirs, "DetrAttention"):
        from conddetr.interop.accelerated import projections_in_layer as structure

        found.append(
            Replacement(
                "encoder self-attention", structure.EncoderSelfAttention, "PyTorch's fused attention; on a CPU ours"
            )
        )
        found.append(Replacement("decoder attention", structure.DecoderAttention))
    else:
        return found
    return [*found, Replacement("sine embedding, λ ⊙ p_s", structure.Decoder)]


def accelerate(model: nn.Module, backend: str, choice: registry.Choice, report: AccelerationReport) -> None:
    """Replace what can be replaced, and say so in the report.

    Args:
        model: `ConditionalDetrForObjectDetection`, changed in place.
        backend: as asked for; `choice` is what it means where the model is now.
    """
    found = replacements()
    for replacement in found:
        _replace_modules(model, replacement, backend, choice, report)
    if not found:
        layers = len(model.model.decoder.layers)
        report.left.append(
            Part("decoder", layers, f"its structure in transformers {transformers.__version__} is unknown")
        )
    _replace_loss(model, backend, report)
    _replace_backbone(model, backend, report)
    if hasattr(theirs, "ConditionalDetrSelfAttention"):
        _replace_self_attention(model, backend, choice, report)


def _replace_self_attention(
    model: nn.Module, backend: str, choice: registry.Choice, report: AccelerationReport
) -> None:
    """On a CPU, where PyTorch has no fused attention with dropout; elsewhere it stays what transformers was told."""
    from conddetr.interop.accelerated import projections_in_attention as structure

    for replacement in (
        Replacement("encoder self-attention", structure.EncoderSelfAttention),
        Replacement("decoder self-attention", structure.DecoderSelfAttention),
    ):
        if is_native_on_cpu(backend, parameter_of(model)):
            _replace_modules(model, replacement, backend, choice, report)
            continue
        kinds = (replacement.original, replacement.ours)
        modules = [module for module in model.modules() if type(module) in kinds]
        for module in modules:
            module.backend = backend
        attention = f"transformers' {model.config._attn_implementation} attention (attn_implementation)"
        report.left.append(Part(replacement.name, len(modules), attention))


def _replace_backbone(model: nn.Module, backend: str, report: AccelerationReport) -> None:
    """The parts of each ResNet that are plain; whether they still are is asked in every call."""
    replacement = Replacement("backbone", ConvEncoder)
    kinds = (replacement.original, replacement.ours)
    for encoder in (module for module in model.modules() if type(module) in kinds):
        reason = replacement.misfit() or misfit(encoder)
        if reason is not None:
            report.left.append(Part("backbone", 1, reason))
            continue
        encoder.__class__ = ConvEncoder
        encoder.backend = backend
        report_backbone(encoder.model, report)


def _replace_modules(
    model: nn.Module, replacement: Replacement, backend: str, choice: registry.Choice | None, report: AccelerationReport
) -> None:
    modules = [module for module in model.modules() if type(module) in (replacement.original, replacement.ours)]
    reason = replacement.misfit()
    if reason is None and not modules:
        reason = f"no module is a {replacement.original.__name__}"
    if reason is not None:
        report.left.append(Part(replacement.name, len(modules), reason))
        return
    for module in modules:
        module.__class__ = replacement.ours
        module.backend = backend
    if not replacement.needs_kernel:
        report.replaced.append(Part(replacement.name, len(modules), replacement.note))
        return
    note = describe(choice, parameter_of(model))
    if backend == "auto" and choice.backend == "eager":
        report.left.append(Part(replacement.name, len(modules), f"no kernel here, so transformers' own runs ({note})"))
    else:
        report.replaced.append(Part(replacement.name, len(modules), note))


def _replace_loss(model: nn.Module, backend: str, report: AccelerationReport) -> None:
    name = "matcher and loss"
    found = getattr(model.loss_function, "func", model.loss_function)
    if found not in (DeformableDetrForObjectDetectionLoss, detection_loss):
        report.left.append(Part(name, 1, "the model has a loss function of its own"))
    elif model.config.focal_alpha != MATCHING_ALPHA:
        reason = f"focal_alpha {model.config.focal_alpha}: transformers uses {MATCHING_ALPHA} for matching all the same"
        report.left.append(Part(name, 1, reason))
    else:
        model.loss_function = partial(detection_loss, backend=backend)
        report.replaced.append(Part(name, 1, "all layers at once"))
