"""transformers' attention masks, in the layouts of its versions, and ours."""

import torch
from torch import Tensor


def mask_of_keys(mask: Tensor, queries: int, dtype: torch.dtype | None = None) -> Tensor:
    """transformers' attention mask, as a view of one row per image.

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
            0 = valid and very negative = padding; None: no padding.
    """
    if mask is None:
        return None
    if mask.dim() == 2:
        return ~mask.to(torch.bool)
    keys = mask[:, 0, 0]
    return keys < 0 if keys.is_floating_point() else ~keys.to(torch.bool)


def is_floating_mask(mask: Tensor | None) -> bool:
    """Whether transformers passes such a mask to modules that add it to scores: floating-point or None.

    It never passes them a bool mask, and some of these modules would read one inverted, unlike `key_padding`.
    """
    return mask is None or mask.is_floating_point()
