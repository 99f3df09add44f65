"""The command line: `conddetr train | eval | predict | attention | export | ...`; `conddetr --help` lists all."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, get_args

import torch

from conddetr import interrupt
from conddetr.config import PRESETS, Backend, Precision
from conddetr.config.checks import check_fraction, check_least
from conddetr.config.flags import add_data_options, add_options, chosen_data, chosen_options, unknown_flag
from conddetr.config.run import resolve_run
from conddetr.devices import find_device
from conddetr.engine import distributed
from conddetr.engine.checkpoint import LATEST
from conddetr.kernels.registry import BackendError

if TYPE_CHECKING:
    from conddetr.data.annotations import Annotations
    from conddetr.data.validate import ValidationReport
    from conddetr.detector import Detector
    from conddetr.engine.evaluator import CocoResult


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0; 1 where a data set has errors or a kernel is refused; 2 with one line on stderr for bad
        input; 143, as of a process that SIGTERM ended, when a signal stopped training after its state was saved; 130
        after Ctrl-C where nothing was to be saved.
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
    """Prints its help into any encoding, and says what is wrong in one line: `train` alone has a page of options. The
    parsers of the commands are of this kind too.
    """

    def print_help(self, file: IO[str] | None = None) -> None:
        from conddetr.engine.progress import StandardOutput

        super().print_help(file or StandardOutput())

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
        description="COCO's twelve numbers of a checkpoint: on all images of an annotation file (--images, "
        "--annotations), on the validation images of a data set (--dataset, --coco-path), or by default on those of "
        "its training. Under torchrun the processes share the images.",
    )
    evaluate.set_defaults(run=_evaluate)
    add_data_options(evaluate)
    _add_device(evaluate)
    _add_computing(evaluate)
    _add_checkpoint(evaluate)
    evaluate.add_argument("--batch-size", type=int, default=2, help="images per forward pass")
    evaluate.add_argument("--workers", type=int, default=2, help="processes that load images")
    evaluate.add_argument("--out", metavar="FILE", help="also write the numbers there, as JSON")
    evaluate.add_argument("--results", metavar="FILE", help="also write the detections there, in COCO's results format")
    evaluate.add_argument("--split", default="val", choices=("val", "test"), help="of a --dataset; default: val")
    evaluate.add_argument(
        "--classes-by-name", action="store_true", help="match classes by name, whatever their ids in the data set"
    )
    evaluate.add_argument(
        "--per-class", action="store_true", help="also print a table of the classes, and write it to --out"
    )

    predict = commands.add_parser("predict", help="draw detections on images")
    predict.set_defaults(run=_predict)
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="a file, or a folder of images")
    _add_checkpoint(predict)
    _add_device(predict)
    _add_computing(predict)
    predict.add_argument(
        "--out",
        default="runs/predict",
        help="folder for the drawn images; only pictures of the same images that predict drew earlier are replaced",
    )
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
    source.add_argument("--dataset", metavar="DIR", help="a folder in any layout that is known, all its parts")
    source.add_argument("--coco-path", metavar="DIR", help="COCO's 2017 layout, training and validation")
    source.add_argument("--annotations", metavar="FILE", help="one file in COCO's format; needs --images")
    validate.add_argument("--images", metavar="DIR", help="folder of the images of --annotations")
    validate.add_argument("--val-annotations", metavar="FILE", help="of validation images, compared with --annotations")
    validate.add_argument("--val-folder", metavar="DIR", help="folder of the images of --val-annotations")
    validate.add_argument("--report", metavar="FILE", help="also write what was found there, as JSON")
    validate.add_argument(
        "--fix", metavar="OUT.json", help="write a cleaned copy of --annotations there, and list what was changed"
    )
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

    check = commands.add_parser(
        "check",
        help="prove the kernels on this device: numbers, memory, time",
        description="Run every kernel on this device beside plain PyTorch in float64: results, gradients, dropout, the "
        "same bits twice, nothing written outside, then the time. The record of it is kept in the user's cache folder; "
        "on a GPU backend=auto goes by it. The exit status is 1 if a kernel is refused.",
    )
    check.set_defaults(run=_check)
    _add_device(check)
    check.add_argument("--short", action="store_true", help="only the sizes of the model")
    check.add_argument(
        "--tune",
        action="store_true",
        help="on a GPU: before, measure the few launch settings of attention that are predicted to be the fastest, and "
        "record which one is",
    )
    check.add_argument("--json", metavar="FILE", help="also write the record there")
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: CUDA where there is one")


def _add_computing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        default="auto",
        choices=get_args(Backend),
        help="as of train; eager: the reference, in plain PyTorch",
    )
    parser.add_argument(
        "--precision",
        default="auto",
        choices=get_args(Precision),
        help="default: that of the training, and bfloat16 where it is not known; both on GPUs that have it",
    )


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
    from conddetr.engine.progress import metrics_table, say, show
    from conddetr.engine.run import official_evaluation, train

    chosen, notes = chosen_options(options)
    run = resolve_run(chosen)
    for note in notes:
        say(note)
    checkpoint = Path(run.output_dir) / LATEST
    if not run.eval:
        trainer = train(run)
        if not trainer.is_main:
            return
        metrics, result = trainer.metrics, trainer.result
        say(f"wrote {checkpoint}")
    elif run.resume:
        # The official way to evaluate a checkpoint.
        checkpoint = checkpoint if run.resume == "auto" else Path(run.resume)
        data = official_evaluation(run.data, chosen)
        # Weights do not tell dilation: an official file without arguments takes it from the flags.
        preset = run.preset if {"preset", "family", "backbone", "dilation"} & chosen.keys() else None
        source = checkpoint, preset, run.device, run.backend, run.train.precision
        result = _coco_result(*source, data, run.train.batch_size, run.train.workers)
        if result is None:
            return
        metrics = result.metrics
    else:
        raise ValueError("--eval needs --resume FILE: the checkpoint to evaluate.")
    show(f"COCO metrics of {checkpoint}, in percent", metrics_table(metrics))
    # A run that was complete has its numbers from the checkpoint.
    if result is not None:
        say(result.describe())


def _coco_result(
    checkpoint: str | Path,
    preset: str | None,
    device: str | None,
    backend: str,
    precision: str,
    data: Mapping[str, Any],
    batch_size: int,
    workers: int,
    results: str | None = None,
    by_name: bool = False,
    split: str = "val",
) -> "CocoResult | None":
    """COCO's numbers of a checkpoint, with torchrun's other processes; None on every rank but 0, and where the images
    have no annotations.

    `data` and `split` as `evaluation_set` takes them; detections are written to `results`; `by_name` as `detect`.
    """
    from conddetr.data.batch import check_loading
    from conddetr.detector import Detector
    from conddetr.engine.evaluator import coco_library, coco_result, detect
    from conddetr.engine.progress import say
    from conddetr.engine.run import evaluation_set

    check_loading(batch_size, workers)
    with distributed.process_group(device or "") as own_device:
        detector = Detector.from_checkpoint(checkpoint, preset, str(own_device), backend, precision)
        val_set = evaluation_set(data, detector.data, detector.classes, detector.config, split)
        # Better refused now than after the detections are made.
        if val_set.is_annotated:
            coco_library()
        elif not results:
            raise ValueError(
                f"Annotation file {val_set.annotation_file} has no list 'annotations', so that there is nothing to "
                "compare detections with: --results FILE writes them."
            )
        _print_chosen(detector, own_device)
        group = distributed.rank(), distributed.world_size()
        how = {"by_name": by_name, "precision": detector.precision}
        found = detect(detector.model, detector.classes, val_set, own_device, batch_size, workers, *group, **how)
    if found is None:
        return None
    if results:
        found.write(results)
        say(f"{val_set.source}: {len(val_set)} images, {len(found)} detections; wrote {results}")
    if not val_set.is_annotated:
        say(f"{val_set.source} has no annotations: there are no metrics.")
        return None
    return coco_result(val_set.ground_truth(), found, source=val_set.source)


def _print_chosen(detector: "Detector", device: torch.device) -> None:
    """One line: what a detector runs on a device, whose kernels are checked before if nothing is known of them."""
    from conddetr.engine.chosen import chosen, prove
    from conddetr.engine.progress import say

    config, backend = detector.model.config, detector.model.backend
    prove(device, backend)
    if distributed.is_main():
        say(chosen(config, backend, device, detector.precision, trains=False).line())


def _evaluate(options: argparse.Namespace) -> None:
    from conddetr.config.run import unused
    from conddetr.engine.progress import class_table, metrics_table, say, show
    from conddetr.files import check_json_target, refuse_overwriting, write_text

    source = options.checkpoint, options.preset, options.device, options.backend, options.precision
    data = chosen_data(options)
    if "train_images" in data:
        raise ValueError(unused("train_images", "eval"))
    read = options.checkpoint, *(value for value in data.values() if isinstance(value, str))
    check_json_target("--results", options.results)
    check_json_target("--out", options.out)
    refuse_overwriting("--results", options.results, read)
    refuse_overwriting("--out", options.out, (*read, options.results))
    loading = options.batch_size, options.workers
    result = _coco_result(*source, data, *loading, options.results, options.classes_by_name, options.split)
    if result is None:
        return
    data = {"source": result.source, "images": result.images, "objects": result.objects, "library": result.library}
    per_class = {"per_class": [vars(row) for row in result.per_class]} if options.per_class else {}
    content = {**result.metrics, "data": data, **per_class}
    try:
        if options.per_class:
            show("classes, in percent", class_table(result.per_class))
        show(f"COCO metrics of {options.checkpoint}, in percent", metrics_table(result.metrics))
        say(result.describe())
    finally:
        # A pipe that ends early costs no file, and a file that cannot be written no numbers.
        if options.out:
            write_text(options.out, json.dumps(content, indent=1) + "\n")


def _predict(options: argparse.Namespace) -> None:
    from conddetr.data.images import read_image
    from conddetr.detector import Detector
    from conddetr.engine.progress import say
    from conddetr.viz.boxes import detections_figure
    from conddetr.viz.pictures import PictureFolder, find_images

    check_fraction("threshold", options.threshold)
    images = find_images(options.images)
    pictures = PictureFolder(options.out, "predict", images)
    source = options.checkpoint, options.preset, options.device, options.backend, options.precision
    detector = Detector.from_checkpoint(*source)
    _print_chosen(detector, detector.device)
    if len(images) > 1 and options.backend != "eager":
        detector = detector.fused()
    faults = []
    for path in images:
        try:
            image = read_image(path)
        except (OSError, ValueError) as error:
            faults.append(error)
            if len(images) > 1:
                say(f"{path}: left out: {error}")
            continue
        found = detector.predict(image, options.threshold)[0]
        file = pictures.save(detections_figure(image, found.boxes, found.labels.tolist(), found.captions), path)
        say(f"{path}: {len(found)} objects; wrote {file}")
    if faults:
        others = f"{len(faults)} of {len(images)} images cannot be read, first: " if len(images) > 1 else ""
        raise ValueError(f"{others}{faults[0]}")


def _attention(options: argparse.Namespace) -> None:
    from conddetr.data.images import read_image
    from conddetr.detector import Detector
    from conddetr.engine.progress import say
    from conddetr.viz.attention import attention_figure
    from conddetr.viz.pictures import PictureFolder, image_file

    path = image_file(options.image)
    pictures = PictureFolder(options.out, "attention", [path])
    image = read_image(path)
    detector = Detector.from_checkpoint(options.checkpoint, options.preset, options.device)
    queries = None if options.query is None else [options.query]
    found, maps = detector.attention(image, queries, options.top, options.layer)
    for index, (caption, query) in enumerate(zip(found.captions, found.queries.tolist(), strict=True)):
        file = pictures.save(attention_figure(image, found, index, maps), path, f"-layer{maps.layer}-query{query}")
        say(f"{caption}: wrote {file}")


def _export(options: argparse.Namespace) -> None:
    from conddetr.detector import Detector
    from conddetr.engine.progress import console, say
    from conddetr.export import SUFFIXES
    from conddetr.files import refuse_overwriting

    refuse_overwriting("--out", options.out, [options.checkpoint])
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
        say(line)


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
    from conddetr.engine.progress import say
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
        say("training a tiny detector on synthetic shapes: about two minutes on two CPU cores")
    trainer = train(resolve_run({**chosen, "device": options.device or ""}), show_config=False)
    detector = Detector.from_checkpoint(out / LATEST, device=options.device)
    report(trainer.result, draw_samples(detector, trainer.val_set, out))
    if not options.coco_path and options.seconds is None:
        check_learned(trainer.metrics)


def _validate(options: argparse.Namespace) -> int:
    from conddetr.data.validate import compare_splits, validate
    from conddetr.engine.progress import Progress
    from conddetr.files import check_json_target, refuse_overwriting

    if options.fix and (not options.annotations or options.val_annotations):
        raise ValueError("--fix: it cleans one annotation file: name it with --annotations, and its --images.")
    sources = _sources_to_validate(options)
    files = [source for _, source in sources.values() if isinstance(source, str | Path)]
    check_json_target("--report", options.report)
    check_json_target("--fix", options.fix)
    refuse_overwriting("--report", options.report, files)
    refuse_overwriting("--fix", options.fix, [*files, options.report])
    reports = {}
    for split, (images, annotations) in sources.items():
        with Progress(f"validate {split}", total=None) as progress:
            reports[split] = validate(
                images,
                annotations,
                split == "train",
                options.processes,
                lambda done, total: progress.advance(done, total=total),
            )
    for split, report in reports.items():
        if split != "train" and "train" in reports:
            compare_splits(reports["train"], report)
    return _fixed_or_reported(options, list(reports.values()))


def _sources_to_validate(options: argparse.Namespace) -> "dict[str, tuple[str | Path, str | Path | Annotations]]":
    """By `train`, `val` and `test`, the folder of the images, and the annotation file or what was read."""
    from conddetr.config.run import DataConfig
    from conddetr.data.coco import coco_files
    from conddetr.data.layouts import CocoSplit, find_layout
    from conddetr.engine.progress import say

    names = ("dataset", "coco_path", "annotations", "images", "val_annotations", "val_folder")
    given = {name: getattr(options, name) for name in names}
    DataConfig(**{name: value for name, value in given.items() if value}).check_used()
    if options.dataset:
        layout = find_layout(options.dataset)
        say(layout.describe())
        return {
            name: (split.images, split.source if isinstance(split, CocoSplit) else split.read())
            for name, split in layout.splits.items()
        }
    if options.coco_path:
        root = Path(options.coco_path)
        if not any((root / f"{split}2017").is_dir() for split in ("train", "val")):
            coco_files(root, "train")
        return {
            split: (root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json")
            for split in ("train", "val")
        }
    sources = {"train": (options.images, options.annotations)}
    if options.val_annotations:
        sources["val"] = (options.val_folder or options.images, options.val_annotations)
    return sources


def _fixed_or_reported(options: argparse.Namespace, reports: "list[ValidationReport]") -> int:
    """Print the reports, carry out --fix and --report; the exit status. A pipe that ends early costs no report."""
    from conddetr.data.fix import fix
    from conddetr.engine.progress import console, say, show
    from conddetr.files import write_text

    ok = all(report.ok for report in reports)
    content = {"ok": ok, "data_sets": [report.to_dict() for report in reports]}
    try:
        for report in reports:
            say(report.summary())
            console.print(*report.tables(), sep="\n")
        if options.fix:
            fixed = fix(reports[0], options.fix)
            content["fixed"] = fixed.to_dict()
            show(fixed.summary(), fixed.table())
            say("No errors are left there: train on that file.")
    finally:
        if options.report:
            write_text(options.report, json.dumps(content, indent=1) + "\n")
    return 0 if ok or options.fix else 1


def _bench_data(options: argparse.Namespace) -> None:
    from conddetr.data.bench import bench_data
    from conddetr.data.coco import coco_split
    from conddetr.data.transforms import TrainTransform
    from conddetr.engine.progress import console, say

    check_least("--count", options.count, 1)
    check_least("--rounds", options.rounds, 1)
    dataset = coco_split(options.coco_path, "train", TrainTransform(PRESETS[options.preset]))
    result = bench_data(dataset, options.count, options.rounds)
    console.print(result.table())
    say(result.agreement())


def _env(options: argparse.Namespace) -> None:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from rich.table import Table

    from conddetr.engine.progress import say, show
    from conddetr.kernels import native, registry

    device = find_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
    say(f"Python {platform.python_version()}, device {device} ({name})")
    for package in ("torch", "torchvision", "triton", "pycocotools", "faster-coco-eval"):
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed"
        say(f"{package} {found}")
    say(f"native kernels: {native.NOT_LOADED or native.describe(device)}")
    dtypes = (torch.float32, torch.bfloat16)
    table = Table()
    for column in ("operation", *(str(dtype).removeprefix("torch.") for dtype in dtypes)):
        table.add_column(column)
    reasons: dict[str, list[str]] = {}
    for name, operation in sorted(registry.OPERATIONS.items()):
        choices = [operation.choose("auto", device, dtype) for dtype in dtypes]
        table.add_row(name, *(choice.backend for choice in choices))
        for backend, why in {item for choice in choices for item in choice.refused.items()}:
            reasons.setdefault(f"{backend} is refused: {why}", []).append(name)
    show("what backend=auto picks", table)
    for reason, names in sorted(reasons.items()):
        say(f"{reason} ({', '.join(names) if len(names) < 4 else f'{len(names)} operations'})")


def _check(options: argparse.Namespace) -> int:
    from conddetr.engine.progress import Steps, say, show
    from conddetr.files import check_json_target, write_text
    from conddetr.kernels.check import examine
    from conddetr.kernels.check.table import TITLE, TUNING_TITLE, summary, tuning_table, verdict_table

    check_json_target("--json", options.json)
    with Steps("check") as steps:
        device = find_device(options.device)
        report = examine(device, short=options.short, tune=options.tune, progress=steps.tell)
    try:
        show(TITLE, verdict_table(report))
        if report.tuning is not None and report.tuning.choices:
            show(TUNING_TITLE, tuning_table(report.tuning))
        for line in summary(report):
            say(line)
    finally:
        # A pipe that ends early costs no file, and a file that cannot be written no table.
        if options.json:
            write_text(options.json, report.record.to_json())
    return 1 if any(verdict.refused for verdict in report.record.verdicts) else 0
