"""Whether ours supports a call of a replaced module."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from conddetr.kernels.registry import OPERATIONS


def runs_ours(backend: str, tensor: Tensor) -> bool:
    """Whether our operation runs this call: the backend was requested by name, or `auto` finds a kernel.

    If `auto` finds none, ours would be plain PyTorch like transformers' own, whose choice stays.
    """
    dtype = tensor.dtype
    if torch.is_autocast_enabled(tensor.device.type):
        dtype = torch.get_autocast_dtype(tensor.device.type)
    attention = OPERATIONS["conditional_attention"]
    return backend != "auto" or attention.choose("auto", tensor.device, dtype).backend != "eager"


def asking_waits(tensor: Tensor) -> bool:
    """Whether the host would wait for the tensor's values, so that our code runs, which does not read them."""
    return tensor.is_cuda and not torch.compiler.is_compiling()


def is_plain_call(decoder: nn.Module, memory: Tensor | None, mask: Tensor | None, options: dict) -> bool:
    """Whether `decode` returns everything that this call of a decoder requests.

    Attention maps, hidden states, tuples, layer drop, and gradient checkpointing by the decoder itself (early 4.5x)
    are left to transformers.
    """
    is_checkpointed = getattr(decoder, "gradient_checkpointing", False)
    has_layer_drop = decoder.training and (decoder.layerdrop > 0 or is_checkpointed)
    has_memory = memory is not None and mask is not None and mask.dim() == 2
    return has_memory and not (wants_more(decoder.config, options) or has_layer_drop)


def wants_more(config: object, options: dict) -> bool:
    """Whether a call requests attention maps, hidden states or a tuple, which transformers collects."""
    names = ("output_attentions", "output_hidden_states")
    is_tuple = options.get("return_dict", getattr(config, "return_dict", True)) is False
    return is_tuple or any(options.get(name, getattr(config, name, False)) for name in names)


@contextmanager
def as_shipped(module: nn.Module, original: type[nn.Module]) -> Iterator[None]:
    """Give the module transformers' own class meanwhile: transformers records outputs of layers by the class's name."""
    accelerated = type(module)
    module.__class__ = original
    try:
        yield
    finally:
        if accelerated is not original:  # else another thread is inside, which restores the class
            module.__class__ = accelerated
