"""Every operation by every backend: launches on its tensors' device, and a host that waits for nothing."""

import importlib
from pathlib import Path

import pytest
import torch

from conddetr.kernels import (
    conditional_attention,
    conditional_spatial_query,
    focal_loss,
    grid_positions,
    linear_assignment,
    matched_box_loss,
    matching_cost,
    native,
    prediction_errors,
    registry,
    sine_embedding,
)
from null_gpu.counts import counted

LAYERS, BATCH, QUERIES, CLASSES, OBJECTS = 2, 3, 10, 4, 5


def numbers(device, *shape):
    return torch.rand(shape, device=device, requires_grad=True)


def separable_inputs(device):
    head = (2, 32)
    grid = (numbers(device, BATCH, 4, *head), numbers(device, BATCH, 6, *head))
    queries = [numbers(device, BATCH, QUERIES, *head) for _ in range(2)]
    keys = [numbers(device, BATCH, 24, *head) for _ in range(2)]
    return *queries, keys[0], grid, keys[1]


def attention(device, backend):
    valid = torch.ones(BATCH, 2, dtype=torch.int32, device=device)
    return conditional_attention(*separable_inputs(device), valid_hw=valid, dropout_p=0.1, backend=backend)


def dense_attention(device, backend):
    head = (2, 32)
    queries = [numbers(device, BATCH, QUERIES, *head) for _ in range(2)]
    keys = [numbers(device, BATCH, 24, *head) for _ in range(3)]
    padding = torch.zeros(BATCH, 24, dtype=torch.bool, device=device)
    return conditional_attention(*queries, *keys, key_padding_mask=padding, backend=backend)


def embedding(device, backend):
    return sine_embedding(numbers(device, QUERIES, 2), 64, backend=backend)


def spatial_query(device, backend):
    return conditional_spatial_query(numbers(device, QUERIES, 2), numbers(device, BATCH, QUERIES, 64), backend=backend)


def classes(device, backend):
    target = torch.zeros(LAYERS, BATCH, QUERIES, dtype=torch.int64, device=device)
    return focal_loss(numbers(device, LAYERS, BATCH, QUERIES, CLASSES), target, backend=backend)


def boxes(device, backend):
    assignment = torch.zeros(LAYERS, BATCH, QUERIES, dtype=torch.int64, device=device)
    objects = numbers(device, BATCH, OBJECTS, 4).detach()
    return matched_box_loss(numbers(device, LAYERS, BATCH, QUERIES, 4), objects, assignment, backend=backend)


def cost(device, backend):
    labels = torch.zeros(BATCH, OBJECTS, dtype=torch.int64, device=device)
    counts = torch.full((BATCH,), OBJECTS, dtype=torch.int32, device=device)
    predictions = (numbers(device, LAYERS, BATCH, QUERIES, CLASSES), numbers(device, LAYERS, BATCH, QUERIES, 4))
    objects = numbers(device, BATCH, OBJECTS, 4).detach()
    return matching_cost(*predictions, labels, objects, counts, backend=backend)


def assignment(device, backend):
    counts = torch.full((BATCH,), OBJECTS, dtype=torch.int32, device=device)
    return linear_assignment(numbers(device, LAYERS, BATCH, OBJECTS, QUERIES).detach(), counts, backend=backend)


def errors(device, backend):
    assignment = torch.zeros(LAYERS, BATCH, QUERIES, dtype=torch.int64, device=device)
    labels = torch.zeros(BATCH, OBJECTS, dtype=torch.int64, device=device)
    counts = torch.full((BATCH,), OBJECTS, dtype=torch.int32, device=device)
    logits = numbers(device, LAYERS, BATCH, QUERIES, CLASSES)
    return prediction_errors(logits, assignment, labels, counts, backend=backend)[1]


def positions(device, backend):
    valid = torch.full((BATCH, 2), 60, dtype=torch.int32, device=device)
    return grid_positions(torch.empty(BATCH, 3, 4, 6, device=device), (64, 96), 32, valid, backend=backend)[0]


OPERATIONS = (attention, dense_attention, embedding, spatial_query, classes, boxes, cost, assignment, errors, positions)
HAVE_NATIVE = (attention, dense_attention, embedding, spatial_query)
CASES = [(operation, "triton") for operation in OPERATIONS] + [(operation, "native") for operation in HAVE_NATIVE]


def skip_unless_built(backend):
    if backend != "native":
        return
    if native.NOT_LOADED or native.build_info()["cuda"] is None:
        pytest.skip("the native kernels were built without CUDA")
    if b"libcudart.so" not in Path(importlib.import_module("conddetr._C").__file__).read_bytes():
        pytest.skip("the extension has a CUDA runtime of its own, which a null GPU cannot stand in for")


@pytest.mark.parametrize(("operation", "backend"), CASES, ids=lambda case: getattr(case, "__name__", case))
@pytest.mark.parametrize("index", [0, 1])
def test_launches_on_the_device_of_the_tensors(operation, backend, index):
    """Device 0 is the current one throughout."""
    skip_unless_built(backend)
    device = torch.device("cuda", index)
    with counted() as counts:
        found = operation(device, backend)
        if found.requires_grad:
            found.sum().backward()
    assert torch.cuda.current_device() == 0
    assert found.device == device
    assert counts.launches == counts.launches_by_device[index] > 0
    ours = [name for name in counts.kernels if name.endswith("_kernel") or "conddetr" in name]
    assert ours, f"none of {list(counts.kernels)} is a kernel of this project"
    assert counts.waits == counts.from_device == 0


@pytest.mark.parametrize("backend", ["triton", "native"])
def test_compiles_without_a_graph_break(backend):
    """The choice of the backend is traced too."""
    skip_unless_built(backend)
    compiled = torch.compile(conditional_attention, backend="aot_eager", fullgraph=True)
    with counted() as counts:
        compiled(*separable_inputs("cuda"), backend=backend).sum().backward()
    assert counts.launches > 0
    assert counts.waits == 0


def test_a_gpu_that_the_build_has_no_code_for(monkeypatch):
    skip_unless_built("native")
    device = torch.device("cuda")
    assert native.why_not(device, torch.float32) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(registry.BackendError, match=r"built for .*, this GPU has compute capability 7.5: build with"):
        registry.choose("native", device, torch.float32)
