"""Freezing and learning rates by pattern: what is trained, how fast, and what a resumed run keeps."""

import copy
import re
from fnmatch import translate
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import SMALL_MODEL, assert_equal, batches, small_trainer

import conddetr
from conddetr.config.run import TrainConfig
from conddetr.engine.checkpoint import read_checkpoint
from conddetr.engine.log import read_log
from conddetr.engine.optim import load_optimizer, make_optimizer
from conddetr.engine.parameters import Frozen, freeze, group_parameters
from conddetr.engine.run import note_random_parts
from conddetr.weights.load import LoadReport

pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")

MODELS = {
    family: conddetr.build(f"{family}-tiny", num_classes=3, **SMALL_MODEL) for family in ("conditional-detr", "detr")
}
EXPRESSIONS = {
    "backbone": r"backbone\..*",
    "encoder": r"transformer\.encoder\..*",
    "decoder": r"transformer\.decoder\..*",
    "heads": r"(class|bbox)_embed\..*",
    "backbone.0.stages.3": r"backbone\.0\.stages\.3\..*",
    "query_embed.weight": r"query_embed\.weight",
    "*.norm?.*": translate("*.norm?.*"),
    "*bias": translate("*bias"),
    "transformer.*.self_attn.*": translate("transformer.*.self_attn.*"),
}
"""Patterns, and regular expressions of the same parameters."""
PATTERNS = st.lists(st.sampled_from(list(EXPRESSIONS)), unique=True, max_size=4)


def means(pattern, name):
    return re.fullmatch(EXPRESSIONS[pattern], name) is not None


@pytest.mark.parametrize("family", MODELS)
@given(frozen=PATTERNS, patterns=PATTERNS)
def test_every_trainable_parameter_is_in_the_group_of_its_first_pattern(family, frozen, patterns):
    model = MODELS[family].requires_grad_(True)
    names = [name for name, _ in model.named_parameters()]
    trainable = [name for name in names if not any(means(pattern, name) for pattern in frozen)]
    expected = {pattern: [] for pattern in (False, True, *patterns)}
    for name in trainable:
        first = next((pattern for pattern in patterns if means(pattern, name)), means("backbone", name))
        expected[first].append(name)
    config = TrainConfig(freeze=",".join(frozen), lr_patterns=",".join(f"{pattern}=0.5" for pattern in patterns))
    try:
        freeze(model, config.freeze)
        groups = group_parameters(model, config)
    except ValueError:
        # Nothing is trained, or a pattern has no effect: earlier patterns, or freezing, take all of its parameters.
        alone = [[name for name in names if means(pattern, name)] for pattern in frozen]
        takes_none = [not set(own) - set(chain(*alone[:number])) for number, own in enumerate(alone)]
        assert not trainable or any(takes_none) or any(not expected[pattern] for pattern in patterns)
        return
    assert groups == list(expected.values())
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": "backbon"}, r"freeze: 'backbon' matches no parameter. Did you mean 'backbone'"),
        ({"freeze": "backbone.stages.1.*"}, r"'backbone.stages.1.\*' matches no .* Did you mean 'backbone.0.stages.1'"),
        ({"freeze": "*"}, r"freeze: '\*' leaves no parameter to train"),
        ({"freeze": "encoder, transformer.encoder"}, "'transformer.encoder' matches belong to earlier patterns"),
        ({"lr_patterns": "head=1"}, r"lr_patterns: 'head' matches no parameter. Did you mean 'heads'"),
        ({"lr_patterns": "*=1, heads=2"}, "'heads' matches belong to earlier patterns: put it before them"),
        ({"freeze": "heads", "lr_patterns": "heads=1"}, "all parameters of 'heads' are frozen"),
    ],
)
def test_patterns_without_effect_are_errors(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        small_trainer(tmp_path, **options)


def test_frozen_parts_stay_as_they_are(tmp_path, capsys):
    run = small_trainer(tmp_path, model_options={"dropout": 0.5}, freeze="backbone, encoder", ema_decay=0.9)
    before = copy.deepcopy(run.model.state_dict())
    run.stepper.train_mode()
    encoder, decoder = run.model.transformer.encoder, run.model.transformer.decoder
    assert not any(module.training for part in (run.model.backbone, encoder) for module in part.modules())
    assert all(module.training for module in (run.model, run.model.transformer, *decoder.modules()))
    run.fit()
    printed = capsys.readouterr().out
    sizes = [sum(p.numel() for p in part.parameters()) for part in (run.model.backbone, encoder)]
    assert f"frozen: backbone ({sizes[0]:,} parameters), encoder ({sizes[1]:,} parameters); modules that" in printed
    for state in (run.model.state_dict(), run.trained.state_dict()):
        # Statistics of batch norms included.
        changed = {name for name, value in state.items() if not torch.equal(value, before[name])}
        assert not [name for name in changed if name.startswith(("backbone.", "transformer.encoder."))]
        assert {"class_embed.weight", "input_proj.weight", "query_embed.weight"} <= changed
    # A frozen encoder drops nothing out.
    run.stepper.train_mode()
    tokens = torch.randn(2, 16, 16)
    assert torch.equal(encoder(tokens, None, tokens), encoder(tokens, None, tokens))
    trained = [p for p in run.model.parameters() if p.requires_grad]
    assert all(p.grad is None for p in run.model.parameters() if not p.requires_grad)
    assert set(run.stepper.optimizer.state) == set(trained)


@pytest.mark.parametrize("options", [{"model_options": {"train_backbone": False}}, {"freeze": "backbone"}])
def test_both_options_that_freeze_the_backbone_keep_its_statistics(tmp_path, options):
    run = small_trainer(tmp_path, images=4, epochs=1, **options)
    before = copy.deepcopy(run.model.backbone.state_dict())
    run.fit()
    assert_equal(run.model.backbone.state_dict(), before)
    assert run.model.transformer.decoder.training


def test_first_step_of_adam_is_the_rate_of_each_pattern(tmp_path):
    """Adam's first step is its learning rate times the sign of the gradient."""
    patterns = "class_embed=0.004, backbone.0.stages.*.0.weight=0.002"
    run = small_trainer(tmp_path, lr_patterns=patterns, lr=1e-3, lr_backbone=5e-4, weight_decay=0.0)
    before = copy.deepcopy(dict(run.model.named_parameters()))
    run.stepper.train_mode()
    run.stepper(batches(run, 1), 0)
    steps = {name: float((p - before[name]).detach().abs().max()) for name, p in run.model.named_parameters()}
    expected = {"class_embed.weight": 0.004, "backbone.0.stages.4.0.weight": 0.002}
    expected |= {"backbone.0.stages.4.1.bias": 5e-4, "bbox_embed.layers.2.weight": 1e-3}
    assert {name: steps[name] for name in expected} == pytest.approx(expected, rel=1e-3)


def test_rates_are_logged_and_follow_the_schedule(tmp_path, capsys):
    run = small_trainer(tmp_path, lr_patterns={"class_embed": 0.004}, lr_drop=1, epochs=2, images=4)
    run.fit()
    rates = [
        {name: value for name, value in record.items() if name.startswith("lr")}
        for record in read_log(tmp_path / "log.jsonl")
    ]
    first = {"lr": 1e-3, "lr_backbone": 1e-3, "lr_pattern/class_embed": 4e-3}
    assert rates == [pytest.approx(first), pytest.approx({name: rate / 10 for name, rate in first.items()})]
    size = sum(p.numel() for p in run.model.class_embed.parameters())
    assert f"learning rates: class_embed 0.004 ({size:,} parameters); the others have" in capsys.readouterr().out


def test_other_groups_resume_with_the_moments_of_each_parameter(tmp_path):
    """Groups with the default rates change nothing, so a run that gets them in the middle ends as the whole run."""
    options = {"clip_max_norm": 0.0, "images": 4}
    small_trainer(tmp_path / "whole", **options, epochs=2).fit()
    small_trainer(tmp_path / "cut", **options, epochs=1).fit()
    run = small_trainer(tmp_path / "cut", **options, epochs=2, lr_patterns="*.norm?.*=1e-3, backbone.0.stages.3=1e-3")
    run.resume(tmp_path / "cut" / "checkpoint.pt")
    assert "lr_patterns was '', is '*.norm?.*=1e-3, backbone.0.stages.3=1e-3'" in run.changes
    run.fit()
    assert_equal(*(read_checkpoint(tmp_path / name / "checkpoint.pt")["model"] for name in ("cut", "whole")))


def test_parameters_that_are_trained_again_start_without_moments(tmp_path):
    small_trainer(tmp_path, epochs=1, images=4, freeze="backbone").fit()
    run = small_trainer(tmp_path, epochs=2, images=4)
    run.resume(tmp_path / "checkpoint.pt")
    assert run.changes[:2] == [
        "freeze was 'backbone', is ''",
        "15 parameter tensors were not trained before: AdamW has no moments for them yet",
    ]
    run.fit()
    saved = read_checkpoint(tmp_path / "checkpoint.pt")
    states = saved["optimizer"]["state"]
    steps = {name: int(states[number]["step"]) for number, name in enumerate(chain(*saved["groups"]))}
    assert steps["class_embed.weight"] == 2
    assert steps["backbone.0.stages.0.0.weight"] == 1


def test_checkpoints_of_before_groups_were_stored_resume_with_the_same_groups_only():
    model = copy.deepcopy(MODELS["detr"]).requires_grad_(True)
    config = TrainConfig()
    optimizer, groups = make_optimizer(model, config), group_parameters(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    again = make_optimizer(model, config)
    assert load_optimizer(again, groups, saved, None) == 0
    assert_equal(again.state_dict(), saved)
    other = TrainConfig(lr_patterns="heads=1")
    with pytest.raises(ValueError, match="does not name them: resume without freeze and lr_patterns"):
        load_optimizer(make_optimizer(model, other), group_parameters(model, other), saved, None)


@pytest.mark.parametrize(
    ("frozen", "report", "pretrained_backbone", "first"),
    [
        ("encoder", None, True, "12 frozen parameter tensors hold random values and keep them, first transformer.enc"),
        ("backbone", None, True, ""),
        ("backbone", None, False, "15 frozen parameter tensors hold random values and keep them, first backbone.0"),
        ("*", LoadReport(), False, ""),
        (
            "*",
            LoadReport(mismatched=["class_embed.bias: expected (3,), got (91,)"]),
            False,
            "1 frozen .* class_embed.b",
        ),
    ],
)
def test_frozen_parts_with_random_values_are_a_warning(caplog, frozen, report, pretrained_backbone, first):
    names = [name for name, _ in MODELS["detr"].named_parameters()]
    own = {frozen: [name for name in names if frozen == "*" or means(frozen, name)]}
    note_random_parts(Frozen(own, {}, []), report, pretrained_backbone)
    assert re.match(first, caplog.messages[0]) if first else not caplog.messages
