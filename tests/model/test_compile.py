"""The whole model under `torch.compile`: equal to the plain one, in one piece, and compiled a few times only."""

import pytest
import torch
from torch._dynamo.utils import counters

import conddetr

GRAPHS = 3
"""Of a training with images of all sizes (docs/models.md): batches of one image, batches of several, and one more
where the first batch is special. With `dynamic=None` that is compiled for its own size; with `dynamic=True` PyTorch
takes sizes that are equal there for the same, and on a CPU it chooses how to convolve by the size of a single image."""
SIZES = [(224, 192), (208, 240), (272, 224), (250, 213), (216, 264), (260, 197)]


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def small_models(backend, preset="conditional-detr-tiny", **options):
    """The model to compile, and the same in plain PyTorch."""
    torch.manual_seed(0)
    sizes = {"num_classes": 3, "num_queries": 5, "encoder_layers": 1, "decoder_layers": 1, **options}
    model, plain = (conddetr.build(preset, backend=name, **sizes) for name in (backend, "eager"))
    torch.nn.init.normal_(model.bbox_embed.layers[-1].weight)
    plain.load_state_dict(model.state_dict())
    return model, plain


def batch(size, count):
    """Images and their valid sizes, the first of which is the whole batch's."""
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


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    # The biases of keys have no gradient but rounding noise: the measure is the largest of all gradients.
    largest = max(x.abs().max().item() for name, x in expected.items() if name.startswith("gradient"))
    for name, theirs in expected.items():
        atol = 1e-4 * largest if name.startswith("gradient") else 1e-5
        torch.testing.assert_close(found[name], theirs, atol=atol, rtol=1e-3, msg=name)


def epoch(model, plain, compiled, counts, sizes):
    """Steps over all sizes with batch sizes in turn, each compared; the number of graphs that PyTorch compiled."""
    for number, size in enumerate(sizes):
        inputs = batch(size, counts[number % len(counts)])
        assert_close(step(model, compiled, *inputs), step(plain, plain, *inputs))
    return counters["stats"]["unique_graphs"]


# PyTorch would try the many small floats of a model as inputs first, and compile again without.
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
def test_an_epoch_of_mixed_sizes(backend, preset, dynamic):
    model, plain = small_models(backend, preset, dropout=0.0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert epoch(model, plain, compiled, (1, 2, 3, 4), 2 * SIZES) <= GRAPHS


@pytest.mark.slow
def test_inductor():
    """A minute and more: Inductor compiles about sixty C++ files for this smallest of models.

    In evaluation mode: gradients through batch norm's own statistics are differences of large sums.
    """
    model, plain = (model.eval() for model in small_models("auto"))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for size in SIZES[:3]:
        inputs = batch(size, 2)
        assert_close(step(model, compiled, *inputs), step(plain, plain, *inputs))
