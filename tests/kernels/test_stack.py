"""Stacking without a copy: memory, values, gradients of any order, and the cases that need a copy."""

import pytest
import torch

from conddetr.kernels.stack import stacked, unstacked


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_unstacked_parts_are_stacked_in_the_same_memory():
    x = leaf(3, 2, 4)
    y = x * 1
    parts = unstacked(y)
    again = stacked(parts)
    assert torch.equal(again, y)
    assert again.data_ptr() == y.data_ptr()
    upstream = torch.randn_like(y)
    seen = []
    y.register_hook(seen.append)
    again.backward(upstream)
    assert torch.equal(x.grad, upstream)
    assert seen[0].data_ptr() == upstream.data_ptr()


@pytest.mark.parametrize("change", ["replaced", "in another order", "fewer", "not contiguous", "empty"])
def test_other_parts_are_copied(change):
    x = leaf(3, 2, 4)
    parts = list(unstacked(x * 1))
    if change == "replaced":
        parts[1] = parts[1] * 2
    elif change == "in another order":
        parts.reverse()
    elif change == "fewer":
        del parts[1]
    elif change == "not contiguous":
        parts = [part.t() for part in parts]
    else:
        parts = [part[:0] for part in parts]
    actual, expected = stacked(parts), torch.stack(parts)
    assert torch.equal(actual, expected)
    weights = torch.randn_like(actual)
    (our_grad,) = torch.autograd.grad((actual * weights).sum(), x, retain_graph=True)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), x)
    assert torch.equal(our_grad, expected_grad)


def test_hooks_and_retained_gradients_get_each_part():
    x, seen = leaf(3, 2, 4), []
    parts = unstacked(x * 1)
    parts[1].retain_grad()
    parts[2].register_hook(lambda grad: seen.append(grad) or 2 * grad)
    upstream = torch.randn(3, 2, 4, dtype=torch.float64)
    stacked(parts).backward(upstream)
    assert torch.equal(parts[1].grad, upstream[1])
    assert torch.equal(seen[0], upstream[2])
    assert torch.equal(x.grad, upstream * torch.tensor([1, 1, 2]).view(3, 1, 1))


def test_higher_derivatives_and_batches():
    x = leaf(3, 2)

    def run(x):
        return stacked(unstacked(x.sin())).cos()

    assert torch.autograd.gradcheck(run, (x,), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, (x,))
    expected = torch.func.vmap(lambda x: x.sin().cos())(x)
    assert torch.equal(torch.func.vmap(run)(x), expected)
    assert torch.equal(torch.compile(run, backend="eager", fullgraph=True)(x), expected)


def test_gradients_of_unused_parts_are_zero():
    x = leaf(3, 2)
    unstacked(x * 2)[1].sum().backward()
    assert x.grad.tolist() == [[0, 0], [2, 2], [0, 0]]
