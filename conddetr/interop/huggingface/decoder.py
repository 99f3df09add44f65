"""The decoder's loop over layers that are called as modules, in all versions of transformers."""

import torch
from torch import Tensor, nn

from conddetr.kernels import paths, sine_embedding


def decode(
    decoder: nn.Module,
    tokens: Tensor,
    memory: Tensor,
    mask: Tensor,
    position: Tensor,
    object_query: Tensor,
    **options: object,
) -> dict[str, Tensor | None]:
    """The decoder's loop: reference points and their embedding once, then layer by layer with λ ⊙ p_s.

    Everything in the decoder is called as a module, with the arguments that transformers passes.

    Args:
        decoder: transformers' decoder.
        tokens: [B, Q, C] initial decoder embedding.
        memory, position: [B, N, C].
        mask: for the layers: [B, 1, Q, N] as `mask_of_keys` returns it.
        object_query: [B, Q, C].
        options: passed on to the layers.

    Returns:
        The fields of transformers' decoder output: `last_hidden_state` [B, Q, C], `intermediate_hidden_states`
        [L, B, Q, C] or None, `reference_points` [Q, B, 2].
    """
    paths.note("decoder", "sine embedding and λ ⊙ p_s once")
    reference = decoder.ref_point_head(object_query).sigmoid()
    p_s = sine_embedding(reference, object_query.shape[-1], backend=decoder.backend)
    intermediate = []
    for index, layer in enumerate(decoder.layers):
        spatial_query = p_s if index == 0 else decoder.query_scale(tokens) * p_s
        is_first = index == 0
        # Positional as in transformers, because checkpointing saves positional arguments.
        output = layer(
            tokens,
            None,
            position,
            object_query,
            spatial_query,
            memory,
            encoder_attention_mask=mask,
            is_first=is_first,
            **options,
        )
        tokens = output[0] if isinstance(output, tuple) else output
        if decoder.config.auxiliary_loss:
            # As in transformers, the next layer gets the normalised tokens too.
            tokens = decoder.layernorm(tokens)
            intermediate.append(tokens)
    return {
        "last_hidden_state": decoder.layernorm(tokens),
        "intermediate_hidden_states": torch.stack(intermediate) if intermediate else None,
        "reference_points": reference.transpose(0, 1),
    }
