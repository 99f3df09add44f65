"""W (λ ⊙ p_s) + b: the kernels against float64, layouts of λ and p_s, sums of gradients."""

import pytest
import torch
import torch.nn.functional as F

from conddetr.kernels import registry, spatial_query

pytestmark = [pytest.mark.gpu, pytest.mark.compares_numbers]
NAMES = ("transform", "embedding", "weight", "bias")


def case(images, queries, channels, outputs, device, dtype=torch.float32, per_image=False):
    """λ, p_s (for all images, or per image), weight and bias, and the gradient of the result."""
    shapes = ((images, queries, channels), (images, queries, channels)[0 if per_image else 1 :], (outputs, channels))
    made = [torch.randn(shape, device=device).to(dtype) for shape in (*shapes, (outputs,))]
    return made, torch.randn(images, queries, outputs, device=device).to(dtype)


def results(call, tensors, upstream):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = call(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def plain(transform, embedding, weight, bias):
    return F.linear(transform * embedding, weight, bias)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(1, 1, 4, 3), (3, 21, 20, 33), (2, 35, 160, 130), (17, 5, 33, 70)])
def test_kernels_match_float64(sizes, dtype, per_image, device):
    """One row; remainders in every tile; several tiles; more images than a program processes at once."""
    tensors, upstream = case(*sizes, device, dtype, per_image)
    exact = results(plain, [x.double() for x in tensors], upstream.double())
    budgets = results(plain, tensors, upstream)
    actual = results(lambda *inputs: spatial_query(*inputs, backend="triton"), tensors, upstream)
    for ours, reference, truth in zip(actual, budgets, exact, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == truth.shape
        error, budget = ((x.double() - truth).abs().max().item() for x in (ours, reference))
        assert error <= 2 * budget + 4 * torch.finfo(dtype).eps * truth.abs().max().item()


def test_reference_is_the_formula():
    """The formula is written out as sums; gradients are checked by finite differences."""
    tensors, _ = case(2, 3, 4, 5, torch.device("cpu"), torch.float64)
    out = spatial_query(*tensors, backend="eager")
    transform, embedding, weight, bias = (x.tolist() for x in tensors)
    for image in range(2):
        for query in range(3):
            products = [a * b for a, b in zip(transform[image][query], embedding[query], strict=True)]
            for output in range(5):
                expected = sum(a * b for a, b in zip(products, weight[output], strict=True)) + bias[output]
                assert out[image, query, output].item() == pytest.approx(expected, abs=1e-12)
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *inputs: spatial_query(*inputs, backend="eager"), leaves)


@pytest.mark.parametrize("wanted", NAMES)
def test_each_gradient_alone(wanted, device):
    """Frozen inputs get no gradient and do not change the others' gradients."""
    tensors, upstream = case(3, 5, 20, 7, device)
    expected = dict(zip(NAMES, results(plain, tensors, upstream)[1:], strict=True))
    leaves = [x.clone().requires_grad_(name == wanted) for name, x in zip(NAMES, tensors, strict=True)]
    out = spatial_query(*leaves, backend="triton")
    out.backward(upstream)
    gradients = {name: x.grad for name, x in zip(NAMES, leaves, strict=True)}
    torch.testing.assert_close(gradients.pop(wanted), expected[wanted], atol=1e-5, rtol=1e-5)
    assert all(gradient is None for gradient in gradients.values())


def test_repeats_are_bitwise_equal(device):
    tensors, upstream = case(19, 13, 40, 24, device, torch.bfloat16)
    first, second = (results(lambda *x: spatial_query(*x, backend="triton"), tensors, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_inputs_are_saved_for_backward(device):
    """Backward recomputes λ ⊙ p_s."""
    tensors, _ = case(2, 5, 8, 8, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        spatial_query(*(x.requires_grad_() for x in tensors), backend="triton")
    assert sorted(kept) == sorted(x.data_ptr() for x in tensors[:3])


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_bias_for_every_row(backend, device):
    """The sum of its gradient over rows is the gradient of a single bias."""
    tensors, upstream = case(3, 5, 20, 7, device)
    *others, bias = tensors
    expected = results(plain, tensors, upstream)
    actual = results(lambda *inputs: spatial_query(*inputs, backend=backend), [*others, bias.expand(15, -1)], upstream)
    *same, rows_grad = actual
    for ours, reference in zip((*same, rows_grad.sum(0)), expected, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)


def test_strides_and_dimensions(device):
    """Inputs need not be contiguous; images may have several dimensions, none, or no elements."""
    (transform, embedding, weight, bias), _ = case(6, 5, 20, 7, device)

    def call(*inputs):
        return spatial_query(*inputs, backend="triton")

    expected = call(transform, embedding, weight, bias)
    transposed = [x.t().contiguous().t() for x in (embedding, weight)]
    wide = torch.stack([bias, bias], -1)[:, 0]
    assert torch.equal(call(transform.transpose(0, 1).contiguous().transpose(0, 1), *transposed, wide), expected)
    assert torch.equal(call(transform.view(2, 3, 5, 20), embedding, weight, bias), expected.view(2, 3, 5, 7))
    torch.testing.assert_close(call(transform[0], embedding, weight, bias), expected[0])
    upstream = torch.randn(7, 5, 6, device=device).permute(2, 1, 0)
    actual = results(call, (transform, embedding, weight, bias), upstream)
    for ours, truth in zip(actual, results(plain, (transform, embedding, weight, bias), upstream), strict=True):
        torch.testing.assert_close(ours, truth, atol=1e-5, rtol=1e-5)
    for empty in (transform[:0], transform[:, :0]):
        inputs = (empty, embedding[: empty.shape[1]], weight, bias)
        out, *gradients = results(call, inputs, torch.empty(*empty.shape[:2], 7, device=device))
        assert out.shape == (*empty.shape[:2], 7)
        assert [x.abs().sum().item() for x in gradients] == [0] * 4


@pytest.mark.parametrize("is_single", [False, True])
def test_operator_registration(is_single, device):
    tensors, _ = case(1 if is_single else 2, 5, 9, 6, device)
    inputs = tuple(x.requires_grad_() for x in tensors)
    torch.library.opcheck(torch.ops.conddetr.spatial_query.default, inputs)


def test_compiles_without_a_graph_break(device):
    tensors, upstream = case(2, 5, 20, 7, device)

    def call(*inputs):
        return spatial_query(*inputs, backend="triton")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(results(compiled, tensors, upstream), results(call, tensors, upstream), strict=True):
        assert torch.equal(actual, expected)


def test_flops_are_counted_as_in_plain_pytorch(device):
    from torch.utils.flop_counter import FlopCounterMode

    tensors, upstream = case(2, 5, 20, 7, device)
    counted = []
    for call in (plain, lambda *inputs: spatial_query(*inputs, backend="triton")):
        with FlopCounterMode(display=False) as counter:
            results(call, tensors, upstream)
        counted.append(counter.get_total_flops())
    assert counted == [3 * 2 * 10 * 20 * 7] * 2


def test_errors(device):
    (transform, embedding, weight, bias), _ = case(2, 5, 8, 6, device)
    with pytest.raises(ValueError, match=r"transform: expected \[..., Q, C\], floating, got \(8,\) torch.float32"):
        spatial_query(transform[0, 0], embedding, weight, bias)
    with pytest.raises(ValueError, match=r"embedding: expected \(5, 8\) or \(2, 5, 8\), got \(4, 8\)"):
        spatial_query(transform, embedding[:4], weight, bias)
    with pytest.raises(ValueError, match=r"weight: expected \(O, 8\), got \(6, 7\)"):
        spatial_query(transform, embedding, weight[:, :7], bias)
    with pytest.raises(ValueError, match=r"bias: expected \(6,\) or \(10, 6\), got \(9, 6\)"):
        spatial_query(transform, embedding, weight, bias.expand(9, -1))
    with pytest.raises(ValueError, match=r"weight: expected torch.float32 on .* like transform, got torch.bfloat16"):
        spatial_query(transform, embedding, weight.bfloat16(), bias)
    with pytest.raises(registry.BackendError, match="no kernels of this backend"):
        spatial_query(transform, embedding, weight, bias, backend="native")
