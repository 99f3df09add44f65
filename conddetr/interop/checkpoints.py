"""Checkpoints of anybody: their weights under our names, with class list and configuration where these are known.

A checkpoint is a file, a folder of `save_pretrained`, or what `torch.load` returned. It may be ours, one of the
official Conditional DETR or DETR, or one of transformers' `ConditionalDetrForObjectDetection`; written by a training
script of any kind, with the model inside DistributedDataParallel, `torch.compile` or a LightningModule.
"""

import argparse
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from conddetr import config as configs
from conddetr.engine.checkpoint import BEST, LATEST, read_checkpoint
from conddetr.interop.huggingface import class_list, from_huggingface, is_huggingface, model_options
from conddetr.model.families import FAMILIES

log = logging.getLogger(__name__)

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where `save_pretrained` writes weights, in the order in which they are looked for."""
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
"""What `save_pretrained` of a model and of its image processor write beside them."""

_KNOWN = (
    # Of the official code and ours.
    "class_embed.weight",
    "query_embed.weight",
    "transformer.decoder.norm.weight",
    "backbone.0.body.conv1.weight",
    "backbone.0.stages.0.0.weight",
    # Of transformers.
    "class_labels_classifier.weight",
    "model.query_position_embeddings.weight",
    "model.decoder.layernorm.weight",
    "model.backbone.conv_encoder.model.conv1.weight",
    "model.backbone.model.conv1.weight",
)
"""Names by which a model is found. What stands before them is a prefix."""
_PREFIX = re.compile(rf"(.*?\.)?(?:{'|'.join(map(re.escape, _KNOWN))})")
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|(?<=\.)module\.")
"""What `torch.compile`, FSDP, activation checkpointing and DistributedDataParallel put into the names of a part that
they wrap. Around the whole model `module.` is a prefix as others are."""
_AVERAGE = {"ema", "averaged", "average", "swa", "shadow"}
_USUAL = {"model", "state", "dict", "module", "net", "network", "weights", "params", "detector", "online"}
"""Words in keys and prefixes: of a moving average of the weights, and of the one model of a checkpoint."""
_DEPTH = 4
"""How deep in a checkpoint a state dict is looked for."""


@dataclass
class Weights:
    """What a checkpoint holds."""

    origin: str
    """How messages name it."""
    state: dict[str, Tensor]
    """Under our names."""
    config: configs.ModelConfig | None = None
    """Of a checkpoint of ours."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of `ModelConfig` that a checkpoint of others states."""
    classes: list[dict[str, Any]] | None = None
    """`id` and `name` of every label; None: not stated."""
    run: dict[str, Any] | None = None
    """Configuration of the run that the weights are of."""
    metrics: dict[str, float] | None = None
    """Of the last evaluation in training."""
    notes: list[str] = field(default_factory=list)
    """How the weights were found, where that is not plain."""
    ignored: list[str] = field(default_factory=list)
    """Tensors of other modules beside the model."""


def read_weights(source: str | Path | Mapping[str, Any]) -> Weights:
    """Read a checkpoint of anybody.

    Args:
        source: file, folder of `save_pretrained`, or the content of a file. Of several state dicts in it the moving
            average is taken, else the one under the usual name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, of another architecture, or several models and none is the usual one; says which.
    """
    path, content, origin = None, source, "The state dict"
    if isinstance(source, (str, Path)):
        path = weights_file(Path(source))
        content, origin = _read(path), f"Checkpoint {source}"
    weights = _find(content, origin)
    adapter = next((name for name in weights.state if ".lora_" in name or ".base_layer." in name), None)
    if adapter:
        raise ValueError(f"{origin} has adapters, {adapter}: merge them (PEFT: merge_and_unload()) and save the model.")
    weights.classes = _listed(content.get("classes"))
    config = content.get("config")
    if isinstance(config, dict) and {"family", "backbone"} <= config.keys():
        weights.config = configs.from_dict(config)
        weights.run, weights.metrics = content.get("run"), content.get("metrics") or None
    elif identify(weights.state):
        weights.options = _official_options(content)
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
    """The file of a folder of `save_pretrained`; a file is itself.

    Raises:
        FileNotFoundError: a folder without such a file; names what there is to take.
    """
    if not path.is_dir():
        return path
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    if (path / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"Folder {path} holds PEFT's adapters alone: merge them (merge_and_unload()) and save the model."
        )
    own = [name for name in (LATEST, BEST) if (path / name).is_file()]
    advice = f" It holds {' and '.join(own)}: name one of them." if own else ""
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
        ValueError: not JSON, or no object; names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content


@dataclass
class _Candidate:
    """A state dict in a checkpoint that may be the model's."""

    keys: tuple[str, ...]
    """Where it is."""
    prefix: str
    """Of its names; removed in `state`."""
    state: dict[str, Tensor]
    others: list[str]
    """Names without the prefix."""

    @property
    def words(self) -> set[str]:
        return _words(".".join([*self.keys, self.prefix]))

    def __str__(self) -> str:
        place = "".join(f"[{key!r}]" for key in self.keys)
        return " ".join(filter(None, (place, f"with prefix {self.prefix!r}" if self.prefix else "")))


def _words(name: str) -> set[str]:
    return set(re.split(r"[._]", name.lower())) - {""}


def _candidates(content: Mapping, keys: tuple[str, ...] = ()) -> Iterator[_Candidate]:
    """Every model that is known here by its names, under any key and any prefix."""
    tensors = {
        _WRAPPERS.sub("", name): value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    for prefix in _prefixes(tensors):
        state = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        yield _Candidate(keys, prefix, state, [name for name in tensors if not name.startswith(prefix)])
    if len(keys) < _DEPTH:
        for key, value in content.items():
            if isinstance(value, Mapping):
                yield from _candidates(value, (*keys, str(key)))


def _prefixes(names: Iterable[str]) -> list[str]:
    """What stands before the names by which a model is known."""
    found = (_PREFIX.fullmatch(name) for name in names)
    return list(dict.fromkeys(match[1] or "" for match in found if match))


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """The names of a model that may be wrapped, by those without wrappers and prefix."""
    plain = {_WRAPPERS.sub("", name): name for name in names}
    prefixes = _prefixes(plain)
    return {name.removeprefix(prefixes[0]): own for name, own in plain.items()} if len(prefixes) == 1 else plain


def _find(content: Mapping, origin: str) -> Weights:
    """The model of a checkpoint."""
    candidates = list(_candidates(content))
    if not candidates:
        return _unknown(content, origin)
    averages = [candidate for candidate in candidates if candidate.words & _AVERAGE]
    plain = [candidate for candidate in candidates if not candidate.words & _AVERAGE]
    plain = [candidate for candidate in plain if candidate.words <= _USUAL] or plain
    chosen = averages or plain
    if len(chosen) > 1:
        places = "; ".join(str(candidate) or "at the top" for candidate in chosen)
        raise ValueError(f"{origin} holds {len(chosen)} models: {places}. Give the state dict of one of them.")
    weights = Weights(origin, chosen[0].state, ignored=chosen[0].others)
    if averages:
        weights.notes.append(f"the moving average of the weights is taken, {averages[0]}")
        # Averages of parameters alone lack the statistics of batch norm.
        absent = [name for name in plain[0].state if name not in weights.state] if len(plain) == 1 else []
        if absent and weights.state.keys() <= plain[0].state.keys():
            weights.state = {name: weights.state.get(name, value) for name, value in plain[0].state.items()}
            weights.notes.append(f"{len(absent)} tensors that it lacks, first {absent[0]!r}, are of the other weights")
    elif str(chosen[0]):
        weights.notes.append(f"the weights are {chosen[0]}")
    unnamed = [key for key, value in content.items() if isinstance(value, (Mapping, list)) and value]
    unnamed = [] if averages else [key for key in unnamed if _words(str(key)) & _AVERAGE]
    if unnamed:
        weights.notes.append(f"{unnamed[0]!r} has no names of this model's weights and is left out")
    if weights.ignored:
        weights.notes.append(f"{len(weights.ignored)} tensors of other modules, first {weights.ignored[0]!r}")
    return weights


def _unknown(content: Mapping, origin: str) -> Weights:
    """The largest state dict of a checkpoint in which no model is known."""
    states: list[dict[str, Tensor]] = []

    def look(value: Mapping, depth: int) -> None:
        states.append(
            {name: item for name, item in value.items() if isinstance(name, str) and isinstance(item, Tensor)}
        )
        for item in value.values():
            if isinstance(item, Mapping) and depth < _DEPTH:
                look(item, depth + 1)

    look(content, 0)
    state = max(states, key=len)
    if not state:
        found = ", ".join(repr(key) for key in list(content)[:8]) or "nothing"
        raise ValueError(
            f"Expected a state dict (name → tensor) or a checkpoint with one; {origin} has the keys {found}."
        )
    return Weights(origin, state)


def _listed(classes: Any) -> list[dict[str, Any]] | None:
    """A class list as ours has it, also from one of names."""
    if not isinstance(classes, (list, tuple)) or not classes:
        return None
    if all(isinstance(name, str) for name in classes):
        return [{"id": label, "name": name} for label, name in enumerate(classes)]
    is_ours = all(isinstance(entry, dict) and {"id", "name"} <= entry.keys() for entry in classes)
    return list(classes) if is_ours else None


def _official_options(content: Mapping) -> dict[str, Any]:
    """What the arguments in an official checkpoint say of the model and its weights do not."""
    arguments = content.get("args")
    given = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    if not isinstance(given, Mapping):
        return {}
    names = {"dilation": ("dilation", bool), "num_heads": ("nheads", int), "dropout": ("dropout", float)}
    return {name: kind(given[theirs]) for name, (theirs, kind) in names.items() if theirs in given}


def _take_configuration(weights: Weights, path: Path) -> None:
    """Class list and sizes from what `save_pretrained` wrote beside the weights."""
    if not path.with_name(CONFIG).is_file():
        return
    config = read_json(path.with_name(CONFIG))
    if not {"model_type", "architectures", "id2label"} & config.keys():
        return
    weights.options = model_options(config)
    weights.classes = class_list(config)
    if path.with_name(PREPROCESSOR).is_file():
        weights.options.update(_image_size(path.with_name(PREPROCESSOR)))


def _image_size(path: Path) -> dict[str, int]:
    """Fields of `ModelConfig` from the configuration of an image processor; warns of what ours does otherwise."""
    config = read_json(path)
    for name, ours in (("image_mean", [0.485, 0.456, 0.406]), ("image_std", [0.229, 0.224, 0.225])):
        if config.get(name, ours) != ours:
            log.warning("%s: %s is %s; images are normalised with %s here.", path, name, config[name], ours)
    size = config.get("size", {})
    if isinstance(size, int):
        size = {"shortest_edge": size, "longest_edge": config.get("max_size", 1333)}
    if not size or size.keys() == {"shortest_edge", "longest_edge"}:
        names = {"shortest_edge": "image_size", "longest_edge": "max_image_size"}
        return {names[name]: value for name, value in size.items()}
    log.warning("%s: size is %s; images are resized by their shorter side here, see `image_size`.", path, size)
    return {}


def identify(state: Mapping[str, Tensor]) -> dict[str, int | str]:
    """The model options that a state dict determines; empty if it is none of ours. Dilation leaves no trace, nor does
    the number of heads.
    """
    decoder = "transformer.decoder.layers.0."
    family = next((name for name, family in FAMILIES.items() if decoder + family.known_by in state), None)
    if family is None or "query_embed.weight" not in state:
        return {}
    queries, dim = state["query_embed.weight"].shape
    found = {"family": family, "backbone": _backbone(state)}
    if "class_embed.weight" in state:
        found["num_classes"] = state["class_embed.weight"].shape[0] - FAMILIES[family].no_object_logits
    found |= {"num_queries": queries, "hidden_dim": dim}
    found |= {f"{part}_layers": _layers(state, part) for part in ("encoder", "decoder")}
    if decoder + "linear1.weight" in state:
        found["ffn_dim"] = state[decoder + "linear1.weight"].shape[0]
    return found


def _backbone(state: Mapping[str, Tensor]) -> str:
    if "backbone.0.stages.0.0.weight" in state:
        return "tiny"
    if "backbone.0.body.layer1.0.conv3.weight" not in state:
        return "a ResNet without bottlenecks, or none"
    return "resnet101" if "backbone.0.body.layer3.6.conv1.weight" in state else "resnet50"


def _layers(state: Mapping[str, Tensor], part: str) -> int:
    return len({name.split(".")[3] for name in state if name.startswith(f"transformer.{part}.layers.")})


def describe(state: Mapping[str, Tensor]) -> str:
    """One line that says which model a state dict belongs to."""
    found = identify(state)
    if not found:
        return f"no DETR or Conditional DETR that is known here, with names as {next(iter(state), 'none')!r}"
    return ", ".join(f"{name} {value}" for name, value in found.items())
