"""Weights, inputs and stored numbers of the golden cases, rebuilt by the rule of `golden/RULE.md`."""

import copy
import json
import re
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import conddetr
from conddetr.model.detr import DETR

GOLDEN = Path(__file__).parent / "golden"

CASES = {
    "p1": "conditional-detr-r50",
    "p2": "conditional-detr-dc5-r50",
    "p3": "detr-r50",
    "p6": "conditional-detr-r50",
}
"""The cases of a whole model → their presets."""


@cache
def read_json(name: str) -> dict:
    """Read one JSON file of the golden set."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


@cache
def read_arrays(name: str) -> dict[str, Tensor]:
    """Read all arrays of one case, as tensors."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def rule_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Section 1: the float32 value of one entry of the official state dict."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if re.search(r"layer\d+\.\d+\.bn3\.weight$", name):
        return 0.1 + 0.1 * torch.rand(shape, generator=generator)
    if name.endswith("running_var") or re.search(r"\.bn\d+\.weight$|downsample\.1\.weight$", name):
        return 0.5 + torch.rand(shape, generator=generator)
    if name == "class_embed.bias":
        return -4.59512 + 0.02 * torch.randn(shape, generator=generator)
    if name.endswith(("bias", "running_mean")):
        return 0.02 * torch.randn(shape, generator=generator)
    if re.search(r"norm\d*\.weight$", name):
        return 0.9 + 0.2 * torch.rand(shape, generator=generator)
    weight = torch.randn(shape, generator=generator)
    return weight if name == "query_embed.weight" else _scaled_matrix(name, weight)


def _scaled_matrix(name: str, weight: Tensor) -> Tensor:
    fan_in = weight.numel() // weight.shape[0]
    if weight.dim() == 4:
        weight = weight - weight.double().mean((1, 2, 3), keepdim=True).float()
    weight = weight * (1.0 / fan_in**0.5)
    if name == "input_proj.weight":
        return weight * 4.0
    if name.endswith("in_proj_weight"):
        weight[: 2 * weight.shape[1]] *= 2.0 if name.startswith("transformer.encoder.") else 2.5
        return weight
    if re.search(r"\.[sc]a_[qk][a-z_]*_proj\.weight$", name):
        return weight * 2.5
    if re.search(r"^transformer\..*\.(out_proj|linear2)\.weight$", name):
        return weight * 0.4
    return weight


def rule_model(preset: str, dtype: torch.dtype = torch.float32, backend: str = "eager") -> DETR:
    """A model with the rule's weights, without dropout, in eval mode."""
    # Copying 40 million numbers is faster than sampling them again.
    model = copy.deepcopy(_rule_model(preset)).to(dtype)
    model.set_backend(backend)
    return model


@cache
def _rule_model(preset: str) -> DETR:
    model = conddetr.build(preset, dropout=0.0).eval()
    state = {name: rule_weight(name, tuple(value.shape)) for name, value in model.state_dict().items()}
    conddetr.load_weights(model, state)
    return model


def rule_inputs(case: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[dict]]:
    """Section 2: images and targets of a case."""
    info = read_json(case)
    generator = torch.Generator().manual_seed(info["seed"])
    images = [torch.randn(3, h, w, generator=generator).to(dtype) for h, w in info["image_sizes_hw"]]
    targets = []
    for count in info["num_boxes"]:
        center = torch.rand(count, 2, generator=generator) * 0.6 + 0.2
        size = torch.rand(count, 2, generator=generator) * 0.3 + 0.05
        labels = torch.randint(1, 91, (count,), generator=generator)
        targets.append({"labels": labels, "boxes": torch.cat([center, size], 1).to(dtype)})
    return images, targets
