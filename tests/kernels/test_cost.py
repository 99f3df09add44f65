"""Matching cost: the reference against the formula pair by pair, the kernel against the reference.

tests/loss compares it with official values.
"""

import math

import pytest
import torch
from torchvision import ops

from conddetr.kernels import matching_cost

pytestmark = [pytest.mark.gpu, pytest.mark.compares_numbers]

WEIGHTS = {"class_weight": 2.0, "bbox_weight": 5.0, "giou_weight": 2.0}


def case(layers=2, queries=6, classes=5, counts=(3, 0, 4), capacity=4, dtype=torch.float64):
    batch = len(counts)
    logits, boxes = 3 * torch.randn(layers, batch, queries, classes), torch.rand(layers, batch, queries, 4)
    labels, objects = torch.randint(0, classes, (batch, capacity)), torch.rand(batch, capacity, 4)
    return logits.to(dtype), boxes.to(dtype), labels, objects, torch.tensor(counts, dtype=torch.int32)


def class_cost(logits, label, activation):
    if activation == "softmax":
        return -logits.softmax(-1)[label].item()
    p = 1 / (1 + math.exp(-logits[label].item()))
    present = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8)
    return present - 0.75 * p**2 * -math.log(1 - p + 1e-8)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_reference_against_a_loop(activation):
    logits, boxes, labels, objects, counts = case()
    cost = matching_cost(logits, boxes, labels, objects, counts, activation=activation, **WEIGHTS)
    assert cost.shape == (2, 3, 4, 6)
    for layer, image, item, query in torch.cartesian_prod(*map(torch.arange, cost.shape)).tolist():
        expected = 0.0
        if item < counts[image]:
            a, b = boxes[layer, image, query], objects[image, item].double()
            corners = (ops.box_convert(box[None], "cxcywh", "xyxy") for box in (a, b))
            expected = 2 * class_cost(logits[layer, image, query], labels[image, item], activation)
            expected += 5 * (a - b).abs().sum().item() - 2 * ops.generalized_box_iou(*corners).item()
        assert cost[layer, image, item, query].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [{}, {"queries": 70, "classes": 91, "counts": (1, 17), "capacity": 17}])
def test_kernel_matches_the_reference(sizes, dtype, activation, device):
    logits, boxes, *rest = (x.to(device) for x in case(**sizes, dtype=dtype))

    def run(backend, dtype):
        return matching_cost(logits.to(dtype), boxes.to(dtype), *rest, activation=activation, backend=backend)

    exact, plain, actual = run("eager", torch.float64), run("eager", dtype), run("triton", dtype)
    assert actual.dtype == torch.float32
    error, budget = ((x.double() - exact).abs().max().item() for x in (actual, plain))
    assert error <= 2 * budget + 4 * torch.finfo(torch.float32).eps * exact.abs().max().item()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # from numpy, before exp(-inf)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_extreme_logits_stay_finite(backend, device):
    logits = torch.tensor([-3e38, -100.0, 0.0, 100.0, 3e38], device=device).view(1, 1, 5, 1)
    labels, objects = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.zeros(1, 1, 4, device=device)
    counts = torch.ones(1, dtype=torch.int32, device=device)
    cost = matching_cost(logits, torch.zeros(1, 1, 5, 4, device=device), labels, objects, counts, backend=backend)
    # The limit of both logarithms is log 1e-8.
    limits = torch.tensor([2 * 0.25 * -math.log(1e-8), 2 * 0.75 * math.log(1e-8)], device=device)
    torch.testing.assert_close(cost[0, 0, 0, [0, 4]], limits)
    assert torch.isfinite(cost).all()
    assert (cost[0, 0, 0, 1:] <= cost[0, 0, 0, :-1]).all()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # from numpy: values beyond the dtype's range
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("size", [1e20, torch.finfo(torch.float32).max])
def test_huge_boxes_stay_finite_and_nan_propagates(size, backend, device):
    boxes = torch.tensor([[size, size, size, size], [-size, -size, size, size]], device=device).view(1, 1, 2, 4)
    logits, labels = torch.zeros(1, 1, 2, 1, device=device), torch.zeros(1, 2, dtype=torch.int64, device=device)
    rest = (labels, boxes[0], torch.full((1,), 2, dtype=torch.int32, device=device))
    cost = matching_cost(logits, boxes, *rest, backend=backend)
    assert torch.isfinite(cost).all()
    assert (cost[0, 0].diagonal() < 0).all(), "equal boxes: only GIoU and class contribute"
    assert (cost[0, 0, [0, 1], [1, 0]] >= size).all()
    assert matching_cost(logits, boxes * float("nan"), *rest, backend=backend).isnan().all()


def test_invalid_label_never_reads_outside(device):
    logits, boxes, labels, objects, counts = (x.to(device) for x in case(dtype=torch.float32))
    costs = [matching_cost(logits, boxes, x, objects, counts, backend="triton") for x in (labels + 99, labels * 0 + 4)]
    assert torch.equal(*costs)


def test_operator_registration(device):
    tensors = [x.to(device) for x in case(dtype=torch.float32)]
    torch.library.opcheck(torch.ops.conddetr.matching_cost.default, (*tensors, None, 2.0, 5.0, 2.0, 0.25, 2.0))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_no_objects(backend, device):
    tensors = [x.to(device) for x in case(counts=(0, 0), capacity=0, dtype=torch.float32)]
    assert matching_cost(*tensors, backend=backend).shape == (2, 2, 0, 6)


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, torch.zeros(2, 3, 6), r"logits: expected \[L, B, Q, K\], got shape \(2, 3, 6\)"),
        (1, torch.zeros(2, 3, 6, 5), r"boxes: expected shape \(2, 3, 6, 4\), got \(2, 3, 6, 5\)"),
        (2, torch.zeros(3, 4), "labels: expected dtype torch.int64, got torch.float32"),
        (3, torch.zeros(3, 5, 4), r"objects: expected shape \(3, 4, 4\), got \(3, 5, 4\)"),
        (4, torch.zeros(3, dtype=torch.int64), "counts: expected dtype torch.int32, got torch.int64"),
    ],
)
def test_errors(index, wrong, message):
    arguments = list(case())
    arguments[index] = wrong
    with pytest.raises(ValueError, match=message):
        matching_cost(*arguments)


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation: expected sigmoid or softmax, got 'tanh'"):
        matching_cost(*case(), activation="tanh")
