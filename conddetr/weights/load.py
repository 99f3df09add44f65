"""Loads weights from any source into a model; `conddetr.weights.read` reads them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from torch import nn

from conddetr import config as configs
from conddetr.interop.official.weights import describe, identify
from conddetr.model.detr import DETR
from conddetr.weights.read import Weights, read_weights
from conddetr.weights.search import plain_names


@dataclass
class LoadReport:
    """The result of `load_weights`. Every list holds parameter or buffer names."""

    loaded: int = 0
    """Number of loaded tensors."""
    missing: list[str] = field(default_factory=list)
    """In the model, not in the weights."""
    unexpected: list[str] = field(default_factory=list)
    """In the weights, not in the model."""
    mismatched: list[str] = field(default_factory=list)
    """In both, with different shapes, or of integers: `name: expected shape, got shape`."""
    ignored: list[str] = field(default_factory=list)
    """Not needed: batch counters of batch norm, and modules beside the model."""
    notes: list[str] = field(default_factory=list)
    """Further information, e.g. that the moving average was taken."""

    @property
    def complete(self) -> bool:
        """Whether everything in the model came from the weights, and nothing was left over."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = ["; ".join([f"{self.loaded} tensors loaded", *self.notes])]
        for title in ("missing", "unexpected", "mismatched"):
            names = getattr(self, title)
            if names:
                shown = "\n    ".join(names[:8]) + ("\n    …" if len(names) > 8 else "")
                lines.append(f"  {len(names)} {title}:\n    {shown}")
        return "\n".join(lines)


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Any], strict: bool = True) -> LoadReport:
    """Load weights into a model, in place.

    Args:
        model: from `build`; it may be compiled or wrapped.
        source: a checkpoint or a state dict: ours, official, or of transformers' `ConditionalDetrForObjectDetection`
            with timm's ResNet. A file, a folder of `save_pretrained`, or the content of a file. Prefixes are removed.
            If it holds a moving average, that is taken; the report says so.
        strict: raise an error unless everything fits. False: load the tensors that fit; the report lists the others.

    Returns:
        The report.

    Raises:
        ValueError: strict and something did not fit (the model is unchanged), or the file is not a checkpoint.
        FileNotFoundError: no such file.
    """
    return load(model, read_weights(source), strict)


def load(model: nn.Module, weights: Weights, strict: bool = True) -> LoadReport:
    """Like `load_weights`, for weights that `read_weights` returned."""
    model_state, state = model.state_dict(), weights.state
    names = plain_names(model_state)
    model_state = {name: model_state[wrapped] for name, wrapped in names.items()}
    report = LoadReport(ignored=list(weights.ignored), notes=list(weights.notes))
    accepted = {}
    for name, value in state.items():
        if name.endswith("num_batches_tracked") and name not in model_state:
            report.ignored.append(name)
        elif name not in model_state:
            report.unexpected.append(name)
        elif model_state[name].shape != value.shape:
            report.mismatched.append(f"{name}: expected {tuple(model_state[name].shape)}, got {tuple(value.shape)}")
        elif model_state[name].is_floating_point() != value.is_floating_point():
            report.mismatched.append(f"{name}: expected {model_state[name].dtype}, got {value.dtype}")
        else:
            accepted[name] = value
    report.missing = [name for name in model_state if name not in state and not name.endswith("num_batches_tracked")]
    report.loaded = len(accepted)
    if strict and not report.complete:
        raise ValueError(
            f"The weights do not fit the model. They look like: {describe(state)}; "
            f"the model is: {describe(model_state)}.\n{report}"
        )
    _check_settings(model, weights, report, strict)
    model.load_state_dict({names[name]: value for name, value in accepted.items()}, strict=False)
    return report


def _check_settings(model: nn.Module, weights: Weights, report: LoadReport, strict: bool) -> None:
    """Compare settings that leave no trace in names and shapes, if the checkpoint states them."""
    config = getattr(model, "config", None)
    if not isinstance(config, configs.ModelConfig):
        return
    stated = weights.config.to_dict() if weights.config else weights.options
    heads, dilation = stated.get("num_heads", config.num_heads), stated.get("dilation", config.dilation)
    if heads != config.num_heads:
        difference = f"num_heads: the weights belong to a model with {heads} heads, this model has {config.num_heads}"
        if strict:
            raise ValueError(f"The weights do not fit the model. {difference}.")
        report.notes.append(difference)
    if dilation != config.dilation:
        report.notes.append(f"the weights were trained with dilation {dilation}, this model has {config.dilation}")


def start_from(model: nn.Module, classes: list[dict[str, Any]], source: str | Path | Mapping[str, Any]) -> LoadReport:
    """Load weights, without the class head if they were trained on other classes.

    Args:
        model: from `build`; its class head stays as it is if it is not loaded.
        classes: `id` and `name` of every label of the model. Class lists are equal if their names are, in this order.
        source: as in `load_weights`. A checkpoint without a class list fits if the number of classes does.

    Returns:
        The report; the class head is in `mismatched` if it was left out.

    Raises:
        ValueError: something besides the class head does not fit (the model is unchanged).
        FileNotFoundError: no such file.
    """
    weights = read_weights(source)
    state = weights.state
    head = {name: value for name, value in model.state_dict().items() if name.startswith("class_embed.")}
    same_shape = all(name in state and state[name].shape == value.shape for name, value in head.items())
    if same_shape and _names(weights.classes or classes) == _names(classes):
        return load(model, weights)
    report = load(model, replace(weights, state={**state, **head}))
    report.loaded -= len(head)
    for name, value in head.items():
        shape = tuple(state[name].shape) if name in state else "nothing"
        differing = "" if same_shape else f" (expected {tuple(value.shape)}, got {shape})"
        report.mismatched.append(f"{name}: not loaded, because the classes differ{differing}")
    return report


def _names(classes: list[dict[str, Any]]) -> list[str]:
    return [category["name"] for category in classes]


def load_model(
    source: str | Path, preset: str | None = None, *, backend: str = "auto", **overrides: Any
) -> tuple[DETR, Weights]:
    """A model with the weights of a checkpoint from any source, in training mode.

    Args:
        source: as in `read_weights`.
        preset: the checkpoint's; it determines dilation if the checkpoint does not state it.
        backend: as in `build`, independent of the training's.
        overrides: fields of `ModelConfig`.

    Returns:
        The model, and the content of the checkpoint. If it states no class list, 91 classes, as official models have,
        are COCO's; others are numbered.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a supported checkpoint, another preset, or the weights do not fit.
    """
    weights = read_weights(source)
    config = weights.config or _config_of(weights, preset)
    name = configs.preset_name(config.family, config.backbone, config.dilation)
    if preset and preset != name:
        configs.resolve(preset)
        raise ValueError(f"{weights.origin} is of {name}, not of {preset}.")
    model = DETR(configs.from_dict({**config.to_dict(), **overrides}), backend=backend)
    load(model, weights)
    weights.classes = weights.classes or _default_classes(model.config.num_classes)
    return model, weights


def _config_of(weights: Weights, preset: str | None) -> configs.ModelConfig:
    """The configuration of a checkpoint that is not ours, from its weights and the options that it states."""
    options = identify(weights.state)
    if not options:
        first = next(iter(weights.state))
        raise ValueError(f"{weights.origin}: the weights are neither Conditional DETR's nor DETR's; first {first!r}.")
    if "num_classes" not in options:
        raise ValueError(
            f"{weights.origin} has no class head, 'class_embed.weight': train from it with --weights, or load it with "
            "load_weights(model, file, strict=False)."
        )
    family, backbone = str(options.pop("family")), str(options.pop("backbone"))
    if backbone not in (known := get_args(configs.Backbone)):
        raise ValueError(f"{weights.origin}: backbone: expected {', '.join(known)}, got {backbone}.")
    dilation = weights.options.get("dilation", configs.resolve(preset).dilation if preset else False)
    name = configs.preset_name(family, backbone, dilation)
    return configs.resolve(name, **{**weights.options, **options})


def _default_classes(num_classes: int) -> list[dict[str, Any]]:
    """Official models use COCO's category ids as labels; classes of other models are named by their numbers."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    if num_classes != len(names):
        names = [str(label) for label in range(num_classes)]
    return [{"id": label, "name": name} for label, name in enumerate(names)]
