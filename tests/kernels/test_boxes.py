"""Box losses: GIoU against torchvision and the official values, and the kernels against the reference."""

import pytest
import torch
from golden_rule import read_arrays
from torchvision import ops

from conddetr.kernels import matched_box_loss
from conddetr.kernels.boxes import generalized_iou

pytestmark = [pytest.mark.gpu, pytest.mark.compares_numbers]

LARGEST = torch.finfo(torch.float32).max


def test_official_pairs():
    golden = read_arrays("p5_cdetr")
    giou = generalized_iou(golden["box/xyxy1"][:, None], golden["box/xyxy2"][None])
    torch.testing.assert_close(giou, golden["box/giou"], atol=1e-6, rtol=0)


def test_against_torchvision():
    a, b = (torch.rand(50, 4, dtype=torch.float64) for _ in range(2))
    a, b = (torch.cat([box[:, :2], box[:, :2] + box[:, 2:]], 1) for box in (a, b))
    torch.testing.assert_close(generalized_iou(a[:, None], b[None]), ops.generalized_box_iou(a, b))
    torch.testing.assert_close(generalized_iou(a, b), ops.generalized_box_iou(a, b).diagonal())


def test_gradient():
    a = torch.tensor([[0.1, 0.1, 0.5, 0.6]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[0.3, 0.2, 0.9, 0.7]], dtype=torch.float64)
    assert torch.autograd.gradcheck(generalized_iou, (a, b))


def case(layers=2, batch=3, queries=7, capacity=4, dtype=torch.float64):
    """Random predictions and objects; each layer matches the objects of an image with random queries."""
    boxes, objects = torch.rand(layers, batch, queries, 4), torch.rand(batch, capacity, 4)
    assignment = torch.full((layers, batch, queries), -1)
    for layer in range(layers):
        for image in range(batch):
            query = torch.randperm(queries)[: min(capacity - image % 2, queries)]
            assignment[layer, image, query] = torch.randperm(capacity)[: len(query)]
    # Derivatives jump at equal boxes (first layer) and at a shared edge (last layer).
    objects[0, 0] = torch.tensor([0.5, 0.5, 0.25, 0.25])
    for layer, box in ((0, objects[0, 0]), (-1, torch.tensor([0.75, 0.5, 0.25, 0.125]))):
        boxes[layer, 0, assignment[layer, 0] == 0] = box
    return boxes.to(dtype), objects, assignment


def loop(boxes, objects, assignment):
    """The losses one pair at a time, with torchvision's GIoU."""
    totals = torch.zeros(2, len(boxes), dtype=torch.float64)
    for layer, image, query in (assignment >= 0).nonzero().tolist():
        a, b = boxes[layer, image, query].double(), objects[image, assignment[layer, image, query]].double()
        corners = (ops.box_convert(box[None], "cxcywh", "xyxy") for box in (a, b))
        totals[0, layer] += (a - b).abs().sum()
        totals[1, layer] += 1 - ops.generalized_box_iou(*corners)[0, 0]
    return totals


def test_reference_against_a_loop():
    boxes, objects, assignment = case()
    torch.testing.assert_close(matched_box_loss(boxes, objects, assignment), loop(boxes, objects, assignment))


def test_reference_gradients():
    boxes, objects, assignment = case(1, 2, 3, 2)
    boxes += 0.01 * torch.rand_like(boxes)  # away from the jumps
    run = lambda x: matched_box_loss(x, objects, assignment)  # noqa: E731
    assert torch.autograd.gradcheck(run, boxes.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [7, 150])
def test_kernels_match_the_reference(queries, dtype, device):
    boxes, objects, assignment = case(queries=queries, dtype=dtype)
    upstream = torch.randn(2, len(boxes))

    def run(backend, dtype):
        leaf = boxes.to(device, dtype).requires_grad_()
        losses = matched_box_loss(leaf, objects.to(device), assignment.to(device), backend)
        return losses.detach(), torch.autograd.grad(losses, leaf, upstream.to(device, losses.dtype))[0]

    exact, plain, actual = run("eager", torch.float64), run("eager", dtype), run("triton", dtype)
    assert actual[0].dtype == torch.float32
    assert actual[1].dtype == dtype
    assert (actual[1].cpu()[assignment < 0] == 0).all()
    # Ties in float64 are ties in the narrower dtypes too, because the boxes are the same numbers.
    for ours, reference, truth in zip(actual, plain, exact, strict=True):
        error, budget = ((x.double() - truth).abs().max().item() for x in (ours, reference))
        assert error <= 2 * budget + 4 * torch.finfo(ours.dtype).eps * truth.abs().max().item()


@pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning"
)  # from numpy: the L1 distance of the last pair
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_giou_of_empty_and_huge_boxes_is_finite(backend, device):
    pairs = torch.tensor(
        [
            [[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]],  # the same point
            [[0.5, 0.5, 0.0, 0.8], [0.5, 0.5, 0.0, 0.8]],  # the same line
            [[0.5, 0.5, 0.0, 0.8], [0.7, 0.5, 0.0, 0.8]],
            [[0.5, 0.5, 1e-30, 1e-30], [0.5, 0.5, 1e-30, 1e-30]],
            [[1e20, 1e20, 1e20, 1e20], [-1e20, -1e20, 1e20, 1e20]],
            [[1e20, 1e20, 1e20, 1e20], [1e20, 1e20, 1e20, 1e20]],
            [[0.5, 0.5, 1e-38, LARGEST], [0.5, 0.5, 1e-38, LARGEST]],
            [[LARGEST, LARGEST, LARGEST, LARGEST], [-LARGEST, -LARGEST, LARGEST, LARGEST]],
        ],
        device=device,
    )
    boxes, objects = pairs[None, None, :, 0].clone().requires_grad_(), pairs[None, :, 1]
    l1, giou = matched_box_loss(boxes, objects, torch.arange(8, device=device).view(1, 1, 8), backend)
    (l1.sum() + giou.sum()).backward()
    assert l1.item() == float("inf"), "the last pair's distance exceeds float32"
    # No area: 1; apart: 4/3 on lines, and 1 + 7/9 for squares one side apart; equal: 0.
    assert giou.item() == pytest.approx(1 + 1 + 2 + 1 + 16 / 9 + 0 + 1 + 16 / 9, rel=1e-5)
    assert torch.isfinite(boxes.grad).all()
    assert boxes.grad.abs().max() < 1e3


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_no_objects(backend, device):
    boxes = torch.rand(2, 3, 5, 4, device=device, requires_grad=True)
    unmatched = torch.full((2, 3, 5), -1, device=device)
    losses = matched_box_loss(boxes, torch.zeros(3, 0, 4, device=device), unmatched, backend)
    losses.sum().backward()
    assert (losses == 0).all()
    assert (boxes.grad == 0).all()


def test_operator_registration(device):
    boxes, objects, assignment = (x.to(device) for x in case(dtype=torch.float32))
    torch.library.opcheck(torch.ops.conddetr.matched_box_loss.default, (boxes.requires_grad_(), objects, assignment))


def test_errors():
    boxes, objects, assignment = case()
    with pytest.raises(ValueError, match=r"boxes: expected \[L, B, Q, 4\], floating, got \(3, 7, 4\) torch.float64"):
        matched_box_loss(boxes[0], objects, assignment)
    with pytest.raises(ValueError, match=r"objects: expected \(3, 4, 4\), floating, got \(2, 4, 4\) torch.float32"):
        matched_box_loss(boxes, objects[:2], assignment)
    with pytest.raises(ValueError, match=r"assignment: expected \(2, 3, 7\) torch.int64, got \(2, 3, 7\) torch.int32"):
        matched_box_loss(boxes, objects, assignment.int())
