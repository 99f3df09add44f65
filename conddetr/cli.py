"""The command line: `conddetr train | eval | predict | attention | export | ...`; `conddetr --help` lists all."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from conddetr import interrupt
from conddetr.config import PRESETS, check_fraction, check_least
from conddetr.devices import find_device
from conddetr.engine import distributed
from conddetr.engine.checkpoint import LATEST
from conddetr.engine.config import resolve_run
from conddetr.kernels.registry import BackendError
from conddetr.options import add_data_options, add_options, chosen_data, chosen_options, unknown_flag

if TYPE_CHECKING:
    from conddetr.engine.evaluator import CocoResult


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0; 1 where a data set has errors; 2 with one line on stderr for bad input; 143, as of a
        process that SIGTERM ended, when a signal stopped training after its state was saved; 130 after Ctrl-C where
        nothing was to be saved.
    """
    options, unknown = _parser().parse_known_args(arguments)
    try:
        interrupt.raise_again()
        if unknown:
            raise ValueError(unknown_flag(options.parser, unknown))
        return options.run(options) or 0
    except distributed.InterruptedRunError as error:
        print(f"conddetr {options.command}: {error} Go on with --resume auto.", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print(f"conddetr {options.command}: interrupted.", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, BackendError) as error:
        print(f"conddetr {options.command}: {error}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line: `train` alone has a page of options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="conddetr", description="Train and run Conditional DETR.")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser(
        "train",
        help="train a detector",
        allow_abbrev=False,
        description="Train a detector. Defaults are the paper's for the large presets and a few CPU minutes for the "
        "tiny ones. Flags of the official repository are accepted too.",
    )
    train.set_defaults(run=_train)
    add_options(train)

    evaluate = commands.add_parser(
        "eval",
        help="COCO's twelve numbers of a checkpoint",
        description="COCO's twelve numbers of a checkpoint, by default on the data of its training. Under torchrun the "
        "processes share the images.",
    )
    evaluate.set_defaults(run=_evaluate)
    add_data_options(evaluate)
    _add_device(evaluate)
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
    _add_device(predict)
    predict.add_argument("--out", default="runs/predict", help="folder for the drawn images")
    predict.add_argument("--threshold", type=float, default=0.5, help="least score that is drawn")

    attention = commands.add_parser("attention", help="draw where each head of the decoder looks for an object")
    attention.set_defaults(run=_attention)
    attention.add_argument("image", metavar="IMAGE")
    _add_checkpoint(attention)
    _add_device(attention)
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

    demo = commands.add_parser("demo", help="train a tiny detector for two minutes, evaluate it, draw")
    demo.set_defaults(run=_demo)
    demo.add_argument("--coco-path", default="", metavar="DIR", help="COCO's 2017 layout; default: synthetic shapes")
    _add_device(demo)
    demo.add_argument(
        "--out",
        default="runs/demo",
        help="folder for the checkpoint and the pictures; one that holds a run stays: DIR-2 is taken",
    )
    demo.add_argument(
        "--seconds", type=float, help="training time at most; default: none for shapes, 600 with --coco-path"
    )

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
    _add_device(env)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: CUDA where there is one")


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="ours, an official one, or one of transformers' ConditionalDetrForObjectDetection; a folder of "
        "save_pretrained too; with --preset also coco or official, its public weights",
    )
    parser.add_argument("--preset", choices=list(PRESETS), help="of a checkpoint of others; default: found")


def _train(options: argparse.Namespace) -> None:
    from conddetr.engine.progress import console, metrics_table
    from conddetr.engine.run import train

    chosen, notes = chosen_options(options)
    run = resolve_run(chosen)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)
    checkpoint = Path(run.output_dir) / LATEST
    if not run.eval:
        trainer = train(run)
        if not trainer.is_main:
            return
        metrics = trainer.metrics
        console.print(f"wrote {checkpoint}", highlight=False, soft_wrap=True)
    elif run.resume:
        # The official way to evaluate a checkpoint.
        checkpoint = checkpoint if run.resume == "auto" else Path(run.resume)
        data = {name: value for name, value in dataclasses.asdict(run.data).items() if name in chosen}
        # Weights do not tell dilation: an official file without arguments takes it from the flags.
        preset = run.preset if {"preset", "family", "backbone", "dilation"} & chosen.keys() else None
        result = _coco_result(checkpoint, preset, run.device, data, run.train.batch_size, run.train.workers)
        if result is None:
            return
        metrics = result.metrics
    else:
        raise ValueError("--eval needs --resume FILE: the checkpoint to evaluate.")
    console.print(metrics_table(f"COCO metrics of {checkpoint}, in percent", metrics))


def _coco_result(
    checkpoint: str | Path,
    preset: str | None,
    device: str | None,
    data: Mapping[str, Any],
    batch_size: int,
    workers: int,
    results: str | None = None,
) -> "CocoResult | None":
    """COCO's numbers of a checkpoint, with torchrun's other processes; None on every rank but 0.

    `data` as `evaluation_data` takes it; the detections are written to `results`.
    """
    from conddetr.data.batch import check_loading
    from conddetr.detector import Detector
    from conddetr.engine.evaluator import coco_library, coco_result, detect
    from conddetr.engine.run import data_sets, evaluation_data

    # Better refused now than after the detections are made.
    coco_library()
    check_loading(batch_size, workers)
    with distributed.process_group(device or "") as own_device:
        detector = Detector.from_checkpoint(checkpoint, preset, str(own_device))
        _, val_set = data_sets(evaluation_data(data, detector.data, detector.classes), detector.config)
        group = distributed.rank(), distributed.world_size()
        found = detect(detector.model, detector.classes, val_set, own_device, batch_size, workers, *group)
    if found is None:
        return None
    if results:
        found.write(results)
    return coco_result(val_set.ground_truth(), found)


def _evaluate(options: argparse.Namespace) -> None:
    from conddetr.engine.progress import class_table, console, metrics_table
    from conddetr.files import write_text

    source = options.checkpoint, options.preset, options.device
    result = _coco_result(*source, chosen_data(options), options.batch_size, options.workers, options.results)
    if result is None:
        return
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

    check_fraction("threshold", options.threshold)
    detector = Detector.from_checkpoint(options.checkpoint, options.preset, options.device)
    if len(options.images) > 1:
        detector = detector.fused()
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
    from conddetr.demo import (
        RECIPE_FOR_PHOTOS,
        check_learned,
        draw_samples,
        free_folder,
        recipe_for_shapes,
        report,
        use_one_thread,
    )
    from conddetr.detector import Detector
    from conddetr.engine.progress import console
    from conddetr.engine.run import train

    if options.seconds is not None and not options.seconds > 0:
        raise ValueError(f"--seconds: expected more than 0, got {options.seconds:g}.")
    out = free_folder(options.out)
    recipe = RECIPE_FOR_PHOTOS if options.coco_path else recipe_for_shapes(options.device)
    chosen = {"preset": "conditional-detr-tiny", "coco_path": options.coco_path, "output_dir": str(out), **recipe}
    if options.seconds is not None:
        chosen["time_limit"] = options.seconds
    if not options.coco_path:
        use_one_thread()
        console.print("training a tiny detector on synthetic shapes: about two minutes on two CPU cores")
    trainer = train(resolve_run({**chosen, "device": options.device or ""}), show_config=False)
    detector = Detector.from_checkpoint(out / LATEST, device=options.device)
    report(trainer.metrics, draw_samples(detector, trainer.val_set, out))
    if not options.coco_path and options.seconds is None:
        check_learned(trainer.metrics)


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

    check_least("--count", options.count, 1)
    check_least("--rounds", options.rounds, 1)
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
    from conddetr.kernels.conv3x3 import op as conv3x3
    from conddetr.kernels.dropout import op as dropout
    from conddetr.kernels.match import op as match
    from conddetr.kernels.query import op as query

    device = find_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
    console.print(f"Python {platform.python_version()}, device {device} ({name})", highlight=False)
    for package in ("torch", "torchvision", "triton", "pycocotools", "faster-coco-eval"):
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed"
        console.print(f"{package} {found}", highlight=False)
    console.print(f"native kernels: {native.NOT_LOADED or native.describe(device)}", highlight=False, soft_wrap=True)
    dtypes = (torch.float32, torch.bfloat16)
    choices = [registry.choose("auto", device, dtype) for dtype in dtypes]
    table = Table(title="what backend=auto picks")
    for column in ("operation", *(str(dtype).removeprefix("torch.") for dtype in dtypes)):
        table.add_column(column)
    for operation in ("conditional_attention", "dropout_bits", "sine_embedding", "conditional_spatial_query"):
        table.add_row(operation, *(choice.backend for choice in choices))
    losses = ("focal_loss", "matched_box_loss", "matching_cost", "prediction_errors")
    fused = ("add_norm", "grid_positions", "max_pool", "predicted_boxes", "prepare_weights")
    for operation in (*fused, *losses):
        table.add_row(operation, *(registry.choose("auto", device, x, registry.WITHOUT_NATIVE).backend for x in dtypes))
    table.add_row("spatial_query", *(query.choose("auto", device, dtype).backend for dtype in dtypes))
    table.add_row("relu_dropout", *(dropout.choose("auto", device, dtype).backend for dtype in dtypes))
    table.add_row("dropout_add", *(dropout.choose_add("auto", device, dtype) for dtype in dtypes))
    shapes = [torch.empty(1, conv3x3.GRAIN, 1, 1, device=device, dtype=dtype) for dtype in dtypes]
    table.add_row("convolution_3x3", *(conv3x3.choose("auto", x, (conv3x3.GRAIN, conv3x3.GRAIN)) for x in shapes))
    table.add_row("linear_assignment", *[match.choose("auto", device, torch.float32)] * len(dtypes))
    console.print(table)
    for backend, reason in {item for choice in choices for item in choice.refused.items()}:
        console.print(f"{backend} is refused: {reason}", highlight=False, soft_wrap=True)
