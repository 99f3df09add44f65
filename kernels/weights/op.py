"""All weights of a step in one pass, and all their gradients in another: the public function and its gradient.

Under autocast every weight is cast by a kernel of its own, and every gradient by another: hundreds of launches, each
for less than a microsecond of work.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from conddetr.kernels import addresses, operators, paths, registry
from conddetr.kernels.weights import layout, reference
from conddetr.kernels.weights.reference import Recipe, Replicas, Shift, Weight


def prepare_weights(recipes: list[Recipe], dtype: torch.dtype, backend: str = "auto") -> list[Tensor]:
    """Make what a step computes with of its parameters: cast, stacked, with frozen norms folded in.

    Args:
        recipes: what is wanted: `Weight`, `Shift` or `Replicas`. Parameters share a device. For what is used several
            times the recipe is there several times, one and the same: the kernels make it once, and their backward
            adds the gradients up.
        dtype: of the step, e.g. bfloat16; that of the parameters is float32 then.
        backend: `auto`, `triton` (one launch each way, however many parameters; they share one dtype) or `eager`.

    Returns:
        One tensor per recipe: of `Weight` [ΣO, ...] or [copies, ΣO] and of `Shift` [C] in `dtype`, of `Replicas`
        [`REPLICAS`, C] in the vector's own. They are new ones, except where a parameter is as it is wanted. Gradients
        flow to the parameters that require them, not to norms.

    Raises:
        RuntimeError: the requested backend cannot run here; says why.
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
    """By the kernels."""
    if not recipes:
        return []
    # What is used several times is made once.
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
    """The recipes, with a view of a parameter wherever something wants the same of it as another before.

    The kernel writes one gradient of every number; those of tied weights autograd adds up.
    """
    wanted: dict[int, list[tuple[int, int]]] = {}
    found = []
    for recipe in recipes:
        parts = []
        for part in _parts(recipe):
            first, last = getattr(recipe, "rows", None) or (0, len(part))
            others = wanted.setdefault(id(part), [])
            is_repeated = any(first < end and begin < last for begin, end in others)
            others.append((first, last))
            parts.append(part.view_as(part) if is_repeated else part)
        kind = type(recipe)
        if kind is Weight:
            recipe = recipe._replace(parts=tuple(parts))
        found.append(Replicas(*parts) if kind is Replicas else recipe)
    return found


def _parts(recipe: Recipe) -> tuple[Tensor, ...]:
    """What may have a gradient."""
    kind = type(recipe)
    if kind is Weight:
        return recipe.parts
    return () if kind is Shift else (recipe.vector,)


def _sources(recipe: Recipe) -> tuple[Tensor, ...]:
    parts = _parts(recipe)
    return parts if type(recipe) is Replicas or recipe.norm is None else parts + recipe.norm[:4]


def _misfit(sources: list[Tensor]) -> str | None:
    """What the kernels cannot take of these parameters, or None."""
    if not addresses.can_place(sources[0].device):
        return "its tables of addresses would have to outlive this capture of a CUDA graph."
    if any(source.device != sources[0].device for source in sources):
        return "its kernel takes parameters of one device."
    dtypes = {source.dtype for source in sources}
    if len(dtypes) > 1:
        return f"its kernel takes parameters of one dtype, not {', '.join(sorted(map(str, dtypes)))}."
    odd = next((source for source in sources if not source.is_contiguous() and not layout.is_dense(source)), None)
    if odd is not None:
        return f"its kernel takes parameters without gaps, not one of shape {tuple(odd.shape)}, strides {odd.stride()}."
    return None


OPERATION = registry.declare("prepare_weights", triton=registry.Kernels(why_not=_misfit))


def _as_it_is(recipe: Recipe) -> Tensor | None:
    """The parameter, if it is what was asked for but for the dtype."""
    if not isinstance(recipe, Weight) or len(recipe.parts) > 1 or recipe[1:] != (None, None, None):
        return None
    [part] = recipe.parts
    return None if part.dim() == 4 and not part.is_contiguous(memory_format=torch.channels_last) else part


class _Prepare(torch.autograd.Function):
    """One kernel each way."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, recipes: list[Recipe], which: list[int], dtype: torch.dtype, *parts: Tensor
    ) -> tuple[Tensor, ...]:
        """`which`: for each result the number of its recipe."""
        from conddetr.kernels.weights import triton

        # The parts are asked for nothing but shape, strides and dtype, so that they need not be saved.
        ctx.recipes, ctx.which, ctx.parts, ctx.forms = recipes, which, parts, layout.forms(recipes, parts)
        ctx.set_materialize_grads(False)
        made = triton.forward(recipes, which, parts, ctx.forms, dtype)
        ctx.mark_non_differentiable(*(x for x, n in zip(made, which, strict=True) if not _is_trained(recipes[n])))
        return tuple(made)

    @staticmethod
    @operators.first_derivatives("prepare_weights")
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple:
        from conddetr.kernels.weights import triton

        # Those of what is not trained are None.
        of_recipes: list[list[Tensor]] = [[] for _ in ctx.recipes]
        for number, grad in zip(ctx.which, grads, strict=True):
            if grad is not None:
                of_recipes[number].append(grad)
        found = triton.backward(ctx.recipes, ctx.parts, ctx.forms, of_recipes)
        return None, None, None, *(x if part.requires_grad else None for x, part in zip(found, ctx.parts, strict=True))


def _is_trained(recipe: Recipe) -> bool:
    return True in [part.requires_grad for part in _parts(recipe)]
