"""Every operation on every backend: launches on its tensors' device, and a host that never waits."""

import importlib
from pathlib import Path

import pytest
import torch

import conddetr
from conddetr.kernels import (
    add_norm,
    addresses,
    conditional_attention,
    conditional_spatial_query,
    convolution,
    convolution_pair,
    focal_loss,
    grid_positions,
    linear_assignment,
    matched_box_loss,
    matching_cost,
    max_pool,
    native,
    predicted_boxes,
    prediction_errors,
    registry,
    relu_dropout,
    sine_embedding,
)
from conddetr.kernels import spatial_query as project
from conddetr.kernels.common.launch import REPLICAS
from conddetr.kernels.conv import Layer
from conddetr.kernels.weights import FrozenNorm, Replicas, Shift, Weight, prepare_weights
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
    return conditional_attention(*separable_inputs(device), valid_cells=valid, dropout_p=0.1, backend=backend)


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


def projected_query(device, backend):
    tensors = ((BATCH, QUERIES, 256), (QUERIES, 256), (256, 256), (256,))
    return project(*(numbers(device, *shape) for shape in tensors), backend)


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


def replicas(device, channels):
    return numbers(device, channels).expand(REPLICAS, -1).detach().requires_grad_()


def norm(device, backend):
    """As in training with bfloat16. Returns the sum of all outputs, which is not one of our launches."""
    tokens = (BATCH, QUERIES, 256)
    branch = numbers(device, *tokens).bfloat16()
    vectors = [replicas(device, 256) for _ in range(3)]
    settings = {"branch_bias": vectors[2], "position": numbers(device, 1, QUERIES, 256), "dropout_p": 0.1}
    return sum(add_norm(branch, numbers(device, *tokens), *vectors[:2], **settings, outs=2, backend=backend))


def hidden(device, backend):
    return relu_dropout(numbers(device, BATCH, QUERIES, 2048), 0.1, backend, replicas(device, 2048))


def convolved(device, backend):
    """In odd sizes, with an output that is used twice."""
    x, residual = (numbers(device, BATCH, 5, 7, 9).contiguous(memory_format=torch.channels_last) for _ in range(2))
    weights = (numbers(device, 5, 5, 3, 3), numbers(device, 5))
    options = {"padding": (1, 1), "residual": residual, "relu": True, "uses": 2}
    return sum(convolution(x, *weights, **options, backend=backend))


def convolved_twice(device, backend):
    x = numbers(device, BATCH, 5, 7, 9).contiguous(memory_format=torch.channels_last)
    layers = (Layer(numbers(device, 4, 5, 1, 1)), Layer(numbers(device, 3, 4, 3, 3), numbers(device, 3), (2, 2)))
    return convolution_pair(x, *layers, backend=backend)


def predicted(device, backend):
    return predicted_boxes(numbers(device, LAYERS, BATCH, QUERIES, 4), numbers(device, QUERIES, 2), backend)


def pooled(device, backend):
    return max_pool(numbers(device, 2, 5, 7, 9).detach().contiguous(memory_format=torch.channels_last), backend)


def step_weights(device, backend):
    """A folded convolution, a stack and replicas."""
    norm = FrozenNorm(*(numbers(device, 5).detach() for _ in range(4)), 1e-5)
    recipes = [Weight((numbers(device, 5, 4, 3, 3),), norm), Shift(norm)]
    recipes += [Weight((numbers(device, 3, 4), numbers(device, 2, 4))), Replicas(numbers(device, 6))]
    return sum(weight.float().sum() for weight in prepare_weights(recipes, torch.bfloat16, backend))


def errors(device, backend):
    assignment = torch.zeros(LAYERS, BATCH, QUERIES, dtype=torch.int64, device=device)
    labels = torch.zeros(BATCH, OBJECTS, dtype=torch.int64, device=device)
    counts = torch.full((BATCH,), OBJECTS, dtype=torch.int32, device=device)
    logits = numbers(device, LAYERS, BATCH, QUERIES, CLASSES)
    return prediction_errors(logits, assignment, labels, counts, backend=backend)[1]


def positions(device, backend):
    valid = torch.full((BATCH, 2), 60, dtype=torch.int32, device=device)
    return grid_positions(torch.empty(BATCH, 3, 4, 6, device=device), (64, 96), 32, valid, backend=backend)[0]


TRANSFORMER = (attention, dense_attention, embedding, spatial_query, projected_query, positions, norm, hidden)
OPERATIONS = (
    *TRANSFORMER,
    predicted,
    classes,
    boxes,
    cost,
    assignment,
    errors,
    convolved,
    convolved_twice,
    pooled,
    step_weights,
)
HAVE_NATIVE = (attention, dense_attention, embedding, spatial_query)
CASES = [(operation, "triton") for operation in OPERATIONS] + [(operation, "native") for operation in HAVE_NATIVE]


def skip_unless_built(backend):
    if backend != "native":
        return
    if native.NOT_LOADED or native.build_info()["cuda"] is None:
        pytest.skip("the native kernels were built without CUDA")
    if b"libcudart.so" not in Path(importlib.import_module("conddetr._C").__file__).read_bytes():
        pytest.skip("the extension contains a CUDA runtime, which a null GPU cannot replace")


@pytest.mark.parametrize(("operation", "backend"), CASES, ids=lambda case: getattr(case, "__name__", case))
@pytest.mark.parametrize("index", [0, 1])
def test_launches_on_the_device_of_the_tensors(operation, backend, index):
    """Device 0 stays the current one."""
    skip_unless_built(backend)
    device = torch.device("cuda", index)
    with counted() as counts:
        result = operation(device, backend)
        if result.requires_grad:
            result.sum().backward()
    assert torch.cuda.current_device() == 0
    assert result.device == device
    assert counts.launches == counts.launches_by_device[index] > 0
    ours = [name for name in counts.kernels if name.endswith("_kernel") or "conddetr" in name]
    assert ours, f"none of {list(counts.kernels)} is a kernel of this project"
    assert counts.waits == counts.from_device == 0


@pytest.mark.parametrize(
    ("batch", "has_dropout", "keys", "registers"), [(8, False, 64, None), (32, False, 32, 96), (32, True, 64, 128)]
)
def test_attention_in_triton_fills_a_hopper(batch, has_dropout, keys, registers):
    """300 queries and 8 heads give each of 132 multiprocessors about three blocks at B = 8, and ten at B = 32."""
    triton_attention = importlib.import_module("conddetr.kernels.attn.triton")
    device = torch.device("cuda")
    assert torch.cuda.get_device_capability(device) == (9, 0)
    queries, items = (torch.zeros(batch, n, 8, 32, dtype=torch.bfloat16, device=device) for n in (300, 24))
    keep = torch.zeros(batch, 8, 2, 300, dtype=torch.int32, device=device) if has_dropout else None
    tensors = (queries, queries, items, items[:, :4], items[:, :6], items)
    tiles = triton_attention.Inputs(*tensors, None, None, keep, 0.125, 0.1 * has_dropout).launch().forward
    assert (tiles.queries, tiles.keys, tiles.registers) == (64, keys, registers)


def test_norm_and_hidden_dropout_are_one_launch_per_direction():
    """For all uses of the result, and for a given seed at any alignment."""
    device = torch.device("cuda")
    seeds = torch.zeros(3, dtype=torch.int64, device=device)
    vectors = [replicas(device, 256) for _ in range(3)]
    tokens, bias = numbers(device, BATCH, QUERIES, 256), replicas(device, 2048)
    branch, x = tokens.detach().bfloat16().requires_grad_(), numbers(device, BATCH, QUERIES, 2048)
    position = numbers(device, 1, QUERIES, 256).detach()
    modules = []
    for seed in seeds.split(1):
        with counted() as counts:
            settings = {"branch_bias": vectors[2], "position": position, "dropout_p": 0.1, "outs": 2, "seed": seed}
            outputs = add_norm(branch, tokens, *vectors[:2], **settings)
            outputs += (relu_dropout(x, 0.1, "auto", bias, seed),)
        with counted() as counts_back:
            upstream = [torch.empty_like(out) for out in outputs]
            torch.autograd.grad(outputs, (branch, tokens, *vectors, x, bias), upstream)
        assert dict(counts.kernels) == {"add_norm_kernel": 1, "relu_dropout_kernel": 1}
        assert dict(counts_back.kernels) == {"add_norm_backward_kernel": 1, "relu_dropout_backward_kernel": 1}
        modules.append(counts.modules + counts_back.modules)
    assert modules[1:] == [0, 0], "a kernel was compiled again"


def test_projected_spatial_query_is_one_launch_and_two_for_its_gradients():
    """Backward is our kernel and PyTorch's product for the weight; a bias for every row has the output's gradient."""
    device = torch.device("cuda")
    shapes = ((BATCH, QUERIES, 256), (QUERIES, 256), (256, 256))
    scale, p_s, weight = (numbers(device, *shape).bfloat16() for shape in shapes)
    bias = numbers(device, 256).bfloat16().expand(BATCH * QUERIES, -1)
    with counted() as counts:
        out = project(scale, p_s, weight, bias)
    with counted() as counts_back:
        torch.autograd.grad(out, (scale, p_s, weight, bias), torch.empty_like(out))
    assert dict(counts.kernels) == {"spatial_query_kernel": 1}
    assert counts_back.kernels["spatial_query_backward_kernel"] == 1
    assert counts_back.launches == 2


def test_projected_spatial_query_in_float32_runs_on_cublas():
    """Unless the kernel is requested by name."""
    device = torch.device("cuda")
    operation = registry.OPERATIONS["spatial_query"]
    choice = operation.choose("auto", device, torch.float32)
    assert choice.backend == "eager"
    assert "in float32 `auto` uses plain PyTorch" in choice.refused["triton"]
    assert operation.choose("auto", device, torch.bfloat16).backend == "triton"
    assert operation.choose("triton", device, torch.float32).backend == "triton"


@pytest.mark.parametrize("backend", ["triton", "native"])
def test_compiles_without_a_graph_break(backend):
    """The choice of the backend is traced as well."""
    skip_unless_built(backend)
    compiled = torch.compile(conditional_attention, backend="aot_eager", fullgraph=True)
    with counted() as counts:
        compiled(*separable_inputs("cuda"), backend=backend).sum().backward()
    assert counts.launches > 0
    assert counts.waits == 0


def test_gpu_without_code_in_the_build_is_refused(monkeypatch):
    skip_unless_built("native")
    device = torch.device("cuda")
    assert native.why_not(device, torch.float32) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(registry.BackendError, match=r"built for .*, but this GPU has compute capability 7.5: build"):
        registry.OPERATIONS["conditional_attention"].choose("native", device, torch.float32)


def test_weights_in_a_foreign_capture_are_prepared_one_by_one():
    """After such a capture nothing would fill the tables of the kernel that prepares all at once."""
    weight = numbers("cuda", 3, 4)
    prepare_weights([Weight((weight,))], torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with conddetr.record_paths() as paths, torch.cuda.graph(graph):
        prepare_weights([Weight((weight,))], torch.bfloat16)
    assert paths["prepare_weights"] == {"eager": 1}
    with addresses.collected() as tables, torch.cuda.graph(torch.cuda.CUDAGraph()), conddetr.record_paths() as paths:
        prepare_weights([Weight((weight,))], torch.bfloat16)
    assert paths["prepare_weights"] == {"triton": 1}
    assert len(tables) == 3
