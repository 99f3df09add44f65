"""A saved run and a configured one: whether one continues the other, and what changes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

from conddetr.config import ModelConfig
from conddetr.config.augment import AugmentConfig
from conddetr.config.run import TrainConfig
from conddetr.data.sets import ImageSet


def check_same_model(
    path: Path, content: Mapping[str, Any], classes: Sequence[dict[str, Any]], config: ModelConfig
) -> None:
    """Compare class list and model of a checkpoint with those of the configured run.

    Args:
        path: the checkpoint, for messages.
        content: what the file holds.
        classes: `id` and `name` of the data set's classes.
        config: the configured model.

    Raises:
        ValueError: they differ; the message names the first class, or all options, that differ.
    """
    advice = f"To start a new run from the weights that fit: --weights {path}."
    saved = content["classes"]
    if saved != classes:
        differing = [pair for pair in zip_longest(saved, classes) if pair[0] != pair[1]]
        was, now = (f"id {c['id']} {c['name']!r}" if c else "none" for c in differing[0])
        raise ValueError(
            f"Checkpoint {path} cannot be resumed: it has {len(saved)} classes, the data set has {len(classes)}; "
            f"the first that differs was {was}, is {now}. {advice}"
        )
    changes = _differences(content["config"], config.to_dict())
    if changes:
        raise ValueError(f"Checkpoint {path} is of another model: {changes}. {advice}")


def check_same_batches(
    path: Path, content: Mapping[str, Any], config: TrainConfig, train_set: ImageSet, processes: int
) -> None:
    """Refuse to resume inside an epoch if its remaining batches would have other images.

    Args:
        path: the checkpoint, for messages.
        content: what the file holds.
        config: how the configured run trains.
        train_set: its images, with their augmentation.
        processes: their number.

    Raises:
        ValueError: the batches would differ; the message names the options.
    """
    relevant = ("batch_size", "accumulate", "seed", "pad_buckets")
    # Older checkpoints have no section `augment`.
    augment = content["run"].get("augment", asdict(AugmentConfig("none" if train_set.endless else "paper")))
    saved = {**{name: content["run"]["train"].get(name) for name in relevant}, **content["data"], **augment}
    current = {**{name: getattr(config, name) for name in relevant}, **train_set.augment.switches()}
    changes = _differences(saved, {**current, "images": len(train_set), "processes": processes})
    if changes:
        raise ValueError(
            f"Checkpoint {path} was saved inside an epoch, and its batches would now be different: {changes}. "
            f"Resume it with the saved values, or from the end of an epoch."
        )


def parameter_changes(saved: Mapping[str, Any], config: TrainConfig, added: int) -> list[str]:
    """Lines about other frozen parameters and learning rates than in the saved run.

    Args:
        saved: its `TrainConfig` as a dict; older ones lack these options.
        config: how the configured run trains.
        added: number of its trained parameters that the saved run did not train.
    """
    options = ((name, saved.get(name, ""), getattr(config, name)) for name in ("freeze", "lr_patterns"))
    changes = [f"{name} was {was!r}, is {now!r}" for name, was, now in options if was != now]
    if added:
        changes.append(f"{added} parameter tensors were not trained before: AdamW has no moments for them yet")
    return changes


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """`name was …, is …` for every value that differs."""
    names = [name for name in current if saved.get(name) != current[name]]
    return ", ".join(f"{name} was {saved.get(name)!r}, is {current[name]!r}" for name in names)
