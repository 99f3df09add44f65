"""Matching against the official numbers, and against brute force."""

import itertools

import pytest
import torch
from golden_rule import read_arrays

from conddetr.config import resolve
from conddetr.kernels import registry
from conddetr.kernels.cost import focal_cost
from conddetr.kernels.match.op import MAX_QUERIES
from conddetr.loss.matcher import assign, match, matching_cost
from conddetr.loss.targets import pack_targets

CONDITIONAL, DETR = resolve("conditional-detr-r50"), resolve("detr-r50")


def stored(case, unit):
    golden = read_arrays(case)
    logits, boxes = golden[f"{unit}/logits"], golden[f"{unit}/boxes"]
    costs = [golden[f"{unit}/cost_img{b}"] for b in range(len(logits))]
    counts = [cost.shape[1] for cost in costs]
    labels, objects = (golden[f"{unit}/tgt_{key}_cat"].split(counts) for key in ("labels", "boxes"))
    targets = [{"labels": a, "boxes": b} for a, b in zip(labels, objects, strict=True)]
    indices = [golden[f"{unit}/idx_img{b}"] for b in range(len(logits))]
    return logits, boxes, targets, costs, indices


@pytest.mark.parametrize(
    ("case", "unit", "config"),
    [
        ("p5_cdetr", "match_A", CONDITIONAL),
        ("p5_cdetr", "match_B", CONDITIONAL),  # no object; more objects than queries
        ("p5_cdetr", "match_C", CONDITIONAL),
        ("p5_detr", "match_D", DETR),
    ],
)
def test_official_costs_and_assignments(case, unit, config):
    logits, boxes, targets, costs, indices = stored(case, unit)
    actual = matching_cost(logits[None], boxes[None], pack_targets(targets, config.num_classes), config)[0]
    for image, cost in enumerate(costs):
        torch.testing.assert_close(actual[image, : cost.shape[1]].T, cost, atol=2e-5, rtol=1e-5)
    for pair, expected in zip(match(logits[None], boxes[None], targets, config)[0], indices, strict=True):
        assert torch.equal(torch.stack(pair), expected)


def test_least_cost_by_brute_force():
    logits, boxes = torch.randn(2, 1, 5, 91), torch.rand(2, 1, 5, 4)
    targets = [{"labels": torch.tensor([3, 8, 3]), "boxes": torch.rand(3, 4)}]
    costs = matching_cost(logits, boxes, pack_targets(targets, 91), CONDITIONAL)
    for layer, [(query, index)] in enumerate(match(logits, boxes, targets, CONDITIONAL)):
        total = costs[layer, 0, index, query].sum().item()
        best = min(
            sum(costs[layer, 0, t, q].item() for t, q in enumerate(queries))
            for queries in itertools.permutations(range(5), 3)
        )
        assert total == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cost_is_finite_and_wide_for_extreme_logits(dtype):
    largest = min(torch.finfo(dtype).max, 1e30)
    logits = torch.tensor([-largest, -100.0, 0.0, 100.0, largest]).to(dtype).view(1, 1, 5, 1)
    boxes = torch.zeros(1, 1, 5, 4, dtype=dtype)
    targets = [{"labels": torch.tensor([0]), "boxes": torch.zeros(1, 4)}]
    cost = matching_cost(logits, boxes, pack_targets(targets, 91), CONDITIONAL)
    assert cost.dtype == torch.float32
    assert torch.isfinite(cost).all()


def test_focal_cost_equals_the_formula():
    logits = torch.linspace(-12, 12, 49, dtype=torch.float64).view(1, -1, 1)
    p = logits.sigmoid()
    positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
    actual = focal_cost(logits, 0.25, 2.0)
    torch.testing.assert_close(actual, positive - negative, atol=1e-9, rtol=1e-9)


@pytest.mark.gpu
@pytest.mark.compares_numbers
def test_more_queries_than_the_kernel_supports(monkeypatch):
    """`auto` falls back to `eager`, as `linear_assignment` itself does."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(registry, "why_not", lambda backend, *_, **__: None if backend != "native" else "no")
    logits, boxes = (torch.rand(1, 1, MAX_QUERIES + 1, size, device=device) for size in (91, 4))
    targets = pack_targets([{"labels": torch.tensor([1, 5]), "boxes": torch.rand(2, 4)}], 91).to(device)
    assignment = assign(logits, boxes, targets, CONDITIONAL)
    assert torch.equal(assignment, assign(logits, boxes, targets, CONDITIONAL, "eager"))
    assert (assignment >= 0).sum() == 2
    with pytest.raises(registry.BackendError, match=f"at most {MAX_QUERIES} queries, got {MAX_QUERIES + 1}"):
        assign(logits, boxes, targets, CONDITIONAL, "triton")


def test_error_for_nan_names_layer_and_image():
    logits, boxes = torch.randn(2, 3, 5, 91), torch.rand(2, 3, 5, 4)
    logits[1, 2] = float("nan")
    targets = [{"labels": torch.tensor([1]), "boxes": torch.rand(1, 4)} for _ in range(3)]
    with pytest.raises(ValueError, match="decoder layer 1, image 2 of the batch: the cost is not finite"):
        match(logits, boxes, targets, CONDITIONAL)
