"""Presets, overrides, and the cost of imports."""

import subprocess
import sys

import pytest
import torch

import conddetr
from conddetr.config import PRESETS, from_dict, resolve
from conddetr.config.augment import AugmentConfig
from conddetr.config.run import read_config, resolve_run
from conddetr.zoo import gflops
from tools.cached import ROOT, cached


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_class": 3}, "Unknown model option 'num_class'. Did you mean 'num_classes'?"),
        ({"csq": "X"}, "csq: unknown value 'X'"),
        ({"num_queries": 0}, "num_queries: expected at least 1, got 0"),
        ({"num_queries": "many"}, "num_queries: expected int, got str 'many'"),
        ({"dilation": 1}, "dilation: expected bool, got int 1"),
        ({"dropout": 1.0}, r"dropout: expected a value in \[0, 1\), got 1.0"),
        ({"hidden_dim": 100}, r"hidden_dim: expected a multiple of num_heads \(8\) and of 4, got 100"),
        ({"max_image_size": 100}, r"max_image_size: expected at least image_size \(800\), got 100"),
        ({"backend": "tritn"}, "backend: unknown value 'tritn'. Did you mean 'triton'"),
        ({"cross_attention_positions": "first-layer"}, "is an option of the detr family"),
        ({"backbone": "tiny", "dilation": True}, "dilation: expected backbone resnet50 or resnet101, .* got tiny"),
        ({"backbone": "resnet18", "dilation": True}, "dilation: expected backbone resnet50 or .* got resnet18"),
        ({"backbone": "timm:resnet50", "dilation": True}, "dilation: expected backbone resnet50 .* got timm:resnet50"),
        ({"backbone": "resnet35"}, "backbone: unknown value 'resnet35'. Did you mean 'resnet.*, timm:NAME"),
        ({"backbone": "timm:hf-hub:a/b"}, "backbone: unknown value 'timm:hf-hub:a/b'. .*, timm:NAME"),
        ({"backbone": "tiny", "backbone_norm": "frozen"}, "backbone_norm: `frozen` needs pretrained statistics"),
        (
            {"backbone_norm": "train", "train_backbone": False},
            "backbone_norm: `train` contradicts train_backbone False",
        ),
    ],
)
def test_errors_name_bad_overrides(overrides, message):
    with pytest.raises(ValueError, match=message):
        conddetr.build("conditional-detr-r50", **overrides)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": float("nan")}, "Training option lr: expected a finite number, got nan"),
        ({"clip_max_norm": float("inf")}, "Training option clip_max_norm: expected a finite number, got inf"),
        ({"weight_decay": -0.1}, "Training option weight_decay: expected at least 0, got -0.1"),
        ({"check_finite": "allways"}, "check_finite: unknown value 'allways'. Did you mean 'always'"),
        ({"check_finite": "always", "cuda_graphs": True}, "`always` makes the host wait for the device, which"),
        ({"cuda_graphs": "onn"}, "cuda_graphs: unknown value 'onn'. Did you mean 'on'"),
        ({"seed": 2**63}, r"seed: expected at most 9223372036854775807 \(2\^63 - 1\), got 9223372036854775808"),
        ({"freeze": "encoder,,heads"}, "freeze: expected entries separated by single commas, got 'encoder,,heads'"),
        ({"freeze": "encoder, encoder"}, "freeze: 'encoder' is given twice"),
        ({"lr_patterns": "heads"}, "lr_patterns: expected PATTERN=RATE with a positive learning rate, got 'heads'"),
        ({"lr_patterns": "heads=0"}, "got 'heads=0'. To hold parameters still, use freeze"),
        ({"lr_patterns": {"heads": True}}, "got 'heads=True'"),
        ({"lr_patterns": "heads=1, heads=2"}, "lr_patterns: 'heads' is given twice"),
        ({"log_to": "tensorbord"}, "log_to: unknown value 'tensorbord'. Did you mean 'tensorboard'"),
        ({"log_to": "wandb,wandb"}, "log_to: 'wandb' is given twice"),
        ({"log_to": True}, "log_to: expected str, got bool True"),
        ({"patience": -1}, "patience: expected at least 0, got -1"),
        ({"patience": 2, "min_delta": 1.0}, r"min_delta: expected a value in \[0, 1\), got 1.0"),
        ({"min_delta": 0.001}, "min_delta has no effect without patience"),
        ({"pad_buckets": -2}, "pad_buckets: expected at least -1, got -2"),
        ({"train_images": 0}, "Data option train_images: expected at least 1, got 0"),
        ({"val_images": -3}, "Data option val_images: expected at least 1, got -3"),
    ],
)
def test_errors_name_run_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        resolve_run(options)


def test_table_of_learning_rates_is_read_from_toml(tmp_path):
    (tmp_path / "run.toml").write_text('[train.lr_patterns]\n"*.norm?.*" = 5e-6\nheads = 0.001\n')
    run = resolve_run(read_config(tmp_path / "run.toml"))
    assert run.train.lr_patterns == "*.norm?.*=5e-06, heads=0.001"
    # It is stored as text, which means the same.
    assert resolve_run(run.to_dict()) == run


def test_former_switch_is_read_from_older_files():
    values = [resolve_run({"cuda_graphs": value}).train.cuda_graphs for value in (True, False, "auto")]
    assert values == ["on", "off", "auto"]


def test_a_set_of_augmentations_gives_the_switches_that_are_not_given():
    run = resolve_run({"coco_path": "coco", "augment": "strong", "colour": False})
    assert run.to_dict()["augment"] == {
        "augment": "strong",
        "flip": True,
        "resize": "large-scale-jitter",
        "crop": "keep-boxes",
        "colour": False,
        "mosaic": 0.0,
    }
    assert resolve_run(run.to_dict()) == run
    assert resolve_run({"coco_path": "coco"}).augment == AugmentConfig() == AugmentConfig("paper")
    assert resolve_run({"coco_path": "coco", "augment": {"augment": "none", "mosaic": 1}}).augment.mosaic == 1
    # Synthetic shapes are never augmented, and the configuration shows that.
    shapes = resolve_run({})
    assert shapes.augment == AugmentConfig("none")
    assert resolve_run(shapes.to_dict()) == shapes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "storng"}, "Augmentation option augment: unknown value 'storng'. Did you mean 'strong'"),
        ({"augment": "strong"}, "augment: synthetic shapes .* are never augmented, expected 'none', got 'strong'"),
        ({"flip": True}, "flip: synthetic shapes .* are never augmented, expected False, got True: leave it out"),
        ({"coco_path": "coco", "crop": "keep"}, "crop: unknown value 'keep'. Did you mean 'keep-boxes'"),
        ({"coco_path": "coco", "colour": 1}, "Augmentation option colour: expected bool, got int 1"),
        ({"coco_path": "coco", "mosaic": -0.1}, "Augmentation option mosaic: expected a number from 0 to 1, got -0.1"),
        ({"coco_path": "coco", "color": True}, "Unknown option 'color'. Did you mean 'colour'"),
        ({"augment": {"flip": False}, "flip": True}, "option 'flip' is given twice"),
    ],
)
def test_errors_name_wrong_augmentations(options, message):
    with pytest.raises(ValueError, match=message):
        resolve_run(options)


def test_unknown_preset_suggests_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'conditional-detr-r50'"):
        conddetr.build("conditional-detr-r-50")


def test_conditional_options_are_refused_for_detr():
    with pytest.raises(ValueError, match="options of the conditional-detr family"):
        conddetr.build("detr-r50", csq="I")


def test_build_options_are_not_model_options():
    with pytest.raises(ValueError, match=r"backend is an option of conddetr\.build and conddetr\.DETR"):
        resolve("conditional-detr-tiny", backend="eager")
    with pytest.raises(ValueError, match=r"'bakend'\. Did you mean 'backend'"):
        conddetr.build("conditional-detr-tiny", bakend="eager")
    with pytest.raises(ValueError, match="pretrained_backbone: expected bool, got str 'yes'"):
        conddetr.build("conditional-detr-r50", pretrained_backbone="yes")
    with pytest.raises(ValueError, match="pretrained_backbone: the backbone 'tiny' has no pretrained weights"):
        conddetr.DETR(PRESETS["conditional-detr-tiny"], pretrained_backbone=True)


@pytest.mark.parametrize("old", [{"backend": "triton", "pretrained_backbone": True}, {"backend": "eager"}, {}])
def test_older_configuration_with_build_options_loads(old):
    """Older files have them in `config` of a checkpoint, and in the section `model` of a run's `config.json`."""
    config = PRESETS["detr-r50"]
    assert from_dict({**config.to_dict(), **old}) == config
    run = resolve_run({"preset": "detr-r50", "model": {**config.to_dict(), **old}, "output_dir": "here"})
    assert run.model == config
    assert (run.backend, run.pretrained_backbone) == (old.get("backend", "auto"), True)
    assert resolve_run(run.to_dict()) == run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tritn"}, "Model option backend: unknown value 'tritn'. Did you mean 'triton'"),
        ({"model": {"backend": 1}}, "Model option backend: expected str, got int 1"),
        ({"model": {"backend": "eager"}, "backend": "auto"}, "option 'backend' is given twice"),
        ({"pretrained_backbone": True}, "pretrained_backbone: the backbone 'tiny' has no pretrained"),
        ({"pretraind_backbone": True}, "Unknown option 'pretraind_backbone'. Did you mean 'pretrained_backbone'"),
    ],
)
def test_errors_name_wrong_build_options_of_a_run(options, message):
    with pytest.raises(ValueError, match=message):
        resolve_run(options)


def test_model_reports_its_backend():
    model = conddetr.build("conditional-detr-tiny", backend="eager", num_classes=3)
    assert {model.backend} == {part.backend for part in model.parts_with_backend()} == {"eager"}
    assert model.config == resolve("conditional-detr-tiny", num_classes=3)
    assert not {"backend", "pretrained_backbone"} & model.config.to_dict().keys()
    assert [conddetr.build_criterion(source).backend for source in (model, model.config)] == ["eager", "auto"]
    assert conddetr.build_criterion(conddetr.build("detr-tiny", backend="native")).backend == "auto"
    model.set_backend("auto")
    assert {model.backend} == {part.backend for part in model.parts_with_backend()} == {"auto"}


def test_model_config_survives_a_round_trip():
    config = conddetr.build("detr-tiny", num_classes=4).config
    assert from_dict(config.to_dict()) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_table_equals_counted_values(preset):
    row = conddetr.presets()[preset]
    sources = sorted(path for folder in ("conddetr", "kernels") for path in (ROOT / folder).rglob("*.py"))
    counted = cached("gflops", [*sources, torch.__version__, preset], lambda: gflops(PRESETS[preset]))
    assert counted == pytest.approx(row.gflops, rel=2e-3)
    with torch.device("meta"):
        model = conddetr.build(preset)
    assert sum(p.numel() for p in model.parameters()) == row.parameters
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == row.trainable_parameters


def test_import_loads_no_large_library():
    """Not even PyTorch, so `conddetr --help` and errors about flags do not wait for it."""
    code = "import sys; import conddetr, conddetr.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.split()
    assert {"torch", "torchvision", "numpy", "PIL", "matplotlib"}.isdisjoint(loaded)


def test_public_names_are_those_of_their_modules():
    assert sorted(conddetr._HOMES) == sorted(conddetr.__all__)
    assert all(getattr(conddetr, name).__name__ == name for name in conddetr.__all__)
    assert set(conddetr.__all__) <= set(dir(conddetr))
    with pytest.raises(AttributeError, match="no attribute 'biuld'"):
        _ = conddetr.biuld


def test_public_names_load_no_large_library():
    """Large libraries are imported where they are used, so a command does not wait for those it does not need."""
    code = (
        "import torch, torchvision, sys; known = set(sys.modules); import conddetr; "
        "[getattr(conddetr, name) for name in conddetr.__all__]; print(*(set(sys.modules) - known))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.split()
    # These two register FLOP formulas and take 2 ms.
    small = {"torch.utils.flop_counter", "torch.utils.module_tracker"}
    assert {name.split(".")[0] for name in loaded if name not in small} <= {"conddetr", "rich", "safetensors"}
