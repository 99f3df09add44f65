"""Finds a model's state dict in the checkpoint of any training script."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

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
"""Names that identify a model. The text before them is a prefix."""
_PREFIX = re.compile(rf"(.*?\.)?(?:{'|'.join(map(re.escape, _KNOWN))})")
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|(?<=\.)module\.")
"""Names that `torch.compile`, FSDP, activation checkpointing and DistributedDataParallel insert for a part that they
wrap. Around the whole model, `module.` is a prefix like others."""
_AVERAGE = {"ema", "averaged", "average", "swa", "shadow"}
_USUAL = {"model", "state", "dict", "module", "net", "network", "weights", "params", "detector", "online"}
"""Words in keys and prefixes: of a moving average of the weights, and of the one model of a checkpoint."""
_DEPTH = 4
"""Maximal depth at which a checkpoint is searched for a state dict."""


@dataclass
class Found:
    """The state dict of a checkpoint's model."""

    state: dict[str, Tensor]
    """Without prefixes and wrappers in its names."""
    notes: list[str] = field(default_factory=list)
    """How it was found, if it is not obvious."""
    ignored: list[str] = field(default_factory=list)
    """Tensors of other modules beside the model."""


@dataclass
class _Candidate:
    """A state dict in a checkpoint that may be the model's."""

    keys: tuple[str, ...]
    """Keys that lead to it."""
    prefix: str
    """The prefix of its names; removed in `state`."""
    state: dict[str, Tensor]
    others: list[str]
    """Names without the prefix."""

    @property
    def words(self) -> set[str]:
        return _words(".".join([*self.keys, self.prefix]))

    def __str__(self) -> str:
        path = "".join(f"[{key!r}]" for key in self.keys)
        return " ".join(filter(None, (path, f"with prefix {self.prefix!r}" if self.prefix else "")))


def _words(name: str) -> set[str]:
    return set(re.split(r"[._]", name.lower())) - {""}


def _candidates(content: Mapping, keys: tuple[str, ...] = ()) -> Iterator[_Candidate]:
    """Every model with known names, under any key and any prefix."""
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
    """The prefixes of the names that identify a model."""
    matches = (_PREFIX.fullmatch(name) for name in names)
    return list(dict.fromkeys(match[1] or "" for match in matches if match))


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """The names of a model that may be wrapped, by the names without wrappers and prefix."""
    plain = {_WRAPPERS.sub("", name): name for name in names}
    prefixes = _prefixes(plain)
    return (
        {name.removeprefix(prefixes[0]): original for name, original in plain.items()} if len(prefixes) == 1 else plain
    )


def find_model(content: Mapping, origin: str) -> Found:
    """Find the model of a checkpoint."""
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
    found = Found(chosen[0].state, ignored=chosen[0].others)
    if averages:
        found.notes.append(f"the moving average of the weights is taken, {averages[0]}")
        # Averages of parameters alone lack the statistics of batch norm.
        absent = [name for name in plain[0].state if name not in found.state] if len(plain) == 1 else []
        if absent and found.state.keys() <= plain[0].state.keys():
            found.state = {name: found.state.get(name, value) for name, value in plain[0].state.items()}
            found.notes.append(f"{len(absent)} tensors that it lacks, first {absent[0]!r}, come from the other weights")
    elif str(chosen[0]):
        found.notes.append(f"the weights are {chosen[0]}")
    unnamed = [key for key, value in content.items() if isinstance(value, (Mapping, list)) and value]
    unnamed = [] if averages else [key for key in unnamed if _words(str(key)) & _AVERAGE]
    if unnamed:
        found.notes.append(f"{unnamed[0]!r} has no names of this model's weights and is left out")
    if found.ignored:
        found.notes.append(f"{len(found.ignored)} tensors of other modules are ignored, first {found.ignored[0]!r}")
    return found


def _unknown(content: Mapping, origin: str) -> Found:
    """The largest state dict of a checkpoint without a known model."""
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
        keys = ", ".join(repr(key) for key in list(content)[:8]) or "nothing"
        raise ValueError(
            f"Expected a state dict (name → tensor) or a checkpoint with one; {origin} has the keys {keys}."
        )
    return Found(state)
