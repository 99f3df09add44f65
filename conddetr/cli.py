"""The command line: `conddetr train | eval | predict | attention | export | ...`; `conddetr --help` lists all."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from conddetr.config import PRESETS, ModelConfig
from conddetr.kernels.registry import BackendError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 where a data set has errors, 2 with one line for bad input."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, BackendError) as error:
        print(f"conddetr {options.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="conddetr", description="Train and run Conditional DETR.")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train a detector")
    train.set_defaults(run=_train)
    _add_data(train)
    _add_model(train)
    train.add_argument("--out", default="runs/train", help="folder for checkpoint.pt and log.jsonl")
    train.add_argument("--resume", metavar="FILE", help="continue from the epoch end in this checkpoint")
    _add_training(train)

    evaluate = commands.add_parser("eval", help="COCO's twelve numbers of a checkpoint")
    evaluate.set_defaults(run=_evaluate)
    _add_data(evaluate)
    _add_checkpoint(evaluate)
    evaluate.add_argument("--batch-size", type=int, default=2, help="images per forward pass")
    evaluate.add_argument("--workers", type=int, default=2, help="processes that load images")
    evaluate.add_argument("--out", metavar="FILE", help="also write the numbers there, as JSON")
    evaluate.add_argument("--results", metavar="FILE", help="also write the detections there, in COCO's results format")
    evaluate.add_argument(
        "--per-class", action="store_true", help="also print a table of the classes, and write it to --out"
    )

    predict = commands.add_parser("predict", help="draw detections on images")
    predict.set_defaults(run=_predict)
    predict.add_argument("images", nargs="+", metavar="IMAGE")
    _add_checkpoint(predict)
    predict.add_argument("--out", default="runs/predict", help="folder for the drawn images")
    predict.add_argument("--threshold", type=float, default=0.5, help="least score that is drawn")

    attention = commands.add_parser("attention", help="draw where each head of the decoder looks for an object")
    attention.set_defaults(run=_attention)
    attention.add_argument("image", metavar="IMAGE")
    _add_checkpoint(attention)
    which = attention.add_mutually_exclusive_group()
    which.add_argument("--query", type=int, metavar="N", help="object query, from 0, whatever it found")
    which.add_argument("--top", type=int, default=1, metavar="K", help="the K best detections, a picture each")
    attention.add_argument("--layer", type=int, default=-1, help="decoder layer, from 0; default: the last")
    attention.add_argument("--out", default="runs/attention", help="folder for the pictures")

    export = commands.add_parser("export", help="write a file that runs without this package, and check it")
    export.set_defaults(run=_export)
    _add_checkpoint(export)
    export.add_argument("--format", default="onnx", choices=("torch", "onnx"), help="default: onnx")
    export.add_argument("--out", metavar="FILE", help="default: runs/export/model.onnx, or model.pt2 for torch")
    export.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="fix the image size; default: any")

    demo = commands.add_parser("demo", help="train a tiny detector for minutes, evaluate it, draw")
    demo.set_defaults(run=_demo)
    _add_data(demo)
    demo.add_argument("--out", default="runs/demo", help="folder for the checkpoint and the pictures")
    demo.add_argument("--seconds", type=float, default=200.0, help="training time at most")

    validate = commands.add_parser("validate-data", help="read a whole data set and report what is wrong with it")
    validate.set_defaults(run=_validate)
    source = validate.add_mutually_exclusive_group(required=True)
    source.add_argument("--coco-path", metavar="DIR", help="COCO's 2017 layout, both splits")
    source.add_argument("--annotations", metavar="FILE", help="one file in COCO's format; needs --images")
    validate.add_argument("--images", metavar="DIR", help="folder of the images of --annotations")
    validate.add_argument("--report", metavar="FILE", help="also write what was found there, as JSON")
    validate.add_argument("--processes", type=int, help="that read images; default: one per core")

    bench = commands.add_parser("bench-data", help="training images/s on one core, official chain against ours")
    bench.set_defaults(run=_bench_data)
    bench.add_argument("--coco-path", required=True, metavar="DIR", help="COCO's 2017 layout")
    bench.add_argument("--preset", default="conditional-detr-r50", choices=list(PRESETS), help="for its image sizes")
    bench.add_argument("--count", type=int, default=100, help="images to use at most")
    bench.add_argument("--rounds", type=int, default=5, help="passes over the images")

    env = commands.add_parser("env", help="versions, and which implementation each operation uses here")
    env.set_defaults(run=_env)
    env.add_argument("--device", help="as torch names it; default: CUDA where there is one")
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--coco-path", metavar="DIR", help="COCO's 2017 layout; default: synthetic shapes")
    parser.add_argument("--device", help="as torch names it; default: CUDA where there is one")


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="ours, or an official one")
    parser.add_argument("--preset", choices=list(PRESETS), help="of an official checkpoint; default: found")
    if parser.prog.endswith(("predict", "attention")):
        parser.add_argument("--device", help="as torch names it; default: CUDA where there is one")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="conditional-detr-tiny", choices=list(PRESETS))
    parser.add_argument(
        "--pretrained-backbone",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start a ResNet from torchvision's ImageNet weights, downloaded on first use",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="override a model option, e.g. csq=I",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    from conddetr.engine.trainer import TrainConfig

    group = parser.add_argument_group(
        "training", "Defaults are the paper's for the large presets and a few CPU minutes for the tiny ones."
    )
    for field in dataclasses.fields(TrainConfig):
        group.add_argument("--" + field.name.replace("_", "-"), type=field.type, default=None)
    group.add_argument("--train-images", type=int, default=1600, help="synthetic images per epoch")
    group.add_argument("--val-images", type=int, default=200, help="synthetic images to evaluate on")


def _train(options: argparse.Namespace) -> None:
    from conddetr.engine.progress import console, metrics_table
    from conddetr.engine.trainer import TrainConfig, Trainer, seed_everything, tiny_train_config
    from conddetr.zoo import build

    preset = PRESETS[options.preset]
    # A resumed run brings its own weights, and the tiny backbone has no others.
    pretrained = options.pretrained_backbone and preset.backbone != "tiny" and not options.resume
    overrides = {"pretrained_backbone": pretrained, **_parse_overrides(options.set)}
    config = tiny_train_config() if preset.backbone == "tiny" else TrainConfig()
    for field in dataclasses.fields(TrainConfig):
        value = getattr(options, field.name)
        if value is not None:
            setattr(config, field.name, value)
    train_set, val_set = _data_sets(
        options.coco_path,
        dataclasses.replace(preset, **_sizes(overrides)),
        options.train_images,
        options.val_images,
    )
    seed_everything(config.seed)
    model = build(options.preset, num_classes=len(train_set.classes), **overrides)
    _print_start(options.preset, model, len(train_set), len(val_set))
    trainer = Trainer(model, train_set, val_set, config, options.out, _device(options.device))
    if options.resume:
        trainer.resume(options.resume)
    metrics = trainer.fit()
    console.print(metrics_table("COCO metrics, in percent", metrics))
    console.print(f"wrote {Path(options.out) / 'checkpoint.pt'}", highlight=False, soft_wrap=True)


def _evaluate(options: argparse.Namespace) -> None:
    from conddetr.detector import Detector
    from conddetr.engine.evaluator import coco_library, coco_result, detect
    from conddetr.engine.progress import class_table, console, metrics_table
    from conddetr.files import write_text

    # Better refused now than after the detections are made.
    coco_library()

    detector = Detector.from_checkpoint(options.checkpoint, options.preset, options.device)
    _, val_set = _data_sets(options.coco_path, detector.model.config, 1, 200)
    found = detect(detector.model, detector.classes, val_set, detector.device, options.batch_size, options.workers)
    if options.results:
        found.write(options.results)
    result = coco_result(val_set.ground_truth(), found)
    if options.per_class:
        console.print(class_table("classes, in percent", result.per_class))
    console.print(metrics_table(f"COCO metrics of {options.checkpoint}, in percent", result.metrics))
    if options.out:
        per_class = {"per_class": [vars(row) for row in result.per_class]} if options.per_class else {}
        content = {**result.metrics, **per_class}
        write_text(options.out, json.dumps(content, indent=1) + "\n")


def _predict(options: argparse.Namespace) -> None:
    from conddetr.data.images import read_image
    from conddetr.detector import Detector
    from conddetr.engine.progress import console
    from conddetr.viz.boxes import save_detections

    detector = Detector.from_checkpoint(options.checkpoint, options.preset, options.device)
    for path in options.images:
        image = read_image(path)
        found = detector.predict(image, options.threshold)[0]
        file = Path(options.out) / f"{Path(path).stem}.png"
        save_detections(file, image, found.boxes, found.labels.tolist(), found.captions)
        console.print(f"{path}: {len(found)} objects; wrote {file}", highlight=False, soft_wrap=True)


def _attention(options: argparse.Namespace) -> None:
    from conddetr.data.images import read_image
    from conddetr.detector import Detector
    from conddetr.engine.progress import console
    from conddetr.viz.attention import attention_figure
    from conddetr.viz.boxes import save_figure

    detector = Detector.from_checkpoint(options.checkpoint, options.preset, options.device)
    image = read_image(options.image)
    queries = None if options.query is None else [options.query]
    found, maps = detector.attention(image, queries, options.top, options.layer)
    for index, (caption, query) in enumerate(zip(found.captions, found.queries.tolist(), strict=True)):
        file = Path(options.out) / f"{Path(options.image).stem}-layer{maps.layer}-query{query}.png"
        save_figure(attention_figure(image, found, index, maps), file)
        console.print(f"{caption}: wrote {file}", highlight=False, soft_wrap=True)


def _export(options: argparse.Namespace) -> None:
    from conddetr.detector import Detector
    from conddetr.engine.progress import console
    from conddetr.export import SUFFIXES

    detector = Detector.from_checkpoint(options.checkpoint, options.preset, "cpu")
    path = options.out or f"runs/export/model{SUFFIXES[options.format]}"
    with console.status("exporting, then comparing the file with the model"):
        report = detector.export(path, options.format, options.size and tuple(options.size))
    megabytes = report.path.stat().st_size / 1e6
    for line in (
        f"input images {report.input_shape} float32; outputs logits and boxes",
        f"differs from the model by at most {report.difference:.1e}, on batches of shape "
        f"{', '.join(map(str, report.checked))}",
        f"wrote {report.path} ({megabytes:.1f} MB)",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _demo(options: argparse.Namespace) -> None:
    from conddetr.demo import draw_samples, report
    from conddetr.detector import Detector
    from conddetr.engine.trainer import Trainer, seed_everything, tiny_train_config
    from conddetr.zoo import build

    preset = "conditional-detr-tiny"
    config = tiny_train_config()
    config.time_limit = options.seconds
    train_set, val_set = _data_sets(options.coco_path, PRESETS[preset], 1600, 200)
    if options.coco_path:
        # A small real set is passed over many times within the same minutes.
        config.epochs, config.lr_drop, config.eval_every = 100, 80, 50
    seed_everything(config.seed)
    model = build(preset, num_classes=len(train_set.classes))
    _print_start(preset, model, len(train_set), len(val_set))
    # A second demonstration replaces the first.
    for name in ("checkpoint.pt", "log.jsonl"):
        (Path(options.out) / name).unlink(missing_ok=True)
    metrics = Trainer(model, train_set, val_set, config, options.out, _device(options.device)).fit()
    detector = Detector.from_checkpoint(Path(options.out) / "checkpoint.pt", device=options.device)
    report(metrics, draw_samples(detector, val_set, options.out))


def _validate(options: argparse.Namespace) -> int:
    from conddetr.data.validate import note_shared_images, validate
    from conddetr.engine.progress import Progress, console
    from conddetr.files import write_text

    if options.annotations and not options.images:
        raise ValueError("--images: name the folder of the images of --annotations.")
    sources = {"train": (options.images, options.annotations)}
    if options.coco_path:
        root = Path(options.coco_path)
        sources = {
            split: (root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json")
            for split in ("train", "val")
        }
    reports = []
    for split, (images, annotations) in sources.items():
        with Progress(f"validate {split}", total=None) as progress:
            report = validate(
                images,
                annotations,
                split == "train",
                options.processes,
                lambda done, total: progress.advance(done, total=total),
            )
        reports.append(report)
    if len(reports) == 2:
        note_shared_images(*reports)
    for report in reports:
        console.print(report.summary(), highlight=False, soft_wrap=True, markup=False)
        console.print(*report.tables(), sep="\n")
    ok = all(report.ok for report in reports)
    if options.report:
        content = {"ok": ok, "data_sets": [report.to_dict() for report in reports]}
        write_text(options.report, json.dumps(content, indent=1) + "\n")
    return 0 if ok else 1


def _bench_data(options: argparse.Namespace) -> None:
    from conddetr.data.bench import bench_data
    from conddetr.data.coco import coco_split
    from conddetr.data.transforms import TrainTransform
    from conddetr.engine.progress import console

    dataset = coco_split(options.coco_path, "train", TrainTransform(PRESETS[options.preset]))
    result = bench_data(dataset, options.count, options.rounds)
    console.print(result.table())
    console.print(result.agreement(), highlight=False, soft_wrap=True)


def _env(options: argparse.Namespace) -> None:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from rich.table import Table

    from conddetr.engine.progress import console
    from conddetr.kernels import native, registry

    device = _device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
    console.print(f"Python {platform.python_version()}, device {device} ({name})", highlight=False)
    for package in ("torch", "torchvision", "triton", "pycocotools", "faster-coco-eval"):
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed"
        console.print(f"{package} {found}", highlight=False)
    console.print(f"native kernels: {native.NOT_LOADED or native.describe()}", highlight=False, soft_wrap=True)
    dtypes = (torch.float32, torch.bfloat16)
    choices = [registry.choose("auto", device, dtype) for dtype in dtypes]
    table = Table(title="what backend=auto picks")
    for column in ("operation", *(str(dtype).removeprefix("torch.") for dtype in dtypes)):
        table.add_column(column)
    for operation in ("conditional_attention", "sine_embedding", "conditional_spatial_query"):
        table.add_row(operation, *(choice.backend for choice in choices))
    console.print(table)
    for backend, reason in {item for choice in choices for item in choice.refused.items()}:
        console.print(f"{backend} is refused: {reason}", highlight=False, soft_wrap=True)


def _data_sets(coco_path: str | None, config: ModelConfig, train_images: int, val_images: int) -> tuple:
    """Training and validation set: COCO's layout where a folder is named, else synthetic shapes."""
    from conddetr.data.coco import coco_split
    from conddetr.data.synthetic import SyntheticShapes
    from conddetr.data.transforms import EvalTransform, TrainTransform

    if coco_path:
        return (
            coco_split(coco_path, "train", TrainTransform(config)),
            coco_split(coco_path, "val", EvalTransform(config)),
        )
    size = config.image_size
    return SyntheticShapes(train_images, seed=1, image_size=size), SyntheticShapes(val_images, 2, size)


def _parse_overrides(pairs: list[str]) -> dict[str, object]:
    """`name=value` pairs, the value read as the type of the field."""
    types = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    overrides: dict[str, object] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set: expected OPTION=VALUE, got {pair!r}.")
        kind = types.get(name, str)
        overrides[name] = text.lower() in ("1", "true", "yes") if kind is bool else kind(text)
    return overrides


def _sizes(overrides: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in overrides.items() if name in ("image_size", "max_image_size")}


def _device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _print_start(preset: str, model: torch.nn.Module, train: int, val: int) -> None:
    from conddetr.engine.progress import console

    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    console.print(
        f"{preset}: {total:,} parameters, {trainable:,} trainable; {train} training and {val} validation images",
        highlight=False,
        soft_wrap=True,
    )
