"""Our attention as an implementation that transformers' models can select (`attn_implementation`)."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conddetr.interop.huggingface.attention import as_under_autocast
from conddetr.interop.huggingface.calls import runs_ours
from conddetr.kernels import conditional_attention, paths
from conddetr.kernels.registry import BACKENDS
from conddetr.model.attention import attends_natively

NAME = "conddetr"
"""The value of `attn_implementation`."""

_OTHER_ATTENTION = ("softcap", "sliding_window", "s_aux", "position_bias", "is_causal")
"""Options of other models' attention that ours does not support."""


def register_attention(backend: str = "auto") -> None:
    """Register our attention as `attn_implementation="conddetr"` for transformers' Conditional DETR.

    After it, `model.set_attn_implementation("conddetr")` and `from_pretrained(…, attn_implementation="conddetr")` run
    self-attention and conditional cross-attention on our kernels; everything else stays as shipped.
    `conddetr.accelerate` needs no registration and replaces more: sine embedding, backbone, loss, and the
    concatenation of queries and keys.

    Attention maps (`output_attentions=True`) are computed in plain PyTorch. A model with another attention, such as a
    causal one, raises an error when it runs.

    Args:
        backend: as in `conddetr.accelerate`; the last registration of this process applies to all its models.

    Raises:
        ImportError: transformers is not installed.
        RuntimeError: this version's Conditional DETR has no choice of attention (before 5).
        ValueError: no such backend.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {backend!r}.")
    import transformers
    from transformers.models.conditional_detr import modeling_conditional_detr

    if not hasattr(modeling_conditional_detr, "ALL_ATTENTION_FUNCTIONS"):
        raise RuntimeError(
            f"transformers {transformers.__version__} has no choice of attention (attn_implementation) in its "
            f"Conditional DETR: update to 5, or use conddetr.accelerate(model), which works without that choice."
        )
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, sdpa_mask

    AttentionInterface.register(NAME, partial(_attend, backend=backend))
    AttentionMaskInterface.register(NAME, partial(_mask, otherwise=sdpa_mask, usual=bidirectional_mask_function))


def _mask(
    *, mask_function: Callable, attention_mask: Tensor | None, otherwise: Callable, usual: Callable, **options: object
) -> Tensor | None:
    """transformers' protocol of mask functions -> [B, 1, 1, N] bool, True = valid, if only keys are masked.

    Args:
        mask_function: the allowed pairs of query and key; `usual` allows all.
        attention_mask: [B, N], nonzero = valid; None: no padding.
        otherwise: makes the mask [B, 1, Q, N] of any other mask function.
    """
    if mask_function is not usual:
        return otherwise(mask_function=mask_function, attention_mask=attention_mask, **options)
    return None if attention_mask is None else attention_mask.to(torch.bool)[:, None, None]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    backend: str,
    **options: object,
) -> tuple[Tensor, Tensor | None]:
    """transformers' protocol of attention functions.

    Args:
        module: the calling attention module.
        query: [B, h, Q, d]; in conditional attention each head has its content half first, its spatial half after it.
        key: [B, h, N, d]; value: [B, h, N, dv].
        attention_mask: as `_mask` returns it.
        scaling: of the scores; default d ** -0.5.
        options: further options of the model's call.

    Returns:
        [B, Q, h, dv]; and the weights [B, h, Q, N] with `output_attentions`, else None.
    """
    _check(module, query, key, options)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = as_under_autocast(query, key, value)
    is_conditional = query.shape[-1] == 2 * value.shape[-1]
    name = "cross-attention" if is_conditional else "self-attention"
    if options.get("output_attentions"):
        paths.note(name, "plain PyTorch, for attention maps")
        return _attend_with_weights(query, key, value, attention_mask, dropout, scaling)
    # As in `accelerate`: self-attention has kernels on CPUs; elsewhere PyTorch's fused attention is as good.
    has_kernel = runs_ours(backend, query) if is_conditional else attends_natively(backend, query)
    masks_only_keys = attention_mask is None or attention_mask.shape[-2] == 1
    if not (masks_only_keys and has_kernel):
        paths.note(name, "PyTorch's scaled_dot_product_attention")
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
        )
        return attended.transpose(1, 2).contiguous(), None
    paths.note(name, "conditional_attention")
    queries, keys, values = (x.transpose(1, 2) for x in (query, key, value))
    attended = conditional_attention(
        *queries.tensor_split(2, dim=-1),
        *keys.tensor_split(2, dim=-1),
        values,
        key_padding_mask=None if attention_mask is None else ~attention_mask[:, 0, 0],
        scale=scaling,
        dropout_p=dropout,
        backend=backend,
    )
    return attended, None


def _attend_with_weights(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float
) -> tuple[Tensor, Tensor]:
    scores = query @ key.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _check(module: nn.Module, query: Tensor, key: Tensor, options: dict[str, object]) -> None:
    """Raise an error for features of other models' attention that ours does not support."""
    unsupported = [name for name in _OTHER_ATTENTION if options.get(name) is not None and options[name] is not False]
    if getattr(module, "is_causal", True):
        unsupported.append("a causal mask")
    if query.shape[1] != key.shape[1]:
        unsupported.append(f"{query.shape[1]} heads of queries, {key.shape[1]} of keys")
    if unsupported:
        raise ValueError(
            f"attn_implementation {NAME!r} is the attention of Conditional DETR, in both directions; "
            f"{type(module).__name__} has {', '.join(unsupported)}. Use another implementation, for example 'sdpa'."
        )
