"""Our attention as one of those that transformers' models can be told to take (`attn_implementation`)."""

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
"""What `attn_implementation` is called."""

_OTHER_ATTENTION = ("softcap", "sliding_window", "s_aux", "position_bias", "is_causal")
"""Options of other models' attention, which ours does not compute."""


def register_attention(backend: str = "auto") -> None:
    """Let `attn_implementation="conddetr"` name our attention in transformers' Conditional DETR.

    After it, `model.set_attn_implementation("conddetr")` and `from_pretrained(…, attn_implementation="conddetr")` run
    self-attention and conditional cross-attention on our kernels; all else stays as shipped. `conddetr.accelerate`
    needs no registration and does more: sine embedding, backbone, loss, and no concatenated queries and keys.

    Attention maps (`output_attentions=True`) are computed in plain PyTorch. A model that is no detector with attention
    in both directions is refused when it runs.

    Args:
        backend: as in `conddetr.accelerate`; the last registration of this process counts for all its models.

    Raises:
        ImportError: transformers is not installed.
        RuntimeError: this version's Conditional DETR does not let attention be chosen (before 5).
        ValueError: no such backend.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {backend!r}.")
    import transformers
    from transformers.models.conditional_detr import modeling_conditional_detr

    if not hasattr(modeling_conditional_detr, "ALL_ATTENTION_FUNCTIONS"):
        raise RuntimeError(
            f"transformers {transformers.__version__} does not let the attention of its Conditional DETR be chosen "
            f"(attn_implementation), 5 does: update it, or use conddetr.accelerate(model), which needs no such choice."
        )
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, sdpa_mask

    AttentionInterface.register(NAME, partial(_attend, backend=backend))
    AttentionMaskInterface.register(NAME, partial(_mask, otherwise=sdpa_mask, usual=bidirectional_mask_function))


def _mask(
    *, mask_function: Callable, attention_mask: Tensor | None, otherwise: Callable, usual: Callable, **options: object
) -> Tensor | None:
    """transformers' protocol of mask functions -> [B, 1, 1, N] bool, True = valid, where only keys are masked.

    Args:
        mask_function: which pairs of query and key are allowed; `usual` allows all.
        attention_mask: [B, N], nonzero = valid; None: nothing is padding.
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
        module: the attention module that calls.
        query: [B, h, Q, d]; in conditional attention each head has its content half first, its spatial half after it.
        key: [B, h, N, d]; value: [B, h, N, dv].
        attention_mask: as `_mask` makes it.
        scaling: of the scores; default d ** -0.5.
        options: those of the model's call.

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
    masks_keys_alone = attention_mask is None or attention_mask.shape[-2] == 1
    if not (masks_keys_alone and has_kernel):
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
    """Refuse what other models' attention has and ours has not."""
    found = [name for name in _OTHER_ATTENTION if options.get(name) is not None and options[name] is not False]
    if getattr(module, "is_causal", True):
        found.append("a causal mask")
    if query.shape[1] != key.shape[1]:
        found.append(f"{query.shape[1]} heads of queries, {key.shape[1]} of keys")
    if found:
        raise ValueError(
            f"attn_implementation {NAME!r} is the attention of Conditional DETR, in both directions; "
            f"{type(module).__name__} has {', '.join(found)}. Use another one, 'sdpa' for example."
        )
