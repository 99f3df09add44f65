"""Focal loss: the official values, the formula, and the kernels against the reference."""

import math

import pytest
import torch
from golden_rule import read_arrays, read_json
from torchvision.ops import sigmoid_focal_loss

from conddetr.kernels import focal_loss

pytestmark = [pytest.mark.gpu, pytest.mark.compares_numbers]


@pytest.mark.parametrize(("key", "alpha", "boxes"), [("alpha-1_nb7", -1.0, 7.0), ("alpha.25_nb1", 0.25, 1.0)])
def test_torchvision_gives_the_official_values(key, alpha, boxes):
    """Our loss is compared with torchvision's. The official targets have several classes at once."""
    golden, info = read_arrays("p5_cdetr"), read_json("p5_cdetr")["units"]["focal"]
    logits = golden["focal/logits"].clone().requires_grad_()
    mean = sigmoid_focal_loss(logits, golden["focal/targets"], alpha).mean(1).sum() / boxes
    assert mean.item() == pytest.approx(info[f"alpha={alpha},num_boxes={boxes}"], rel=1e-5)
    mean.backward()
    torch.testing.assert_close(logits.grad, golden[f"focal/grad_{key}"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (-1.0, 0.0), (0.6, 1.5)])
def test_reference_against_torchvision(alpha, gamma):
    logits = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    target = torch.randint(-1, 7, (2, 3, 5))
    one_hot = (target[..., None] == torch.arange(7)).double()
    expected = sigmoid_focal_loss(logits, one_hot, alpha, gamma).flatten(1).sum(1)
    actual = focal_loss(logits, target, alpha, gamma)
    torch.testing.assert_close(actual, expected)
    gradients = [
        torch.autograd.grad(loss @ torch.tensor([1.0, -2.0]).double(), logits)[0] for loss in (actual, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_reference_gradients():
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0, -1, 3], [-1, 2, 2]])
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, target), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "alpha", "gamma"), [((2, 3, 40, 91), 0.25, 2.0), ((1, 1, 1), 0.25, 2.0), ((3, 9, 5), -1.0, 0.5)]
)
def test_kernels_match_the_reference(shape, alpha, gamma, dtype, device):
    logits, upstream = (4 * torch.randn(shape) - 2).to(dtype), torch.rand(shape[0])
    target = torch.randint(-1, shape[-1], shape[:-1])

    def run(backend, dtype):
        leaf = logits.to(device, dtype).requires_grad_()
        loss = focal_loss(leaf, target.to(device), alpha, gamma, backend)
        return loss.detach(), torch.autograd.grad(loss, leaf, upstream.to(device, loss.dtype))[0]

    exact, plain, actual = run("eager", torch.float64), run("eager", dtype), run("triton", dtype)
    assert actual[0].dtype == torch.float32
    assert actual[1].dtype == dtype
    for ours, reference, truth in zip(actual, plain, exact, strict=True):
        error, budget = ((x.double() - truth).abs().max().item() for x in (ours, reference))
        assert error <= 2 * budget + 4 * torch.finfo(ours.dtype).eps * truth.abs().max().item()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # from numpy, before exp(-inf)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_extreme_logits_stay_finite(backend, device):
    """Each logit alone, against the two limits of the formula: 0 if the logit is right, else |x| times a weight."""
    largest = torch.finfo(torch.float32).max
    extremes = torch.tensor([-largest, -1e4, -104.0, 104.0, 1e4, largest], device=device)
    logits = extremes.view(-1, 1, 1).requires_grad_()
    for target, weight in ((0, 0.25), (-1, 0.75)):
        index = torch.full((6, 1), target, device=device)
        loss = focal_loss(logits, index, backend=backend)
        is_wrong = extremes < 0 if target == 0 else extremes > 0
        torch.testing.assert_close(loss, torch.where(is_wrong, weight * extremes.abs(), 0.0))
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        direction = -weight if target == 0 else weight
        torch.testing.assert_close(gradient.flatten(), torch.where(is_wrong, direction, 0.0))


def test_small_losses_keep_their_digits(device):
    """At x = -12 the loss of an absent class is about 0.75 · p² · p: the e^x in 1 + e^x must not be rounded away."""
    logits = torch.full((1, 1, 1), -12.0, device=device)
    loss = focal_loss(logits, torch.full((1, 1), -1, device=device), backend="triton").item()
    p = 1 / (1 + math.exp(12))
    assert loss == pytest.approx(0.75 * p**2 * -math.log1p(-p), rel=1e-5)


@pytest.mark.parametrize("capacity", [0, 7])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_classes_of_matched_objects(backend, capacity, device):
    """The loss and its gradient equal those of classes that are looked up one by one, to the bit."""
    logits = torch.randn(2, 3, 40, 5, device=device, requires_grad=True)
    labels = torch.randint(5, (3, capacity))
    assignment = torch.randint(-1, capacity, (2, 3, 40))
    classes = torch.full_like(assignment, -1)
    for layer, image, query in (assignment >= 0).nonzero().tolist():
        classes[layer, image, query] = labels[image, assignment[layer, image, query]]
    expected = focal_loss(logits, classes.to(device), backend=backend)
    actual = focal_loss(logits, assignment.to(device), backend=backend, labels=labels.to(device))
    assert torch.equal(actual, expected)
    assert torch.equal(*(torch.autograd.grad(loss.sum(), logits)[0] for loss in (actual, expected)))


def test_operator_registration(device):
    logits = torch.randn(2, 3, 5, device=device, requires_grad=True)
    target = torch.randint(-1, 5, (2, 3), device=device)
    torch.library.opcheck(torch.ops.conddetr.focal_loss.default, (logits, target, None, 0.25, 2.0))
    logits = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
    target, labels = torch.randint(-1, 3, (2, 3, 4), device=device), torch.randint(5, (3, 3), device=device)
    torch.library.opcheck(torch.ops.conddetr.focal_loss.default, (logits, target, labels, 0.25, 2.0))


def test_no_rows(device):
    logits = torch.zeros(2, 0, 5, device=device, requires_grad=True)
    loss = focal_loss(logits, torch.zeros(2, 0, dtype=torch.int64, device=device), backend="triton")
    assert loss.tolist() == [0, 0]
    loss.sum().backward()


def test_errors():
    logits, target = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits: expected \[L, ..., K\], floating, got \(5,\) torch.float32"):
        focal_loss(torch.zeros(5), target)
    with pytest.raises(ValueError, match=r"target: expected \(2, 3\) torch.int64, got \(2,\) torch.int64"):
        focal_loss(logits, target[:, 0])
    with pytest.raises(ValueError, match=r"target: expected \(2, 3\) torch.int64, got \(2, 3\) torch.float32"):
        focal_loss(logits, target.float())
    with pytest.raises(ValueError, match="gamma: expected at least 0, got -1"):
        focal_loss(logits, target, gamma=-1)
    with pytest.raises(ValueError, match=r"labels: expected \[B, N\] torch.int64 with target \[L, B, Q\], got"):
        focal_loss(logits, target, labels=target)
