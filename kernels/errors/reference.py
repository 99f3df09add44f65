"""Errors of predictions in plain PyTorch: the reference for the kernel.

Source: `SetCriterion.loss_labels` and `loss_cardinality` of the official code.
"""

import torch
from torch import Tensor

from conddetr.kernels.focal.reference import matched_classes


def prediction_errors(logits: Tensor, assignment: Tensor, labels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Class error, a scalar, and cardinality error, [L]; see `op.py`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    classes = matched_classes(assignment[-1:], labels)[0]
    is_matched = classes >= 0
    correct = (is_matched & (logits[-1].argmax(-1) == classes)).sum()
    # Among equal logits the first is the best. On a CPU `amax` takes a quarter of the time of `argmax`.
    is_object = torch.zeros_like(assignment, dtype=torch.bool)
    if logits.shape[-1] > 1:
        is_object = logits[..., :-1].amax(-1) >= logits[..., -1]
    class_error = 100 - 100 * correct.to(dtype) / is_matched.sum().clamp(min=1)
    return class_error, (is_object.sum(-1) - counts).abs().to(dtype).mean(1)
