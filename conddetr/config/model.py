"""Model configuration and the table of presets.

A preset is a `ModelConfig`; overrides are checked against its fields, so a typo never passes silently.
"""

import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from conddetr.config.build import BUILD_OPTIONS
from conddetr.config.checks import check_values, nearest
from conddetr.model.families import FAMILIES, FamilyName

Backbone = Literal["resnet18", "resnet34", "resnet50", "resnet101", "tiny"]
"""Our backbones. Any other one is timm's and has the prefix `TIMM`."""
TIMM = "timm:"


@dataclass(frozen=True)
class ModelConfig:
    """Everything that defines a detector and its criterion. Every field is an override of `build`, which also has its
    own options (`conddetr.config.build`).

    Sources: Conditional DETR (Meng et al., ICCV 2021, "CD" below) and DETR (Carion et al., ECCV 2020).
    """

    family: FamilyName = "conditional-detr"
    """`conditional-detr` (sigmoid logits, focal loss) or `detr` (softmax logits with a no-object class)."""
    num_classes: int = 91
    """Number of object classes. Logits: `num_classes`, plus one for no-object in the `detr` family."""

    backbone: str = "resnet50"
    """`resnet18`, `resnet34`, `resnet50` or `resnet101` (torchvision), `tiny` (stride 16), or the last feature map of a
    model of timm, by its name: `timm:convnext_tiny`."""
    backbone_norm: Literal["auto", "frozen", "train"] = "auto"
    """Batch norms of the backbone. `frozen`: their statistics and weights stay those of pretraining, as in DETR;
    `train`: they train in each stage that trains. `auto`: `train` for `tiny`, else `frozen`. Layer and group norms have
    no statistics and train with the other weights."""
    dilation: bool = False
    """DC5: the last stage of a ResNet-50 or ResNet-101 keeps stride 16 and dilates its convolutions."""
    train_backbone: bool = True
    """False freezes the whole backbone, also its statistics and dropout. The stem and the first stage of a torchvision
    ResNet are always frozen; a model of timm trains as a whole."""

    hidden_dim: int = 256
    """Width of the transformer; a multiple of `num_heads` and of 4."""
    num_heads: int = 8
    """Heads of every attention."""
    encoder_layers: int = 6
    """Layers of the transformer's encoder; 0: none."""
    decoder_layers: int = 6
    """Layers of the transformer's decoder."""
    ffn_dim: int = 2048
    """Hidden width of the feed-forward networks."""
    dropout: float = 0.1
    """Dropout of attention weights, inside the feed-forward networks and on residual branches."""
    num_queries: int = 300
    """Object queries: the largest number of objects that can be detected in an image."""

    csq: Literal["full", "C", "T", "P", "I"] = "full"
    """Conditional spatial query, CD section 4.3: `full` (λ from the decoder embedding f, times p_s),
    `C` (f alone), `T` (λ alone), `P` (p_s alone), `I` (λ from the self-attention output c_q, times p_s)."""
    reference_points: Literal["generated", "learned", "zero"] = "generated"
    """CD section 3.3: `generated` from the object query, `learned` per query, or `zero`."""
    cross_attention_positions: Literal["all-layers", "first-layer"] = "all-layers"
    """`detr` only. `first-layer` drops the positional embeddings of cross-attention's keys and queries
    from the second decoder layer on (CD section 1)."""
    aux_loss: bool = True
    """Predict and supervise after every decoder layer, not only after the last."""

    class_weight: float = 2.0
    """Weight of the classification loss in the total."""
    bbox_weight: float = 5.0
    """Weight of the L1 box loss in the total."""
    giou_weight: float = 2.0
    """Weight of the GIoU loss in the total."""
    class_cost: float = 2.0
    """Weight of classification in the matching cost."""
    bbox_cost: float = 5.0
    """Weight of the L1 box distance in the matching cost."""
    giou_cost: float = 2.0
    """Weight of GIoU in the matching cost."""
    focal_alpha: float = 0.25
    """Weight α of positives in the focal loss; negatives weigh 1 - α."""
    focal_gamma: float = 2.0
    """Exponent γ of the focal loss."""
    no_object_weight: float = 0.1
    """`detr` only: weight of the no-object class in the cross-entropy."""

    image_size: int = 800
    """Short side, in pixels, to which images are resized for evaluation; training scales are relative to it."""
    max_image_size: int = 1333
    """Upper bound of the long side, in pixels."""

    @property
    def freezes_norms(self) -> bool:
        """Whether the backbone's batch norms are frozen."""
        return self.backbone_norm == "frozen" or (self.backbone_norm == "auto" and self.backbone != "tiny")

    @property
    def num_logits(self) -> int:
        """Width of the classification head."""
        return self.num_classes + FAMILIES[self.family].no_object_logits

    @property
    def activation(self) -> str:
        """Function that turns logits into scores: `sigmoid` or `softmax`."""
        return FAMILIES[self.family].activation

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of all fields, as stored in checkpoints."""
        return asdict(self)


_TINY: dict[str, Any] = {
    "backbone": "tiny",
    "hidden_dim": 64,
    "num_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "ffn_dim": 256,
    "dropout": 0.0,
    "num_queries": 25,
    "image_size": 128,
    "max_image_size": 213,
}
_SIZES: tuple[dict[str, Any], ...] = (
    {"backbone": "resnet18"},
    {"backbone": "resnet34"},
    {"backbone": "resnet50"},
    {"backbone": "resnet50", "dilation": True},
    {"backbone": "resnet101"},
    {"backbone": "resnet101", "dilation": True},
    _TINY,
)


def preset_name(family: str, backbone: str, dilation: bool) -> str:
    """The preset of these `ModelConfig` fields, as `resolve` accepts it, e.g. `conditional-detr-timm:convnext_tiny`."""
    size = re.sub("^resnet", "r", backbone)
    return f"{family}-{'dc5-' if dilation else ''}{size}"


PRESETS: dict[str, ModelConfig] = {
    preset_name(family, size["backbone"], size.get("dilation", False)): ModelConfig(
        **{"family": family, **FAMILIES[family].preset_options, **size}
    )
    for family in FAMILIES
    for size in _SIZES
}
"""Each family in each size: `conditional-detr-r18`, `-r34`, `-r50`, `-dc5-r50`, `-r101`, `-dc5-r101` and `-tiny`, and
so on."""


def resolve(preset: str, **overrides: Any) -> ModelConfig:
    """The preset's configuration with `overrides` applied and checked.

    Args:
        preset: a name in `PRESETS`; or a family with a backbone of timm, `conditional-detr-timm:convnext_tiny`.
        overrides: fields of `ModelConfig`.

    Raises:
        ValueError: unknown preset, unknown override (with the nearest name), or a value out of range.
    """
    config = _preset(preset)
    for name in BUILD_OPTIONS:
        if name in overrides:
            raise ValueError(
                f"{name} is an option of conddetr.build and conddetr.DETR, not of the model configuration."
            )
    return from_dict({**config.to_dict(), **overrides})


def _preset(name: str) -> ModelConfig:
    if name in PRESETS:
        return PRESETS[name]
    for family in FAMILIES:
        if name.startswith(f"{family}-{TIMM}"):
            return replace(PRESETS[f"{family}-r50"], backbone=name.removeprefix(f"{family}-"))
    raise ValueError(f"Unknown preset {name!r}.{nearest(name, list(PRESETS))}")


def from_dict(values: dict[str, Any]) -> ModelConfig:
    """A checked `ModelConfig` from a dict. Absent fields keep their defaults; `BUILD_OPTIONS`, which were formerly
    fields, are left out.

    Raises:
        ValueError: unknown field (with the nearest name), or a value out of range.
    """
    known = [*(field.name for field in fields(ModelConfig)), *BUILD_OPTIONS]
    for key in values:
        if key not in known:
            raise ValueError(f"Unknown model option {key!r}.{nearest(key, known)}")
    config = ModelConfig(**{name: value for name, value in values.items() if name not in BUILD_OPTIONS})
    check_values(config, "Model option")
    _check_combinations(config)
    _check_backbone(config)
    _check_ranges(config)
    return config


def _check_combinations(config: ModelConfig) -> None:
    default = ModelConfig()
    for name, family in FAMILIES.items():
        options = family.own_options
        if name != config.family and any(getattr(config, option) != getattr(default, option) for option in options):
            are = "are options" if len(options) > 1 else "is an option"
            raise ValueError(f"{' and '.join(options)} {are} of the {name} family, not of {config.family}.")


def _check_backbone(config: ModelConfig) -> None:
    """Check the options of the backbone. Whether timm has a model of this name is checked when it is built."""
    known = list(get_args(Backbone))
    if config.backbone not in known and not re.fullmatch(rf"{TIMM}\w+(\.\w+)?", config.backbone):
        hint = nearest(config.backbone, [*known, f"{TIMM}NAME"])
        raise ValueError(f"Model option backbone: unknown value {config.backbone!r}.{hint}")
    if config.dilation and config.backbone not in ("resnet50", "resnet101"):
        raise ValueError(
            "Model option dilation: expected backbone resnet50 or resnet101, the only ones that can be dilated, got "
            f"{config.backbone}."
        )
    if config.backbone == "tiny" and config.freezes_norms:
        raise ValueError(
            "Model option backbone_norm: `frozen` needs pretrained statistics, which the backbone 'tiny' does not have."
        )
    if config.backbone_norm == "train" and not config.train_backbone:
        raise ValueError(
            "Model option backbone_norm: `train` contradicts train_backbone False, which freezes all norms."
        )


def _check_ranges(config: ModelConfig) -> None:
    for name in (
        "num_classes",
        "hidden_dim",
        "num_heads",
        "decoder_layers",
        "ffn_dim",
        "num_queries",
        "image_size",
    ):
        if getattr(config, name) < 1:
            raise ValueError(f"Model option {name}: expected at least 1, got {getattr(config, name)}.")
    if config.encoder_layers < 0:
        raise ValueError(f"Model option encoder_layers: expected at least 0, got {config.encoder_layers}.")
    if config.hidden_dim % config.num_heads or config.hidden_dim % 4:
        raise ValueError(
            f"Model option hidden_dim: expected a multiple of num_heads ({config.num_heads}) and of 4, "
            f"got {config.hidden_dim}."
        )
    if not 0.0 <= config.dropout < 1.0:
        raise ValueError(f"Model option dropout: expected a value in [0, 1), got {config.dropout}.")
    if config.max_image_size < config.image_size:
        raise ValueError(
            f"Model option max_image_size: expected at least image_size ({config.image_size}), "
            f"got {config.max_image_size}."
        )
