"""Parameters of a model by part or pattern: to freeze them, or to train them at another learning rate."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from conddetr.config.lists import entries, rates
from conddetr.config.run import TrainConfig

PARTS = {
    "backbone": ("backbone.",),
    "encoder": ("transformer.encoder.",),
    "decoder": ("transformer.decoder.",),
    "heads": ("class_embed.", "bbox_embed."),
}
"""Names of a model's parts, with the beginnings of their parameters' names."""

Groups = list[list[str]]
"""Names of the parameters in each group of the optimizer."""


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern means a parameter: a name from `PARTS`, the name of the parameter or of a module around it, or
    a pattern as of `fnmatch` for the whole name, where `*` also matches dots.
    """
    if pattern in PARTS:
        return name.startswith(PARTS[pattern])
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def first_matches(option: str, patterns: Sequence[str], model: nn.Module) -> dict[str, list[str]]:
    """The parameters that each pattern means, and no earlier one.

    Args:
        option: the option with the patterns, for messages.
        patterns: as `matches` takes them.
        model: a `DETR`.

    Raises:
        ValueError: a pattern matches no parameter (the message has the nearest names), or only parameters of
            earlier patterns.
    """
    names = [name for name, _ in model.named_parameters()]
    taken: dict[str, list[str]] = {}
    for pattern in patterns:
        own = [name for name in names if matches(pattern, name)]
        if not own:
            raise ValueError(f"{option}: {pattern!r} matches no parameter.{_nearest(pattern, model)}")
        earlier = {name for others in taken.values() for name in others}
        taken[pattern] = [name for name in own if name not in earlier]
        if not taken[pattern]:
            raise ValueError(
                f"{option}: all {len(own)} parameter tensors that {pattern!r} matches belong to earlier patterns: put "
                "it before them, or leave it out."
            )
    return taken


def _nearest(pattern: str, model: nn.Module) -> str:
    modules = [name for name, _ in model.named_modules() if name]
    known = [*PARTS, *modules, *(name for name, _ in model.named_parameters())]
    close = difflib.get_close_matches(pattern.rstrip("*.?"), known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"{hint} Known: {', '.join(PARTS)}, names of modules and parameters, and patterns with * and ?."


@dataclass(frozen=True)
class Frozen:
    """The parameters that `TrainConfig.freeze` freezes."""

    names: dict[str, list[str]]
    """Pattern → names of its parameters that no earlier pattern has."""
    sizes: dict[str, int]
    """Pattern → the number of values in these parameters."""
    modules: list[nn.Module]
    """The outermost modules whose parameters are all among them."""

    def eval(self) -> None:
        """Put the frozen modules into evaluation mode: batch norms keep their statistics, nothing is dropped out."""
        for module in self.modules:
            module.eval()

    def describe(self) -> str:
        """The number of frozen values by pattern, in one line; empty if nothing is frozen."""
        counts = ", ".join(f"{pattern} ({size:,} parameters)" for pattern, size in self.sizes.items())
        return f"frozen: {counts}; modules that are frozen as a whole stay in evaluation mode" if counts else ""


def freeze(model: nn.Module, patterns: str) -> Frozen:
    """Freeze the parameters that match, which then have no gradient. Calling it again changes nothing.

    Args:
        model: a `DETR`.
        patterns: `TrainConfig.freeze`.

    Raises:
        ValueError: as `first_matches`, or no trainable parameter is left.
    """
    option = "Training option freeze"
    names = first_matches(option, entries(option, patterns), model)
    frozen = {name for own in names.values() for name in own}
    parameters = dict(model.named_parameters())
    if not any(parameter.requires_grad for name, parameter in parameters.items() if name not in frozen):
        raise ValueError(f"{option}: {patterns!r} leaves no parameter to train.")
    for name in frozen:
        parameters[name].requires_grad_(False)
    sizes = {pattern: sum(parameters[name].numel() for name in own) for pattern, own in names.items()}
    return Frozen(names, sizes, list(_whole_modules(model, "", frozen)))


def _whole_modules(module: nn.Module, prefix: str, names: set[str]) -> Iterator[nn.Module]:
    """The outermost modules whose parameters are all in `names`; `prefix` is the name of `module` with a dot."""
    inside = [prefix + name for name, _ in module.named_parameters()]
    if inside and names.issuperset(inside):
        yield module
        return
    for name, child in module.named_children():
        yield from _whole_modules(child, f"{prefix}{name}.", names)


def group_parameters(model: nn.Module, config: TrainConfig) -> Groups:
    """Names of the trainable parameters by learning rate: those of `lr`, of `lr_backbone`, and of each pattern of
    `lr_patterns`. Each one is in exactly one group; the first two may be empty.

    Raises:
        ValueError: as `first_matches`, or all parameters that a pattern matches are frozen.
    """
    option = "Training option lr_patterns"
    patterns = first_matches(option, list(rates(option, config.lr_patterns)), model)
    pattern_of = {name: pattern for pattern, names in patterns.items() for name in names}
    others: Groups = [[], []]
    by_pattern: dict[str, list[str]] = {pattern: [] for pattern in patterns}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = by_pattern[pattern_of[name]] if name in pattern_of else others[matches("backbone", name)]
            group.append(name)
    for pattern, group in by_pattern.items():
        if not group:
            raise ValueError(f"{option}: all parameters of {pattern!r} are frozen: leave it out, or train them.")
    return [*others, *by_pattern.values()]


def describe_rates(model: nn.Module, config: TrainConfig, groups: Groups) -> str:
    """The learning rate and the number of values of each pattern, in one line; empty without patterns."""
    parameters = dict(model.named_parameters())
    parts = [
        f"{pattern} {rate:g} ({sum(parameters[name].numel() for name in names):,} parameters)"
        for (pattern, rate), names in zip(
            rates("Training option lr_patterns", config.lr_patterns).items(), groups[2:], strict=True
        )
    ]
    return f"learning rates: {', '.join(parts)}; the others have lr and lr_backbone" if parts else ""
