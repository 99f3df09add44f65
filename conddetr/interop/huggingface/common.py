"""What the replaced modules of all versions of transformers share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from conddetr.kernels import conditional_attention, paths, sine_embedding
from conddetr.kernels.registry import OPERATIONS


def runs_ours(backend: str, tensor: Tensor) -> bool:
    """Whether our operation takes this call: the backend was asked for by name, or `auto` finds a kernel.

    Where `auto` finds none, plain PyTorch is what transformers has too, and its own choice of it stays.
    """
    dtype = tensor.dtype
    if torch.is_autocast_enabled(tensor.device.type):
        dtype = torch.get_autocast_dtype(tensor.device.type)
    attention = OPERATIONS["conditional_attention"]
    return backend != "auto" or attention.choose("auto", tensor.device, dtype).backend != "eager"


def asking_waits(tensor: Tensor) -> bool:
    """Whether the host would wait for the tensor's values, so that code of ours runs which does without."""
    return tensor.is_cuda and not torch.compiler.is_compiling()


def as_under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, as PyTorch's attention takes them: one projection of several may
    be wrapped in something that computes in float32.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor.to(dtype) for tensor in tensors)


@contextmanager
def as_shipped(module: nn.Module, theirs: type[nn.Module]) -> Iterator[None]:
    """The module is of transformers' own class meanwhile: what it records of its layers goes by the class's name."""
    found = type(module)
    module.__class__ = theirs
    try:
        yield
    finally:
        if found is not theirs:  # else another thread is in here, which gives the class back
            module.__class__ = found


def mask_of_keys(mask: Tensor, queries: int, dtype: torch.dtype | None = None) -> Tensor:
    """transformers' mask for attention, as a view of one row per image.

    Args:
        mask: [B, N], nonzero = valid.
        queries: Q.
        dtype: floating, for attention that adds the mask to its scores; None for attention that takes a bool mask.

    Returns:
        [B, 1, Q, N]: bool, True = valid; or of `dtype`, 0 = valid and its most negative number = padding.
    """
    rows = mask.to(torch.bool)[:, None, None]
    if dtype is not None:
        rows = torch.zeros(rows.shape, dtype=dtype, device=rows.device).masked_fill_(~rows, torch.finfo(dtype).min)
    return rows.expand(-1, 1, queries, -1)


def key_padding(mask: Tensor | None) -> Tensor | None:
    """transformers' masks -> [B, N] bool, True = padding.

    Args:
        mask: [B, N], nonzero = valid; or [B, 1, Q or 1, N], the same for every query: bool, True = valid, or floating,
            0 = valid and very negative = padding; None: nothing is padding.
    """
    if mask is None:
        return None
    if mask.dim() == 2:
        return ~mask.to(torch.bool)
    keys = mask[:, 0, 0]
    return keys < 0 if keys.is_floating_point() else ~keys.to(torch.bool)


def is_floating_mask(mask: Tensor | None) -> bool:
    """Whether it is a mask as modules that add it to scores get it from transformers.

    A bool one never comes from there; some of these modules would read it the other way round than `key_padding`.
    """
    return mask is None or mask.is_floating_point()


def cross_attention(
    q_content: Tensor,
    q_spatial: Tensor,
    k_content: Tensor,
    k_spatial: Tensor,
    v: Tensor,
    padding: Tensor | None,
    dropout_p: float,
    backend: str,
) -> Tensor:
    """Conditional attention of split heads: [B, Q, h, d] queries, [B, N, h, d] keys and values -> [B, Q, C]."""
    paths.note("cross-attention", "conditional_attention, dense spatial keys")
    attended = conditional_attention(
        *as_under_autocast(q_content, q_spatial, k_content, k_spatial, v),
        key_padding_mask=padding,
        dropout_p=dropout_p,
        backend=backend,
    )
    return attended.flatten(-2)


def is_plain_call(decoder: nn.Module, memory: Tensor | None, mask: Tensor | None, options: dict) -> bool:
    """Whether `decode` says all that this call of a decoder wants.

    Attention maps, hidden states, tuples, layer drop, and gradient checkpointing where the decoder itself does it
    (early 4.5x) are left to transformers.
    """
    is_checkpointed = getattr(decoder, "gradient_checkpointing", False)
    has_layer_drop = decoder.training and (decoder.layerdrop > 0 or is_checkpointed)
    has_memory = memory is not None and mask is not None and mask.dim() == 2
    return has_memory and not (wants_more(decoder.config, options) or has_layer_drop)


def wants_more(config: object, options: dict) -> bool:
    """Whether a call asks for attention maps, hidden states or a tuple, which transformers collects."""
    names = ("output_attentions", "output_hidden_states")
    is_tuple = options.get("return_dict", getattr(config, "return_dict", True)) is False
    return is_tuple or any(options.get(name, getattr(config, name, False)) for name in names)


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

    Everything in the decoder is called as a module, with what transformers hands to it.

    Args:
        decoder: transformers' decoder.
        tokens: [B, Q, C] decoder embedding at the start.
        memory, position: [B, N, C].
        mask: for the layers: [B, 1, Q, N] as `mask_of_keys` makes it.
        object_query: [B, Q, C].
        options: handed on to the layers.

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
        # By position, as transformers does it: checkpointing saves those.
        found = layer(
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
        tokens = found[0] if isinstance(found, tuple) else found
        if decoder.config.auxiliary_loss:
            # As transformers does it: the next layer, too, goes on from the normalised tokens.
            tokens = decoder.layernorm(tokens)
            intermediate.append(tokens)
    return {
        "last_hidden_state": decoder.layernorm(tokens),
        "intermediate_hidden_states": torch.stack(intermediate) if intermediate else None,
        "reference_points": reference.transpose(0, 1),
    }
