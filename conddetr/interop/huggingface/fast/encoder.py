"""The encoder from fused operations."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conddetr.interop.huggingface.fast.parts import dtype_of_step, feed_forward_recipes, layer_settings
from conddetr.kernels import paths
from conddetr.model.fast import encoder as fast_encoder
from conddetr.model.fast import parts
from conddetr.model.fast.layers import Dropout, branch_weights, for_a_module, seeds
from conddetr.model.fast.plan import SEEDS_PER_LAYER, make_weights


def encode(
    encoder: nn.Module, tokens: Tensor, mask: Tensor, position: Tensor | None, kinds: frozenset[type]
) -> Tensor | None:
    """Run the encoder on fused operations.

    Args:
        encoder: transformers' encoder.
        tokens: [B, N, C].
        mask: [B, N], nonzero = valid.
        position: [B, N, C].
        kinds: the classes of the parts of plain layers.

    Returns:
        Memory [B, N, C]; None if the layers have to be called as modules.
    """
    layers = list(encoder.layers)
    # A fused operation adds it to the tokens and gives it no gradient.
    is_position = position is not None and not position.requires_grad
    dtype = dtype_of_step(encoder, layers, tokens, kinds) if is_position else None
    # float16 may overflow: in training transformers clamps such outputs, fused operations do not.
    if dtype is None or (encoder.training and tokens.dtype == torch.float16):
        return None
    paths.note("encoder", "fused operations")
    [weights] = make_weights(([_recipes(layer, tokens.shape[:-1].numel()) for layer in layers],), dtype)
    step_seeds = seeds(tokens.device, SEEDS_PER_LAYER * len(layers))
    tokens = F.dropout(tokens, encoder.dropout, encoder.training)
    position = position.to(dtype)
    padding = fast_encoder.attention_mask(~mask.to(torch.bool), dtype)
    stream = fast_encoder.begin(tokens.to(dtype), position)
    is_autocast = torch.is_autocast_enabled(tokens.device.type)
    for index, (layer, layer_weights) in enumerate(zip(layers, weights, strict=True)):
        settings = layer_settings(layer, encoder.config.encoder_attention_heads, Dropout(0.0, step_seeds))
        next_position = position if index < len(layers) - 1 else None
        stream = fast_encoder.run_layer(
            layer_weights, settings, stream, padding, next_position, wants_trunk=is_autocast
        )
    return for_a_module(stream.trunk, stream.out)


def _recipes(layer: nn.Module, tokens: int) -> fast_encoder.LayerWeights:
    attention = layer.self_attn
    return fast_encoder.LayerWeights(
        parts.stack(attention.q_proj, attention.k_proj, rows=tokens),
        parts.stack(attention.v_proj, rows=tokens),
        branch_weights(attention.o_proj, layer.self_attn_layer_norm),
        feed_forward_recipes(layer),
    )
