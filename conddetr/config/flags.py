"""The options of `conddetr train` as command-line flags: every field of the configuration, and the official flags.

Flags are accepted with hyphens and with underscores. Official flags are those of Conditional DETR's and DETR's
`main.py`.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from conddetr.config.augment import AugmentConfig
from conddetr.config.checks import nearest, plain_type
from conddetr.config.model import ModelConfig
from conddetr.config.run import DataConfig, option_help, option_types, read_config

OFFICIAL_NAMES = {
    "enc_layers": "encoder_layers",
    "dec_layers": "decoder_layers",
    "dim_feedforward": "ffn_dim",
    "nheads": "num_heads",
    "set_cost_class": "class_cost",
    "set_cost_bbox": "bbox_cost",
    "set_cost_giou": "giou_cost",
    "cls_loss_coef": "class_weight",
    "bbox_loss_coef": "bbox_weight",
    "giou_loss_coef": "giou_weight",
    "eos_coef": "no_object_weight",
    "num_workers": "workers",
    "out": "output_dir",
}
"""Official names of our options, and the option each stands for."""

WITHOUT_MEANING = {
    "start_epoch": "a checkpoint holds the epoch at which it was saved",
    "world_size": "torchrun sets the number of processes",
    "dist_url": "torchrun sets the address where the processes meet",
    "remove_difficult": "the official code does not use it either",
    "mask_loss_coef": "there is no mask head",
    "dice_loss_coef": "there is no mask head",
}
"""Official flags that have no effect here, with the reason. They are accepted, and one line reports it."""

FIXED = {
    "dataset_file": ("coco", "other data sets need COCO's annotation format"),
    "position_embedding": ("sine", "learned positions are not implemented"),
    "coco_panoptic_path": (None, "panoptic segmentation is not implemented"),
    "frozen_weights": (None, "it is for segmentation, which is not implemented"),
    "masks": (None, "segmentation is not implemented"),
    "pre_norm": (None, "only the paper's post-norm is implemented"),
}
"""Official flags with the only accepted value (None: none), and why other values are refused."""

SHARED_NAMES = (
    "batch_size",
    "clip_max_norm",
    "coco_path",
    "focal_alpha",
    "hidden_dim",
    "lr_backbone",
    "lr_drop",
    "no_aux_loss",
    "num_queries",
    "output_dir",
    "weight_decay",
)
"""Official flags with the same names as our options. The official ones have underscores, our pages use hyphens. Names
without either, such as `--lr`, do not show for which program a command was written.
"""

ONCE_SWITCHES = ("cuda_graphs",)
"""Options that were formerly switches: without a value they mean `on`, and with `no-` in front `off`."""

_SWITCHES = ("remove_difficult", "masks", "pre_norm")

_OFFICIAL_FLAGS = {f"--{name}" for name in ({*OFFICIAL_NAMES} - {"out"}).union(WITHOUT_MEANING, FIXED, SHARED_NAMES)}


class _Store(argparse.Action):
    """Stores a flag's value, or `const` if it takes none, and remembers a flag that is spelled as in `main.py`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)
        if option_string in _OFFICIAL_FLAGS:
            namespace.official_flag = option_string


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--config`, a flag for every option of a run, and the official flags."""
    parser.add_argument("--config", metavar="FILE", help="options from a TOML or JSON file; flags override them")
    _add_flags(parser, option_types())
    for name in (*WITHOUT_MEANING, *FIXED):
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        if name in _SWITCHES:
            settings |= {"nargs": 0, "const": True}
        parser.add_argument(*_spellings(name), dest=f"official_{name}", action=_Store, **settings)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of `DataConfig`; `chosen_data` reads them."""
    _add_flags(parser, _types_of(DataConfig))


def add_augment_options(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of `AugmentConfig`; `chosen_augment` reads them."""
    _add_flags(parser, _types_of(AugmentConfig))


def chosen_data(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `DataConfig` that were given as flags of `add_data_options`."""
    return _chosen(options, DataConfig)


def chosen_augment(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `AugmentConfig` that were given as flags of `add_augment_options`."""
    return _chosen(options, AugmentConfig)


def _types_of(section: type) -> dict[str, type]:
    return {option.name: plain_type(option.type) for option in fields(section)}


def _chosen(options: argparse.Namespace, section: type) -> dict[str, Any]:
    given = vars(options)
    return {option.name: given[option.name] for option in fields(section) if option.name in given}


def _add_flags(parser: argparse.ArgumentParser, types: Mapping[str, type]) -> None:
    """Add a flag for each option; options that are not given are absent from the result."""
    help_of = option_help()
    for name, kind in types.items():
        names = [name, *(alias for alias, ours in OFFICIAL_NAMES.items() if ours == name)]
        flags = [flag for spelled in names for flag in _spellings(spelled)]
        settings: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "action": _Store}
        text = help_of.get(name, "").replace("%", "%%").replace("`", "")
        if kind is bool:
            parser.add_argument(*flags, nargs=0, const=True, help=text, **settings)
            negative = [flag for spelled in names for flag in _spellings(f"no_{spelled}")]
            parser.add_argument(*negative, nargs=0, const=False, help=argparse.SUPPRESS, **settings)
            continue
        if name in ONCE_SWITCHES:
            negative = _spellings(f"no_{name}")
            parser.add_argument(*negative, nargs=0, const="off", help=argparse.SUPPRESS, **settings)
            settings |= {"nargs": "?", "const": "on"}
        parser.add_argument(*flags, type=kind, help=text, metavar=kind.__name__.upper(), **settings)


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys(("--" + name.replace("_", "-"), "--" + name)))


def chosen_options(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The user's options, flat, with flags overriding the file, and one line for every flag that has no effect here.

    With official flags the default precision is the official one, float32; a line says so.

    Raises:
        ValueError: an official flag requests a feature that is not implemented; the message names it. Or the file and
            `--preset` describe different models, or the file and `--augment` different augmentations.
        FileNotFoundError: no such configuration file.
    """
    given = vars(options)
    notes = []
    for name, reason in WITHOUT_MEANING.items():
        if f"official_{name}" in given:
            notes.append(f"--{name} has no effect here: {reason}.")
    for name, (accepted, reason) in FIXED.items():
        value = given.get(f"official_{name}", accepted)
        if value != accepted:
            raise ValueError(f"--{name} {value}: {reason}.")
    chosen = read_config(options.config) if options.config else {}
    flags = {name: given[name] for name in option_types() if name in given}
    _check_preset(chosen, flags)
    _check_augment(chosen, flags)
    chosen = {**chosen, **flags}
    if "official_flag" in given and "precision" not in chosen:
        chosen["precision"] = "float32"
        notes.append(
            f"{given['official_flag']} is an official flag: the precision is float32, as in the official code."
        )
    return chosen, notes


def _check_preset(in_file: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """Refuse a preset if the file sets model options of another preset, which would override it."""
    described = [option.name for option in fields(ModelConfig) if option.name in in_file]
    named = flags.get("preset", in_file.get("preset"))
    if described and in_file.get("preset", named) != named:
        raise ValueError(
            f"--preset {named}: the configuration file is for {in_file['preset']} and sets {len(described)} options "
            f"of its model, first {described[0]!r}: remove preset and model from the file."
        )


def _check_augment(in_file: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """Refuse a set of augmentations if the file sets switches of another set, which would override it."""
    switches = [option.name for option in fields(AugmentConfig) if option.name in in_file and option.name != "augment"]
    named = flags.get("augment", in_file.get("augment"))
    if switches and in_file.get("augment", named) != named:
        raise ValueError(
            f"--augment {named}: the configuration file is for {in_file['augment']} and sets {len(switches)} of its "
            f"switches, first {switches[0]!r}: remove the section augment from the file."
        )


def unknown_flag(parser: argparse.ArgumentParser, flags: Sequence[str]) -> str:
    """Error message for arguments that a parser did not recognize."""
    known = [flag for action in parser._actions for flag in action.option_strings]
    flag = next((flag for flag in flags if flag.startswith("--")), flags[0])
    return f"unknown option {flag!r}.{nearest(flag.partition('=')[0], sorted(known))}"
