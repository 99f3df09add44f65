"""Functions that encoder and decoder layers share: linear layers, residual branches, the feed-forward network."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from conddetr.kernels import add_norm, relu_dropout
from conddetr.kernels.weights import Recipe
from conddetr.model.fast import parts
from conddetr.model.layers import FeedForward

Made = Recipe | Tensor
"""The recipe of a weight before a step, the weight within it."""


Pairs = list[tuple[Made, Made]]
"""Weights and biases of several linear layers."""


class Branch(NamedTuple):
    """Weights at the end of a residual branch: a product, then bias, dropout, residual add and norm in one kernel."""

    weight: Made
    bias: Made
    norm: tuple[Made, Made]
    eps: float


class FeedForwardWeights(NamedTuple):
    """Weights of a feed-forward network and the norm behind it."""

    first: tuple[Made, Made]
    last: Branch


def feed_forward_weights(layer: FeedForward, norm: torch.nn.LayerNorm) -> FeedForwardWeights:
    """Recipes for the feed-forward network of an encoder or decoder layer and its last norm."""
    return FeedForwardWeights(hidden_weights(layer.linear1), branch_weights(layer.linear2, norm))


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Linear layer of x [..., C]. The bias is [O], or [rows, O] with equal rows: its gradient is then the output's."""
    if bias.dim() == 1:
        return F.linear(x, weight, bias)
    # The number of rows was a guess if the backbone determines it.
    return _Linear.apply(x, weight, bias, False) if len(bias) == _rows(x) else F.linear(x, weight, bias[0])


def _rows(x: Tensor) -> int:
    return x.shape[:-1].numel()


class _Linear(torch.autograd.Function):
    """A linear layer with a bias for every row and an optional ReLU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
        # Not `F.linear`: in some versions of PyTorch it returns a view, which must not be changed in place.
        out = x.new_empty(*x.shape[:-1], len(weight))
        product = torch._addmm_activation if relu else torch.addmm
        product(bias[0], x.flatten(0, -2), weight.t(), out=out.view(-1, len(weight)))
        ctx.save_for_backward(x, weight, out if relu else None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, activated = ctx.saved_tensors
        if activated is not None:
            grad = torch.ops.aten.threshold_backward(grad, activated, 0)
        rows = grad.flatten(0, -2)
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        return (
            (rows @ weight).view(x.shape) if needs_x else None,
            rows.t() @ x.flatten(0, -2) if needs_weight else None,
            rows if needs_bias else None,
            None,
        )


def hidden_weights(linear: torch.nn.Linear, rows: int | None = None) -> tuple[Recipe, Recipe]:
    """Recipes of a linear layer followed by ReLU: in inference cuBLAS fuses bias and ReLU.

    Args:
        linear: the layer.
        rows: number of output rows if no dropout follows; cuBLAS then fuses them in training too.
    """
    if not torch.is_grad_enabled() or parts.copies(rows) is not None:
        return parts.stack(linear, rows=rows)
    return parts.before_fusion(linear)


def hidden(x: Tensor, weights: tuple[Tensor, Tensor], dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """dropout(relu(linear(x))), x [B, N, C]."""
    weight, bias = weights
    if bias.dim() == 2:
        if dropout_p == 0 and len(bias) == _rows(x) and bias.dtype == x.dtype:
            return _Linear.apply(x, weight, bias, True)
        return relu_dropout(F.linear(x, weight), dropout_p, "auto", bias, seed)
    product = torch._addmm_activation(bias, x.flatten(0, 1), weight.t()).unflatten(0, x.shape[:2])
    return product if dropout_p == 0 else relu_dropout(product, dropout_p, "auto", seed=seed)


def branch_weights(last: torch.nn.Linear, norm: torch.nn.LayerNorm) -> Branch:
    """Recipes of the last linear layer of a branch and the norm behind it."""
    return Branch(*parts.before_fusion(last), parts.norm(norm), norm.eps)


def for_a_module(trunk: Tensor, out: Tensor) -> Tensor:
    """Choose the tokens that a module expects: under autocast the float32 ones, as norms return them."""
    return trunk if torch.is_autocast_enabled(out.device.type) else out


class Dropout(NamedTuple):
    """The probability of dropout and the source of its random bits."""

    probability: float
    seeds: Iterator[Tensor]

    def of(self, probability: float) -> "Dropout":
        """Dropout of another probability with the same source."""
        return Dropout(probability, self.seeds)

    def seed(self) -> Tensor | None:
        """A new seed for each operation; None without dropout."""
        return next(self.seeds) if self.probability > 0 else None


def seeds(device: torch.device, count: int) -> Iterator[Tensor]:
    """Yield `count` seeds, [1] int64 each, sampled at once from torch's generator: repeatable, also in CUDA graphs."""
    sampled: list[Tensor] = []
    for index in range(count):
        if not sampled:
            sampled.append(torch.randint(2**31 - 1, (count,), device=device))
        yield sampled[0][index : index + 1]


def repeatable(seeds: Iterator[Tensor]) -> Callable[[], Iterator[Tensor]]:
    """A function that returns the same seeds in every call, for work that runs again; they are taken when needed."""
    taken: list[Tensor] = []

    def again() -> Iterator[Tensor]:
        yield from taken
        for seed in seeds:
            taken.append(seed)
            yield seed

    return again


def end_branch(
    x: Tensor,
    trunk: Tensor,
    weights: Branch,
    dropout: Dropout,
    position: Tensor | None = None,
    trunks: int = 1,
    outs: int = 1,
) -> tuple[Tensor, ...]:
    """norm(trunk + dropout(linear(x))); arguments and results as in `add_norm`."""
    return add_norm(
        F.linear(x, weights.weight),
        trunk,
        *weights.norm,
        branch_bias=weights.bias,
        position=position,
        dropout_p=dropout.probability,
        eps=weights.eps,
        trunks=trunks,
        outs=outs,
        seed=dropout.seed(),
        backend="auto",
    )


def feed_forward(
    x: Tensor,
    trunk: Tensor,
    weights: FeedForwardWeights,
    dropout: Dropout,
    position: Tensor | None = None,
    trunks: int = 1,
    outs: int = 1,
    inner_dropout: Dropout | None = None,
) -> tuple[Tensor, ...]:
    """The feed-forward network on x [B, N, C] in the step's dtype, ending as `end_branch`.

    Args:
        inner_dropout: behind ReLU; None: the same as at the end.
    """
    inner_dropout = inner_dropout or dropout
    inner = hidden(x, weights.first, inner_dropout.probability, inner_dropout.seed())
    return end_branch(inner, trunk, weights.last, dropout, position, trunks, outs)


class AddToFirst(torch.autograd.Function):
    """Add in place to the first channels of a tensor without other users: neither it nor its gradient is split."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, addend: Tensor) -> Tensor:
        """x [..., C] and addend [..., c], c ≤ C, which images may share -> x."""
        ctx.shape = addend.shape
        x[..., : addend.shape[-1]].add_(addend)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient, and its first channels."""
        return grad, grad[..., : ctx.shape[-1]].sum_to_size(ctx.shape)
