"""Names of the HuggingFace implementation (transformers 5: `ConditionalDetrForObjectDetection`, timm backbone)."""

import re
from collections.abc import Mapping

from torch import Tensor

_OUTER = (
    (r"^backbone\.0\.body\.", "model.backbone.model."),
    (r"^input_proj\.", "model.input_projection."),
    (r"^query_embed\.", "model.query_position_embeddings."),
    (r"^class_embed\.", "class_labels_classifier."),
    (r"^bbox_embed\.", "bbox_predictor."),
    (r"^transformer\.decoder\.norm\.", "model.decoder.layernorm."),
    (r"^transformer\.", "model."),
)
_LAYER = (
    (r"(encoder\.layers\.\d+)\.norm2\.", r"\1.final_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.encoder_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm3\.", r"\1.final_layer_norm."),
    (r"(layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"\.linear([12])\.", r".mlp.fc\1."),
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
    (r"\.cross_attn\.out_proj\.", ".encoder_attn.o_proj."),
    (r"\.sa_(q|k)(content|pos)_proj\.", r".self_attn.\1_\2_proj."),
    (r"\.sa_v_proj\.", ".self_attn.v_proj."),
    (r"\.ca_(q|k)(content|pos)_proj\.", r".encoder_attn.\1_\2_proj."),
    (r"\.ca_v_proj\.", ".encoder_attn.v_proj."),
    (r"\.ca_qpos_sine_proj\.", ".encoder_attn.q_pos_sine_proj."),
)


def to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of a conditional-detr preset under the names of transformers.

    Args:
        state: ours, which has the official names.

    Returns:
        The same tensors; packed query, key and value projections are split in three.
    """
    converted = {}
    for name, value in state.items():
        new_name = name
        for pattern, replacement in (*_OUTER, *_LAYER):
            new_name = re.sub(pattern, replacement, new_name)
        packed = re.fullmatch(r"(.*)\.in_proj_(weight|bias)", new_name)
        if packed is None:
            converted[new_name] = value
            continue
        for part, chunk in zip("qkv", value.chunk(3), strict=True):
            converted[f"{packed[1]}.{part}_proj.{packed[2]}"] = chunk
    return converted
