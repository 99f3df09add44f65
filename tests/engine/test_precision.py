"""The meaning of `precision` on each device and in a resumed run; default runs agree with the reference."""

import json

import pytest
import torch
from small_runs import small_trainer

import conddetr
from conddetr.config.run import TrainConfig, resolve_run
from conddetr.engine import precision as precisions
from conddetr.engine.checkpoint import CheckpointWriter, read_checkpoint, save_checkpoint
from conddetr.engine.precision import float32_products, has_bfloat16, resolve_precision

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "capability", "hip", "expected"),
    [
        ("cpu", None, None, False),
        ("cuda", (7, 5), None, False),
        ("cuda", (8, 0), None, True),
        ("cuda", (8, 6), None, True),
        ("cuda", (12, 0), None, True),
        # An AMD GPU has the device type cuda and a capability, too.
        ("cuda", (9, 4), "6.4", False),
    ],
)
def test_auto_means_bfloat16_on_nvidia_gpus_from_8_0_on(device, capability, hip, expected, monkeypatch):
    monkeypatch.setattr(precisions.registry, "capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert has_bfloat16(torch.device(device)) is expected
    assert resolve_precision("auto", has_bfloat16(torch.device(device))) == ("bfloat16" if expected else "float32")


def test_named_precision_is_used_on_every_device():
    assert [resolve_precision("bfloat16", False), resolve_precision("float32", True)] == ["bfloat16", "float32"]
    assert TrainConfig().precision == resolve_run({"coco_path": "coco"}).train.precision == "auto"
    with pytest.raises(ValueError, match="precision: unknown value 'half'"):
        TrainConfig(precision="half")


@pytest.fixture
def _restored_switches():
    """Restore the older switches too: PyTorch refuses to read them if they disagree with the newer ones."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [switch.fp32_precision for switch in switches]
    older = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(older[0])
    torch.backends.cudnn.allow_tf32 = older[1]
    for switch, value in zip(switches, before, strict=True):
        switch.fp32_precision = value


@pytest.mark.usefixtures("_restored_switches")
@pytest.mark.parametrize("products", ["tf32", "ieee"])
@pytest.mark.parametrize("convolutions", ["tf32", "ieee"])
def test_tf32_switches_are_described_in_words(products, convolutions):
    """With PyTorch's newer switches, after which it refuses to read the older ones."""
    torch.backends.cuda.matmul.fp32_precision = products
    torch.backends.cudnn.conv.fp32_precision = convolutions
    words = {"tf32": "on", "ieee": "off"}
    expected = f"float32 products: TF32 {words[products]}, convolutions: TF32 {words[convolutions]}"
    assert float32_products(CUDA) == expected
    assert float32_products(torch.device("cpu")) == ""


@pytest.mark.usefixtures("_restored_switches")
def test_older_tf32_switches_are_read_too():
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = False
    assert float32_products(CUDA) == "float32 products: TF32 on, convolutions: TF32 off"


def trainer(folder, has, monkeypatch, **options):
    """A trainer on a device where `auto` means bfloat16 (`has`), or float32."""
    monkeypatch.setattr("conddetr.engine.trainer.has_bfloat16", lambda device: has)
    return small_trainer(folder, epochs=1, **options)


def resumed(folder, has, monkeypatch, **options):
    run = trainer(folder, has, monkeypatch, **options)
    run.resume(folder / "checkpoint.pt")
    return run


def save(run):
    with CheckpointWriter() as writer:
        run.save(writer)


def test_resumed_run_keeps_its_precision_or_reports_why_not(tmp_path, monkeypatch):
    save(trainer(tmp_path, True, monkeypatch))
    assert read_checkpoint(tmp_path / "checkpoint.pt")["run"]["train"]["precision"] == "bfloat16"
    same = resumed(tmp_path, True, monkeypatch)
    assert (same.config.precision, same.changes) == ("bfloat16", [])
    elsewhere = resumed(tmp_path, False, monkeypatch)
    assert (elsewhere.stepper.config.precision, elsewhere.run.train.precision) == ("float32", "float32")
    [change] = elsewhere.changes
    assert change.startswith("precision was bfloat16, is float32: `auto` means bfloat16 only on NVIDIA GPUs")
    assert change.endswith("--precision bfloat16 keeps it")
    named = resumed(tmp_path, False, monkeypatch, precision="bfloat16")
    assert (named.stepper.config.precision, named.changes) == ("bfloat16", [])
    other = resumed(tmp_path, True, monkeypatch, precision="float32")
    assert other.changes == ["precision was bfloat16, is float32: as requested"]


@pytest.mark.parametrize("stored", ["float32", None])
def test_older_checkpoints_resume_in_float32(tmp_path, monkeypatch, stored):
    save(trainer(tmp_path, True, monkeypatch, model_options={"backend": "eager"}))
    content = read_checkpoint(tmp_path / "checkpoint.pt")
    content["run"]["train"].pop("precision")
    del content["chosen"]
    if stored:
        content["run"]["train"]["precision"] = stored
    else:
        # Even older checkpoints have these two in the model's configuration.
        build_options = {name: content["run"].pop(name) for name in ("backend", "pretrained_backbone")}
        content["config"].update(build_options)
        content["run"]["model"].update(build_options)
    save_checkpoint(tmp_path / "checkpoint.pt", content)
    run = resumed(tmp_path, True, monkeypatch)
    assert run.stepper.config.precision == "float32"
    assert run.changes == ["backend was eager, is auto: rounding and the random numbers of dropout differ"]


def test_all_processes_train_in_one_precision(tmp_path, monkeypatch):
    """One GPU without bfloat16 makes all processes use float32."""
    monkeypatch.setattr("conddetr.engine.distributed.any_of", lambda flag, device: True)
    assert trainer(tmp_path, True, monkeypatch).config.precision == "float32"


@pytest.mark.parametrize("has", [False, True])
def test_steps_and_evaluation_use_the_precision_of_the_run(tmp_path, has, monkeypatch):
    pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")
    run, seen, forward = trainer(tmp_path, has, monkeypatch), set(), conddetr.DETR._detect

    def watched(model, *args):
        seen.add((model.training, torch.is_autocast_enabled("cpu")))
        return forward(model, *args)

    monkeypatch.setattr(conddetr.DETR, "_detect", watched)
    run.fit()
    assert seen == {(True, has), (False, has)}
    stored = json.loads((tmp_path / "config.json").read_text())["train"]["precision"]
    assert stored == ("bfloat16" if has else "float32")


def test_checkpoint_of_a_default_run_works_in_the_reference(tmp_path):
    """Its weights load strictly, and outputs agree within the tolerances of the golden outputs."""
    pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")
    run = small_trainer(tmp_path)
    assert run.model.backend == "auto"
    run.fit()
    path = tmp_path / "checkpoint.pt"
    reference = conddetr.DETR(run.model.config, backend="eager")
    assert conddetr.load_weights(reference, path).complete
    default = conddetr.Detector.from_checkpoint(path, device="cpu").model
    images = [torch.randn(3, 64, 64), torch.randn(3, 48, 64)]
    with torch.inference_mode():
        expected, outputs = (model.eval()(images) for model in (reference, default))
    torch.testing.assert_close(outputs["pred_logits"], expected["pred_logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs["pred_boxes"], expected["pred_boxes"], atol=1e-5, rtol=0)
