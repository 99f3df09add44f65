"""Names in state dicts of transformers' `ConditionalDetrForObjectDetection`, and our names for them."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_ENCODER = ("transformer.encoder.layers.{}.", "model.encoder.layers.{}.", "model.encoder.layers.{}.")
_DECODER = ("transformer.decoder.layers.{}.", "model.decoder.layers.{}.", "model.decoder.layers.{}.")
_PROJECTIONS = {"qcontent": "q_content", "qpos": "q_pos", "kcontent": "k_content", "kpos": "k_pos", "v": "v"}


def _in(layer: tuple[str, str, str], ours: str, five: str, four: str) -> tuple[str, str, str]:
    return layer[0] + ours, layer[1] + five, layer[2] + four


_RESNET = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
_FEED_FORWARD = (("linear1.", "mlp.fc1.", "fc1."), ("linear2.", "mlp.fc2.", "fc2."))
_NAMES = (
    # Prefixes: official and ours; transformers 5.17; transformers 4.57. {} is a layer's number.
    *(
        (f"backbone.0.body.{x}.", f"model.backbone.model.{x}.", f"model.backbone.conv_encoder.model.{x}.")
        for x in _RESNET
    ),
    ("input_proj.", "model.input_projection.", "model.input_projection."),
    ("query_embed.", "model.query_position_embeddings.", "model.query_position_embeddings."),
    ("class_embed.", "class_labels_classifier.", "class_labels_classifier."),
    ("bbox_embed.", "bbox_predictor.", "bbox_predictor."),
    ("transformer.decoder.norm.", "model.decoder.layernorm.", "model.decoder.layernorm."),
    ("transformer.decoder.query_scale.", "model.decoder.query_scale.", "model.decoder.query_scale."),
    ("transformer.decoder.ref_point_head.", "model.decoder.ref_point_head.", "model.decoder.ref_point_head."),
    *(_in(_ENCODER, f"self_attn.in_proj.{x}.", f"self_attn.{x}_proj.", f"self_attn.{x}_proj.") for x in "qkv"),
    _in(_ENCODER, "self_attn.out_proj.", "self_attn.o_proj.", "self_attn.out_proj."),
    _in(_ENCODER, "norm1.", "self_attn_layer_norm.", "self_attn_layer_norm."),
    _in(_ENCODER, "norm2.", "final_layer_norm.", "final_layer_norm."),
    *(_in(_ENCODER, *names) for names in _FEED_FORWARD),
    *(_in(_DECODER, f"sa_{x}_proj.", f"self_attn.{y}_proj.", f"sa_{x}_proj.") for x, y in _PROJECTIONS.items()),
    *(_in(_DECODER, f"ca_{x}_proj.", f"encoder_attn.{y}_proj.", f"ca_{x}_proj.") for x, y in _PROJECTIONS.items()),
    _in(_DECODER, "ca_qpos_sine_proj.", "encoder_attn.q_pos_sine_proj.", "ca_qpos_sine_proj."),
    _in(_DECODER, "self_attn.out_proj.", "self_attn.o_proj.", "self_attn.out_proj."),
    _in(_DECODER, "cross_attn.out_proj.", "encoder_attn.o_proj.", "encoder_attn.out_proj."),
    _in(_DECODER, "norm1.", "self_attn_layer_norm.", "self_attn_layer_norm."),
    _in(_DECODER, "norm2.", "encoder_attn_layer_norm.", "encoder_attn_layer_norm."),
    _in(_DECODER, "norm3.", "final_layer_norm.", "final_layer_norm."),
    *(_in(_DECODER, *names) for names in _FEED_FORWARD),
)
_OURS, _FIVE, _FOUR = range(3)
_COLUMNS = {"5": _FIVE, "4": _FOUR}


def to_huggingface(state: Mapping[str, Tensor], names: str = "5") -> dict[str, Tensor]:
    """A state dict of a conditional-detr preset under the names of transformers.

    Args:
        state: ours, which has the official names; of a preset with a ResNet.
        names: `5` for those of transformers 5.17, `4` for those of 4.57, 5.0 and the files on HuggingFace's hub.

    Returns:
        The same tensors; packed query, key and value projections are split in three.

    Raises:
        ValueError: a name does not belong to such a model; names it.
    """
    if names not in _COLUMNS:
        raise ValueError(f"names: expected '5' or '4', got {names!r}.")
    unpacked = {}
    for name, value in state.items():
        packed = re.fullmatch(r"(transformer\.encoder\..*\.in_proj)_(weight|bias)", name)
        if packed is None:
            unpacked[name] = value
            continue
        for part, third in zip("qkv", value.chunk(3), strict=True):
            unpacked[f"{packed[1]}.{part}.{packed[2]}"] = third
    return _rename(unpacked, (_OURS,), _COLUMNS[names])


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers' `ConditionalDetrForObjectDetection` under the official names, which are ours.

    Args:
        state: of any version (`save_pretrained` of 5 writes names of 4 too), with timm's ResNet as backbone, as in the
            files on HuggingFace's hub.

    Returns:
        The same tensors; query, key and value projections of the encoder are packed into one.

    Raises:
        ValueError: a name does not belong to such a model; names it.
    """
    converted = {}
    for name, value in _rename(state, (_FIVE, _FOUR), _OURS).items():
        part = re.fullmatch(r"(.*\.in_proj)\.([qkv])\.(weight|bias)", name)
        if part is None:
            converted[name] = value
        else:
            converted.setdefault(f"{part[1]}_{part[3]}", {})[part[2]] = value
    return {
        name: torch.cat([value[x] for x in "qkv"]) if isinstance(value, dict) else value
        for name, value in converted.items()
    }


def is_huggingface(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are transformers'."""
    return "class_labels_classifier.weight" in state or "model.query_position_embeddings.weight" in state


def _rename(state: Mapping[str, Tensor], sources: tuple[int, ...], target: int) -> dict[str, Tensor]:
    """Rename from any of the columns `sources` of `_NAMES` to the column `target`."""
    renamed = {}
    for name, value in state.items():
        number = re.search(r"(?<=layers\.)\d+", name)
        template = name if number is None else name[: number.start()] + "{}" + name[number.end() :]
        prefixes = ((row[source], row[target]) for row in _NAMES for source in sources)
        match = next((pair for pair in prefixes if template.startswith(pair[0])), None)
        if match is None:
            raise ValueError(
                f"{name} is not a name of a Conditional DETR for detection"
                f"{' with a ResNet' if target else ' with a ResNet of timm'}: this state dict belongs to another model."
            )
        template = match[1] + template[len(match[0]) :]
        renamed[template if number is None else template.replace("{}", number[0])] = value
    return renamed
