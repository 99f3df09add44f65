"""Generalised IoU against torchvision and the official numbers."""

import torch
from golden_rule import read_arrays
from torchvision import ops

from conddetr.loss.boxes import generalized_iou


def test_official_pairs():
    golden = read_arrays("p5_cdetr")
    found = generalized_iou(golden["box/xyxy1"][:, None], golden["box/xyxy2"][None])
    torch.testing.assert_close(found, golden["box/giou"], atol=1e-6, rtol=0)


def test_against_torchvision():
    a, b = (torch.rand(50, 4, dtype=torch.float64) for _ in range(2))
    a, b = (torch.cat([box[:, :2], box[:, :2] + box[:, 2:]], 1) for box in (a, b))
    torch.testing.assert_close(generalized_iou(a[:, None], b[None]), ops.generalized_box_iou(a, b))
    torch.testing.assert_close(generalized_iou(a, b), ops.generalized_box_iou(a, b).diagonal())


def test_gradient_and_boxes_without_area():
    a = torch.tensor([[0.1, 0.1, 0.5, 0.6]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[0.3, 0.2, 0.9, 0.7]], dtype=torch.float64)
    assert torch.autograd.gradcheck(generalized_iou, (a, b))
    points = torch.zeros(1, 4, requires_grad=True)
    value = generalized_iou(points, torch.zeros(1, 4))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(points.grad).all()
