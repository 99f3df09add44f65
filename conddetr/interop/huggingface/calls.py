"""What a call of a replaced module wants, and whether ours takes it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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
