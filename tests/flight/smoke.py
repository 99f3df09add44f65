"""Smoke test on a GPU: every operation on every backend that runs there, forward and backward, compared with eager.

    python tests/flight/smoke.py

Prints one line for each, then one for training steps in a CUDA graph while a DataLoader pins batches. Exits with status
1 if anything failed. The bounds are loose; the tests have tight ones. On a null GPU no numbers are compared.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import conddetr
from conddetr import kernels
from conddetr.config.run import TrainConfig
from conddetr.data.loader import make_loader
from conddetr.data.synthetic import SyntheticShapes
from conddetr.engine.step import Stepper
from conddetr.kernels.conv import Layer
from conddetr.kernels.registry import BackendError
from conddetr.kernels.weights import FrozenNorm, Replicas, Shift, Weight

DEVICE = torch.device("cuda")
BOUND = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest difference from eager, relative to the tensor's largest number."""
RARE = 1e-9
"""Dropout probability at which nothing is dropped, so that results can be compared."""
HAS_NUMBERS = "NULL_GPU" not in os.environ


@dataclass(frozen=True)
class Case:
    """An operation with its inputs."""

    operation: Callable[..., Tensor | tuple[Tensor, ...]]
    leaves: list[Tensor]
    """Its first arguments, which get gradients."""
    others: list = field(default_factory=list)
    options: dict = field(default_factory=dict)
    note: str = ""

    @property
    def title(self) -> str:
        """Operation, note and dtype."""
        dtype = str((self.leaves or self.others)[0].dtype).removeprefix("torch.")
        return ", ".join(filter(None, (self.operation.__name__, self.note, dtype)))

    def run(self, backend: str) -> list[Tensor]:
        """Outputs, then the gradients of their weighted sum, if any."""
        leaves = [leaf.detach().requires_grad_() for leaf in self.leaves]
        result = self.operation(*leaves, *self.others, **self.options, backend=backend)
        outputs = list(result) if isinstance(result, tuple) else [result]
        if leaves and outputs[0].requires_grad:
            generator = torch.Generator(DEVICE).manual_seed(1)
            weights = [torch.rand(out.shape, generator=generator, device=DEVICE) for out in outputs]
            total = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
            outputs += torch.autograd.grad(total, leaves)
        return [out.detach() for out in outputs]


def attend(q_content: Tensor, q_spatial: Tensor, k_content: Tensor, v: Tensor, *spatial: Tensor, **options) -> Tensor:
    """Attention with its spatial keys as separate arguments: rows and columns, or dense keys."""
    keys = spatial if len(spatial) == 2 else spatial[0]
    return kernels.conditional_attention(q_content, q_spatial, k_content, keys, v, **options)


def convolve_twice(
    x: Tensor, weight: Tensor, bias: Tensor, other_weight: Tensor, other_bias: Tensor, backend: str
) -> Tensor:
    """A pair of convolutions with its tensors as separate arguments; the second is strided."""
    layers = (Layer(weight, bias), Layer(other_weight, other_bias, stride=(2, 2), padding=(1, 1)))
    return kernels.convolution_pair(x, *layers, backend=backend)


def weigh(weight: Tensor, other: Tensor, bias: Tensor, norm: FrozenNorm, backend: str) -> tuple[Tensor, ...]:
    """Weights of a step from separate arguments: a folded convolution, a stack, replicas."""
    recipes = [Weight((weight,), norm), Shift(norm), Weight((other, other)), Replicas(bias)]
    return tuple(kernels.prepare_weights(recipes, torch.float32, backend))


def cases() -> Iterator[Case]:
    """Every operation, at small sizes with a remainder in every tile."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    def uniform(*shape: int) -> Tensor:
        return (0.1 + 0.4 * torch.rand(shape, generator=generator)).to(DEVICE)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(DEVICE)

    attend.__name__, weigh.__name__ = "conditional_attention", "prepare_weights"
    convolve_twice.__name__ = "convolution_pair"
    counts = torch.tensor([7, 3], dtype=torch.int32, device=DEVICE)
    valid = torch.tensor([[9, 11], [4, 7]], dtype=torch.int32, device=DEVICE)
    mask = torch.arange(99, device=DEVICE) >= torch.tensor([[99], [40]], device=DEVICE)
    bfloat16, float32 = (
        [normal(2, n, 8, 32, dtype=dtype) for n in (70, 70, 99, 99, 9, 11)] for dtype in (torch.bfloat16, torch.float32)
    )
    yield Case(attend, bfloat16, [], {"valid_cells": valid}, "rows and columns")
    yield Case(attend, [*float32[:4], normal(2, 99, 8, 32)], [], {"key_padding_mask": mask}, "dense keys")
    yield Case(kernels.sine_embedding, [uniform(50, 2)])
    yield Case(kernels.conditional_spatial_query, [uniform(50, 2), normal(50, 256)])
    projected = [normal(9, 50, 256), normal(50, 256), normal(256, 256), normal(256)]
    yield Case(kernels.spatial_query, projected)
    yield Case(kernels.spatial_query, [x.bfloat16() for x in projected])
    logits, boxes = normal(2, 2, 30, 91), uniform(2, 2, 30, 4)
    labels, objects = integers(0, 91, 2, 7), uniform(2, 7, 4)
    yield Case(kernels.predicted_boxes, [normal(2, 2, 30, 4), uniform(30, 2)])
    yield Case(kernels.focal_loss, [logits], [integers(-1, 91, 2, 2, 30)])
    yield Case(kernels.matched_box_loss, [boxes], [objects, integers(-1, 7, 2, 2, 30)])
    yield Case(kernels.matching_cost, [], [logits, boxes, labels, objects, counts])
    yield Case(kernels.prediction_errors, [], [logits, integers(-1, 7, 2, 2, 30), labels, counts])
    yield Case(kernels.grid_positions, [], [normal(2, 3, 9, 11), (288, 352), 64, 32 * valid])
    yield Case(kernels.max_pool, [], [normal(2, 5, 9, 11).contiguous(memory_format=torch.channels_last)])
    yield Case(kernels.linear_assignment, [], [normal(2, 2, 7, 30), counts])
    yield Case(kernels.relu_dropout, [normal(50, 33)], [RARE])
    yield Case(kernels.relu_dropout, [normal(50, 33)], [RARE], {"bias": normal(33)}, "bias")
    tokens, vectors = [normal(2, 25, 33), normal(2, 25, 33)], [normal(33) for _ in range(3)]
    others = {"branch_bias": vectors[2], "position": normal(1, 25, 33), "dropout_p": RARE}
    yield Case(kernels.add_norm, [*tokens, *vectors[:2]], [], others)
    yield Case(kernels.dropout_add, [normal(50, 33), normal(50, 33)], [RARE])
    norm = FrozenNorm(*(uniform(5) for _ in range(4)), 1e-5)
    yield Case(weigh, [normal(5, 4, 3, 3), normal(3, 4), normal(6)], [norm])
    x, residual = (normal(2, 5, 9, 11).contiguous(memory_format=torch.channels_last) for _ in range(2))
    window = {"padding": (1, 1), "residual": residual, "relu": True, "uses": 2}
    yield Case(kernels.convolution, [x, normal(5, 5, 3, 3), normal(5)], [], window)
    yield Case(convolve_twice, [x, normal(5, 5, 1, 1), normal(5), normal(7, 5, 3, 3), normal(7)])
    image, weight = normal(1, 32, 9, 11), normal(32, 32, 3, 3)
    yield Case(kernels.convolution_3x3, [image, weight])
    yield Case(kernels.convolution_3x3_weight_gradient, [], [image, normal(1, 32, 9, 11)])


def check(case: Case, backend: str) -> bool:
    """Run a case and print its result; False if it failed."""
    title = f"{case.title}, {backend}"
    try:
        results = case.run(backend)
        torch.cuda.synchronize()
    except BackendError as error:
        print(f"none    {title}: {error}", flush=True)
        return True
    except Exception as error:
        # Any error may occur here, and the next operation may run all the same.
        print(f"FAILED  {title}: {type(error).__name__}: {error}", flush=True)
        return False
    if not HAS_NUMBERS:
        print(f"ran     {title}", flush=True)
        return True
    worst = max(difference(a, b) for a, b in zip(results, case.run("eager"), strict=True))
    bound = BOUND[(case.leaves or case.others)[0].dtype]
    # Written so that NaN fails.
    is_right = worst <= bound
    print(f"{'ok    ' if is_right else 'FAILED'}  {title}: differs by {worst:.1e}, bound {bound:.0e}", flush=True)
    return is_right


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected number."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


def captured_training() -> bool:
    """Train a few steps in bfloat16, in a CUDA graph, while a loader pins batches; False if that fails."""
    title = "training, bfloat16, CUDA graphs, a loader that pins"
    torch.manual_seed(0)
    try:
        # Requested by name, because no kernel is proven yet.
        model = conddetr.build("conditional-detr-tiny", num_classes=3, backend="triton").to(DEVICE).train()
        loader = make_loader(SyntheticShapes(32, 0), 4, train=True, workers=2, device=DEVICE)
        stepper = Stepper(model, TrainConfig(precision="bfloat16", cuda_graphs=True), DEVICE, len(loader))
        for step, batch in enumerate(loader):
            stepper([batch], step)
        stepper.flush()
    except Exception as error:
        print(f"FAILED  {title}: {type(error).__name__}: {error}")
        return False
    loss, graphs = stepper.means["loss"], len(stepper.graphs.recorded)
    is_right = graphs == 1 and stepper.skipped == 0 and (math.isfinite(loss) or not HAS_NUMBERS)
    skipped = f"{stepper.skipped} steps of {len(loader)} skipped"
    print(f"{'ok    ' if is_right else 'FAILED'}  {title}: loss {loss:.4g}, {graphs} graphs, {skipped}")
    return is_right


def is_usable() -> bool:
    """Whether the device still works: after an illegal access it fails every call of this process."""
    try:
        torch.zeros(1, device=DEVICE)
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main() -> None:
    """Run all checks; after a kernel that made the device fail, continue in a new process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip", type=int, default=0, help="number of checks already done")
    parser.add_argument("--failed", type=int, default=0, help="number of them that failed")
    options = parser.parse_args()
    failed = options.failed
    if not HAS_NUMBERS:
        print("a null GPU: nothing is compared")
    checks = [(case, backend) for case in cases() for backend in ("triton", "native")]
    for number, (case, backend) in enumerate(checks):
        if number < options.skip:
            continue
        failed += not check(case, backend)
        if not is_usable():
            progress = ("--skip", str(number + 1), "--failed", str(failed))
            os.execv(sys.executable, (sys.executable, __file__, *progress))
    failed += not captured_training()
    print(f"{failed} of {len(checks) + 1} checks failed")
    raise SystemExit(min(failed, 1))


if __name__ == "__main__":
    main()
