"""The table of families: the facts that configuration, checkpoints and messages need, without PyTorch.

A family is an entry here, an entry in `table.py` with its parts, and a folder beside them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

FamilyName = Literal["conditional-detr", "detr"]


@dataclass(frozen=True)
class Family:
    """A family of detectors."""

    title: str
    """Name in the paper."""
    paper: str
    """Address of the paper."""
    activation: Literal["sigmoid", "softmax"]
    """Function from logits to scores."""
    no_object_logits: int
    """Extra logits after those of the classes: 1 for a no-object class, else 0."""
    own_options: tuple[str, ...]
    """Fields of `ModelConfig` that the other families do not have."""
    preset_options: Mapping[str, Any]
    """Fields of `ModelConfig` in which its presets differ from the defaults."""
    known_by: str
    """Name, within a decoder layer, of a tensor that every layer of this family has and no other family does."""


FAMILIES: dict[str, Family] = {
    "conditional-detr": Family(
        title="Conditional DETR",
        paper="https://arxiv.org/abs/2108.06152",
        activation="sigmoid",
        no_object_logits=0,
        own_options=("csq", "reference_points"),
        preset_options={},
        known_by="ca_qcontent_proj.weight",
    ),
    "detr": Family(
        title="DETR",
        paper="https://arxiv.org/abs/2005.12872",
        activation="softmax",
        no_object_logits=1,
        own_options=("cross_attention_positions",),
        preset_options={"num_queries": 100, "class_weight": 1.0, "class_cost": 1.0},
        known_by="multihead_attn.in_proj_weight",
    ),
}
