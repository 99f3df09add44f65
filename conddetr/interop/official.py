"""Loading weights: ours, those of the official Conditional DETR and DETR (the names are the same), HuggingFace's."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from conddetr.engine.checkpoint import read_checkpoint
from conddetr.interop.huggingface import from_huggingface, is_huggingface


@dataclass
class LoadReport:
    """What `load_weights` did. Every list holds parameter or buffer names."""

    loaded: int = 0
    """Number of tensors taken over."""
    missing: list[str] = field(default_factory=list)
    """In the model, not in the weights."""
    unexpected: list[str] = field(default_factory=list)
    """In the weights, not in the model."""
    mismatched: list[str] = field(default_factory=list)
    """In both, with different shapes: `name: expected shape, got shape`."""
    ignored: list[str] = field(default_factory=list)
    """Known to be without use here: batch counters of batch norm."""

    @property
    def complete(self) -> bool:
        """Everything in the model came from the weights, and nothing was left over."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{self.loaded} tensors loaded"]
        for title in ("missing", "unexpected", "mismatched"):
            names = getattr(self, title)
            if names:
                shown = "\n    ".join(names[:8]) + ("\n    …" if len(names) > 8 else "")
                lines.append(f"  {len(names)} {title}:\n    {shown}")
        return "\n".join(lines)


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Tensor], strict: bool = True) -> LoadReport:
    """Load weights into a model, in place.

    Args:
        model: from `build`.
        source: a checkpoint file (ours or official), or a state dict (bare or under the key `model`), also of
            transformers' `ConditionalDetrForObjectDetection` with timm's ResNet.
        strict: raise unless everything fits. False: take what fits; the report says what did not.

    Returns:
        The report.

    Raises:
        ValueError: strict and something did not fit (the model is unchanged), or the file is no checkpoint.
        FileNotFoundError: no such file.
    """
    if isinstance(source, (str, Path)):
        source = read_checkpoint(source)
    state = extract_state_dict(source)
    if is_huggingface(state):
        state = from_huggingface(state)
    own = model.state_dict()
    report = LoadReport()
    accepted = {}
    for name, value in state.items():
        if name.endswith("num_batches_tracked") and name not in own:
            report.ignored.append(name)
        elif name not in own:
            report.unexpected.append(name)
        elif own[name].shape != value.shape:
            report.mismatched.append(f"{name}: expected {tuple(own[name].shape)}, got {tuple(value.shape)}")
        else:
            accepted[name] = value
    report.missing = [name for name in own if name not in state]
    report.loaded = len(accepted)
    if strict and not report.complete:
        raise ValueError(
            f"The weights do not fit the model. They look like: {describe(state)}; "
            f"the model is: {describe(own)}.\n{report}"
        )
    model.load_state_dict(accepted, strict=False)
    return report


def start_from(model: nn.Module, classes: list[dict[str, Any]], source: str | Path | Mapping[str, Any]) -> LoadReport:
    """Load everything but the class head where the weights were trained on another class list.

    Args:
        model: from `build`; its class head stays as it is if it is not loaded.
        classes: `id` and `name` of every label of the model.
        source: as `load_weights`. Where it holds a moving average, that is taken. A file without a class list fits
            if the number of classes does.

    Returns:
        The report; the class head is in `mismatched` if it was left out.

    Raises:
        ValueError: something besides the class head does not fit (the model is unchanged).
        FileNotFoundError: no such file.
    """
    content = read_checkpoint(source) if isinstance(source, (str, Path)) else source
    state = extract_state_dict(content)
    head = {name: value for name, value in model.state_dict().items() if name.startswith("class_embed.")}
    same_shape = all(name in state and state[name].shape == value.shape for name, value in head.items())
    if same_shape and content.get("classes", classes) == classes:
        return load_weights(model, state)
    report = load_weights(model, {**state, **head})
    report.loaded -= len(head)
    for name, value in head.items():
        found = tuple(state[name].shape) if name in state else "nothing"
        report.mismatched.append(f"{name}: expected {tuple(value.shape)} of other classes, got {found}; starts anew")
    return report


def extract_state_dict(source: Mapping) -> dict[str, Tensor]:
    """The tensors of a checkpoint, of the moving average where there is one, without the prefix that
    DistributedDataParallel adds.
    """
    state = source.get("ema") or source.get("model") or source
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("Expected a state dict (name → tensor) or a checkpoint with one under the key 'model'.")
    return {name.removeprefix("module."): value for name, value in state.items()}


def identify(state: Mapping[str, Tensor]) -> dict[str, int | str]:
    """The model options that a state dict determines; empty if it is none of ours. Dilation leaves no trace."""
    if "class_embed.weight" not in state or "query_embed.weight" not in state:
        return {}
    family = "detr"
    if "transformer.decoder.layers.0.ca_qcontent_proj.weight" in state:
        family = "conditional-detr"
    if "backbone.0.stages.0.0.weight" in state:
        backbone = "tiny"
    else:
        backbone = "resnet101" if "backbone.0.body.layer3.6.conv1.weight" in state else "resnet50"
    queries, dim = state["query_embed.weight"].shape
    return {
        "family": family,
        "backbone": backbone,
        "num_classes": state["class_embed.weight"].shape[0] - (family == "detr"),
        "num_queries": queries,
        "hidden_dim": dim,
    }


def describe(state: Mapping[str, Tensor]) -> str:
    """One line that says which model a state dict belongs to."""
    found = identify(state)
    if not found:
        return "no DETR or Conditional DETR that is known here"
    return ", ".join(f"{name} {value}" for name, value in found.items())
