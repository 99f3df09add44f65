"""The flags of all commands. It imports neither PyTorch nor the commands, so importing it is fast."""

import argparse
from typing import TYPE_CHECKING, NoReturn, get_args

from conddetr.config import PRESETS, Backend, Precision
from conddetr.config.flags import add_augment_options, add_data_options, add_options
from conddetr.engine.progress import StandardOutput

if TYPE_CHECKING:
    from _typeshed import SupportsWrite


class _Parser(argparse.ArgumentParser):
    """Prints help in any encoding, and errors in one line, because the usage of `train` alone fills a page. The parsers
    of the commands have this class too.
    """

    def print_help(self, file: "SupportsWrite[str] | None" = None) -> None:
        super().print_help(file or StandardOutput())

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of `conddetr`. Its result names the command (`command`), its file (`module`) and its `parser`."""
    parser = _Parser(prog="conddetr", description="Train and run Conditional DETR.")
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (
        _add_train,
        _add_evaluate,
        _add_predict,
        _add_attention,
        _add_export,
        _add_demo,
        _add_validate_data,
        _add_show_data,
        _add_bench_data,
        _add_env,
        _add_check,
    ):
        add(commands)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def _add_train(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "train",
        help="train a detector",
        allow_abbrev=False,
        description="Train a detector. Defaults are the paper's for the large presets and a few CPU minutes for the "
        "tiny ones. Flags of the official repository are accepted too.",
    )
    parser.set_defaults(module="train")
    add_options(parser)


def _add_evaluate(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "eval",
        help="compute the COCO metrics of a checkpoint",
        description="Compute the twelve COCO metrics of a checkpoint: on all images of an annotation file (--images, "
        "--annotations), on the validation images of a data set (--dataset, --coco-path), or by default on those of "
        "its training. Under torchrun the processes share the images.",
    )
    parser.set_defaults(module="evaluate")
    add_data_options(parser)
    _add_device(parser)
    _add_computing(parser)
    _add_checkpoint(parser)
    parser.add_argument("--batch-size", type=int, default=2, help="images per forward pass")
    parser.add_argument("--workers", type=int, default=2, help="processes that load images")
    parser.add_argument("--out", metavar="FILE", help="also write the metrics to this file, as JSON")
    parser.add_argument(
        "--results", metavar="FILE", help="also write the detections to this file, in COCO's results format"
    )
    parser.add_argument("--split", default="val", choices=("val", "test"), help="part of a --dataset; default: val")
    parser.add_argument(
        "--classes-by-name", action="store_true", help="match classes by name and ignore their ids in the data set"
    )
    parser.add_argument(
        "--per-class", action="store_true", help="also print a table of the classes, and write it to --out"
    )
    parser.add_argument(
        "--report",
        nargs="?",
        const="",
        metavar="FILE",
        help="also write a page with curves, the best score threshold, the confusion matrix and the worst errors; "
        "default: report.html beside the checkpoint; an older report is replaced",
    )


def _add_predict(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "predict",
        help="detect objects in images, videos and cameras",
        description="Detect objects in images, videos and cameras; draw them, and write them to files. Ctrl-C ends a "
        "camera. The files are complete after Ctrl-C too. Of more than 20 images, only those that cannot be read "
        "have a line.",
    )
    parser.set_defaults(module="predict")
    parser.add_argument(
        "images",
        nargs="+",
        metavar="INPUT",
        help="an image or a video file; a folder of images; a pattern in quotes, such as 'photos/**/*.jpg'; camera:N; "
        "or an address such as rtsp://HOST/PATH",
    )
    _add_checkpoint(parser)
    _add_device(parser)
    _add_computing(parser)
    parser.add_argument("--batch-size", type=int, default=1, help="maximum images per forward pass; default: 1")
    parser.add_argument("--compile", action="store_true", help="compile the model with torch.compile first: minutes")
    parser.add_argument("--graphs", action="store_true", help="replay CUDA graphs, on an NVIDIA GPU")
    parser.add_argument("--threshold", type=float, default=0.5, help="smallest score that is kept; default: 0.5")
    parser.add_argument("--top-k", type=int, default=100, help="maximum objects per image; default: 100")
    parser.add_argument(
        "--out",
        help="folder for the drawn images and videos; only pictures of the same images that predict drew earlier are "
        "replaced; default: runs/predict",
    )
    parser.add_argument("--no-pictures", action="store_true", help="draw nothing")
    parser.add_argument(
        "--results",
        metavar="FILE",
        action="append",
        default=[],
        help="also write the objects to FILE.csv, or to FILE.json, a data set in COCO's format with scores; may be "
        "repeated",
    )
    parser.add_argument(
        "--annotations",
        metavar="FILE",
        help="COCO annotations of the images: FILE.json of --results then has COCO's results format, with their image "
        "ids, by file name",
    )
    parser.add_argument(
        "--classes-by-name", action="store_true", help="match classes with --annotations by name and ignore their ids"
    )
    parser.add_argument("--every", type=int, metavar="N", help="read every N-th frame of a video")
    parser.add_argument("--max-frames", type=int, metavar="N", help="end a video or a camera after N frames")


def _add_attention(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser("attention", help="draw where each head of the decoder looks for an object")
    parser.set_defaults(module="attention")
    parser.add_argument("image", metavar="IMAGE")
    _add_checkpoint(parser)
    _add_device(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--query", type=int, metavar="N", help="object query, from 0, even without a detection")
    which.add_argument("--top", type=int, default=1, metavar="K", help="the K best detections, one picture each")
    parser.add_argument("--layer", type=int, default=-1, help="decoder layer, from 0; default: the last")
    parser.add_argument("--out", default="runs/attention", help="folder for the pictures")


def _add_export(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser("export", help="write a file that runs without this package, and check it")
    parser.set_defaults(module="export")
    _add_checkpoint(parser)
    parser.add_argument("--format", default="onnx", choices=("torch", "onnx"), help="default: onnx")
    parser.add_argument("--out", metavar="FILE", help="default: runs/export/model.onnx, or model.pt2 for torch")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="fix the image size; default: any")
    parser.add_argument(
        "--with-postprocess",
        action="store_true",
        help="the file takes the images' sizes too and returns scores, labels and boxes in pixels",
    )
    parser.add_argument("--top-k", type=int, help="detections per image of --with-postprocess; default: 100")
    parser.add_argument(
        "--precision",
        default="float32",
        choices=("float32", "float16"),
        help="float16: weights and computation of convolutions and linear layers; default: float32",
    )
    parser.add_argument(
        "--check",
        default="",
        choices=("openvino",),
        help="compare the ONNX file, run by this program too, with the model; default: onnxruntime alone",
    )


def _add_demo(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser("demo", help="train a tiny detector for two minutes, evaluate it, draw")
    parser.set_defaults(module="demo")
    parser.add_argument("--coco-path", default="", metavar="DIR", help="COCO's 2017 layout; default: synthetic shapes")
    _add_device(parser)
    parser.add_argument(
        "--out",
        default="runs/demo",
        help="folder for the checkpoint and the pictures; if it holds a run, DIR-2 is used",
    )
    parser.add_argument(
        "--seconds", type=float, help="limit of the training time; default: none for shapes, 600 with --coco-path"
    )


def _add_validate_data(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser("validate-data", help="read a whole data set and report its problems")
    parser.set_defaults(module="validate_data")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", metavar="DIR", help="a folder in any known layout, with all its parts")
    source.add_argument("--coco-path", metavar="DIR", help="COCO's 2017 layout, training and validation")
    source.add_argument("--annotations", metavar="FILE", help="one file in COCO's format; needs --images")
    parser.add_argument("--images", metavar="DIR", help="folder of the images of --annotations")
    parser.add_argument("--val-annotations", metavar="FILE", help="of validation images, compared with --annotations")
    parser.add_argument("--val-folder", metavar="DIR", help="folder of the images of --val-annotations")
    parser.add_argument("--report", metavar="FILE", help="also write the findings to this file, as JSON")
    parser.add_argument(
        "--fix", metavar="OUT.json", help="write a cleaned copy of --annotations to this file, and list the changes"
    )
    parser.add_argument("--processes", type=int, help="number of processes that read images; default: one per core")


def _add_show_data(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "show-data",
        help="draw training images as training will see them",
        allow_abbrev=False,
        description="Draw training images with their boxes, each beside the versions that the first epochs of a "
        "training with this seed see. Data and augmentation options are those of train.",
    )
    parser.set_defaults(module="show_data")
    add_data_options(parser)
    add_augment_options(parser)
    parser.add_argument(
        "--preset",
        default="",
        metavar="NAME",
        help="the preset whose image sizes are used; default: as for train",
    )
    parser.add_argument("--count", type=int, default=8, help="number of images, chosen at random by the seed")
    parser.add_argument("--versions", type=int, default=6, help="epochs that are shown of each image")
    parser.add_argument("--seed", type=int, default=42, help="as for train; another seed also chooses other images")
    parser.add_argument(
        "--out",
        default="runs/show-data",
        help="folder for the pictures; only pictures of the same images that show-data drew earlier are replaced",
    )


def _add_bench_data(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser("bench-data", help="training images/s on one core, official chain against ours")
    parser.set_defaults(module="bench_data")
    parser.add_argument("--coco-path", required=True, metavar="DIR", help="COCO's 2017 layout")
    parser.add_argument(
        "--preset", default="conditional-detr-r50", choices=list(PRESETS), help="the preset whose image sizes are used"
    )
    parser.add_argument("--count", type=int, default=100, help="maximum number of images")
    parser.add_argument("--rounds", type=int, default=5, help="passes over the images")
    parser.add_argument("--device", metavar="DEVICE", help="a GPU to measure too, as with train's --decode device")


def _add_env(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser("env", help="versions, and which implementation each operation uses here")
    parser.set_defaults(module="env")
    _add_device(parser)


def _add_check(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "check",
        help="prove the kernels on this device: numbers, memory, time",
        description="Compare every kernel on this device with plain PyTorch in float64: results, gradients, dropout, "
        "bitwise repeats, writes out of bounds, then the time. The record is kept in the user's cache folder; on a GPU "
        "backend=auto relies on it. The exit status is 1 if a kernel is refused.",
    )
    parser.set_defaults(module="check")
    _add_device(parser)
    parser.add_argument("--short", action="store_true", help="check only the sizes of the model")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="on a GPU, first measure the launch settings of attention that are predicted to be fastest, and record "
        "the best",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the record to this file")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: CUDA if available")


def _add_computing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        default="auto",
        choices=get_args(Backend),
        help="as for train; eager: the reference, in plain PyTorch",
    )
    parser.add_argument(
        "--precision",
        default="auto",
        choices=get_args(Precision),
        help="default: the training's precision, or bfloat16 if unknown; float32 where the device has no bfloat16",
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="ours, an official one, or one of transformers' ConditionalDetrForObjectDetection; also a folder of "
        "save_pretrained; with --preset also coco or official, its public weights",
    )
    parser.add_argument(
        "--preset", choices=list(PRESETS), help="the preset of a checkpoint that is not ours; default: detected"
    )
