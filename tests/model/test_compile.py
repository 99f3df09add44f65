"""The whole model under `torch.compile`: equal to plain PyTorch, one graph, few compilations."""

import pytest
import torch
from torch._dynamo.utils import counters

import conddetr

GRAPHS = 3
"""Largest number of graphs for a training run with images of all sizes (docs/models.md): batches of one image, batches
of several images, and one more for a special first batch. With `dynamic=None` the first batch is compiled for its own
size. With `dynamic=True` PyTorch assumes that sizes which are equal in it stay equal, and on a CPU the size of a single
image determines the convolution's algorithm."""
SIZES = [(224, 192), (208, 240), (272, 224), (250, 213), (216, 264), (260, 197)]


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def small_models(backend, preset="conditional-detr-tiny", **options):
    """The model to compile, and an equal model in plain PyTorch."""
    torch.manual_seed(0)
    sizes = {"num_classes": 3, "num_queries": 5, "encoder_layers": 1, "decoder_layers": 1, **options}
    model, plain = (conddetr.build(preset, backend=name, **sizes) for name in (backend, "eager"))
    torch.nn.init.normal_(model.bbox_embed.layers[-1].weight)
    plain.load_state_dict(model.state_dict())
    return model, plain


def batch(size, count):
    """Images and their valid sizes; the first image has the size of the batch."""
    valid = torch.stack([torch.randint(size[axis] // 2, size[axis] + 1, (count,)) for axis in range(2)], dim=1)
    valid[0] = torch.tensor(size)
    return torch.randn(count, 3, *size), valid.to(torch.int32)


def step(model, called, images, valid_hw):
    """Outputs and all gradients, by name."""
    torch.manual_seed(1)
    model.zero_grad()
    out = called(images, valid_hw=valid_hw)
    (out["pred_logits"].square().mean() + out["pred_boxes"].square().mean()).backward()
    gradients = {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: out[name].detach() for name in ("pred_logits", "pred_boxes")} | gradients


def assert_close(outputs, expected):
    assert outputs.keys() == expected.keys()
    # Gradients of key biases are rounding noise, so the tolerance is relative to the largest gradient.
    largest = max(x.abs().max().item() for name, x in expected.items() if name.startswith("gradient"))
    for name, value in expected.items():
        atol = 1e-4 * largest if name.startswith("gradient") else 1e-5
        torch.testing.assert_close(outputs[name], value, atol=atol, rtol=1e-3, msg=name)


def epoch(model, plain, compiled, counts, sizes):
    """Run and compare a step for each size, with alternating batch sizes; returns the number of compiled graphs."""
    for number, size in enumerate(sizes):
        inputs = batch(size, counts[number % len(counts)])
        assert_close(step(model, compiled, *inputs), step(plain, plain, *inputs))
    return counters["stats"]["unique_graphs"]


# Otherwise PyTorch would first treat the model's float constants as inputs, and then recompile.
@torch._dynamo.config.patch(specialize_float=True)
def test_batches_of_several_images_are_one_graph():
    model, plain = small_models("auto", dropout=0.0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    assert epoch(model, plain, compiled, (4, 5, 2), [(112, 96), (104, 120), (136, 112)]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "preset", "dynamic"),
    [
        ("auto", "conditional-detr-tiny", True),
        ("auto", "conditional-detr-tiny", None),
        ("eager", "conditional-detr-tiny", True),
        ("auto", "detr-tiny", None),
    ],
)
def test_an_epoch_of_mixed_sizes_compiles_few_graphs(backend, preset, dynamic):
    model, plain = small_models(backend, preset, dropout=0.0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert epoch(model, plain, compiled, (1, 2, 3, 4), 2 * SIZES) <= GRAPHS


@pytest.mark.slow
def test_inductor_equals_plain_pytorch():
    """Takes more than a minute: Inductor compiles about sixty C++ files for this smallest model.

    In evaluation mode, because gradients through the statistics of batch norm are differences of large sums.
    """
    model, plain = (model.eval() for model in small_models("auto"))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for size in SIZES[:3]:
        inputs = batch(size, 2)
        assert_close(step(model, compiled, *inputs), step(plain, plain, *inputs))
