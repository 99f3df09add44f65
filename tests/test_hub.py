"""Weights by name, and detectors uploaded to and loaded from a local server that simulates HuggingFace's hub."""

import hashlib
import http.server
import json
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import conddetr
from conddetr.cli import main
from conddetr.interop import to_huggingface
from conddetr.weights.public import NAMES, PUBLIC, PublicWeights, locate

CLASSES = [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}, {"id": 90, "name": "tooth|brush"}]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
RUN = {
    "output_dir": "/home/me/secret/runs/a",
    "resume": "",
    "weights": "",
    "data": {"coco_path": "/home/me/secret/zoo"},
}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache and no network; returns the cache's folder."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (pip install -e .[hub])")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    return tmp_path / "cache"


class Hub:
    """Serves files of repositories like the hub; uploads are copied into its folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[str] = []

    def handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(with_body=False)

            def do_GET(self):
                self.answer(with_body=True)

            def answer(self, with_body):
                repository, _, rest = self.path.partition("/resolve/main/")
                file = hub.root / repository.lstrip("/") / rest
                if not file.is_file():
                    exists = file.parent.is_dir() and rest
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound" if exists else "RepoNotFound")
                    self.send_header("X-Repo-Commit", COMMIT)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                content = file.read_bytes()
                hub.requests.append(f"{self.command} {rest}")
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if with_body:
                    self.wfile.write(content)

            def log_message(self, *_):
                pass

        return Handler


@pytest.fixture
def hub(offline, tmp_path, monkeypatch):
    from huggingface_hub import constants, hf_api

    hub = Hub(tmp_path / "hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), hub.handler())
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")

    def upload_folder(self, *, repo_id, folder_path, commit_message, **options):
        shutil.copytree(folder_path, hub.root / repo_id)
        return f"https://hub/{repo_id}/commit/{COMMIT} {commit_message}"

    # `HF_ENDPOINT` was read at import already. Uploads are patched, because they need many kinds of requests.
    monkeypatch.setattr(hf_api.HfApi, "create_repo", lambda self, repo_id, **_: types.SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hf_api.HfApi, "upload_folder", upload_folder)
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


def fill_cache(cache: Path, repository: str, files: dict[str, Path]) -> None:
    """Write files in the cache layout of `huggingface_hub`."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name, file in files.items():
        shutil.copy(file, snapshot / name)


def published(tiny_model):
    detector = conddetr.Detector(tiny_model, CLASSES, device="cpu")
    detector.run, detector.metrics = RUN, {"AP": 0.412, "AP50": 0.6, "APl": -1.0}
    return detector


def assert_same_detector(actual, expected):
    assert actual.classes == expected.classes
    assert actual.config == expected.config
    for name, value in actual.model.state_dict().items():
        assert torch.equal(value, expected.model.state_dict()[name])


def test_uploaded_detector_loads_from_the_hub(hub, tiny_model, offline):
    detector = published(tiny_model)
    address = detector.push_to_hub("me/zoo", license="apache-2.0", commit_message="First")
    assert address == f"https://hub/me/zoo/commit/{COMMIT} First"
    loaded = conddetr.Detector.from_pretrained("me/zoo", device="cpu")
    assert_same_detector(loaded, detector)
    assert loaded.metrics == detector.metrics
    # Local folders are not published.
    assert loaded.data.coco_path == "zoo"
    assert not any(b"secret" in file.read_bytes() for file in (hub.root / "me" / "zoo").iterdir())

    # Files in the cache are not downloaded again.
    hub.requests.clear()
    conddetr.Detector.from_pretrained("me/zoo", device="cpu")
    assert "HEAD model.safetensors" in hub.requests
    assert not any(line.startswith("GET") for line in hub.requests)
    with pytest.raises(OSError, match=r"^me/nothing could not be read from http://127.0.0.1:\d+ \(.*not in the cache"):
        conddetr.Detector.from_pretrained("me/nothing")


def test_class_names_are_escaped_in_the_model_card(tmp_path):
    names = ["a\n## b", "[x](y)", "$z_1$", "<b>"]
    classes = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    model = conddetr.build("conditional-detr-tiny", num_classes=4)
    conddetr.Detector(model, classes, "cpu").save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert r"Classes: a \#\# b, \[x\](y), \$z\_1\$, \<b\>." in card


def test_model_card_states_data_metrics_and_how_to_load(hub, tiny_model):
    from huggingface_hub import ModelCard

    detector = published(tiny_model)
    detector.push_to_hub("me/zoo", license="apache-2.0")
    card = ModelCard.load(hub.root / "me" / "zoo" / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "conddetr"
    assert card.data.pipeline_tag == "object-detection"
    for line in (
        '    detector = conddetr.Detector.from_pretrained("me/zoo")',
        "Trained and evaluated on a data set in COCO's layout, folder `zoo`.",
        "Classes: dog, cat, tooth|brush.",
        "From the last evaluation in training, on its validation images, in percent:",
        "| AP | AP50 | APl |",
        "| 41.2 | 60.0 | – |",
    ):
        assert line.strip() in card.text.splitlines(), line
    [code] = [part.split("```")[0] for part in card.text.split("```python\n")[1:]]
    compile(code, "card", "exec")
    assert "0.5 million parameters and 25 queries" in card.text.replace("\n", " ")


def test_folder_is_loaded_without_the_hub(tiny_model, tmp_path, offline):
    detector = conddetr.Detector(tiny_model, CLASSES, device="cpu")
    folder = detector.save_pretrained(tmp_path / "mine", metrics={"AP": 0.5})
    assert {file.name for file in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert json.loads((folder / "config.json").read_text())["classes"] == CLASSES
    text = (folder / "README.md").read_text()
    assert "As given by the publisher, in percent" in text
    assert "| 50.0 |" in text
    assert "Not known: the weights hold no training configuration." in text
    for load in (conddetr.Detector.from_pretrained, conddetr.Detector.from_checkpoint):
        assert_same_detector(load(folder, device="cpu"), detector)
    unmeasured = detector.save_pretrained(tmp_path / "other") / "README.md"
    assert "Not measured." in unmeasured.read_text()


@pytest.mark.parametrize("kind", ["bin", "shards"])
def test_repositories_of_transformers_load_as_detectors(hub, kind, caplog):
    """A small model with a ResNet, in transformers' layout; files are recognized by their names."""
    model = conddetr.build(
        "conditional-detr-r50", num_classes=2, hidden_dim=32, num_heads=4, ffn_dim=48, decoder_layers=1
    )
    state = {name: value.contiguous().clone() for name, value in to_huggingface(model.state_dict(), "4").items()}
    folder = hub.root / "them" / "cats"
    folder.mkdir(parents=True)
    if kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        halves = dict(list(state.items())[::2]), dict(list(state.items())[1::2])
        weight_map = {}
        for number, half in enumerate(halves):
            save_file(half, folder / f"model-{number}.safetensors")
            weight_map |= dict.fromkeys(half, f"model-{number}.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "id2label": {0: "a", 1: "b"}}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "conditional_detr"}))
    loaded = conddetr.Detector.from_pretrained("them/cats", device="cpu")
    assert [entry["name"] for entry in loaded.classes] == ["a", "b"]
    assert loaded.config.num_heads == 4
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.model.state_dict().items())


@pytest.fixture
def tiny_public(monkeypatch):
    """Adds public weights with the name `coco` for the tiny preset."""

    def add(**changes):
        public = PublicWeights("model.safetensors", "https://page", 2, **{"repository": "them/tiny", **changes})
        monkeypatch.setitem(PUBLIC, "conditional-detr-tiny", {"coco": public})
        return public

    return add


def test_weights_by_name_give_a_ready_detector(hub, tiny_model, tiny_public, caplog, capsys, tmp_path):
    detector = published(tiny_model)
    detector.push_to_hub("them/tiny")
    tiny_public(sha256=hashlib.sha256((hub.root / "them/tiny/model.safetensors").read_bytes()).hexdigest())
    loaded = conddetr.Detector("conditional-detr-tiny", weights="coco", device="cpu", image_size=96)
    assert loaded.classes == CLASSES
    assert loaded.config.image_size == 96
    assert loaded.metrics == detector.metrics
    assert len(loaded.predict(torch.rand(3, 50, 60), 0.0)[0]) == 75
    assert "Weights 'coco' of conditional-detr-tiny: " in caplog.text
    assert (
        "https://page, Apache-2.0, classes: COCO's category ids, 91 with the unused ones; this project never"
        in caplog.text
    )
    assert "SHA-256" not in caplog.text
    again = conddetr.Detector.from_checkpoint("coco", "conditional-detr-tiny", device="cpu")
    assert_same_detector(again, detector)

    tiny_public(sha256="abc", tried=True)
    caplog.clear()
    locate("coco", "conditional-detr-tiny")
    assert "never tried" not in caplog.text
    assert ", expected abc." in caplog.text

    pytest.importorskip("pycocotools", reason="COCO metrics need pycocotools")
    quick = ["--epochs", "1", "--batch-size", "4", "--workers", "0", "--train-images", "4", "--val-images", "2"]
    options = [
        "--preset",
        "conditional-detr-tiny",
        "--weights",
        "coco",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(["train", *options, *quick]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "starting from weights: " in printed
    assert "class_embed.weight: not loaded, because the classes differ" in printed


def test_cached_weights_load_without_a_network(offline, tmp_path):
    """A row of the real table, with a cache that was filled before."""
    model = conddetr.build(
        "conditional-detr-r50", hidden_dim=32, num_heads=8, ffn_dim=48, decoder_layers=1, num_queries=9
    )
    state = to_huggingface(model.state_dict(), "4")
    save_file({name: value.contiguous().clone() for name, value in state.items()}, tmp_path / "a.safetensors")
    fill_cache(offline, "microsoft/conditional-detr-resnet-50", {"model.safetensors": tmp_path / "a.safetensors"})
    detector = conddetr.Detector("conditional-detr-r50", weights="coco", device="cpu")
    assert torch.equal(detector.model.query_embed.weight, model.query_embed.weight)
    assert [detector.classes[label]["name"] for label in (1, 18)] == ["person", "dog"]
    with pytest.raises(ValueError, match=r"is of conditional-detr-r50, not of detr-r50"):
        conddetr.Detector("detr-r50", weights=str(tmp_path / "a.safetensors"))


def test_error_without_a_network_says_what_to_do(offline, capsys):
    path = offline.parent / "torch" / "checkpoints" / "conditional-detr-resnet-50-model.safetensors"
    with pytest.raises(OSError, match=r"HF_HUB_OFFLINE is set\) and is not in the cache") as caught:
        conddetr.Detector("conditional-detr-r50", weights="coco")
    page = "https://huggingface.co/microsoft/conditional-detr-resnet-50"
    assert str(caught.value).endswith(f"Without a network, put the file model.safetensors from {page} at {path}.")
    assert main(["train", "--preset", "conditional-detr-r50", "--weights", "coco", "--device", "cpu"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith(str(caught.value))
    with pytest.raises(OSError, match=r"^me/zoo could not be read .*HF_HUB_OFFLINE is set"):
        conddetr.Detector.from_pretrained("me/zoo")


def test_file_at_the_path_in_the_message_is_loaded(offline, tiny_model, monkeypatch, tiny_public):
    public = tiny_public(repository="")
    with pytest.raises(FileNotFoundError, match=r"by hand: put the file model\.safetensors from https://page at"):
        locate("coco", "conditional-detr-tiny")
    public.place.parent.mkdir(parents=True)
    published(tiny_model).save(public.place)
    assert_same_detector(
        conddetr.Detector("conditional-detr-tiny", weights="coco", device="cpu"), published(tiny_model)
    )
    with pytest.raises(
        FileNotFoundError, match=r"detr-r50-e632da11\.pth from https://github\.com/facebookresearch/detr"
    ):
        conddetr.Detector("detr-r50", weights="official")


@pytest.mark.parametrize(
    ("source", "preset", "message"),
    [
        (
            "coco",
            "conditional-detr-r101",
            r"conditional-detr-r101 has none of this name\. Known for .*r101: official\.$",
        ),
        ("coco", "conditional-detr-tiny", r"Known: coco and official of conditional-detr-r50; official of"),
        ("coko", "conditional-detr-r50", r"neither a file nor a known name\. Known for .*r50: coco, official\.$"),
        ("official", None, r"name the preset too\. Known: "),
        ("coco", "conditional-detr-r5", r"Unknown preset 'conditional-detr-r5'"),
    ],
)
def test_error_for_unknown_names_lists_the_known_ones(source, preset, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        locate(source, preset)


def test_paths_are_not_names_of_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coco").mkdir()
    for source in ("./coco", Path("coco"), tmp_path / "coco"):
        assert locate(source, "conditional-detr-r50") == Path(source)
    assert locate("coco", None) == Path("coco")
    assert locate("none.pt", None) == Path("none.pt")


def test_table_of_public_weights_is_complete():
    """Every preset of the papers has public weights, with a page, a checksum, and a separate path."""
    assert PUBLIC.keys() == {name for name in conddetr.presets() if name.endswith(("r50", "r101"))}
    for public in [public for by_name in PUBLIC.values() for public in by_name.values()]:
        assert public.page.startswith("https://")
        assert len(public.sha256) in (0, 8, 64)
        assert not public.tried
    assert len({public.place for by_name in PUBLIC.values() for public in by_name.values()}) == 10


def test_package_works_without_huggingface_hub(tmp_path):
    """`import conddetr` does not import it; if it is absent, the error names the extra."""
    code = """
import sys
import conddetr
assert "huggingface_hub" not in sys.modules
sys.modules["huggingface_hub"] = None
for use in (lambda: conddetr.Detector("conditional-detr-r50", weights="coco"),
            lambda: conddetr.Detector.from_pretrained("me/zoo")):
    try:
        use()
    except ImportError as error:
        print(error)
"""
    environment = {"TORCH_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert all("pip install 'conddetr[hub]'" in line for line in lines)
    assert f"at {tmp_path}/hub/checkpoints/conditional-detr-resnet-50-model.safetensors." in lines[0]
    assert {"coco", "official"} == NAMES
