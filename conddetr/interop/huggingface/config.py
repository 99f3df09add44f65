"""Our options from configurations of transformers' Conditional DETR and of its image processor."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

MODEL_TYPE = "conditional_detr"
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
"""ResNets that timm and torchvision share."""


def model_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig` that a configuration of transformers' Conditional DETR sets, except its loss.

    Args:
        config: as in `config.json`; absent fields have transformers' defaults.

    Raises:
        ValueError: another architecture, backbone, activation or position encoding, or encoder and decoder differ in
            heads or width; says which.
    """
    _check_architecture(config)
    for name, default in (("attention_heads", 8), ("ffn_dim", 2048)):
        encoder, decoder = config.get(f"encoder_{name}", default), config.get(f"decoder_{name}", default)
        if encoder != decoder:
            raise ValueError(f"encoder_{name} {encoder} and decoder_{name} {decoder}: expected equal values.")
    for name, expected in (("activation_function", "relu"), ("position_embedding_type", "sine")):
        if config.get(name, expected) != expected:
            raise ValueError(f"{name}: expected {expected}, got {config[name]}.")
    # From transformers 5 on, the backbone has its own configuration.
    inner = config.get("backbone_config") or {}
    backbone = inner.get("backbone") if inner else config.get("backbone", "resnet50")
    if backbone not in RESNETS:
        raise ValueError(
            f"backbone: expected {', '.join(RESNETS)} of timm, got {backbone or inner.get('model_type', 'another')}."
        )
    stride = inner.get("output_stride") or (config.get("backbone_kwargs") or {}).get("output_stride") or 32
    if stride not in (16, 32):
        raise ValueError(f"output_stride of the backbone: expected 32 or 16, got {stride}.")
    return {
        "backbone": backbone,
        "dilation": bool(config.get("dilation", False)) or stride == 16,
        "hidden_dim": config.get("d_model", 256),
        "num_heads": config.get("encoder_attention_heads", 8),
        "encoder_layers": config.get("encoder_layers", 6),
        "decoder_layers": config.get("decoder_layers", 6),
        "ffn_dim": config.get("encoder_ffn_dim", 2048),
        "dropout": float(config.get("dropout", 0.1)),
        "num_queries": config.get("num_queries", 300),
    }


def _check_architecture(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type", MODEL_TYPE)
    architecture = ", ".join(config.get("architectures") or ()) or model_type
    if model_type != MODEL_TYPE:
        raise ValueError(
            f"{architecture} (model_type {model_type}) is another architecture: expected transformers' "
            "ConditionalDetrForObjectDetection."
        )
    if architecture == "ConditionalDetrModel":
        raise ValueError(f"{architecture} has no heads: expected transformers' ConditionalDetrForObjectDetection.")


def class_list(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`id` and `name` of every label, from a configuration of transformers; the id is the label.

    Raises:
        ValueError: the labels of `id2label` are not 0, 1, 2, ….
    """
    # transformers does not write its default, two labels with these names.
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    labels = sorted(int(label) for label in names)
    if labels != list(range(len(names))):
        raise ValueError(f"id2label: expected the labels 0 to {len(names) - 1}, got {labels[:8]}.")
    return [{"id": int(label), "name": str(names[label])} for label in sorted(names, key=int)]


def image_size(config: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Fields of `ModelConfig` from the configuration of an image processor; warns if our preprocessing differs.

    Args:
        config: as in `preprocessor_config.json`.
        path: the path of that file, for warnings.
    """
    for name, ours in (("image_mean", [0.485, 0.456, 0.406]), ("image_std", [0.229, 0.224, 0.225])):
        if config.get(name, ours) != ours:
            log.warning("%s: %s is %s; images are normalised with %s here.", path, name, config[name], ours)
    size = config.get("size", {})
    if isinstance(size, int):
        size = {"shortest_edge": size, "longest_edge": config.get("max_size", 1333)}
    if not size or size.keys() == {"shortest_edge", "longest_edge"}:
        names = {"shortest_edge": "image_size", "longest_edge": "max_image_size"}
        return {names[name]: value for name, value in size.items()}
    log.warning("%s: size is %s; images are resized by their shorter side here, see `image_size`.", path, size)
    return {}
