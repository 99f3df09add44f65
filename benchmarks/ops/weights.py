"""All weights of a step and their gradients, in one pass per direction, against one operation after the other."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

import conddetr
from conddetr.kernels.weights import FrozenNorm, Recipe, Shift, Weight, prepare_weights
from harness.machine import DEVICE, Run, short_name
from harness.problem import Checked, Tensors, against_pytorch, least
from harness.result import Work


@dataclass(frozen=True)
class Problem(Checked[list[Recipe]]):
    """The parameters of a preset, float32, and the dtype of the step."""

    preset: str
    dtype: torch.dtype

    seconds = 30

    @property
    def title(self) -> str:
        return f"weights of {self.preset}, forward + backward, {short_name(self.dtype)}"

    def make(self) -> list[Recipe]:
        """Every convolution followed by a frozen norm, and every linear layer with its bias; values are random."""
        torch.manual_seed(0)
        model = conddetr.build(self.preset, num_classes=91)
        recipes: list[Recipe] = []
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                norm = FrozenNorm(*(torch.rand(len(module.weight), device=DEVICE) + 0.5 for _ in range(4)), 1e-5)
                recipes += [Weight((_leaf(module.weight),), norm), Shift(norm)]
            elif isinstance(module, nn.Linear):
                recipes += [Weight((_leaf(module.weight),)), Weight((_leaf(module.bias),))]
        return recipes

    def implementations(self, recipes: list[Recipe]) -> dict[str, Run]:
        functions = against_pytorch(partial(prepare_weights, dtype=self.dtype), ["triton"], "eager")
        return {name: partial(compute, function, recipes) for name, function in functions.items()}

    def exact(self, recipes: list[Recipe]) -> Tensors:
        """Computed one operation after the other."""
        return compute(partial(prepare_weights, dtype=torch.float64, backend="eager"), recipes)

    def work(self) -> Work:
        """Bytes: parameters read and weights written, gradients of weights read and of parameters written."""
        numbers = sum(part.numel() for part in parts_of(self.make()))
        return least(2 * numbers * (torch.float32.itemsize + self.dtype.itemsize))

    @classmethod
    def arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--presets", nargs="+", default=["conditional-detr-r50"])
        parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])

    @classmethod
    def asked_for(cls, options: argparse.Namespace) -> list[Self]:
        """Every preset in every dtype."""
        return [cls(preset, getattr(torch, dtype)) for dtype in options.dtypes for preset in options.presets]


def _leaf(parameter: Tensor) -> Tensor:
    return parameter.detach().to(DEVICE).requires_grad_()


def parts_of(recipes: list[Recipe]) -> list[Tensor]:
    """The parameters, in the order of the recipes."""
    return [part for recipe in recipes if isinstance(recipe, Weight) for part in recipe.parts]


def compute(prepare: Callable[[list[Recipe]], list[Tensor]], recipes: list[Recipe]) -> Tensors:
    """Weights, and gradients of the parameters if the gradient of every weight is the weight itself."""
    made = prepare(recipes)
    trained = [x for x in made if x.requires_grad]
    gradients = torch.autograd.grad(trained, parts_of(recipes), [x.detach() for x in trained])
    return {"weights": _flat(made), "gradients": _flat(gradients)}


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])
