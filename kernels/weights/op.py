"""All weights of a step in one pass, and all their gradients in another: the public function and its gradient.

PyTorch's autocast casts each weight and each gradient with a separate kernel: hundreds of launches, each for less than
a microsecond of work.
"""

from typing import Any

import torch
from torch import Tensor

from conddetr.kernels import addresses, operators, paths, registry
from conddetr.kernels.weights import layout, reference
from conddetr.kernels.weights.reference import Recipe, Replicas, Shift, Weight


def prepare_weights(recipes: list[Recipe], dtype: torch.dtype, backend: str = "auto") -> list[Tensor]:
    """Prepare the parameters of a step: cast, stacked, with frozen norms folded in.

    Args:
        recipes: `Weight`, `Shift` or `Replicas`, whose parameters share a device. For a result with several uses, list
            the same recipe object several times: the kernels make it once, and their backward pass sums the gradients.
        dtype: of the step, e.g. bfloat16, with float32 parameters.
        backend: `auto`, `triton` (one launch forward and one backward for any number of parameters of one dtype) or
            `eager`.

    Returns:
        One tensor per recipe: `Weight` gives [ΣO, ...] or [copies, ΣO] and `Shift` [C] in `dtype`, `Replicas` gives
        [`REPLICAS`, C] in the vector's dtype. Results are new tensors, unless a parameter can be used unchanged.
        Gradients flow to the parameters that require them, not to norms.

    Raises:
        RuntimeError: the requested backend cannot run here; gives the reason.
    """
    if not recipes:
        return []
    sources = [source for recipe in recipes for source in _sources(recipe)]
    choice = OPERATION.choose(backend, sources[0].device, dtype, sources)
    paths.note("prepare_weights", choice.backend, choice.refused)
    if choice.backend == "eager":
        return reference.prepare_weights(recipes, dtype)
    if sources[0].dtype != dtype:
        return _made(recipes, dtype)
    prepared = [_as_it_is(recipe) for recipe in recipes]
    made = iter(_made([recipe for recipe, same in zip(recipes, prepared, strict=True) if same is None], dtype))
    return [next(made) if same is None else same for same in prepared]


def _made(recipes: list[Recipe], dtype: torch.dtype) -> list[Tensor]:
    """Prepare weights with the kernels."""
    if not recipes:
        return []
    # A recipe with several uses is prepared once.
    once = {id(recipe): recipe for recipe in recipes}
    numbers = {key: number for number, key in enumerate(once)}
    which = [numbers[id(recipe)] for recipe in recipes]
    recipes = list(once.values())
    uses = [part for recipe in recipes for part in _parts(recipe)]
    parts = {id(part): part for part in uses}
    if len(parts) < len(uses) and torch.is_grad_enabled():
        recipes = _apart(recipes)
        parts = {id(part): part for recipe in recipes for part in _parts(recipe)}
    return list(_Prepare.apply(recipes, which, dtype, *parts.values()))


def _apart(recipes: list[Recipe]) -> list[Recipe]:
    """The recipes, with a view of a parameter wherever an earlier recipe uses the same rows of it.

    The kernel writes one gradient for every element; autograd sums the gradients of tied weights.
    """
    used: dict[int, list[tuple[int, int]]] = {}
    results = []
    for recipe in recipes:
        parts = []
        for part in _parts(recipe):
            first, last = getattr(recipe, "rows", None) or (0, len(part))
            ranges = used.setdefault(id(part), [])
            is_repeated = any(first < end and begin < last for begin, end in ranges)
            ranges.append((first, last))
            parts.append(part.view_as(part) if is_repeated else part)
        recipe_class = type(recipe)
        if recipe_class is Weight:
            recipe = recipe._replace(parts=tuple(parts))
        results.append(Replicas(*parts) if recipe_class is Replicas else recipe)
    return results


def _parts(recipe: Recipe) -> tuple[Tensor, ...]:
    """The tensors of a recipe that may have a gradient."""
    kind = type(recipe)
    if kind is Weight:
        return recipe.parts
    return () if kind is Shift else (recipe.vector,)


def _sources(recipe: Recipe) -> tuple[Tensor, ...]:
    parts = _parts(recipe)
    return parts if type(recipe) is Replicas or recipe.norm is None else parts + recipe.norm[:4]


def _misfit(sources: list[Tensor]) -> str | None:
    """The reason why the kernels do not support these parameters, or None."""
    if not addresses.can_place(sources[0].device):
        return "its tables of addresses would have to outlive this capture of a CUDA graph."
    if any(source.device != sources[0].device for source in sources):
        return "its kernel takes parameters on one device."
    dtypes = {source.dtype for source in sources}
    if len(dtypes) > 1:
        return f"its kernel takes parameters of one dtype, not {', '.join(sorted(map(str, dtypes)))}."
    odd = next((source for source in sources if not source.is_contiguous() and not layout.is_dense(source)), None)
    if odd is not None:
        return f"its kernel takes parameters without gaps, not one of shape {tuple(odd.shape)}, strides {odd.stride()}."
    return None


OPERATION = registry.declare("prepare_weights", triton=registry.Kernels(why_not=_misfit))


def _as_it_is(recipe: Recipe) -> Tensor | None:
    """The parameter, if it equals the recipe's result except for the dtype."""
    if not isinstance(recipe, Weight) or len(recipe.parts) > 1 or recipe[1:] != (None, None, None):
        return None
    [part] = recipe.parts
    return None if part.dim() == 4 and not part.is_contiguous(memory_format=torch.channels_last) else part


class _Prepare(torch.autograd.Function):
    """One kernel forward and one backward."""

    @staticmethod
    def forward(
        ctx: Any, recipes: list[Recipe], which: list[int], dtype: torch.dtype, *parts: Tensor
    ) -> tuple[Tensor, ...]:
        """`which`: for each result the number of its recipe."""
        from conddetr.kernels.weights import triton

        # Backward reads only shape, strides and dtype of the parts, so they need not be saved.
        ctx.recipes, ctx.which, ctx.parts, ctx.forms = recipes, which, parts, layout.forms(recipes, parts)
        ctx.set_materialize_grads(False)
        made = triton.forward(recipes, which, parts, ctx.forms, dtype)
        ctx.mark_non_differentiable(*(x for x, n in zip(made, which, strict=True) if not _is_trained(recipes[n])))
        return tuple(made)

    @staticmethod
    @operators.first_derivatives("prepare_weights")
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        from conddetr.kernels.weights import triton

        # Gradients of results that are not trained are None.
        recipe_grads: list[list[Tensor]] = [[] for _ in ctx.recipes]
        for number, grad in zip(ctx.which, grads, strict=True):
            if grad is not None:
                recipe_grads[number].append(grad)
        made = triton.backward(ctx.recipes, ctx.parts, ctx.forms, recipe_grads)
        return None, None, None, *(x if part.requires_grad else None for x, part in zip(made, ctx.parts, strict=True))


def _is_trained(recipe: Recipe) -> bool:
    return True in [part.requires_grad for part in _parts(recipe)]
