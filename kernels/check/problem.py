"""What is checked: an operation at one size, with its inputs, its gradients, and what PyTorch has beside it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from conddetr.kernels.check.inputs import Inputs, Maker, normal
from conddetr.kernels.registry import FLOATS

Run = Callable[[Inputs], Sequence[Tensor]]
"""Computes the results of a problem from its inputs."""
STEPS = 16
"""Gradients that come from above are multiples of 1 / STEPS up to 8: the same number in every dtype."""


@dataclass(frozen=True)
class Dropout:
    """What a problem drops at random."""

    p: float
    """The probability with which an element is dropped."""
    kept: Callable[[Inputs, str], Tensor]
    """Inputs and backend -> bool, one for each element: what that backend leaves of these inputs."""
    run: Callable[[Inputs, Tensor], Sequence[Tensor]]
    """The operation in plain PyTorch, where it is given what is left."""


@dataclass(frozen=True)
class Peer:
    """Another way to compute a problem with PyTorch alone, to time."""

    run: Run
    gradients: tuple[str, ...]
    """Of these inputs."""


@dataclass(frozen=True)
class Problem:
    """An operation at one size."""

    operation: str
    """Name of the public function."""
    title: str
    make: Callable[[Maker], Inputs]
    run: Callable[[Inputs, str], Sequence[Tensor]]
    """Inputs and backend -> results. `eager` in float64 is the truth."""
    gradients: tuple[str, ...] = ()
    """Inputs that have gradients."""
    dtypes: tuple[torch.dtype, ...] = FLOATS
    """Dtypes by which an implementation is chosen; for inputs of two dtypes the wider one."""
    is_model: bool = False
    """Whether this is a size of the model, which is timed and belongs to the short check."""
    is_tf32: bool = False
    """Whether products of float32 are TF32's, by PyTorch's switches: on GPUs alone."""
    dropout: Dropout | None = None
    truth: Run | None = None
    """In place of `eager` in float64, where that computes in float32."""
    jump: Run | None = None
    """One tensor of the shape of the first result; where it is about 0, derivatives jump, and none is asked for."""
    judge: Callable[[Inputs, Sequence[Tensor], Sequence[Tensor]], str | None] | None = None
    """In place of a comparison, where several results are right: inputs, ours and plain PyTorch's -> what is wrong."""
    allowances: Mapping[str, float] = field(default_factory=dict)
    """Input -> how many times plain PyTorch's error its gradient may have, where that is documented; `result` for
    results."""
    peers: tuple[Peer, ...] = ()
    """What is timed in place of `eager`."""


@dataclass(frozen=True)
class Results:
    """What an implementation gave."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """Everything by a name for a person."""
        several = len(self.outputs) > 1
        outputs = {f"result {i + 1}" if several else "result": x for i, x in enumerate(self.outputs)}
        return {**outputs, **{f"gradient of {name}": x for name, x in self.gradients.items()}}


def evaluate(run: Run, inputs: Inputs, gradients: Iterable[str], upstream: Sequence[Tensor] | None = None) -> Results:
    """Results, and the gradients of some inputs.

    Args:
        run: computes the results.
        inputs: detached.
        gradients: names of the inputs that get one.
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
    found = torch.autograd.grad(trained, list(leaves.values()), slopes, allow_unused=True, materialize_grads=True)
    return Results(detached, dict(zip(leaves, found, strict=True)))


def upstream_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """A gradient from above for each result, in its layout and dtype; numbers that every dtype has."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for x in outputs:
        numbers = (STEPS * normal(generator, x.shape, x.device)).round()
        numbers = numbers.clamp(-8 * STEPS, 8 * STEPS) / STEPS
        dtype = x.dtype if x.is_floating_point() else torch.float32
        found.append(torch.empty_like(x, dtype=dtype).copy_(numbers) if _is_dense(x) else numbers.to(dtype))
    return found


def _is_dense(x: Tensor) -> bool:
    """Whether no two elements share their memory."""
    return all(stride > 0 or size <= 1 for size, stride in zip(x.shape, x.stride(), strict=True))
