"""The table of families: what is known of each without PyTorch, for configuration, checkpoints and messages.

A family is an entry here and one in `table.py`, where its parts stand, and a folder of its own beside them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

FamilyName = Literal["conditional-detr", "detr"]


@dataclass(frozen=True)
class Family:
    """A kind of detector."""

    title: str
    """As its paper names it."""
    paper: str
    """Address."""
    activation: Literal["sigmoid", "softmax"]
    """How scores come from logits."""
    no_object_logits: int
    """Logits beside those of the classes, at the end: 1 for a no-object class, else 0."""
    own_options: tuple[str, ...]
    """Fields of `ModelConfig` that the other families do not have."""
    of_presets: Mapping[str, Any]
    """Fields of `ModelConfig` in which its presets differ from the defaults."""
    known_by: str
    """A tensor of each decoder layer that no other family has, by its name in the layer."""


FAMILIES: dict[str, Family] = {
    "conditional-detr": Family(
        title="Conditional DETR",
        paper="https://arxiv.org/abs/2108.06152",
        activation="sigmoid",
        no_object_logits=0,
        own_options=("csq", "reference_points"),
        of_presets={},
        known_by="ca_qcontent_proj.weight",
    ),
    "detr": Family(
        title="DETR",
        paper="https://arxiv.org/abs/2005.12872",
        activation="softmax",
        no_object_logits=1,
        own_options=("cross_attention_positions",),
        of_presets={"num_queries": 100, "class_weight": 1.0, "class_cost": 1.0},
        known_by="multihead_attn.in_proj_weight",
    ),
}
