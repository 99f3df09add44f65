"""Linear assignment of all layers and images against the usual alternatives, checked before timed.

    python benchmarks/run.py match --images 2 --objects 7 50

Costs are on the device, as in training. An implementation on the host includes the copy in its time.
"""

import argparse
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Self

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from conddetr.kernels import linear_assignment, registry
from harness.machine import DEVICE, Run
from harness.problem import Checked, Tensors, ours

LAYERS, QUERIES = 6, 300
PACKAGES = {"torch-linear-assignment": "torch_linear_assignment", "torchmatch": "torchmatch"}
"""Package on the index → module to import."""
THREADS = os.cpu_count()


@dataclass(frozen=True)
class Problem(Checked[Tensor]):
    """One size: objects per image, and images."""

    objects: int
    images: int

    seconds = 120

    @property
    def title(self) -> str:
        problems = f"{LAYERS} layers × {self.images} images"
        return f"assignment, {problems}, {self.objects} objects in each, {QUERIES} queries"

    def make(self) -> Tensor:
        """Costs [L, B, N, Q] float32, with the spread of an untrained model's predictions."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(LAYERS, self.images, self.objects, QUERIES, generator=generator).to(DEVICE)

    def implementations(self, cost: Tensor) -> dict[str, Run]:
        counts = torch.full((self.images,), self.objects, dtype=torch.int32, device=DEVICE)
        runs: dict[str, Run] = {
            "scipy": partial(by_scipy, cost, map),
            f"scipy, {THREADS} threads": partial(by_scipy, cost, threads().map),
            "torch-linear-assignment": partial(by_torch_linear_assignment, cost),
        }
        for package, module in PACKAGES.items():
            if importlib.util.find_spec(module) is None:
                runs[package] = partial(missing, package)
        return runs | ours(partial(by_ours, cost, counts), registry.BACKENDS)

    def answer(self, run: Run) -> Tensors:
        """The cost of each assignment."""
        return {"cost": totals(self.make(), run())}

    def exact(self, cost: Tensor) -> Tensors:
        """Computed by scipy."""
        return {"cost": totals(cost, by_scipy(cost, map)).double()}

    @classmethod
    def arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--objects", nargs="+", type=int, default=[7, 1, 20, 50, 100, 200, 300])
        parser.add_argument("--images", type=int, default=8)

    @classmethod
    def asked_for(cls, options: argparse.Namespace) -> list[Self]:
        """Every number of objects."""
        return [cls(objects, options.images) for objects in options.objects]


@cache
def threads() -> ThreadPoolExecutor:
    """One thread pool for all problems."""
    return ThreadPoolExecutor(THREADS)


def by_scipy(cost: Tensor, mapped: Callable) -> Tensors:
    """Costs [L, B, N, Q] → the query of each object [L, B, N]; `mapped` is `map` of the problems, or a pool's."""
    solved = mapped(lambda problem: linear_sum_assignment(problem)[1], cost.flatten(0, 1).cpu().numpy())
    return {"query": torch.stack([torch.from_numpy(query) for query in solved]).view(cost.shape[:-1]).to(cost.device)}


def by_torch_linear_assignment(cost: Tensor) -> Tensors:
    """The same by the package torch-linear-assignment: since 0.1 Triton on a GPU and scipy on a CPU, before that CUDA.

    The result file names the version.
    """
    solve = importlib.import_module(PACKAGES["torch-linear-assignment"]).batch_linear_assignment
    return {"query": solve(cost.flatten(0, 1)).view(cost.shape[:-1])}


def missing(package: str) -> None:
    """
    Raises:
        ImportError: always.
    """
    raise ImportError(f"not installed (pip install {package})")


def by_ours(cost: Tensor, counts: Tensor, backend: str) -> Tensors:
    """Costs [L, B, N, Q] → the object of each query [L, B, Q], -1 for none."""
    return {"object": linear_assignment(cost, counts, backend)}


def totals(cost: Tensor, assignment: Tensors) -> Tensor:
    """Cost of each problem's assignment [L, B], summed in float64; NaN if an object has no query, or shares one."""
    objects, queries = (torch.arange(n, device=cost.device) for n in cost.shape[-2:])
    if "object" in assignment:
        is_pair = objects[:, None] == assignment["object"].unsqueeze(-2)
    else:
        is_pair = assignment["query"].unsqueeze(-1) == queries
    is_matching = (is_pair.sum(-1) == 1).all(-1) & (is_pair.sum(-2) <= 1).all(-1)
    total = (cost.double() * is_pair).sum((-1, -2))
    return torch.where(is_matching, total, float("nan")).float()
