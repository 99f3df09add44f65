"""Checkpoints from any source: their weights under our names, with class list and configuration if these are known.

A checkpoint is a file, a folder of `save_pretrained`, or the content that `torch.load` returned. It may be ours, of
the official Conditional DETR or DETR, or of transformers' `ConditionalDetrForObjectDetection`. Any training script may
have written it, with the model inside DistributedDataParallel, `torch.compile` or a LightningModule.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from conddetr import config as configs
from conddetr.engine.checkpoint import BEST, LATEST, read_checkpoint
from conddetr.interop.huggingface import config as huggingface_config
from conddetr.interop.huggingface.weights import from_huggingface, is_huggingface
from conddetr.interop.official import weights as official
from conddetr.weights.search import find_model

log = logging.getLogger(__name__)

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files in which `save_pretrained` writes weights, in search order."""
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
"""Files that `save_pretrained` of a model and of its image processor write beside them."""


@dataclass
class Weights:
    """The content of a checkpoint."""

    origin: str
    """Its name in messages."""
    state: dict[str, Tensor]
    """Under our names."""
    config: configs.ModelConfig | None = None
    """The configuration in one of our checkpoints; None: it is another file."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of `ModelConfig` that another checkpoint states."""
    classes: list[dict[str, Any]] | None = None
    """`id` and `name` of every label; None: not stated."""
    run: dict[str, Any] | None = None
    """Configuration of the training run."""
    metrics: dict[str, float] | None = None
    """Metrics of the last evaluation in training."""
    notes: list[str] = field(default_factory=list)
    """How the weights were found, if it is not obvious."""
    ignored: list[str] = field(default_factory=list)
    """Tensors of other modules beside the model."""


def read_weights(source: str | Path | Mapping[str, Any]) -> Weights:
    """Read a checkpoint from any source.

    Args:
        source: file, folder of `save_pretrained`, or the content of a file. If it has several state dicts, the moving
            average is taken, else the one under the usual name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, of another architecture, or several models, none under the usual name; says which.
    """
    path: Path | None = None
    content: Mapping[str, Any]
    if isinstance(source, (str, Path)):
        path = weights_file(Path(source))
        content, origin = _read(path), f"Checkpoint {source}"
    else:
        content, origin = source, "The state dict"
    found = find_model(content, origin)
    weights = Weights(origin, found.state, notes=found.notes, ignored=found.ignored)
    adapter = next((name for name in weights.state if ".lora_" in name or ".base_layer." in name), None)
    if adapter:
        raise ValueError(f"{origin} has adapters, {adapter}: merge them (PEFT: merge_and_unload()) and save the model.")
    weights.classes = _listed(content.get("classes"))
    config = content.get("config")
    if isinstance(config, dict) and {"family", "backbone"} <= config.keys():
        weights.config = configs.from_dict(config)
        weights.run, weights.metrics = content.get("run"), content.get("metrics") or None
    elif official.identify(weights.state):
        weights.options = official.model_options(content)
    else:
        try:
            if path is not None:
                _take_configuration(weights, path)
            if is_huggingface(weights.state):
                weights.state = from_huggingface(weights.state)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from error
    for note in weights.notes:
        log.info("%s: %s.", origin, note)
    return weights


def weights_file(path: Path) -> Path:
    """The file with the weights in a folder of `save_pretrained`; a file is returned as it is.

    Raises:
        FileNotFoundError: a folder without such a file; names other checkpoints in it.
    """
    if not path.is_dir():
        return path
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    if (path / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"Folder {path} holds only PEFT's adapters: merge them (merge_and_unload()) and save the model."
        )
    checkpoints = [name for name in (LATEST, BEST) if (path / name).is_file()]
    advice = f" It holds {' and '.join(checkpoints)}: name one of them." if checkpoints else ""
    raise FileNotFoundError(f"Folder {path} holds none of {', '.join(WEIGHT_FILES)}.{advice}")


def _read(path: Path) -> dict[str, Any]:
    """The content of a file, or of the files that an index names."""
    if not path.name.endswith(".index.json"):
        return read_checkpoint(path)
    parts = read_json(path).get("weight_map")
    if not isinstance(parts, dict):
        raise ValueError(f"Index {path}: expected the files by tensor name under 'weight_map'.")
    state: dict[str, Any] = {}
    for name in sorted({Path(part).name for part in parts.values()}):
        content = read_checkpoint(path.with_name(name))
        state.update(content["model"] if name.endswith(".safetensors") else content)
    absent = [name for name in parts if name not in state]
    if absent:
        raise ValueError(f"Index {path}: {len(absent)} tensors are in none of its files, first {absent[0]!r}.")
    return {"model": state}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not an object; names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}.")
    return content


def _listed(classes: Any) -> list[dict[str, Any]] | None:
    """A class list in our format, also from a list of names."""
    if not isinstance(classes, (list, tuple)) or not classes:
        return None
    if all(isinstance(name, str) for name in classes):
        return [{"id": label, "name": name} for label, name in enumerate(classes)]
    is_ours = all(isinstance(entry, dict) and {"id", "name"} <= entry.keys() for entry in classes)
    return list(classes) if is_ours else None


def _take_configuration(weights: Weights, path: Path) -> None:
    """Take class list and sizes from the files that `save_pretrained` wrote beside the weights."""
    if not path.with_name(CONFIG).is_file():
        return
    config = read_json(path.with_name(CONFIG))
    if not {"model_type", "architectures", "id2label"} & config.keys():
        return
    weights.options = huggingface_config.model_options(config)
    weights.classes = huggingface_config.class_list(config)
    if path.with_name(PREPROCESSOR).is_file():
        preprocessor = path.with_name(PREPROCESSOR)
        weights.options.update(huggingface_config.image_size(read_json(preprocessor), preprocessor))
