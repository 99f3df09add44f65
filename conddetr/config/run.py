"""Configuration of a training run: typed options, from a file and from overrides, checked and printable."""

import ast
import inspect
import json
import math
import textwrap
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from conddetr.config import lists
from conddetr.config import model as models
from conddetr.config.augment import AugmentConfig, shapes_augment
from conddetr.config.build import Backend, Precision, check_build
from conddetr.config.checks import check_value, check_values, nearest, plain_type
from conddetr.config.model import ModelConfig
from conddetr.files import read_text

LoggerName = Literal["tensorboard", "wandb", "mlflow"]

_LARGEST_SEED = 2**63 - 1
"""Largest seed that PyTorch accepts."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the paper's 50-epoch schedule, per GPU."""

    epochs: int = 50
    """Passes over the training set."""
    batch_size: int = 2
    """Images per process and forward pass."""
    accumulate: int = 1
    """Batches per step. Losses are divided by the objects of all of them, so the step is that of one large batch."""
    lr: float = 1e-4
    """Learning rate of everything but the backbone."""
    lr_backbone: float = 1e-5
    """Learning rate of the backbone."""
    lr_patterns: str = ""
    """Other learning rates for some parameters, e.g. `backbone.0.body.layer4=5e-6, heads=1e-3`: parts or patterns as in
    `freeze`; the first that matches applies. A table in a TOML file is accepted too."""
    freeze: str = ""
    """What is not trained: `backbone`, `encoder`, `decoder`, `heads`, names of modules or parameters, or patterns of
    names such as `*.norm?.*`, separated by commas."""
    schedule: Literal["step", "cosine"] = "step"
    """`step`: all learning rates are divided by ten every `lr_drop` epochs; `cosine`: they decay to zero."""
    lr_drop: int = 40
    """Epochs between the divisions by ten of the `step` schedule."""
    warmup_steps: int = 0
    """Steps over which the learning rates rise linearly to their values (warm-up)."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW, for all parameters."""
    clip_max_norm: float = 0.1
    """Maximum norm of the gradient of all parameters together; 0: no clipping."""
    ema_decay: float = 0.0
    """Decay per step of the moving average of the weights, e.g. 0.9997; the average is then evaluated. 0: none."""
    ema_ramp: int = 2000
    """Steps over which the decay rises to its value: decay · (1 - exp(-step / ramp))."""
    precision: Precision = "auto"
    """`float32`, or `bfloat16`: autocast for the model; its heads, losses, matching and weights stay float32. `auto`:
    bfloat16 on NVIDIA GPUs of compute capability 8.0 and newer, else float32; a resumed run keeps its own precision if
    it can."""
    compile: bool = False
    """Compile the model with `torch.compile`."""
    checkpoint_activations: bool = False
    """Compute activations of encoder layers, decoder layers and backbone stages again in backward, instead of keeping
    them: less memory, more time, the same results."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Record whole steps as one CUDA graph per batch shape. This needs one process with an NVIDIA GPU, and backend
    `auto` or `triton`. `auto`: if that is possible, else one line says why not; `on`: else an error; `off`."""
    max_targets: int = 0
    """Objects per image to which every batch is padded; more are an error. 0: the maximum of the batch, in a CUDA graph
    the model's number of queries."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    patience: int = 0
    """End the run after this many evaluations in a row without a better AP, as if all epochs were done; 0: never."""
    min_delta: float = 0.0
    """Gain of AP, in [0, 1], that an evaluation must exceed to count as better for `patience`; 0.001 is 0.1 percentage
    points."""
    save_every: int = 0
    """Epochs between checkpoints that are kept as `epoch-N.pt`; 0: none."""
    save_every_steps: int = 500
    """Steps between checkpoints inside an epoch; 0: only at the end of each epoch."""
    check_finite: Literal["auto", "always", "never"] = "auto"
    """Check the matching cost for NaN and infinity, and skip the step if there are any. `always` waits for the device;
    `never` matches such pairs last, so that only losses and gradients decide; `auto` checks if matching runs on the
    host."""
    max_skipped_steps: int = 10
    """Number of steps that may be skipped because the loss or a gradient is not finite; then training stops."""
    workers: int = 2
    """Processes that load images; 0: the training process loads them."""
    decode: Literal["workers", "device"] = "workers"
    """Where training images are decoded and augmented. `device`: on the GPU; workers only read JPEG files (and prepare
    all other files). Pixels then differ by rounding. Validation images are always decoded by the workers."""
    pad_buckets: int = -1
    """Pad batches to one of this many shapes; 0: to the largest image of the batch; -1: 4 if CUDA graphs are recorded,
    else 0."""
    preflight: bool = False
    """Run the largest batch first, to see whether the memory suffices."""
    seed: int = 42
    """Seed of initial weights, order of images, augmentation and dropout."""
    time_limit: float = 0.0
    """Stop training after this many seconds without evaluation, as if all epochs were done; 0: no limit."""

    def __post_init__(self) -> None:
        if isinstance(self.cuda_graphs, bool):
            # Older files have true or false.
            object.__setattr__(self, "cuda_graphs", "on" if self.cuda_graphs else "off")
        if isinstance(self.lr_patterns, Mapping):
            # A table of a TOML file.
            text = ", ".join(f"{pattern}={rate}" for pattern, rate in self.lr_patterns.items())
            object.__setattr__(self, "lr_patterns", text)
        check_values(self, "Training option")
        lists.entries("Training option freeze", self.freeze)
        lists.rates("Training option lr_patterns", self.lr_patterns)
        at_least_one = ("epochs", "batch_size", "accumulate", "lr_drop", "eval_every", "ema_ramp")
        for option in fields(self):
            least = 1 if option.name in at_least_one else -1 if option.name == "pad_buckets" else 0
            value = getattr(self, option.name)
            if option.type is float and not math.isfinite(value):
                raise ValueError(f"Training option {option.name}: expected a finite number, got {value}.")
            if option.type in (int, float) and value < least:
                raise ValueError(f"Training option {option.name}: expected at least {least}, got {value}.")
        if self.seed > _LARGEST_SEED:
            raise ValueError(f"Training option seed: expected at most {_LARGEST_SEED} (2^63 - 1), got {self.seed}.")
        if self.cuda_graphs == "on" and self.check_finite == "always":
            raise ValueError(
                "Training option check_finite: `always` makes the host wait for the device, which cuda_graphs `on` "
                "cannot do."
            )
        if self.checkpoint_activations and self.compile:
            raise ValueError(
                "Training option checkpoint_activations: a compiled model chooses itself what it recomputes. Leave out "
                "checkpoint_activations or compile."
            )
        for name in ("ema_decay", "min_delta"):
            if getattr(self, name) >= 1:
                raise ValueError(f"Training option {name}: expected a value in [0, 1), got {getattr(self, name)}.")
        if self.min_delta and not self.patience:
            raise ValueError("Training option min_delta has no effect without patience: leave it out.")


def tiny_train_config(**overrides: Any) -> TrainConfig:
    """The defaults for the tiny presets on the synthetic set: a few minutes on two CPU cores."""
    tiny = TrainConfig(epochs=16, batch_size=8, lr=7e-4, lr_backbone=7e-4, lr_drop=13, eval_every=8, workers=0)
    return replace(tiny, **overrides)


@dataclass(frozen=True)
class DataConfig:
    """Where images and annotations come from."""

    dataset: str = ""
    """Folder of a data set in the layout of COCO 2017, Roboflow, YOLO or Pascal VOC, which is detected. Without any
    option for images: synthetic shapes."""
    coco_path: str = ""
    """Folder in COCO's 2017 layout, and no other layout."""
    annotations: str = ""
    """One annotation file in COCO's format."""
    images: str = ""
    """Folder of the images of `annotations`."""
    val_fraction: float = 0.1
    """Share of the images of `annotations`, or of a data set without validation images, that is held out for
    validation."""
    val_annotations: str = ""
    """Annotation file of the validation images; then no images are held out."""
    val_folder: str = ""
    """Folder of the images of `val_annotations`; default: `images`."""
    train_images: int = 1600
    """Synthetic images per epoch."""
    val_images: int = 200
    """Synthetic images to evaluate on."""

    def __post_init__(self) -> None:
        check_values(self, "Data option")
        for name in ("train_images", "val_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"Data option {name}: expected at least 1, got {getattr(self, name)}.")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"Data option val_fraction: expected a value between 0 and 1, got {self.val_fraction}.")

    @property
    def kind(self) -> str:
        """The option that names the images, or `synthetic`.

        Raises:
            ValueError: several options name images, or a required option is missing.
        """
        given = [name for name in ("dataset", "coco_path", "annotations") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"Data options {given[0]} and {given[1]}: give one of them.")
        if not given and (self.images or self.val_annotations or self.val_folder):
            raise ValueError("Data option annotations is missing: name the annotation file of the images.")
        if self.annotations and not self.images:
            raise ValueError("Data option images is missing: name the folder of the images of `annotations`.")
        if self.annotations and self.val_folder and not self.val_annotations:
            raise ValueError("Data option val_annotations is missing: name the annotation file of `val_folder`.")
        return given[0] if given else "synthetic"

    def check_used(self) -> None:
        """Refuse options that training would ignore.

        Raises:
            ValueError: an option has no effect with the others; or as `kind`.
        """
        used = _USED[self.kind] - ({"val_fraction"} if self.val_annotations else set())
        for option in fields(self):
            if option.name not in used and getattr(self, option.name) != option.default:
                other = "val_annotations" if self.val_annotations and option.name == "val_fraction" else self.kind
                raise ValueError(unused(option.name, other))


_USED = {
    "dataset": {"dataset", "val_fraction"},
    "coco_path": {"coco_path"},
    "annotations": {"annotations", "images", "val_fraction", "val_annotations", "val_folder"},
    "synthetic": {"train_images", "val_images"},
}
"""The options that describe each kind of data."""


def unused(name: str, kind: str) -> str:
    """Error message for a data option that has no effect with another."""
    other = "synthetic shapes (no images are named)" if kind == "synthetic" else f"`{kind}`"
    return f"Data option {name} has no effect with {other}: leave it out."


@dataclass(frozen=True)
class RunConfig:
    """A whole run, as `resolve_run` resolves it."""

    preset: str = ""
    """Name of the model; default: `conditional-detr-r50`, on synthetic shapes `conditional-detr-tiny`."""
    output_dir: str = "runs/train"
    """Folder for checkpoints, log and curves."""
    resume: str = ""
    """Resume from this checkpoint; `auto`: from the latest one in `output_dir`, if there is one."""
    weights: str = ""
    """Start from these weights: any checkpoint (ours, official, HuggingFace's), or the preset's public weights `coco`
    or `official`. A class head trained on other classes is left out."""
    pretrained_backbone: bool = False
    """Start the backbone from pretrained weights, downloaded on first use: torchvision's of ImageNet, or timm's own."""
    device: str = ""
    """`cpu`, `cuda` or `cuda:N`; default: CUDA if available."""
    backend: Backend = "auto"
    """Implementation of the operations. `auto`: the best that can run; `triton` or `native`: an error if it cannot run;
    `eager`: the reference in plain PyTorch, with every module called and nothing folded. Weights are loaded with
    `auto`, independent of the backend that trained them, unless another one is requested."""
    log_to: str = ""
    """Send each epoch's record to these too, besides `log.jsonl`: `tensorboard`, `wandb`, `mlflow`, separated by
    commas."""
    eval: bool = False
    """Only evaluate the checkpoint that `resume` names."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        check_value("Run option log_to", self.log_to, str)
        for name in lists.entries("Run option log_to", self.log_to):
            check_value("Run option log_to", name, LoggerName)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, as stored in checkpoints and in `config.json`; `resolve_run` reads them again."""
        return asdict(self)


SECTIONS: dict[str, type] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig, "augment": AugmentConfig}


def option_types() -> dict[str, type]:
    """Every option of a run by name, with its type. The number of classes is not an option: it comes from the data."""
    run_options = [option for option in fields(RunConfig) if option.name not in SECTIONS]
    section_options = [option for section in SECTIONS.values() for option in fields(section)]
    return {
        option.name: plain_type(option.type) for option in run_options + section_options if option.name != "num_classes"
    }


def option_help() -> dict[str, str]:
    """Help text of each option, from the docstring under its field."""
    texts = {}
    for config in (RunConfig, *SECTIONS.values()):
        tree = ast.parse(textwrap.dedent(inspect.getsource(config)))
        [body] = [node.body for node in tree.body if isinstance(node, ast.ClassDef)]
        for pair in pairwise(body):
            match pair:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    texts[name] = " ".join(text.split())
    return texts


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, with the sections `model`, `data`, `train` and `augment` merged into the others.

    Raises:
        ValueError: an option is given twice.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        part = value if key in SECTIONS and isinstance(value, Mapping) else {key: value}
        for name in part:
            if name in flat:
                raise ValueError(f"option {name!r} is given twice: at the top and in a section, or in two sections.")
        flat.update(part)
    return flat


def resolve_run(values: Mapping[str, Any]) -> RunConfig:
    """A checked run from options by name; absent options take the preset's defaults.

    Args:
        values: options of `RunConfig`, `ModelConfig`, `DataConfig`, `TrainConfig` and `AugmentConfig`, flat or under
            the keys `model`, `data`, `train` and `augment`.

    Raises:
        ValueError: unknown option (with the nearest name), an option given twice, a wrong type, a value out of range.
    """
    flat = flatten(values)
    flat.pop("num_classes", None)
    known = option_types()
    for key in flat:
        if key not in known:
            raise ValueError(f"Unknown option {key!r}.{nearest(key, list(known))}")

    def part(section: type) -> dict[str, Any]:
        return {option.name: flat[option.name] for option in fields(section) if option.name in flat}

    # The section `augment` has an option of that name.
    run = {name: value for name, value in part(RunConfig).items() if name not in SECTIONS}
    data = DataConfig(**part(DataConfig))
    has_images = data.dataset or data.coco_path or data.annotations or data.val_annotations
    default = "conditional-detr-r50" if has_images else "conditional-detr-tiny"
    preset = run.pop("preset", "") or default
    model = models.resolve(preset, **part(ModelConfig))
    is_tiny = model.backbone == "tiny"
    # A large backbone from random weights learns little; the tiny one has no pretrained weights.
    run.setdefault("pretrained_backbone", not is_tiny)
    train = tiny_train_config(**part(TrainConfig)) if is_tiny else TrainConfig(**part(TrainConfig))
    augment = (AugmentConfig if has_images else shapes_augment)(**part(AugmentConfig))
    run["preset"] = models.preset_name(model.family, model.backbone, model.dilation)
    resolved = RunConfig(model=model, data=data, train=train, augment=augment, **run)
    check_build(model.backbone, resolved.backend, resolved.pretrained_backbone)
    check_values(resolved, "Run option")
    return resolved


def read_config(path: str | Path) -> dict[str, Any]:
    """Options by name from a TOML or JSON file, sections flattened.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither TOML nor JSON, not a table, or an option given twice; names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Configuration file {path} does not exist.")
    if path.suffix not in (".toml", ".json"):
        raise ValueError(f"Configuration file {path}: expected a name ending in .toml or .json.")
    try:
        text = read_text(path)
        content = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"Configuration file {path} is not {path.suffix[1:].upper()}: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"Configuration file {path}: expected options by name, got {type(content).__name__}.")
    try:
        return flatten(content)
    except ValueError as error:
        raise ValueError(f"Configuration file {path}: {error}") from error
