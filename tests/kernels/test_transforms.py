"""Function transforms, forward-mode and second derivatives of every operation: correct, or an error with the remedy.

The plain implementations are compared with finite differences in float64, `auto` with the plain ones.
"""

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from conddetr import kernels
from conddetr.kernels import registry

EAGER = 'backend="eager"'
WIDTH = 32 if torch.cuda.is_available() else 16
"""Channels of attention: native kernels need 32 on a GPU, Triton's at least 16."""
pytestmark = [pytest.mark.gpu, pytest.mark.compares_numbers]


class Operation(NamedTuple):
    """An operation as a function of its differentiable tensors, here float64."""

    call: Callable
    inputs: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(tensor.to(dtype) for tensor in self.inputs)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def boxes(*shape: int) -> Tensor:
    return torch.rand(*shape, 4, dtype=torch.float64) * 0.3 + 0.3


def separable_attention() -> Operation:
    spatial, keys, valid = normal(1, 2, 1, WIDTH), normal(1, 6, 1, WIDTH), torch.tensor([[2, 2]], dtype=torch.int32)

    def call(content, rows, columns, v, backend):
        cast = (x.to(content.dtype) for x in (spatial, keys))
        return kernels.conditional_attention(content, *cast, (rows, columns), v, valid_cells=valid, backend=backend)

    return Operation(
        call, (normal(1, 2, 1, WIDTH), normal(1, 2, 1, WIDTH), normal(1, 3, 1, WIDTH), normal(1, 6, 1, WIDTH))
    )


def dense_attention() -> Operation:
    content, mask = normal(1, 2, 1, WIDTH), torch.tensor([[True, False, False, True, False, False]])

    def call(spatial, *keys_and_values, backend):
        return kernels.conditional_attention(
            content.to(spatial.dtype), spatial, *keys_and_values, key_padding_mask=mask, backend=backend
        )

    return Operation(call, (normal(1, 2, 1, WIDTH), *(normal(1, 6, 1, WIDTH) for _ in range(3))))


def embedding() -> Operation:
    return Operation(partial(kernels.sine_embedding, dim=8, temperature=20.0), (boxes(2)[:, :2],))


def spatial_query() -> Operation:
    return Operation(partial(kernels.conditional_spatial_query, temperature=20.0), (boxes(2)[:, :2], normal(2, 8)))


def projected_query() -> Operation:
    def call(transform, embedding, weight, bias, backend):
        return kernels.spatial_query(transform, embedding, weight, bias, backend)

    return Operation(call, (normal(2, 3, 8), normal(3, 8), normal(5, 8), normal(5)))


def focal(gamma: float) -> Operation:
    return Operation(
        partial(kernels.focal_loss, target=torch.tensor([[0, -1, 3], [1, 1, 2]]), gamma=gamma), (normal(2, 3, 4),)
    )


def box_loss() -> Operation:
    objects, assignment = boxes(2, 2), torch.tensor([[[0, -1, 1], [-1, 1, 0]]])

    def call(x, backend):
        return kernels.matched_box_loss(x, objects.to(x.dtype), assignment, backend)

    return Operation(call, (boxes(1, 2, 3),))


def dropout(function: Callable, count: int) -> Operation:
    def call(*tensors, backend):
        torch.manual_seed(3)
        return function(*tensors, 0.4, backend)

    return Operation(call, tuple(normal(3, 5) for _ in range(count)))


def relu_after_bias() -> Operation:
    def call(x, bias, backend):
        return kernels.relu_dropout(x, 0.0, backend, bias)

    return Operation(call, (normal(3, 5), normal(5)))


def norm_of_sum() -> Operation:
    position = normal(1, 3, 5)

    def call(branch, residual, weight, bias, branch_bias, backend):
        settings = {"branch_bias": branch_bias, "position": position.to(branch.dtype), "backend": backend}
        return torch.stack(kernels.add_norm(branch, residual, weight, bias, **settings))

    return Operation(call, (normal(2, 3, 5), normal(2, 3, 5), normal(5), normal(2, 5), normal(5)))


def cost() -> Operation:
    labels, objects, counts = torch.tensor([[1, 0]]), boxes(1, 2), torch.tensor([2], dtype=torch.int32)
    call = partial(kernels.matching_cost, labels=labels, objects=objects, counts=counts)
    return Operation(call, (normal(1, 1, 3, 2), boxes(1, 1, 3)))


ONCE = {
    "attention, separable keys": (separable_attention, registry.BACKENDS),
    "attention, dense keys": (dense_attention, registry.BACKENDS),
    "sine embedding": (embedding, registry.BACKENDS),
    "spatial query": (spatial_query, registry.BACKENDS),
    "projected spatial query": (projected_query, ("triton", "eager")),
    "focal loss": (partial(focal, 2.0), ("triton", "eager")),
    "focal loss, γ = 1.5": (partial(focal, 1.5), ("triton", "eager")),
    "box loss": (box_loss, ("triton", "eager")),
    "ReLU after a bias": (relu_after_bias, ("triton", "eager")),
    "norm of a sum": (norm_of_sum, ("triton", "eager")),
}
"""Operations whose kernels have first derivatives only."""
DROPOUT = {
    "ReLU and dropout": (partial(dropout, kernels.relu_dropout, 1), registry.BACKENDS),
    "dropout and sum": (partial(dropout, kernels.dropout_add, 2), ("native", "eager")),
}
OPERATIONS = {**ONCE, **DROPOUT, "matching cost": (cost, ("triton", "eager"))}


def make(name: str, device: torch.device, backend: str = "eager") -> Operation:
    """The operation on a device, if the backend has kernels for it there."""
    if name in DROPOUT and device.type != "cpu" and backend != "triton":
        pytest.skip("dropout has native kernels on CPUs only")
    reason = registry.why_not(backend, device, torch.float32)
    if reason is not None:
        pytest.skip(reason)
    with device:
        return OPERATIONS[name][0]()


def with_backends(names: Iterable[str]) -> pytest.MarkDecorator:
    """Each operation with each of its backends except the plain one."""
    pairs = [(name, backend) for name in names for backend in OPERATIONS[name][1] if backend != "eager"]
    return pytest.mark.parametrize(("name", "backend"), pairs)


def squared(function: Callable) -> Callable:
    return lambda *tensors: function(*tensors).square().sum()


def dual(function: Callable) -> Callable:
    def call(*tensors):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(*(forward_ad.make_dual(x, torch.ones_like(x)) for x in tensors)))

    return call


def over_two(function: Callable) -> Callable:
    return lambda *tensors: torch.func.vmap(function)(*(torch.stack([x, 0.9 * x]) for x in tensors))


def tangents(function: Callable) -> Callable:
    return lambda *tensors: torch.func.jvp(function, tensors, tuple(torch.ones_like(x) for x in tensors))


def pulled_back(function: Callable) -> Callable:
    def call(*tensors):
        out, pull = torch.func.vjp(function, *tensors)
        return pull(torch.ones_like(out))

    return call


TRANSFORMS = {
    "grad": lambda function, all_inputs: torch.func.grad(squared(function), all_inputs),
    "vjp": lambda function, _: pulled_back(function),
    "jacrev": lambda function, all_inputs: torch.func.jacrev(squared(function), all_inputs),
    "hessian": lambda function, all_inputs: torch.func.hessian(squared(function), all_inputs),
    "jvp": lambda function, _: tangents(function),
    "jacfwd": lambda function, all_inputs: torch.func.jacfwd(squared(function), all_inputs),
    "vmap": lambda function, _: over_two(function),
    "forward_ad": lambda function, _: dual(function),
}
"""Transform → its application to a function and the indices of its arguments."""


def flat(result: object) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(result)


@pytest.mark.parametrize("name", ONCE)
def test_plain_pytorch_against_finite_differences(name):
    operation = make(name, torch.device("cpu"))
    function = partial(operation.call, backend="eager")
    inputs = tuple(tensor.requires_grad_() for tensor in operation.inputs)
    options = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, **options)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_auto_falls_back_to_plain_pytorch(name, transform, device):
    if name in DROPOUT and transform in ("hessian", "jacfwd", "vmap"):
        pytest.skip("vmap must be told what to do with random numbers")
    operation = make(name, device)
    results = []
    for backend in ("auto", "eager"):
        torch.manual_seed(1)
        function = TRANSFORMS[transform](partial(operation.call, backend=backend), tuple(range(len(operation.inputs))))
        results.append(flat(function(*operation.to(torch.float32))))
    assert results[0]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("transform", TRANSFORMS)
@with_backends(OPERATIONS)
def test_backend_by_name_raises_with_the_remedy(name, backend, transform, device):
    operation = make(name, device, backend)
    public = {"vjp": "grad", "jacrev": "grad", "hessian": "grad", "jacfwd": "jvp"}.get(transform, transform)
    function = TRANSFORMS[transform](partial(operation.call, backend=backend), tuple(range(len(operation.inputs))))
    with pytest.raises(registry.BackendError, match=rf"torch\.(func|autograd)\.{public}.*{EAGER}"):
        function(*operation.to(torch.float32))


@with_backends(ONCE)
def test_kernels_have_first_derivatives_only(name, backend, device):
    operation = make(name, device, backend)
    gradients = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for used in (backend, "eager"):
            inputs = [tensor.requires_grad_() for tensor in operation.to(torch.float32)]
            value = squared(partial(operation.call, backend=used))(*inputs)
            gradients.append(torch.autograd.grad(value, inputs, create_graph=True))
        for actual, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
        penalty = sum(gradient.square().sum() for gradient in gradients[0])
        with pytest.raises(registry.BackendError, match=f"has first derivatives only: for second ones use {EAGER}"):
            penalty.backward()


@with_backends(ONCE)
def test_batches_of_gradients(name, backend, device):
    """`is_grads_batched` runs only backward inside vmap."""
    operation = make(name, device, backend)
    inputs = [tensor.requires_grad_() for tensor in operation.to(torch.float32)]
    out = operation.call(*inputs, backend=backend)
    upstream = torch.randn(2, *out.shape, device=device)
    batched = torch.autograd.grad(out, inputs, upstream, is_grads_batched=True, retain_graph=True)
    for index in range(2):
        expected = torch.autograd.grad(out, inputs, upstream[index], retain_graph=True)
        assert all(torch.equal(a[index], b) for a, b in zip(batched, expected, strict=True))


@pytest.mark.parametrize("name", DROPOUT)
def test_second_derivatives_of_dropout(name):
    operation = make(name, torch.device("cpu"), "native")
    inputs = tuple(tensor.requires_grad_() for tensor in operation.inputs)

    def function(*tensors):
        return operation.call(*tensors, backend="native").pow(3)

    assert torch.autograd.gradgradcheck(function, inputs)


def test_vmap_over_inputs_without_gradient():
    """Rectangles, targets and assignments that differ in each element of the batch."""
    content, keys = torch.randn(2, 1, 3, 2, 16), torch.randn(2, 1, 6, 2, 16)
    rows, columns = keys[:, :, :2], keys[:, :, :3]
    valid = torch.tensor([[[2, 2]], [[1, 3]]], dtype=torch.int32)
    logits, target = torch.randn(2, 1, 3, 4), torch.tensor([[[0, -1, 3]], [[1, 1, 2]]])
    predicted, objects = boxes(2, 1, 1, 3).float(), boxes(2, 1, 2).float()
    assignment = torch.tensor([[[[0, -1, 1]]], [[[-1, -1, 0]]]])
    empty = (predicted, objects[:, :, :0], torch.full_like(assignment, -1))

    def attend(content, keys, rows, columns, valid):
        return kernels.conditional_attention(content, content, keys, (rows, columns), keys, valid_cells=valid)

    for function, inputs in (
        (attend, (content, keys, rows, columns, valid)),
        (kernels.focal_loss, (logits, target)),
        (lambda target: kernels.focal_loss(logits[0], target), (target,)),
        (kernels.matched_box_loss, (predicted, objects, assignment)),
        (kernels.matched_box_loss, empty),
    ):
        expected = torch.stack([function(*(x[index] for x in inputs)) for index in range(2)])
        torch.testing.assert_close(torch.func.vmap(function)(*inputs), expected, atol=1e-6, rtol=1e-5)


def test_matching_inside_transforms():
    """Matching reads the values of the plain tensor. vmap has several values, and matching has no rule for it."""
    cost, counts = torch.randn(2, 2, 3), torch.tensor([2, 1], dtype=torch.int32)
    expected, assignments = kernels.linear_assignment(cost, counts, "eager"), []

    def function(cost):
        assignments.append(kernels.linear_assignment(cost, counts).tolist())
        return cost.sum()

    torch.func.grad(function)(cost)
    torch.func.jvp(function, (cost,), (cost,))
    torch.func.grad(lambda cost: torch.func.grad(function)(cost).sum())(cost)
    assert assignments == [expected.tolist()] * 3
    with pytest.raises(registry.BackendError, match=r"linear_assignment.* does not run inside torch\.func\.vmap"):
        torch.func.vmap(kernels.linear_assignment, in_dims=(0, None))(cost[:, None], counts[:1])


def test_kernels_run_under_functionalization():
    operation = make("attention, dense keys", torch.device("cpu"), "native")
    inputs = operation.to(torch.float32)
    function = partial(operation.call, backend="native")
    assert torch.equal(torch.func.functionalize(function)(*inputs), function(*inputs))


def test_gradient_inside_a_compiled_function():
    operation = make("attention, separable keys", torch.device("cpu"))
    inputs = operation.to(torch.float32)
    gradient = torch.func.grad(squared(partial(operation.call, backend="auto")), tuple(range(4)))
    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(*inputs), gradient(*inputs), strict=True):
        torch.testing.assert_close(actual, expected)
