"""Predicted boxes: the kernels against the reference in float64, the edges of the reference points, errors."""

import pytest
import torch

from conddetr.kernels import predicted_boxes, registry
from conddetr.kernels.prediction import inverse_sigmoid

pytestmark = [pytest.mark.gpu, pytest.mark.compares_numbers]

EDGES = (2e-6, 1 - 2e-6, 1e-4, 1 - 1e-4, -0.5, 1.5, 0.25, 0.75)
"""Points on both sides of the clamp's limits; at 0 and 1 themselves PyTorch versions differ in `clamp`'s gradient."""


def case(layers=2, batch=3, queries=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(queries, 2, generator=generator)
    points[:4] = torch.tensor(EDGES).view(4, 2)
    return torch.randn(layers, batch, queries, 4, generator=generator).to(dtype), points


def run(backend, offsets, points, upstream):
    leaves = [x.detach().clone().requires_grad_() for x in (offsets, points)]
    out = predicted_boxes(*leaves, backend=backend)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("layers", "queries"), [(2, 7), (13, 20)])
def test_kernels_err_no_more_than_pytorch(layers, queries, dtype, device):
    """With one block and with several, forward and backward; offsets and points may differ in dtype."""
    offsets, points = (x.to(device) for x in case(layers, queries=queries, dtype=dtype))
    upstream = torch.randn(offsets.shape, device=device)
    for cast in (points, points.to(dtype)):
        actual = run("triton", offsets, cast, upstream)
        expected = run("eager", offsets.double(), cast.double(), upstream)
        assert [x.dtype for x in actual] == [torch.promote_types(dtype, cast.dtype), dtype, cast.dtype]
        in_torch = run("eager", offsets, cast, upstream)
        for ours, reference, truth in zip(actual, in_torch, expected, strict=True):
            error, allowed = ((x.double() - truth).abs().max() / truth.abs().max() for x in (ours, reference))
            assert error <= 2 * allowed + 2 * torch.finfo(ours.dtype).eps


def test_gradients_of_clamped_points_are_zero(device):
    offsets, points = (x.to(device) for x in case())
    *_, points_grad = run("triton", offsets, points, torch.ones_like(offsets))
    *_, expected = run("eager", offsets, points, torch.ones_like(offsets))
    assert torch.equal(points_grad == 0, expected == 0)
    assert (points_grad[2] == 0).all(), "outside the image"
    torch.testing.assert_close(points_grad, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_nan_propagates_and_edges_are_clamped(device):
    offsets, points = (x.to(device) for x in case())
    points[4] = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(predicted_boxes(offsets, points, "triton"), predicted_boxes(offsets, points, "eager"))
    points[5, 1], offsets[0, 1, 6, 3] = torch.nan, torch.nan
    expected = predicted_boxes(offsets, points, "eager").isnan()
    assert torch.equal(predicted_boxes(offsets, points, "triton").isnan(), expected)
    assert expected.sum() == 7


def test_any_layout_and_no_images(device):
    offsets, points = (x.to(device) for x in case())
    transposed = offsets.transpose(0, 1).contiguous().transpose(0, 1)
    actual = predicted_boxes(transposed, points.t().contiguous().t(), "triton")
    torch.testing.assert_close(actual, predicted_boxes(offsets, points, "eager"))
    assert predicted_boxes(offsets[:, :0], points, "triton").shape == (2, 0, 7, 4)


def test_reference_gradients():
    offsets, points = case(1, 2, 5, torch.float64)
    points = points.double().clamp(0.1, 0.9)
    arguments = (offsets.requires_grad_(), points.requires_grad_())
    assert torch.autograd.gradcheck(lambda *x: predicted_boxes(*x, backend="eager"), arguments)
    boxes = predicted_boxes(torch.zeros_like(offsets), points, "eager")
    torch.testing.assert_close(boxes[0, 0, :, :2], points)
    torch.testing.assert_close(inverse_sigmoid(points).sigmoid(), points)


def test_operator_registration(device):
    arguments = [x.to(device).requires_grad_() for x in case()]
    torch.library.opcheck(torch.ops.conddetr.predicted_boxes.default, arguments)
    boxes = predicted_boxes(*arguments, backend="triton")
    [first] = torch.autograd.grad(boxes.sum(), arguments[:1], create_graph=True)
    with pytest.raises(registry.BackendError, match="predicted_boxes has first derivatives only"):
        first.sum().backward()


def test_errors():
    offsets, points = case()
    with pytest.raises(ValueError, match=r"offsets: expected \[L, B, Q, 4\], floating, got \(3, 7, 4\)"):
        predicted_boxes(offsets[0], points)
    with pytest.raises(ValueError, match=r"points: expected \(7, 2\), floating, got \(6, 2\)"):
        predicted_boxes(offsets, points[:6])
    with pytest.raises(ValueError, match="points: expected device cpu like offsets, got meta"):
        predicted_boxes(offsets, points.to("meta"))
