"""Shared by fused encoder and decoder: whether they can run, settings and weights of their layers."""

import torch
from torch import Tensor, nn

from conddetr.model.fast import encoder as fast_encoder
from conddetr.model.fast import parts
from conddetr.model.fast.layers import Dropout, FeedForwardWeights, branch_weights, hidden_weights
from conddetr.model.fast.plan import can_run, step_dtype


def dtype_of_step(
    container: nn.Module, known: list[nn.Module], tokens: Tensor, kinds: frozenset[type]
) -> torch.dtype | None:
    """The dtype of a step; None if the layers of an encoder or decoder have to be called as modules.

    Args:
        known: the parts whose parameters are read.
        kinds: their supported classes.
    """
    dtype = step_dtype(tokens.device, tokens.dtype)
    if container.config._attn_implementation not in ("sdpa", "conddetr"):
        return None
    if not can_run(container.backend, tokens.device, dtype):
        return None
    is_checkpointed = any(getattr(part, "gradient_checkpointing", False) and part.training for part in known)
    if is_checkpointed or any(parts.misfit(part, kinds) is not None for part in known):
        return None
    # Fused operations have one dropout rate for all branches of a layer.
    if any(_dropout_p(layer) != _dropout_p(layer.mlp) for layer in container.layers):
        return None
    if torch.is_autocast_enabled(tokens.device.type):
        return dtype
    return dtype if all(x.dtype == dtype for part in known for x in part.parameters()) else None


def layer_settings(layer: nn.Module, heads: int, dropout: Dropout) -> fast_encoder.Settings:
    """The current settings of a layer of transformers; `dropout` has the seeds."""
    attention = layer.self_attn
    return fast_encoder.Settings(
        heads,
        attention.attention_dropout if attention.training else 0.0,
        dropout.of(layer.mlp.activation_dropout if layer.mlp.training else 0.0),
        dropout.of(_dropout_p(layer)),
    )


def _dropout_p(module: nn.Module) -> float:
    """The module's current dropout rate."""
    return module.dropout if module.training else 0.0


def feed_forward_recipes(layer: nn.Module) -> FeedForwardWeights:
    """Weights of a layer's feed-forward network and of the norm after it."""
    return FeedForwardWeights(hidden_weights(layer.mlp.fc1), branch_weights(layer.mlp.fc2, layer.final_layer_norm))
