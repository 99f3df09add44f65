"""Puts our operations into an existing detector, in place."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import UnionType

from torch import nn

from conddetr.interop.changes import change, restore, why_not_restore
from conddetr.interop.huggingface import kinds
from conddetr.interop.official import criterion as official_criterion
from conddetr.interop.official import model as official_model
from conddetr.interop.report import AccelerationReport, Part, describe, parameter_of, report_backbone
from conddetr.kernels import registry
from conddetr.model.attention import attends_natively
from conddetr.model.backbone.resnet import ResNetBody
from conddetr.model.detr import DETR
from conddetr.model.encoder import EncoderSelfAttention
from conddetr.model.families.conditional_detr.attention import ConditionalCrossAttention, ProjectedSelfAttention
from conddetr.model.families.conditional_detr.decoder import ConditionalDecoder
from conddetr.model.layers import FeedForward


def accelerate(model: nn.Module, backend: str = "auto", graphs: bool = False) -> AccelerationReport:
    """Make a model run on our operations, in place. Weights, state dict, outputs and training interface stay.

    Every module inside is called as before, so hooks fire, and adapters and other replaced submodules run. The report
    says which parts fall back because of them. `decelerate` undoes it.

    Args:
        model: transformers' `ConditionalDetrForObjectDetection` or `DabDetrForObjectDetection`; the official
            repository's model, and separately its `SetCriterion`, which is a module beside the model there; ours; or a
            module with one of them inside, such as PEFT's `PeftModel` or `DistributedDataParallel`. A second call only
            changes the backend.
        backend: `auto` takes, in every call, the best that can run on the device of that call, so the model may move
            after this; if no kernel can run, transformers' own code does. Any other name of
            `conddetr.kernels.registry.BACKENDS` raises an error if it cannot run.
        graphs: on a GPU, replay forward and backward of transformers' `ConditionalDetrModel` in training as CUDA
            graphs, one pair per batch shape, so that the host launches some hundred kernels instead of a thousand.
            Heads and loss are outside. Hooks inside a graph would not fire. With a hook inside, with gradient
            checkpointing, with requested attention maps, or if the host has to wait, a call runs without graphs, and a
            warning says why, once. So do shapes beyond the first `conddetr.capture.MAX_GRAPHS`: pad images to few
            shapes (`pad_size` of the image processor). Each shape takes separate memory for its pixels and outputs.

    Returns:
        Which parts were replaced, which were left, and why.

    Raises:
        TypeError: an unsupported model, or several supported ones inside this one.
        ValueError: no such backend; `graphs` for a model other than `ConditionalDetrForObjectDetection`.
        RuntimeError: the requested backend cannot run on the model's current device; says why.
    """
    report = AccelerationReport()
    if graphs and not kinds.is_model(_find(model), kinds.CONDITIONAL_DETR):
        raise ValueError(
            f"graphs: expected transformers' ConditionalDetrForObjectDetection, got {type(model).__qualname__}. Omit "
            "graphs; our own models record whole training steps (cuda_graphs) and inference (`fused(graphs=True)`)."
        )
    if official_criterion.is_criterion(model):
        official_criterion.accelerate_criterion(model, backend, report)
        return report
    model = _find(model)
    parameter = parameter_of(model)
    attention = registry.OPERATIONS["conditional_attention"]
    choice = attention.choose(backend, parameter.device, parameter.dtype)
    if isinstance(model, DETR):
        return _switch_backend(model, backend, choice)
    if official_model.is_model(model):
        official_model.accelerate_model(model, backend, choice, report)
        return report
    # Not at the top: this imports transformers.
    from conddetr.interop.huggingface.replace import accelerate_model

    accelerate_model(model, backend, choice, report, graphs)
    return report


def decelerate(model: nn.Module) -> None:
    """Undo `accelerate`: restore all classes and attributes from before its first call. No trace of it is left.

    Weights, hooks, adapters and all other changes to the model since then stay.

    Args:
        model: the model given to `accelerate`, a module around it or a copy of it, changed in place. A model that was
            not accelerated stays as it is.

    Raises:
        RuntimeError: the class of an accelerated module was changed since then, by FSDP for example; names the module.
            Then nothing is undone.
    """
    for name, module in model.named_modules():
        reason = why_not_restore(module)
        if reason is not None:
            raise RuntimeError(f"{name or 'model'} cannot be decelerated: {reason}.")
    for module in model.modules():
        restore(module)


@contextmanager
def accelerated(model: nn.Module, backend: str = "auto", graphs: bool = False) -> Iterator[AccelerationReport]:
    """`accelerate` for a `with` block, whose variable is the report; `decelerate` at its end, also after an error.

        with conddetr.accelerated(model) as report:
            model(**batch)

    Args:
        model, backend, graphs: as for `accelerate`. A model that was accelerated before is decelerated at the end too.
    """
    report = accelerate(model, backend, graphs)
    try:
        yield report
    finally:
        decelerate(model)


def _find(model: nn.Module) -> nn.Module:
    """The supported model: the module itself, or the only one inside it."""
    if _is_known(model):
        return model
    inside = [name for name, module in model.named_modules() if _is_known(module)]
    if len(inside) == 1:
        return model.get_submodule(inside[0])
    class_name = f"{type(model).__module__}.{type(model).__qualname__}"
    if inside:
        raise TypeError(
            f"model: expected one detector, got {class_name} with {', '.join(inside)} inside. Pass one of them."
        )
    raise TypeError(
        f"model: expected transformers' ConditionalDetrForObjectDetection or DabDetrForObjectDetection, the official "
        f"repository's ConditionalDETR or SetCriterion, a conddetr model, or a module with one of them inside, got "
        f"{class_name}. To load weights into ours: conddetr.load_weights(conddetr.build(preset), state_dict)."
    )


def _is_known(model: nn.Module) -> bool:
    return isinstance(model, DETR) or kinds.is_model(model) or official_model.is_model(model)


def _switch_backend(model: DETR, backend: str, choice: registry.Choice) -> AccelerationReport:
    for module in (model, *model.parts_with_backend()):
        change(module, backend=backend)
    report, note = AccelerationReport(), describe(choice, parameter_of(model))
    for name, module_type in (("decoder", ConditionalDecoder), ("cross-attention", ConditionalCrossAttention)):
        _report_parts(model, name, module_type, f"backend {note}", report)
    if not report.replaced:
        report.left.append(Part("decoder", 1, "the original DETR has no conditional attention"))
    if attends_natively(backend, parameter_of(model)):
        _report_parts(model, "self-attention", EncoderSelfAttention | ProjectedSelfAttention, note, report)
        _report_parts(model, "dropout of layers", FeedForward, note, report)
    if backend != "eager":
        for body in (module for module in model.modules() if isinstance(module, ResNetBody)):
            report_backbone(body, report)
    return report


def _report_parts(model: DETR, name: str, module_type: type | UnionType, note: str, report: AccelerationReport) -> None:
    count = sum(isinstance(module, module_type) for module in model.modules())
    if count:
        report.replaced.append(Part(name, count, note))
