"""The weights of a step with their gradients, in one pass each way, against one operation after the other.

python benchmarks/run.py weights
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import conddetr
from conddetr.kernels.weights import FrozenNorm, Recipe, Shift, Weight, prepare_weights
from harness.machine import DEVICE, copy_bandwidth
from harness.timing import OURS, Result, Work, arguments, measure, parse, run_all, usable


@dataclass(frozen=True)
class Problem:
    """The parameters of a preset, float32, and the dtype of the step."""

    preset: str
    dtype: torch.dtype

    @property
    def title(self) -> str:
        """One line for tables and result files."""
        return f"weights of {self.preset}, forward + backward, {str(self.dtype).removeprefix('torch.')}"

    def make(self) -> list[Recipe]:
        """Every convolution with a frozen norm behind it, every linear layer with its bias; numbers are random."""
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

    def work(self, recipes: list[Recipe]) -> Work:
        """Bytes: parameters read and weights written, gradients of weights read and of parameters written."""
        numbers = sum(part.numel() for part in parts_of(recipes))
        size = 2 * numbers * (torch.float32.itemsize + self.dtype.itemsize)
        return Work(0, size, {"bytes": size / copy_bandwidth()})


def _leaf(parameter: Tensor) -> Tensor:
    return parameter.detach().to(DEVICE).requires_grad_()


def parts_of(recipes: list[Recipe]) -> list[Tensor]:
    """The parameters, in the order of the recipes."""
    return [part for recipe in recipes if isinstance(recipe, Weight) for part in recipe.parts]


def compute(prepare: Callable[[list[Recipe]], list[Tensor]], recipes: list[Recipe]) -> dict[str, Tensor]:
    """Weights, and gradients of the parameters where the gradient of every weight is the weight itself."""
    made = prepare(recipes)
    trained = [x for x in made if x.requires_grad]
    gradients = torch.autograd.grad(trained, parts_of(recipes), [x.detach() for x in trained])
    return {"weights": _flat(made), "gradients": _flat(gradients)}


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


def run(problem: Problem, options: argparse.Namespace) -> Result:
    """Check all implementations of one problem, then time them."""
    torch.compiler.reset()
    recipes = problem.make()
    eager = partial(prepare_weights, dtype=problem.dtype, backend="eager")
    forwards = {"eager": eager, "torch.compile of it": torch.compile(eager, dynamic=False)}
    forwards[f"{OURS}, triton"] = partial(prepare_weights, dtype=problem.dtype, backend="triton")
    runs = {name: partial(compute, call, recipes) for name, call in forwards.items()}
    exact = compute(partial(prepare_weights, dtype=torch.float64, backend="eager"), recipes)
    good, refused = usable(runs, lambda call: call(), exact, is_random=False)
    return measure(problem.title, good, options, problem.work(recipes), refused)


def main() -> None:
    """Time every problem asked for; one result file for all."""
    parser = arguments(__doc__.splitlines()[0], seconds=30)
    parser.add_argument("--presets", nargs="+", default=["conditional-detr-r50"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    options = parse(parser)
    problems = [Problem(preset, getattr(torch, dtype)) for dtype in options.dtypes for preset in options.presets]
    run_all("weights", {problem.title: partial(run, problem, options) for problem in problems}, options)


if __name__ == "__main__":
    main()
