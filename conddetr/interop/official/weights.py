"""Names and arguments in the official checkpoints of Conditional DETR and DETR; our names are the same."""

import argparse
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from conddetr.model.families import FAMILIES

_RESNETS = {(False, 2): "resnet18", (False, 6): "resnet34", (True, 6): "resnet50", (True, 23): "resnet101"}
"""Whether its blocks have three convolutions, and number of blocks in the third stage → name of a ResNet."""


def identify(state: Mapping[str, Tensor]) -> dict[str, int | str]:
    """The model options that a state dict determines; empty if it fits none of our models. Dilation and the number of
    heads leave no trace in it.
    """
    decoder = "transformer.decoder.layers.0."
    family = next((name for name, family in FAMILIES.items() if decoder + family.known_by in state), None)
    if family is None or "query_embed.weight" not in state:
        return {}
    queries, dim = state["query_embed.weight"].shape
    options = {"family": family, "backbone": _backbone(state)}
    if "class_embed.weight" in state:
        options["num_classes"] = state["class_embed.weight"].shape[0] - FAMILIES[family].no_object_logits
    options |= {"num_queries": queries, "hidden_dim": dim}
    options |= {f"{part}_layers": _layers(state, part) for part in ("encoder", "decoder")}
    if decoder + "linear1.weight" in state:
        options["ffn_dim"] = state[decoder + "linear1.weight"].shape[0]
    return options


def _backbone(state: Mapping[str, Tensor]) -> str:
    if "backbone.0.stages.0.0.weight" in state:
        return "tiny"
    if "backbone.0.body.layer1.0.conv2.weight" not in state:
        return "another one"
    blocks = sum(re.fullmatch(r"backbone\.0\.body\.layer3\.\d+\.conv1\.weight", name) is not None for name in state)
    has_bottlenecks = "backbone.0.body.layer1.0.conv3.weight" in state
    return _RESNETS.get((has_bottlenecks, blocks), "another ResNet")


def _layers(state: Mapping[str, Tensor], part: str) -> int:
    return len({name.split(".")[3] for name in state if name.startswith(f"transformer.{part}.layers.")})


def describe(state: Mapping[str, Tensor]) -> str:
    """One line that says which model a state dict belongs to."""
    options = identify(state)
    if not options:
        return f"no supported DETR or Conditional DETR, with names such as {next(iter(state), 'none')!r}"
    return ", ".join(f"{name} {value}" for name, value in options.items())


def model_options(content: Mapping) -> dict[str, Any]:
    """The model options that the arguments in an official checkpoint state, but its weights do not."""
    arguments = content.get("args")
    values = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    if not isinstance(values, Mapping):
        return {}
    names = {"dilation": ("dilation", bool), "num_heads": ("nheads", int), "dropout": ("dropout", float)}
    return {name: convert(values[argument]) for name, (argument, convert) in names.items() if argument in values}
