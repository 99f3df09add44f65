"""Checks for plain parts of a model, and recipes that prepare their parameters for a step."""

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from conddetr.kernels.weights import Recipe, Replicas, Weight
from conddetr.model.plain import why_not_plain

_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)

MOST_ROWS = 8192
"""Largest number of rows in a bias gradient that is kept and summed with all others; more rows are worth a launch."""


def misfit(part: nn.Module, kinds: frozenset[type]) -> str | None:
    """The reason why a part has to be called as a module: it or a module within it is not plain. None if all are.

    Args:
        part: is checked with all modules within.
        kinds: our classes that are allowed, besides linear layers and layer norms.
    """
    modules = [part]
    for module in modules:
        modules += [child for child in module._modules.values() if child is not None]
        cls = type(module)
        reason = why_not_plain(module)
        if reason is None and cls not in kinds and cls not in _LINEAR and cls is not nn.LayerNorm:
            reason = "it is another class"
        if reason is None:
            reason = _unusual(module)
        if reason is not None:
            name = next(name for name, candidate in part.named_modules() if candidate is module)
            return f"{name or 'it'} ({cls.__name__}): {reason}"
    return None


def _unusual(module: nn.Module) -> str | None:
    """The reason why a plain module's parameters cannot be used; None if they can."""
    parameters = module._parameters
    if getattr(module, "_is_replica", False):
        return "it is a replica of DataParallel, which has no parameters"
    for parameter in parameters.values():
        if parameter is not None and type(parameter) not in (Tensor, nn.Parameter):
            return "its weights have a custom class"
    if isinstance(module, (nn.Linear, nn.LayerNorm)) and (parameters["weight"] is None or parameters["bias"] is None):
        return "it has no weight or no bias"
    return None


def stack(*modules: nn.Linear, rows: int | None = None) -> tuple[Recipe, Recipe]:
    """Recipes of concatenated weights and biases of linear layers, for `layers.linear`; `rows`: see `copies`."""
    weights, biases = (tuple([module._parameters[name] for module in modules]) for name in ("weight", "bias"))
    return Weight(weights), Weight(biases, copies=copies(rows))


def copies(rows: int | None) -> int | None:
    """Copies of a bias that is added to `rows` rows: one for each row if their number is known, None: a vector."""
    return rows if torch.is_grad_enabled() and rows is not None and 0 < rows <= MOST_ROWS else None


def norm(module: nn.LayerNorm) -> tuple[Recipe, Recipe]:
    """Recipes of a layer norm's weight and bias, in the layout of the kernels."""
    parameters = module._parameters
    return Replicas(parameters["weight"]), Replicas(parameters["bias"])


def before_fusion(module: nn.Linear) -> tuple[Recipe, Recipe]:
    """Recipes of a linear layer's weight and bias; the kernel that follows adds the bias."""
    parameters = module._parameters
    return Weight((parameters["weight"],)), Replicas(parameters["bias"])
