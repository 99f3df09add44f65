"""Errors of predictions: the reference against a loop, the kernels against the reference."""

import pytest
import torch

from conddetr.kernels import prediction_errors, registry

pytestmark = [pytest.mark.gpu, pytest.mark.compares_numbers]


def case(layers=2, batch=3, queries=70, classes=5, capacity=9):
    """Logits with few distinct values, so that ties occur, and an image without objects."""
    logits = torch.randint(-2, 3, (layers, batch, queries, classes)).float()
    counts = torch.randint(1, capacity + 1, (batch,), dtype=torch.int32)
    counts[0] = 0
    assignment = torch.full((layers, batch, queries), -1)
    for layer in range(layers):
        for image, count in enumerate(counts.tolist()):
            assignment[layer, image, torch.randperm(queries)[:count]] = torch.arange(min(count, queries))
    return logits, assignment, torch.randint(classes, (batch, capacity)), counts


def by_loop(logits, assignment, labels, counts):
    differences = [[0.0] * logits.shape[1] for _ in logits]
    right = matched = 0
    for layer, layer_logits in enumerate(logits.tolist()):
        for image, image_logits in enumerate(layer_logits):
            chosen = [row.index(max(row)) for row in image_logits]
            predicted = sum(choice != logits.shape[-1] - 1 for choice in chosen)
            differences[layer][image] = abs(predicted - counts[image].item())
            if layer == len(logits) - 1:
                pairs = [(a, b) for a, b in zip(chosen, assignment[layer, image].tolist(), strict=True) if b >= 0]
                matched += len(pairs)
                right += sum(labels[image, b].item() == a for a, b in pairs)
    mean = torch.tensor(differences, dtype=torch.float32).mean(1)
    return 100 - 100 * right / max(matched, 1), mean


@pytest.mark.parametrize("name", ["eager", "triton"])
@pytest.mark.parametrize(
    "sizes", [{}, {"classes": 1}, {"classes": 91, "queries": 50}, {"batch": 65, "queries": 9}], ids=str
)
def test_errors_against_a_loop(sizes, name, device):
    if registry.why_not(name, device, torch.float32):
        pytest.skip("Triton cannot run here")
    inputs = case(**sizes)
    class_error, cardinality = prediction_errors(*(x.to(device) for x in inputs), backend=name)
    expected_class, expected_cardinality = by_loop(*inputs)
    assert class_error.item() == pytest.approx(expected_class, rel=1e-6)
    torch.testing.assert_close(cardinality.cpu(), expected_cardinality)
    assert class_error.dtype == cardinality.dtype == torch.float32


@pytest.mark.parametrize("name", ["eager", "triton"])
def test_nothing_matched(name, device):
    logits, assignment, labels, _ = (x.to(device) for x in case())
    counts = torch.zeros(3, dtype=torch.int32, device=device)
    for classes in (labels, labels[:, :0]):
        class_error, _ = prediction_errors(logits, torch.full_like(assignment, -1), classes, counts, backend=name)
        assert class_error.item() == 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_strides(dtype, device):
    logits, *others = (x.to(device) for x in case())
    strided = torch.stack([logits, logits]).to(dtype)[1].transpose(1, 2).contiguous().transpose(1, 2)
    for ours, reference in zip(
        prediction_errors(strided, *others, backend="triton"), prediction_errors(logits, *others), strict=True
    ):
        assert torch.equal(ours, reference)


def test_operator_registration(device):
    torch.library.opcheck(torch.ops.conddetr.prediction_errors.default, tuple(x.to(device) for x in case()))


def test_wrong_arguments_are_named(device):
    logits, assignment, labels, counts = (x.to(device) for x in case())
    with pytest.raises(ValueError, match=r"logits: expected \[L, B, Q, K\], floating"):
        prediction_errors(logits[0], assignment, labels, counts)
    with pytest.raises(ValueError, match=r"assignment: expected \(2, 3, 70\) torch.int64"):
        prediction_errors(logits, assignment[:, :, :5], labels, counts)
    with pytest.raises(ValueError, match=r"counts: expected \(3,\) torch.int32, got \(3,\) torch.int64"):
        prediction_errors(logits, assignment, labels, counts.long())
