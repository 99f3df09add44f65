"""Activation checkpointing: the results and gradients of an ordinary step, from fewer kept activations."""

import inspect
import logging
import re
from collections import Counter

import pytest
import torch
from small_runs import batches, finish, recomputing_ranks, small_trainer, start_ranks
from torch import nn
from torch.profiler import profile

import conddetr
from conddetr.config.run import TrainConfig
from conddetr.kernels import add_norm, relu_dropout
from conddetr.model.fast import layers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {
    "num_classes": 3,
    "num_queries": 7,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "hidden_dim": 32,
    "num_heads": 2,
    "ffn_dim": 32,
    "dropout": 0.1,
}


def model_with(recomputes, preset="conditional-detr-tiny", **options):
    torch.manual_seed(0)
    model = conddetr.build(preset, **{**SMALL, **options}).to(DEVICE).train()
    for part in model.parts_with_backend() if options.get("backend") == "triton" else ():
        # The fast path calls attention with this backend; the interpreter is slow, and its dropout has its own test.
        part.backend = "eager"
    model.checkpoint_activations(recomputes)
    return model


def step(model, autocast=False):
    """Loss, gradients, buffers and the next random number after a step with dropout on two images of unequal size."""
    torch.manual_seed(1)
    images = [torch.randn(3, 64, 96, device=DEVICE), torch.randn(3, 48, 64, device=DEVICE)]
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        output = model(images)
    layers = [*output["aux_outputs"], output]
    outputs = torch.stack([torch.cat([layer["pred_logits"], layer["pred_boxes"]], -1) for layer in layers])
    loss = (outputs * torch.linspace(-1, 1, outputs.numel(), device=DEVICE).view(outputs.shape)).sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "next": torch.rand(1), **gradients, **dict(model.named_buffers())}


@pytest.mark.gpu
@pytest.mark.compares_numbers
@pytest.mark.parametrize(
    ("preset", "backend", "autocast"),
    [
        ("conditional-detr-r18", "eager", False),
        ("conditional-detr-r50", "auto", True),
        pytest.param("conditional-detr-r50", "triton", False, marks=pytest.mark.slow),
        ("detr-tiny", "auto", False),
        ("conditional-detr-tiny", "triton", True),
    ],
)
def test_recomputed_step_equals_an_ordinary_one_with_dropout(preset, backend, autocast):
    expected = step(model_with(False, preset, backend=backend), autocast)
    with conddetr.record_paths() as paths:
        actual = step(model_with(True, preset, backend=backend), autocast)
    # Bit for bit on a CPU; a GPU's convolutions may sum in another order.
    tolerance = {"rtol": 0, "atol": 0} if DEVICE == "cpu" else {}
    torch.testing.assert_close(actual, expected, **tolerance)
    stages = 5 + 5 if preset.endswith("tiny") else 4 + 3
    assert paths["activations of backbone stage"] == {"recomputed": stages}, "the first stage of a ResNet is frozen"
    assert paths["activations of encoder layer"] == {"recomputed": 2 + 2}
    assert paths["activations of decoder layer"] == {"recomputed": 3 + 3}


def on_triton(operation):
    """The operation with backend `triton`, whichever is requested."""

    def run(*args, **options):
        bound = inspect.signature(operation).bind(*args, **options)
        return operation(**{**bound.arguments, "backend": "triton"})

    return run


def test_fused_dropout_repeats_its_seeds(monkeypatch):
    """With `auto` replaced by `triton`, because `auto` does not choose the interpreter, and PyTorch's dropout is
    repeated by its random state alone.
    """
    for operation in (add_norm, relu_dropout):
        monkeypatch.setattr(layers, operation.__name__, on_triton(operation))
    small = {"backend": "triton", "encoder_layers": 1, "decoder_layers": 1}
    expected = step(model_with(False, **small))
    with conddetr.record_paths() as paths:
        actual = step(model_with(True, **small))
    assert set(paths["add_norm"]) == set(paths["relu_dropout"]) == {"triton"}
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_forward_keeps_less_than_a_third_of_the_memory():
    """Kept bytes: allocated in the forward pass and not freed in it, as the allocator reports them."""
    kept = []
    for recomputes in (False, True):
        model = model_with(recomputes, "conditional-detr-r50", backend="eager", encoder_layers=3, ffn_dim=256)
        images = torch.randn(2, 3, 128, 160, device=DEVICE)
        with profile(profile_memory=True) as profiler:
            outputs = model(images)
        kept.append(sum(event.self_cpu_memory_usage for event in profiler.key_averages()))
        del outputs
    assert kept[1] < 0.33 * kept[0]


def test_hooks_inside_units_fire_in_the_forward_pass_and_again_in_backward():
    """The keys of all decoder layers are projected together, before the layers run."""
    model, calls = model_with(True), Counter()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, inputs, output, name=name: calls.update([name]))
    step(model)
    keys = re.compile(r".*\.ca_(kcontent|kpos|v)_proj")
    units = re.compile(r"backbone\.0\.stages|transformer\.(encoder|decoder)\.layers\.")
    assert {calls[name] for name in calls if units.match(name) and not keys.match(name)} == {2}
    assert {calls[name] for name in calls if keys.match(name)} == {1}
    assert {calls[name] for name in ("", "input_proj", "class_embed", "transformer.encoder")} == {1}


def test_nothing_is_recomputed_without_gradients_or_inside_function_transforms():
    model = model_with(True, dropout=0.0)
    images = torch.randn(2, 3, 64, 64, device=DEVICE)
    with conddetr.record_paths() as paths, torch.no_grad():
        model(images)
    assert not [name for name in paths if name.startswith("activations")]
    model.eval()
    weights = dict(model.named_parameters())
    with conddetr.record_paths() as paths:
        torch.func.grad(lambda weights: torch.func.functional_call(model, weights, images)["pred_boxes"].sum())(weights)
    assert paths["activations of encoder layer"] == {"kept": 2}
    assert "is active" in paths.reasons["activations of encoder layer"]["recomputed"]


def test_another_mode_in_backward_is_an_error():
    model = model_with(True)
    loss = model(torch.randn(1, 3, 64, 64, device=DEVICE))["pred_boxes"].sum()
    model.eval()
    with pytest.raises(RuntimeError, match=r"mode changed since the forward pass: expected training=True, got False"):
        loss.backward()


class Foreign(nn.Sequential):
    """A backbone of another library."""

    def set_grad_checkpointing(self, enable=True):
        assert not enable or not self.refuses, "gradient checkpointing not supported"
        self.enabled = enable


@pytest.mark.parametrize(
    ("backbone", "warning"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 1)), "backbone.0 (Sequential) are kept: it has no recomputation"),
        (Foreign(nn.BatchNorm2d(3)), "backbone.0 (Foreign) are kept: its batch norms would update"),
        (Foreign(nn.ReLU()), "backbone.0 (Foreign) are kept: gradient checkpointing not supported"),
        (Foreign(nn.Identity()), ""),
    ],
)
def test_backbone_of_another_library_is_asked_and_its_refusal_is_reported(backbone, warning, caplog):
    backbone.refuses = isinstance(backbone[0], nn.ReLU)
    model = model_with(False)
    model.backbone[0] = backbone
    with caplog.at_level(logging.WARNING):
        model.checkpoint_activations()
    assert warning in caplog.text
    assert bool(caplog.text) == bool(warning)
    assert model.transformer.encoder.recomputes
    assert getattr(backbone, "enabled", False) == (not warning)
    model.checkpoint_activations(False)
    assert not model.transformer.encoder.recomputes
    assert not getattr(backbone, "enabled", False)


def test_training_takes_the_same_steps_and_skips_the_same(tmp_path, caplog):
    """With accumulation, moving average and a step that is not finite, whose cause is searched for."""
    states, messages = [], []
    for recomputes in (False, True):
        run = small_trainer(tmp_path, checkpoint_activations=recomputes, accumulate=2, ema_decay=0.9)
        first, second, bad, last = batches(run, 4)
        run.stepper([first, second], 0)
        hook = run.model.input_proj.register_forward_hook(lambda module, inputs, output: output * float("nan"))
        with caplog.at_level(logging.WARNING):
            run.stepper([bad], 1)
            hook.remove()
            run.stepper([last], 2)
            run.stepper.flush()
        assert run.stepper.skipped == 1
        messages.append(caplog.text)
        caplog.clear()
        states.append({**run.model.state_dict(), **{f"ema {k}": v for k, v in run.trained.state_dict().items()}})
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    assert messages[0] == messages[1] != ""


def test_two_processes_exchange_the_same_gradients(tmp_path):
    finish(*start_ranks(2, recomputing_ranks, tmp_path / "gradients.pt"))
    kept, recomputed = torch.load(tmp_path / "gradients.pt")
    torch.testing.assert_close(recomputed, kept, rtol=0, atol=0)


def test_training_option_excludes_compile():
    with pytest.raises(ValueError, match=r"checkpoint_activations: a compiled model chooses itself"):
        TrainConfig(checkpoint_activations=True, compile=True)
