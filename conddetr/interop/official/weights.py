"""Names and arguments in the official repositories' checkpoints, of Conditional DETR and DETR; the names are ours."""

import argparse
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from conddetr.model.families import FAMILIES


def identify(state: Mapping[str, Tensor]) -> dict[str, int | str]:
    """The model options that a state dict determines; empty if it is none of ours. Dilation leaves no trace, nor does
    the number of heads.
    """
    decoder = "transformer.decoder.layers.0."
    family = next((name for name, family in FAMILIES.items() if decoder + family.known_by in state), None)
    if family is None or "query_embed.weight" not in state:
        return {}
    queries, dim = state["query_embed.weight"].shape
    found = {"family": family, "backbone": _backbone(state)}
    if "class_embed.weight" in state:
        found["num_classes"] = state["class_embed.weight"].shape[0] - FAMILIES[family].no_object_logits
    found |= {"num_queries": queries, "hidden_dim": dim}
    found |= {f"{part}_layers": _layers(state, part) for part in ("encoder", "decoder")}
    if decoder + "linear1.weight" in state:
        found["ffn_dim"] = state[decoder + "linear1.weight"].shape[0]
    return found


def _backbone(state: Mapping[str, Tensor]) -> str:
    if "backbone.0.stages.0.0.weight" in state:
        return "tiny"
    if "backbone.0.body.layer1.0.conv3.weight" not in state:
        return "a ResNet without bottlenecks, or none"
    return "resnet101" if "backbone.0.body.layer3.6.conv1.weight" in state else "resnet50"


def _layers(state: Mapping[str, Tensor], part: str) -> int:
    return len({name.split(".")[3] for name in state if name.startswith(f"transformer.{part}.layers.")})


def describe(state: Mapping[str, Tensor]) -> str:
    """One line that says which model a state dict belongs to."""
    found = identify(state)
    if not found:
        return f"no DETR or Conditional DETR that is known here, with names as {next(iter(state), 'none')!r}"
    return ", ".join(f"{name} {value}" for name, value in found.items())


def model_options(content: Mapping) -> dict[str, Any]:
    """What the arguments in an official checkpoint say of the model and its weights do not."""
    arguments = content.get("args")
    given = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    if not isinstance(given, Mapping):
        return {}
    names = {"dilation": ("dilation", bool), "num_heads": ("nheads", int), "dropout": ("dropout", float)}
    return {name: kind(given[theirs]) for name, (theirs, kind) in names.items() if theirs in given}
