"""Checks for plain modules, whose call is their class's `forward` alone. Only their parameters may be read directly.

Users hook, wrap, replace, parametrise and compile modules. Code that bypasses a call would silently bypass that too.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes in which a module keeps the hooks of its forward and backward pass."""


def why_not_plain(module: nn.Module) -> str | None:
    """The reason why a module has to be called; None if a call is its class's `forward` and nothing else.

    Parametrizations, adapters and quantised layers have other classes: callers must check the class too.
    """
    # Unrolled for speed: this runs for every module in every call.
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    if torch_module._has_any_global_hook() and _are_global_hooks_of_users():
        return "global hooks are registered"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if module._compiled_call_impl is not None:
        return "it was compiled separately"
    return None


def _are_global_hooks_of_users() -> bool:
    """Whether a global hook is not PyTorch's module tracker. Counters use the tracker to find the current module: it
    needs no call, and a counter must not change the code that it counts.
    """
    names = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    hooks = [hook for name in names for hook in getattr(torch_module, f"_global_{name}").values()]
    return any(getattr(hook, "__module__", None) != "torch.utils.module_tracker" for hook in hooks)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether this is PyTorch's linear layer with a bias and ordinary weights, which computes x·Wᵀ + b only."""
    return (
        type(module) is nn.Linear
        and why_not_plain(module) is None
        and all(type(x) in (Tensor, nn.Parameter) for x in (module.weight, module.bias))
    )


def table(embedding: nn.Module, rows: int, device: torch.device) -> Tensor:
    """All rows of an embedding: the weight of a plain PyTorch embedding, else the result of a call with every index."""
    if type(embedding) is nn.Embedding and why_not_plain(embedding) is None:
        return embedding.weight
    return embedding(torch.arange(rows, device=device))
