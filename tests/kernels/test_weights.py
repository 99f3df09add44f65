"""The weights of a step: the kernels against the reference, and their gradients against float64."""

import pytest
import torch

from conddetr.kernels import registry
from conddetr.kernels.common.launch import REPLICAS
from conddetr.kernels.weights import FrozenNorm, Replicas, Shift, Weight, prepare_weights

pytestmark = [pytest.mark.gpu, pytest.mark.compares_numbers]


def parameter(*shape, device, dtype=torch.float32, order=torch.contiguous_format):
    return torch.randn(shape, device=device, dtype=dtype).to(memory_format=order).requires_grad_()


def all_recipes(device, dtype=torch.float32):
    """Recipes of every type: with two blocks and less than one, in both memory formats, trained and frozen."""
    norm = FrozenNorm(*(torch.rand(6, device=device, dtype=dtype) + 0.5 for _ in range(4)), 1e-5)
    make = {"device": device, "dtype": dtype}
    frozen, cut = parameter(6, 5, 3, 3, **make).detach(), parameter(12, 8, **make)
    return [
        Weight((cut,), rows=(0, 8)),
        Weight((cut,), rows=(8, 12)),
        Weight((parameter(6, 70, 3, 3, **make),), norm),
        Shift(norm),
        Weight((parameter(6, 5, 1, 1, **make),), norm),
        Weight((parameter(6, 4, 3, 2, order=torch.channels_last, **make),)),
        Weight((parameter(7, 8, **make), parameter(3, 8, **make), parameter(1, 8, **make))),
        Weight((parameter(9, **make), parameter(2, **make))),
        Replicas(parameter(300, **make)),
        Weight((frozen,), norm),
    ]


def parameters_of(recipes):
    parts = [part for r in recipes for part in getattr(r, "parts", (getattr(r, "vector", None),)) if part is not None]
    return list({id(part): part for part in parts if part.requires_grad}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_match_the_reference(dtype, device):
    """Values are rounded as often as in the reference; the sums of replicas equal those in float64."""
    recipes = all_recipes(device)
    actual, expected = (prepare_weights(recipes, dtype, backend) for backend in ("triton", "eager"))
    # The scale is a reciprocal square root, whose last bit may differ.
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    for ours, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, reference, **tolerance)
        assert ours.requires_grad == reference.requires_grad
    upstream = [torch.randn(x.shape, device=device).to(x.dtype) for x in actual]
    parameters = parameters_of(recipes)
    gradients = []
    for made in (actual, expected):
        total = sum((x.double() * g.double()).sum() for x, g in zip(made, upstream, strict=True) if x.requires_grad)
        gradients.append(torch.autograd.grad(total, parameters))
    for ours, reference, trained in zip(*gradients, parameters, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-4 if ours.shape == (300,) else 1e-6)
        # Other strides would cost a copy in autograd. A parameter that is returned unchanged has PyTorch's gradient.
        assert dtype == torch.float32 or ours.stride() == trained.stride()


def test_folded_convolution_equals_convolution_and_norm(device):
    x = torch.randn(2, 5, 6, 7, device=device)
    conv = parameter(6, 5, 3, 3, device=device)
    norm = FrozenNorm(*(torch.rand(6, device=device) + 0.5 for _ in range(4)), 1e-5)
    weight, shift = prepare_weights([Weight((conv,), norm), Shift(norm)], torch.float32, "triton")
    expected = torch.nn.functional.batch_norm(
        torch.nn.functional.conv2d(x, conv), norm.mean, norm.variance, norm.weight, norm.bias, eps=norm.eps
    )
    torch.testing.assert_close(torch.nn.functional.conv2d(x, weight, shift), expected, rtol=1e-5, atol=1e-5)


def test_unused_parameters_have_no_gradient(device):
    recipes = all_recipes(device)
    made = prepare_weights(recipes, torch.bfloat16, "triton")
    parameters = parameters_of(recipes)
    gradients = torch.autograd.grad(made[6].float().sum(), parameters, allow_unused=True)
    stacked = recipes[6].parts
    for trained, gradient in zip(parameters, gradients, strict=True):
        assert (gradient is not None) == any(trained is part for part in stacked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_sum_the_gradients_of_their_uses(dtype, device):
    tied, untied, vector = (parameter(*shape, device=device) for shape in ((6, 4), (2, 4), (5,)))
    recipes = [
        Weight((tied, untied, tied)),
        Weight((tied,)),
        Weight((tied,), rows=(0, 3)),
        Weight((tied,), rows=(2, 6)),
        Weight((untied,), rows=(0, 1)),
        Weight((untied,), rows=(1, 2)),
        Replicas(vector),
        Replicas(vector),
    ]
    actual, expected = (prepare_weights(recipes, dtype, backend) for backend in ("triton", "eager"))
    upstream = [torch.randn(x.shape, device=device).to(x.dtype) for x in actual]
    gradients = [torch.autograd.grad(made, (tied, untied, vector), upstream) for made in (actual, expected)]
    for ours, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
    with torch.no_grad():
        for ours, exact in zip(prepare_weights(recipes, dtype, "triton"), expected, strict=True):
            torch.testing.assert_close(ours, exact)


def test_gradient_of_unused_rows_is_zero(device):
    weight = parameter(6, 4, device=device)
    first, _ = prepare_weights(
        [Weight((weight,), rows=(0, 2)), Weight((weight,), rows=(2, 6))], torch.float16, "triton"
    )
    first.float().sum().backward()
    assert weight.grad.sum(1).tolist() == [4, 4, 0, 0, 0, 0]


def test_parameter_in_the_right_layout_and_dtype_is_not_copied(device):
    matrix, conv = parameter(4, 3, device=device), parameter(4, 3, 3, 3, device=device)
    same, reordered = prepare_weights([Weight((matrix,)), Weight((conv,))], torch.float32, "triton")
    assert same is matrix
    assert reordered.is_contiguous(memory_format=torch.channels_last)


def test_replicas_share_memory(device):
    vector = parameter(5, device=device)
    [replicas] = prepare_weights([Replicas(vector)], torch.bfloat16, "triton")
    assert replicas.shape == (REPLICAS, 5)
    assert replicas.stride() == (0, 1)
    assert replicas.data_ptr() == vector.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_copies_are_summed(dtype, device):
    """Stacked vectors, and parts of a vector, with more rows and columns than a program processes at once."""
    first, second, cut = (parameter(size, device=device) for size in (9, 40, 12))
    parts = (Weight((cut,), rows=rows, copies=copies) for rows, copies in (((0, 8), 3), ((8, 12), 5)))
    recipes = [Weight((first, second), copies=200), *parts]
    made = prepare_weights(recipes, dtype, "triton")
    for copies, vector in zip(made, (torch.cat([first, second]), cut[:8], cut[8:]), strict=True):
        # Triton's interpreter rounds to bfloat16 differently.
        expected = vector.to(dtype).expand(len(copies), -1)
        torch.testing.assert_close(copies, expected, rtol=torch.finfo(dtype).eps, atol=0)
        assert copies.stride() == (0, 1)
    upstream = [torch.randn(x.shape, device=device).to(dtype) for x in made]
    gradients = torch.autograd.grad(made, (first, second, cut), upstream)
    sums = [x.double().sum(0) for x in upstream]
    for gradient, exact in zip(gradients, (sums[0][:9], sums[0][9:], torch.cat(sums[1:])), strict=True):
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_recipes_are_computed_once_and_their_gradients_summed(dtype, device):
    matrix, conv, bias, vector = (parameter(*shape, device=device) for shape in ((70, 40), (3, 4, 3, 3), (6,), (5,)))
    stack = Weight((matrix, parameter(2, 40, device=device)))
    twice = [stack, Weight((conv,)), Weight((bias,), copies=150), Replicas(vector)]
    recipes = [*twice, Replicas(vector), *twice, stack]
    made = prepare_weights(recipes, dtype, "triton")
    assert len({x.data_ptr() for x in (made[0], made[5], made[9])}) == 1
    upstream = [torch.randn(x.shape, device=device).to(x.dtype) for x in made]
    # The last use gets no gradient, like that of an unused layer.
    gradients = torch.autograd.grad(made[:4] + made[5:9], (matrix, conv, bias), upstream[:4] + upstream[5:9])
    first, second = (
        torch.stack([a.double(), b.double()]).sum(0) for a, b in zip(upstream[:2], upstream[5:7], strict=True)
    )
    rows = torch.cat([upstream[2], upstream[7]]).double().sum(0)
    for gradient, exact in zip(gradients, (first[:70], second, rows), strict=True):
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-4)


def test_unsupported_weights_raise(device):
    gaps = parameter(8, 8, device=device)[:, ::2]
    mixed = [Weight((parameter(4, 4, device=device),)), Weight((parameter(4, 4, device=device, dtype=torch.float16),))]
    with pytest.raises(registry.BackendError, match="without gaps"):
        prepare_weights([Weight((gaps,))], torch.bfloat16, "triton")
    with pytest.raises(registry.BackendError, match=r"one dtype, not torch.float16, torch.float32"):
        prepare_weights(mixed, torch.bfloat16, "triton")
    torch.testing.assert_close(prepare_weights([Weight((gaps,))], torch.bfloat16)[0], gaps.bfloat16())


def test_second_derivatives_raise(device):
    weight = parameter(4, 4, device=device)
    [made] = prepare_weights([Weight((weight,))], torch.bfloat16, "triton")
    [gradient] = torch.autograd.grad(made.float().square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"prepare_weights has first derivatives only: .*backend="):
        gradient.sum().backward()
