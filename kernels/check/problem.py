"""Problems of the check: an operation at one size, its inputs, its gradients, and PyTorch's alternatives."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from conddetr.kernels.check.inputs import Inputs, Maker, normal
from conddetr.kernels.registry import FLOATS

Run = Callable[[Inputs], Sequence[Tensor]]
"""Computes the results of a problem from its inputs."""
STEPS = 16
"""Upstream gradients are multiples of 1 / STEPS up to 8, which every dtype represents exactly."""


@dataclass(frozen=True)
class Dropout:
    """Dropout of a problem."""

    p: float
    """The probability with which an element is dropped."""
    kept: Callable[[Inputs, str], Tensor]
    """Inputs and backend -> bool for each element: the elements that the backend keeps."""
    run: Callable[[Inputs, Tensor], Sequence[Tensor]]
    """The operation in plain PyTorch with these kept elements."""


@dataclass(frozen=True)
class Peer:
    """An alternative that computes a problem with PyTorch alone, for timing."""

    run: Run
    gradients: tuple[str, ...]
    """Inputs that have gradients."""


@dataclass(frozen=True)
class Problem:
    """An operation at one size."""

    operation: str
    """Name of the public function."""
    title: str
    make: Callable[[Maker], Inputs]
    run: Callable[[Inputs, str], Sequence[Tensor]]
    """Inputs and backend -> results. `eager` in float64 gives the exact result."""
    gradients: tuple[str, ...] = ()
    """Inputs that have gradients."""
    dtypes: tuple[torch.dtype, ...] = FLOATS
    """Dtypes by which an implementation is chosen; the wider one if inputs have two."""
    is_model: bool = False
    """Whether this is a size of the model. Those are timed and are part of the short check."""
    is_tf32: bool = False
    """Whether PyTorch's switches allow TF32 in float32 products; on GPUs only."""
    dropout: Dropout | None = None
    truth: Run | None = None
    """The exact result, if `eager` in float64 computes in float32."""
    jump: Run | None = None
    """One tensor with the shape of the first result. Near its zeros derivatives jump, so they are not compared."""
    judge: Callable[[Inputs, Sequence[Tensor], Sequence[Tensor]], str | None] | None = None
    """Replaces the comparison if several results are right: inputs, ours and plain PyTorch's -> the fault."""
    allowances: Mapping[str, float] = field(default_factory=dict)
    """Input -> allowed multiple of plain PyTorch's error in its gradient, where documented; `result` for results."""
    peers: tuple[Peer, ...] = ()
    """Alternatives that are timed instead of `eager`."""


@dataclass(frozen=True)
class Results:
    """Results and gradients of an implementation."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """All tensors by the names that messages use."""
        several = len(self.outputs) > 1
        outputs = {f"result {i + 1}" if several else "result": x for i, x in enumerate(self.outputs)}
        return {**outputs, **{f"gradient of {name}": x for name, x in self.gradients.items()}}


def evaluate(run: Run, inputs: Inputs, gradients: Iterable[str], upstream: Sequence[Tensor] | None = None) -> Results:
    """Compute results and the gradients of some inputs.

    Args:
        run: computes the results.
        inputs: detached tensors.
        gradients: names of the inputs that need gradients.
        upstream: gradients of all results; None: no gradient is computed.
    """
    leaves = {name: inputs[name].detach().requires_grad_() for name in gradients}
    outputs = list(run({**inputs, **leaves}))
    detached = [x.detach() for x in outputs]
    if upstream is None or not leaves:
        return Results(detached, {})
    pairs = [(x, slope.to(x.dtype)) for x, slope in zip(outputs, upstream, strict=True) if x.requires_grad]
    if not pairs:
        raise RuntimeError("no result records a gradient.")
    trained, slopes = zip(*pairs, strict=True)
    grads = torch.autograd.grad(trained, list(leaves.values()), slopes, allow_unused=True, materialize_grads=True)
    return Results(detached, dict(zip(leaves, grads, strict=True)))


def upstream_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """An upstream gradient for each result, in its layout and dtype; every dtype represents the numbers exactly."""
    generator = torch.Generator().manual_seed(1)
    upstream = []
    for x in outputs:
        numbers = (STEPS * normal(generator, x.shape, x.device)).round()
        numbers = numbers.clamp(-8 * STEPS, 8 * STEPS) / STEPS
        dtype = x.dtype if x.is_floating_point() else torch.float32
        upstream.append(torch.empty_like(x, dtype=dtype).copy_(numbers) if _is_dense(x) else numbers.to(dtype))
    return upstream


def _is_dense(x: Tensor) -> bool:
    """Whether no two elements share memory."""
    return all(stride > 0 or size <= 1 for size, stride in zip(x.shape, x.stride(), strict=True))
