"""Checkpoints of other programs: found under any key and prefix, or refused with their names."""

import argparse
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

import conddetr
from conddetr.cli import main
from conddetr.engine.checkpoint import save_checkpoint
from conddetr.interop import to_huggingface
from conddetr.weights.load import start_from

NAMES = ["cat", "dog", "toothbrush"]
SMALL = {"hidden_dim": 32, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 2, "ffn_dim": 48, "num_queries": 10}
CONFIG = {
    "architectures": ["ConditionalDetrForObjectDetection"],
    "model_type": "conditional_detr",
    "backbone": "resnet50",
    "d_model": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "dilation": True,
    "num_queries": 10,
    "id2label": {str(label): name for label, name in enumerate(NAMES)},
}
"""Content of transformers' `config.json`, without fields that make no difference here."""


def tiny(**options):
    return conddetr.build("conditional-detr-tiny", num_classes=3, **options)


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def regionally_compiled(model):
    for layers in (model.transformer.encoder.layers, model.transformer.decoder.layers):
        for index, layer in enumerate(layers):
            layers[index] = torch.compile(layer)
    return model.state_dict()


def optimizer_of(model):
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    return optimizer.state_dict()


def load_into_new(content):
    """A new model with the loaded weights, and the report."""
    model = tiny()
    return model, conddetr.load_weights(model, content)


def assert_same_weights(model, state):
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype)), name


FORMS = {
    "compiled": lambda m: torch.compile(m).state_dict(),
    "compiled, under a key": lambda m: {"model": torch.compile(m).state_dict(), "epoch": 3},
    "compiled layer by layer": regionally_compiled,
    "data parallel over compiled": lambda m: prefixed("module._orig_mod.", m.state_dict()),
    "compiled over data parallel": lambda m: prefixed("_orig_mod.module.", m.state_dict()),
    "a part in parallel": lambda m: {
        name.replace("transformer.", "transformer.module."): value for name, value in m.state_dict().items()
    },
    "FSDP over checkpointed": lambda m: prefixed("_fsdp_wrapped_module._checkpoint_wrapped_module.", m.state_dict()),
    "Lightning": lambda m: {
        "state_dict": {**prefixed("model.", m.state_dict()), "criterion.empty_weight": torch.ones(4)},
        "optimizer_states": [optimizer_of(m)],
        "loops": {"fit_loop": {"state_dict": {}}},
        "hyper_parameters": {"lr": 1e-4},
    },
    "Lightning over compiled": lambda m: {"state_dict": prefixed("model._orig_mod.", m.state_dict())},
    "DeepSpeed": lambda m: {"module": m.state_dict(), "global_steps": 7},
    "model_state_dict": lambda m: {"model_state_dict": m.state_dict(), "optimizer_state_dict": optimizer_of(m)},
    "nested": lambda m: {"checkpoint": {"net": {"params": m.state_dict()}}},
    "parameters": lambda m: {"model": {**m.state_dict(), **dict(m.named_parameters())}},
    "beside numbers": lambda m: {**m.state_dict(), "epoch": 3},
    "average alone": lambda m: {"model_ema": AveragedModel(m).state_dict()},
    "two models, one by the usual name": lambda m: {"model": m.state_dict(), "init": tiny().state_dict()},
}


@pytest.mark.parametrize("form", FORMS)
def test_wrapped_weights_are_found(tmp_path, tiny_model, form):
    state = tiny_model.state_dict()
    content = FORMS[form](tiny_model)
    model, report = load_into_new(content)
    assert_same_weights(model, state)
    assert report.complete
    torch.save(content, tmp_path / "a.ckpt")
    detector = conddetr.Detector.from_checkpoint(tmp_path / "a.ckpt", device="cpu")
    assert_same_weights(detector.model, state)
    assert [entry["name"] for entry in detector.classes] == ["0", "1", "2"]


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_weights_are_loaded_into_a_wrapped_model(tiny_model, wrap):
    model = tiny()
    assert conddetr.load_weights(wrap(model), tiny_model.state_dict()).complete
    assert_same_weights(model, tiny_model.state_dict())


AVERAGES = {
    "ours": lambda state: {"ema": state},
    "RT-DETR": lambda state: {"ema": {"module": state, "updates": 30}},
    "DINO": lambda state: {"ema_model": state},
    "timm": lambda state: {"state_dict_ema": prefixed("module.", state)},
    "compiled": lambda state: {"ema": prefixed("_orig_mod.", state)},
    "torchvision": lambda state: {"model_ema": {**prefixed("module.", state), "n_averaged": torch.tensor(5)}},
    "a callback": lambda state: {"callbacks": {"EMA": {"ema_state_dict": state}}},
    "in the same dict": lambda state: {"state_dict": prefixed("ema_model.", state)},
}


@pytest.mark.parametrize("form", AVERAGES)
def test_moving_average_is_taken_and_reported(tiny_model, form):
    state = tiny_model.state_dict()
    average = {name: value + 1 for name, value in state.items()}
    content = {"model": state, "optimizer": {"state": {}}, **AVERAGES[form](average)}
    if form == "in the same dict":
        content = {"state_dict": {**prefixed("model.", state), **content["state_dict"]}}
    model, report = load_into_new(content)
    assert_same_weights(model, average)
    assert report.complete
    assert "the moving average of the weights is taken" in str(report).splitlines()[0]


def test_average_of_parameters_is_completed_by_the_statistics_of_the_weights(tiny_model):
    for name, buffer in tiny_model.named_buffers():
        assert buffer.is_floating_point() or name.endswith("num_batches_tracked")
        buffer.fill_(3)
    average = {name: value.detach() + 1 for name, value in tiny_model.named_parameters()}
    model, report = load_into_new({"model": tiny_model.state_dict(), "ema": {"shadow": average}})
    assert_same_weights(model, {**tiny_model.state_dict(), **average})
    assert f"{len(list(tiny_model.buffers()))} tensors that it lacks, first 'backbone" in str(report).splitlines()[0]


def test_average_without_names_is_left_out_and_reported(tiny_model):
    average = {"decay": 0.99, "shadow_params": [torch.zeros(3)]}
    model, report = load_into_new({"model": tiny_model.state_dict(), "ema": average})
    assert_same_weights(model, tiny_model.state_dict())
    assert "'ema' has no names of this model's weights and is left out" in str(report).splitlines()[0]


def test_error_names_several_models(tmp_path, tiny_model):
    state = tiny_model.state_dict()
    with pytest.raises(
        ValueError, match=r"^The state dict holds 2 models: \['student'\]; \['teacher'\] with prefix 'm"
    ):
        load_into_new({"student": state, "teacher": prefixed("module.", state)})
    torch.save({"model": {**prefixed("student.", state), **prefixed("teacher.", state)}}, tmp_path / "a.pt")
    with pytest.raises(
        ValueError, match=r"a\.pt holds 2 models: \['model'\] with prefix 'student\.'; \['model'\] with"
    ):
        conddetr.Detector.from_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_converted_to_the_precision_of_the_model(tmp_path, tiny_model, dtype):
    state = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in tiny_model.state_dict().items()
    }
    save_file(state, tmp_path / "a.safetensors")
    detector = conddetr.Detector.from_checkpoint(tmp_path / "a.safetensors", device="cpu")
    assert_same_weights(detector.model, state)
    assert detector.model.class_embed.weight.dtype == torch.float32
    assert len(detector.predict(torch.rand(3, 60, 80), 0.0)[0]) == 75


def test_integer_weights_are_refused(tiny_model):
    """Quantised weights would be copied without their scale."""
    state = {
        **tiny_model.state_dict(),
        "input_proj.weight": torch.zeros_like(tiny_model.input_proj.weight, dtype=torch.int8),
    }
    with pytest.raises(ValueError, match=r"input_proj\.weight: expected torch\.float32, got torch\.int8"):
        load_into_new(state)


def test_settings_without_a_trace_in_the_weights_are_compared(tmp_path, tiny_model):
    content = {"model": tiny_model.state_dict(), "config": tiny_model.config.to_dict(), "classes": NAMES}
    with pytest.raises(ValueError, match="num_heads: the weights belong to a model with 4 heads, this model has 8"):
        conddetr.load_weights(tiny(num_heads=8), content)
    content = {"model": tiny_model.state_dict(), "args": argparse.Namespace(nheads=2, dropout=0.25)}
    torch.save(content, tmp_path / "a.pth")
    config = conddetr.Detector.from_checkpoint(tmp_path / "a.pth", device="cpu").config
    assert (config.num_heads, config.dropout) == (2, 0.25)
    with pytest.raises(ValueError, match=r"a\.pth is of conditional-detr-tiny, not of detr-tiny"):
        conddetr.Detector.from_checkpoint(tmp_path / "a.pth", preset="detr-tiny")


def test_sizes_are_read_from_the_weights(tmp_path):
    model = tiny(encoder_layers=0, decoder_layers=3, ffn_dim=40, hidden_dim=32, num_queries=7)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    detector = conddetr.Detector.from_checkpoint(tmp_path / "a.pt", device="cpu")
    assert detector.config == model.config


def test_class_lists_of_other_programs_are_read(tmp_path, tiny_model):
    torch.save({"model": tiny_model.state_dict(), "classes": NAMES}, tmp_path / "a.pt")
    detector = conddetr.Detector.from_checkpoint(tmp_path / "a.pt", device="cpu")
    assert detector.classes == [{"id": label, "name": name} for label, name in enumerate(NAMES)]
    torch.save({"model": tiny_model.state_dict(), "classes": 3, "config": "a.yaml"}, tmp_path / "a.pt")
    assert conddetr.Detector.from_checkpoint(tmp_path / "a.pt", device="cpu").classes[1] == {"id": 1, "name": "1"}


def test_weights_without_a_class_head_are_for_training_only(tmp_path, tiny_model):
    state = {name: value for name, value in tiny_model.state_dict().items() if not name.startswith("class_embed")}
    torch.save({"model": prefixed("module.", state)}, tmp_path / "a.pth")
    model = tiny()
    report = start_from(model, [{"id": 1, "name": name} for name in NAMES], tmp_path / "a.pth")
    assert "class_embed.weight: not loaded, because the classes differ (expected (3, 64), got nothing)" in str(report)
    assert torch.equal(model.query_embed.weight, tiny_model.query_embed.weight)
    with pytest.raises(ValueError, match=r"a\.pth has no class head"):
        conddetr.Detector.from_checkpoint(tmp_path / "a.pth")


def test_error_names_adapters(tiny_model):
    state = {**tiny_model.state_dict(), "transformer.encoder.layers.0.linear1.lora_A.default.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"^The state dict has adapters, transformer.*lora_A.*merge_and_unload"):
        load_into_new(state)


def test_error_without_weights_names_the_keys():
    with pytest.raises(ValueError, match=r"Expected a state dict .* The state dict has the keys 'epoch', 'loss'\."):
        load_into_new({"epoch": 3, "loss": {"ce": 0.5}})
    with pytest.raises(ValueError, match=r"no supported DETR or Conditional DETR, with names such as 'net\.0\.weight'"):
        load_into_new({"state_dict": {"net.0.weight": torch.zeros(3)}})


class Folder:
    """A folder of transformers' `save_pretrained` with a small model of random weights."""

    def __init__(self, root):
        torch.manual_seed(1)
        self.root = root
        self.model = conddetr.build("conditional-detr-dc5-r50", num_classes=3, **SMALL).eval()
        torch.nn.init.normal_(self.model.class_embed.weight)
        state = to_huggingface(self.model.state_dict(), "4")
        self.state = {name: value.contiguous().clone() for name, value in state.items()}
        root.mkdir()
        save_file(self.state, root / "model.safetensors", {"format": "pt"})
        self.write(CONFIG)

    def write(self, config, name="config.json"):
        (self.root / name).write_text(json.dumps(config))


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    return Folder(tmp_path_factory.mktemp("hub") / "shared")


@pytest.fixture
def hub_folder(shared_folder, tmp_path):
    """A copy that a test may change; the weights are a link."""
    root = tmp_path / "saved"
    root.mkdir()
    (root / "model.safetensors").hardlink_to(shared_folder.root / "model.safetensors")
    shutil.copy(shared_folder.root / "config.json", root)
    folder = Folder.__new__(Folder)
    folder.root, folder.model, folder.state = root, shared_folder.model, shared_folder.state
    return folder


def check_hub_detector(path, folder):
    detector = conddetr.Detector.from_checkpoint(path, device="cpu")
    assert_same_weights(detector.model, folder.model.state_dict())
    assert detector.classes == [{"id": label, "name": name} for label, name in enumerate(NAMES)]
    config = detector.config
    assert {name: getattr(config, name) for name in SMALL} == SMALL
    assert config.dilation
    return detector


def test_folder_of_save_pretrained_is_a_checkpoint(hub_folder):
    for path in (hub_folder.root, hub_folder.root / "model.safetensors"):
        assert check_hub_detector(path, hub_folder).config.image_size == 800
    # transformers 5 describes the backbone in a separate configuration, and does not sort the labels.
    inner = {"backbone": "resnet50", "model_type": "timm_backbone", "output_stride": 16}
    labels = {"id2label": {"2": "toothbrush", "0": "cat", "1": "dog"}}
    hub_folder.write({**CONFIG, "backbone": None, "dilation": False, "backbone_config": inner, **labels})
    size = {"size": {"shortest_edge": 480, "longest_edge": 640}}
    hub_folder.write(size, "preprocessor_config.json")
    config = check_hub_detector(hub_folder.root, hub_folder).config
    assert (config.image_size, config.max_image_size) == (480, 640)


@pytest.mark.parametrize(
    "layout", ["bin", "shards", "index", "shards of bin", "version 5", "data parallel", "no config"]
)
def test_every_layout_of_such_a_folder(hub_folder, tmp_path, layout):
    root, state, path = hub_folder.root, hub_folder.state, hub_folder.root
    (root / "model.safetensors").unlink()
    halves = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
    if layout == "bin":
        torch.save(state, root / "pytorch_model.bin")
    elif layout == "version 5":
        save_file(to_huggingface(hub_folder.model.state_dict(), "5"), root / "model.safetensors")
    elif layout == "data parallel":
        save_file(prefixed("module.", state), root / "model.safetensors")
    elif layout == "no config":
        # Another file name, and no other file in the folder.
        path = tmp_path / "elsewhere.pth"
        torch.save({"model_state_dict": prefixed("_orig_mod.", state)}, path)
        with pytest.raises(
            ValueError, match=r"^Checkpoint .*elsewhere.pth is of conditional-detr-r50, not of detr-r50"
        ):
            conddetr.Detector.from_checkpoint(path, preset="detr-r50")
        detector = conddetr.Detector.from_checkpoint(path, preset="conditional-detr-dc5-r50", device="cpu")
        assert_same_weights(detector.model, hub_folder.model.state_dict())
        assert detector.config.dilation
        return
    else:
        stem, write = ("pytorch_model", torch.save) if layout == "shards of bin" else ("model", save_file)
        ending = "bin" if layout == "shards of bin" else "safetensors"
        files = [f"{stem}-{number}-of-00002.{ending}" for number in ("00001", "00002")]
        for file, half in zip(files, halves, strict=True):
            write(half, root / file)
        files_by_name = {name: file for file, half in zip(files, halves, strict=True) for name in half}
        hub_folder.write({"metadata": {}, "weight_map": files_by_name}, f"{stem}.{ending}.index.json")
        path = root / f"{stem}.{ending}.index.json" if layout == "index" else root
    check_hub_detector(path, hub_folder)
    if layout == "shards":
        hub_folder.write({"weight_map": {**files_by_name, "lost.weight": files[0]}}, "model.safetensors.index.json")
        with pytest.raises(ValueError, match=r"1 tensors are in none of its files, first 'lost\.weight'"):
            conddetr.Detector.from_checkpoint(root)
        (root / files[1]).unlink()
        with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors does not exist"):
            conddetr.Detector.from_checkpoint(root)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "detr", "architectures": ["DetrForObjectDetection"]},
            r"DetrForObjectDetection \(model_type detr\)",
        ),
        (
            {"model_type": "deformable_detr", "architectures": None},
            r"deformable_detr \(model_type deformable_detr\) is an",
        ),
        (
            {"model_type": "dab-detr", "architectures": ["DabDetrForObjectDetection"]},
            r"DabDetr.* is another architecture",
        ),
        ({"architectures": ["ConditionalDetrModel"]}, "ConditionalDetrModel has no heads"),
        ({"backbone": "resnet26"}, "backbone: expected resnet18, .* resnet101 of timm, got resnet26"),
        ({"backbone": None, "backbone_config": {"model_type": "resnet"}}, "backbone: .* got resnet"),
        ({"backbone_kwargs": {"output_stride": 8}}, "output_stride of the backbone: expected 32 or 16, got 8"),
        ({"decoder_attention_heads": 8}, "encoder_attention_heads 4 and decoder_attention_heads 8"),
        ({"activation_function": "gelu"}, "activation_function: expected relu"),
        ({"id2label": {"1": "cat"}}, r"id2label: expected the labels 0 to 0, got \[1\]"),
        ({"id2label": {"0": "cat"}}, "classes: expected 3 as the model has, got 1"),
    ],
)
def test_error_names_other_architectures(hub_folder, changes, message):
    hub_folder.write({**CONFIG, **changes})
    with pytest.raises(ValueError, match=message):
        conddetr.Detector.from_checkpoint(hub_folder.root, device="cpu")


def test_error_names_the_architecture_of_the_configuration(hub_folder):
    (hub_folder.root / "model.safetensors").unlink()
    save_file({"model.decoder.query_scale.layers.0.weight": torch.zeros(1)}, hub_folder.root / "model.safetensors")
    hub_folder.write({"model_type": "dab-detr", "architectures": ["DabDetrForObjectDetection"]})
    for command in (["eval"], ["predict", "a.jpg"]):
        assert main([*command, "--checkpoint", str(hub_folder.root)]) == 2
    with pytest.raises(ValueError, match=r"^Checkpoint .*saved: DabDetrForObjectDetection"):
        conddetr.load_weights(hub_folder.model, hub_folder.root)


def test_different_preprocessing_is_a_warning(hub_folder, caplog):
    content = {"size": {"height": 640, "width": 640}, "image_mean": [0.5, 0.5, 0.5]}
    hub_folder.write(content, "preprocessor_config.json")
    assert conddetr.Detector.from_checkpoint(hub_folder.root, device="cpu").config.image_size == 800
    assert "image_mean is [0.5, 0.5, 0.5]; images are normalised with [0.485" in caplog.text
    assert "size is {'height': 640, 'width': 640}; images are resized by their shorter side" in caplog.text


def test_error_of_folders_without_weights_names_their_content(tmp_path, tiny_model):
    with pytest.raises(FileNotFoundError, match=r"holds none of model\.safetensors, .*index\.json\.$"):
        conddetr.Detector.from_checkpoint(tmp_path)
    save_checkpoint(tmp_path / "checkpoint.pt", {"model": tiny_model.state_dict()})
    with pytest.raises(FileNotFoundError, match=r"It holds checkpoint\.pt: name one of them\."):
        conddetr.load_weights(tiny_model, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds only PEFT's adapters"):
        conddetr.load_weights(tiny_model, tmp_path)


@pytest.mark.parametrize("names", [NAMES, NAMES[::-1], NAMES[:2]])
def test_training_starts_from_such_a_folder(hub_folder, names):
    """Ids are the data set's; class lists are equal if their names are, in this order."""
    model = conddetr.build("conditional-detr-dc5-r50", num_classes=len(names), **SMALL)
    head = model.class_embed.weight.detach().clone()
    classes = [{"id": 10 + position, "name": name} for position, name in enumerate(names)]
    report = start_from(model, classes, hub_folder.root)
    is_same = names == NAMES
    assert torch.equal(model.query_embed.weight, hub_folder.model.query_embed.weight)
    assert torch.equal(model.class_embed.weight, hub_folder.model.class_embed.weight if is_same else head)
    assert report.complete == is_same
    assert ("class_embed.weight: not loaded, because the classes differ" in str(report)) != is_same


def test_model_saved_by_transformers_is_read_and_has_the_same_outputs(tmp_path):
    """With dilation."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[test])")
    pytest.importorskip("timm", reason="timm is not installed (pip install -e .[test])")
    config = transformers.ConditionalDetrConfig(
        use_timm_backbone=True,
        use_pretrained_backbone=False,
        num_labels=4,
        **{k: v for k, v in CONFIG.items() if k != "id2label"},
    )
    peer = transformers.ConditionalDetrForObjectDetection(config).eval()
    for parameter in (peer.model.query_position_embeddings.weight, peer.class_labels_classifier.weight):
        torch.nn.init.normal_(parameter)
    peer.save_pretrained(tmp_path)
    detector = conddetr.Detector.from_checkpoint(tmp_path, device="cpu")
    assert detector.config.dilation
    assert [entry["name"] for entry in detector.classes] == ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]
    report = conddetr.interop.parity(peer, detector.model, images=torch.randn(1, 3, 96, 128))
    assert report.differences["pred_logits"] < 1e-4 < 0.5 < report.magnitudes["pred_logits"]
    assert report.differences["pred_boxes"] < 1e-5


def test_commands_take_such_a_folder(hub_folder, small_coco, tmp_path, capsys):
    pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")
    hub_folder.write({"size": {"shortest_edge": 64, "longest_edge": 96}}, "preprocessor_config.json")
    source = ["--checkpoint", str(hub_folder.root), "--device", "cpu"]
    image = str(small_coco.images / "0.jpg")
    assert main(["predict", image, *source, "--threshold", "0", "--out", str(tmp_path / "drawn")]) == 0
    assert (tmp_path / "drawn" / "0.png").is_file()
    results = tmp_path / "found.json"
    assert (
        main(["eval", *source, "--coco-path", str(small_coco.root), "--workers", "0", "--results", str(results)]) == 0
    )
    # The data set's ids for the classes with these names.
    assert {detection["category_id"] for detection in json.loads(results.read_text())} == {7, 3, 90}
    assert "AP50" in capsys.readouterr().out


def test_weights_of_91_classes_have_cocos_names(tmp_path):
    model = conddetr.build("conditional-detr-r50", **SMALL)
    save_file(
        {name: value.contiguous() for name, value in to_huggingface(model.state_dict(), "4").items()},
        tmp_path / "model.safetensors",
    )
    assert load_file(tmp_path / "model.safetensors")["class_labels_classifier.bias"].shape == (91,)
    classes = conddetr.Detector.from_checkpoint(tmp_path / "model.safetensors", device="cpu").classes
    assert [classes[label]["name"] for label in (1, 18, 90)] == ["person", "dog", "toothbrush"]
