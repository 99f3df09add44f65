"""Which parts of a model are plain, and their parameters as recipes of what a step computes with."""

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from conddetr.kernels.weights import Recipe, Replicas, Weight
from conddetr.model.plain import why_not_plain

_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)

MOST_ROWS = 8192
"""Of a gradient that is kept until all weights' gradients are made; the sum of more rows is worth a launch."""


def misfit(part: nn.Module, kinds: frozenset[type]) -> str | None:
    """The reason why a part has to be called as a module: it, or one within it, is more than plain.

    Args:
        part: to be looked through.
        kinds: the classes of ours that it consists of, beside linear layers and layer norms.
    """
    found = [part]
    for module in found:
        found += [child for child in module._modules.values() if child is not None]
        kind = type(module)
        reason = why_not_plain(module)
        if reason is None and kind not in kinds and kind not in _LINEAR and kind is not nn.LayerNorm:
            reason = "it is another class"
        if reason is None:
            reason = _unusual(module)
        if reason is not None:
            name = next(name for name, other in part.named_modules() if other is module)
            return f"{name or 'it'} ({kind.__name__}): {reason}"
    return None


def _unusual(module: nn.Module) -> str | None:
    """What is not as usual about the parameters of a plain module."""
    parameters = module._parameters
    if getattr(module, "_is_replica", False):
        return "it is a replica of DataParallel, which has no parameters"
    for parameter in parameters.values():
        if parameter is not None and type(parameter) not in (Tensor, nn.Parameter):
            return "its weights are a class of their own"
    if isinstance(module, (nn.Linear, nn.LayerNorm)) and (parameters["weight"] is None or parameters["bias"] is None):
        return "it has no weight or no bias"
    return None


def stack(*modules: nn.Linear, rows: int | None = None) -> tuple[Recipe, Recipe]:
    """Weights and biases of linear layers, one below the other, for `layers.linear`; `rows`: as of `copies`."""
    weights, biases = (tuple([module._parameters[name] for module in modules]) for name in ("weight", "bias"))
    return Weight(weights), Weight(biases, copies=copies(rows))


def copies(rows: int | None) -> int | None:
    """Of a bias that is added to so many rows, where the number is known before: one for each, or a vector alone."""
    return rows if torch.is_grad_enabled() and rows is not None and 0 < rows <= MOST_ROWS else None


def norm(module: nn.LayerNorm) -> tuple[Recipe, Recipe]:
    """Weight and bias of a layer norm, as the kernels want them."""
    parameters = module._parameters
    return Replicas(parameters["weight"]), Replicas(parameters["bias"])


def before_fusion(module: nn.Linear) -> tuple[Recipe, Recipe]:
    """Weight of a linear layer whose bias is added by the kernel behind it, and that bias."""
    parameters = module._parameters
    return Weight((parameters["weight"],)), Replicas(parameters["bias"])
