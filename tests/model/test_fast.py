"""The forward pass from fused operations: the numbers of the modules, and calls of parts that are not plain."""

from functools import partial

import pytest
import torch
from torch import nn

import conddetr
from conddetr.kernels import registry, spatial_query
from conddetr.model.fast import decoder as fast_decoder
from conddetr.model.fast import make_plan, parts
from conddetr.model.fast.encoder import attention_mask
from conddetr.model.fast.layers import hidden, linear

pytestmark = [pytest.mark.gpu, pytest.mark.compares_numbers]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"num_classes": 3, "num_queries": 7, "encoder_layers": 2, "decoder_layers": 3, "hidden_dim": 32, "num_heads": 2}
CSQ = ("full", "P", "C", "T", "I")


def model_on(path, preset="conditional-detr-tiny", **options):
    """A model that uses the fast path or calls its modules; both compute attention in plain PyTorch."""
    torch.manual_seed(0)
    model = conddetr.build(preset, backend="triton" if path == "fast" else "eager", **{**SMALL, **options})
    for part in model.parts_with_backend():
        part.backend = "eager"
    for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
        nn.init.normal_(norm.weight, 1.0, 0.2)
    nn.init.normal_(model.bbox_embed.layers[-1].weight)
    return model.to(DEVICE)


def images_of(*sizes):
    torch.manual_seed(1)
    return [torch.randn(3, *size, device=DEVICE) for size in sizes]


def run(model, images, dtype=torch.float32, autocast=None):
    """Returns the outputs of all layers, and gradients by name; dropout is off."""
    model.eval()
    with torch.autocast(DEVICE, autocast or torch.bfloat16, enabled=autocast is not None):
        out = model([image.to(dtype) for image in images])
    layers = [*out["aux_outputs"], out]
    outputs = torch.stack([torch.cat([layer["pred_logits"], layer["pred_boxes"]], -1) for layer in layers])
    weights = torch.linspace(-1, 1, outputs.numel(), device=DEVICE).view(outputs.shape)
    (outputs * weights).sum().backward()
    return outputs.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(result, expected, tolerance):
    """Compare outputs and gradients with a tolerance relative to the largest value of each."""
    outputs, grads = result
    assert set(grads) == set(expected[1])
    for actual, exact in [(outputs, expected[0]), *((grads[name], expected[1][name]) for name in grads)]:
        scale = max(1.0, exact.abs().max().item())
        torch.testing.assert_close(actual.double(), exact.double(), atol=tolerance * scale, rtol=0)


def distances(result, exact):
    """Relative root mean square error of the outputs and of each gradient."""
    pairs = [(result[0], exact[0]), *((result[1][name], exact[1][name]) for name in exact[1])]
    return [((actual.double() - truth).norm() / truth.norm().clamp(min=1)).item() for actual, truth in pairs]


@pytest.mark.parametrize("csq", CSQ)
@pytest.mark.parametrize("sizes", [((64, 64), (48, 64)), ((64, 48), (64, 48))], ids=["padded", "equal"])
def test_fast_path_equals_the_modules(csq, sizes):
    images = images_of(*sizes)
    result = run(model_on("fast", csq=csq), images)
    assert_close(result, run(model_on("modules", csq=csq), images), 2e-5)


@pytest.mark.parametrize("csq", ["full", "I"])
def test_kernel_projects_the_spatial_query_of_every_layer_with_a_scale(csq, monkeypatch):
    """With `auto` replaced by `triton`, because `auto` does not choose the interpreter."""
    monkeypatch.setattr(fast_decoder, "spatial_query", partial(spatial_query, backend="triton"))
    images = images_of((64, 64), (48, 64))
    with conddetr.record_paths() as paths:
        result = run(model_on("fast", csq=csq), images)
    assert paths["spatial_query"] == {"triton": SMALL["decoder_layers"] - 1}
    assert_close(result, run(model_on("modules", csq=csq), images), 2e-5)


def test_fast_resnet_equals_its_modules():
    images = images_of((64, 96), (64, 64))
    options = {"preset": "conditional-detr-r50", "encoder_layers": 1, "decoder_layers": 1}
    with conddetr.record_paths() as paths:
        result = run(model_on("fast", **options), images)
    assert paths["backbone"] == {"norms folded before": 17}
    assert paths["prepare_weights"].total() == 1
    # Float32 through 53 convolutions; folded weights are rounded once more than weights and norms apart.
    exact = run(model_on("modules", **options).double(), images, torch.float64)
    assert set(result[1]) == set(exact[1])
    assert max(distances(result, exact)) < 2e-4


@pytest.mark.parametrize("family", ["autocast", "half model"])
def test_half_precision_is_as_exact_as_with_modules(family):
    images = images_of((64, 64), (48, 64))
    exact, _ = run(model_on("modules").double(), images, torch.float64)
    errors = []
    for path in ("modules", "fast"):
        model = model_on(path)
        if family == "autocast":
            outputs, _ = run(model, images, autocast=torch.bfloat16)
        else:
            outputs, _ = run(model.bfloat16(), images, torch.bfloat16)
        errors.append((outputs.double() - exact).abs().mean().item())
    assert 0 < errors[1] <= 1.5 * errors[0]


@pytest.mark.parametrize("preset", ["conditional-detr-tiny", "detr-tiny"])
@pytest.mark.parametrize("path", ["modules", "fast"])
def test_heads_are_float32_under_autocast(path, preset):
    """Their inputs, outputs and computation are float32: rounding to bfloat16 in between would be detected."""
    model, predictions = model_on(path, preset), []
    predict = model._predict
    model._predict = lambda *arguments: predictions.append((arguments, predict(*arguments))) or predictions[-1][1]
    with torch.autocast(DEVICE, torch.bfloat16), conddetr.record_paths() as paths:
        model.eval()(images_of((64, 64), (48, 64)))
    if path == "fast" and preset == "conditional-detr-tiny":
        assert set(paths["decoder"]) == {"fused operations"}
    [((hidden_states, reference), out)] = predictions
    assert hidden_states.dtype == torch.float32
    assert reference is None or reference.dtype == torch.float32
    expected = predict(hidden_states, reference)
    for outputs, layer in zip([*out["aux_outputs"], out], [*expected["aux_outputs"], expected], strict=True):
        for name, values in layer.items():
            if name != "aux_outputs":
                assert outputs[name].dtype == torch.float32
                assert torch.equal(outputs[name], values)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert not torch.equal(predict(hidden_states, reference)["pred_logits"].float(), out["pred_logits"])


def test_training_steps_equal_those_of_the_modules():
    """Five steps of AdamW without dropout give the same losses; with dropout the random bits would differ."""
    images = images_of((64, 64), (48, 64))
    targets = [{"labels": torch.tensor([index]), "boxes": torch.rand(1, 4) * 0.3 + 0.3} for index in range(2)]
    curves = []
    for path in ("modules", "fast"):
        model = model_on(path, dropout=0.0).train()
        criterion = conddetr.build_criterion(model, backend="eager")
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        curve = []
        for _ in range(5):
            loss = criterion(model(images), targets)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-3, atol=0)


def test_dropout_follows_torchs_generator_and_the_mode():
    images = images_of((64, 64))
    model = model_on("fast", dropout=0.3)
    outputs = []
    for seed, train in ((1, True), (1, True), (2, True), (1, False), (2, False)):
        torch.manual_seed(seed)
        outputs.append(model.train(train)(images)["pred_boxes"])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    torch.testing.assert_close(outputs[3], outputs[4], rtol=0, atol=0)
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[3])


CALLED = [
    "transformer.encoder.layers.0.self_attn.out_proj",
    "transformer.encoder.layers.1",
    "transformer.encoder",
    "transformer",
    "transformer.decoder",
    "transformer.decoder.layers.1.ca_v_proj",
    "transformer.decoder.query_scale.layers.0",
    "transformer.decoder.norm",
    "transformer.decoder.ref_point_head",
    "input_proj",
    "backbone",
    "class_embed",
]


@pytest.mark.parametrize("name", CALLED)
def test_hooks_fire_and_may_change_outputs(name):
    """A part with a hook is called, whether the other parts run on the fast path or not."""
    images = images_of((64, 64))
    results = []
    for path in ("fast", "modules"):
        model = model_on(path)
        calls = []

        def hook(module, args, output, calls=calls):
            calls.append(module)
            return output * 1.5 if isinstance(output, torch.Tensor) else output

        model.get_submodule(name).register_forward_hook(hook)
        results.append((*run(model, images), len(calls)))
    assert results[0][2] == results[1][2] > 0
    assert_close(results[0][:2], results[1][:2], 2e-5)


def test_only_the_hooked_layer_falls_back_to_modules():
    model = model_on("fast")
    model.transformer.encoder.layers[1].linear1.register_forward_hook(lambda *_: None)
    with conddetr.record_paths() as paths:
        model(images_of((64, 64)))
    assert paths["encoder layer"] == {"fused operations": 1, "modules": 1}
    assert paths["decoder layer"] == {"fused operations": 3}


@pytest.mark.parametrize("rows", [6, 5], ids=["right guess", "wrong guess"])
@pytest.mark.parametrize("has_relu", [False, True], ids=["", "ReLU"])
def test_a_bias_for_every_row_has_the_gradient_of_the_output(has_relu, rows):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((2, 3, 4), (5, 4), (5,)))
    upstream = torch.randn(2, 3, 5, device=DEVICE)
    copies = bias.expand(rows, -1)
    out = hidden(x, (weight, copies)) if has_relu else linear(x, weight, copies)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    exact = exact.relu() if has_relu else exact
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(out, (x, weight, bias, copies), upstream)
    expected = torch.autograd.grad(exact, (x, weight, bias), upstream.double())
    for gradient, reference in zip(grads, expected, strict=False):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5)
    if rows == 6:
        torch.testing.assert_close(grads[3], (upstream * (exact > 0 if has_relu else 1)).flatten(0, 1), rtol=0, atol=0)


@pytest.mark.parametrize("has_relu", [False, True], ids=["", "ReLU"])
def test_a_bias_for_every_row_has_correct_second_derivatives(has_relu):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((2, 3, 4), (5, 4), (5,)))
    copies = bias.expand(6, -1)
    actual = hidden(x, (weight, copies)) if has_relu else linear(x, weight, copies)
    expected = torch.nn.functional.linear(x, weight, bias)
    results = []
    for out in (actual, expected.relu() if has_relu else expected):
        gradients = torch.autograd.grad(out.square().sum(), (x, weight, bias), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), (x, weight, bias)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_the_number_of_tokens_is_known_before_the_backbone_runs():
    """If another backbone returns more or fewer tokens, gradients are still correct."""
    images = images_of((64, 96), (64, 96))
    model = model_on("fast")
    plan = make_plan(model, torch.stack(images), model.query_embed.weight)
    assert len(plan.input_proj[1]) == 2 * 4 * 6
    assert all(len(bias) == 2 * 4 * 6 for layer in plan.encoder for bias in (layer.query_key[1], layer.value[1]))
    with torch.no_grad():
        plan = make_plan(model, torch.stack(images), model.query_embed.weight)
    assert plan.input_proj[1].dim() == 1
    results = []
    for path in ("fast", "modules"):
        model = model_on(path)
        model.backbone[0].stride = 32
        results.append(run(model, images))
    assert_close(*results, 2e-5)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_misfit_gives_the_reason_to_call_a_part():
    kinds = frozenset((nn.Sequential,))
    part = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert parts.misfit(part, kinds) is None
    assert parts.misfit(nn.Sequential(part, Doubled(2, 2)), kinds) == "1 (Doubled): it is another class"
    assert "no bias" in parts.misfit(nn.Sequential(nn.Linear(2, 2, bias=False)), kinds)
    part[0].register_forward_pre_hook(lambda *_: None)
    assert parts.misfit(part, kinds) == "0 (Linear): it has hooks"
    replica = part[1]._replicate_for_data_parallel()
    assert "replica of DataParallel" in parts.misfit(replica, kinds)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU `auto` uses this path")
def test_no_plan_on_cpus_or_with_the_eager_backend():
    model = model_on("fast")
    image = torch.zeros(1, 3, 64, 64)
    query = model.query_embed.weight
    assert make_plan(model, image, query) is not None
    for backend in ("auto", "eager"):
        model.set_backend(backend)
        assert make_plan(model, image, query) is None


def test_attention_masks_are_aligned():
    padding = torch.tensor([[False, True, False], [True, True, False]], device=DEVICE)
    mask = attention_mask(padding, torch.bfloat16)
    assert mask.shape == (2, 1, 1, 3)
    assert not any(stride % 16 for stride in mask.stride()[:-1])
    assert (mask == 0).squeeze().tolist() == (~padding).tolist()


def test_second_derivatives_are_an_error_that_names_a_backend():
    model = model_on("fast")
    loss = model(images_of((64, 64)))["pred_boxes"].square().sum()
    if registry.why_not("triton", torch.device(DEVICE), torch.float32, is_auto=True) is not None:
        pytest.skip("plain PyTorch computes the gradients here, which has second derivatives")
    gradients = torch.autograd.grad(loss, list(model.transformer.parameters()), create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="backend"):
        sum(g.square().sum() for g in gradients if g is not None).backward()
