"""`conddetr export`."""

import argparse

from conddetr.detector import Detector
from conddetr.engine.progress import console, say
from conddetr.export import SUFFIXES
from conddetr.files import refuse_overwriting


def run(options: argparse.Namespace) -> None:
    if options.top_k is not None and not options.with_postprocess:
        raise ValueError("--top-k: the file returns all queries; it has an effect with --with-postprocess only.")
    refuse_overwriting("--out", options.out, [options.checkpoint])
    detector = Detector.from_checkpoint(options.checkpoint, options.preset, "cpu")
    path = options.out or f"runs/export/model{SUFFIXES[options.format]}"
    with console.status("exporting and comparing the file with the model"):
        report = detector.export(
            path,
            options.format,
            options.size and tuple(options.size),
            postprocess=options.with_postprocess,
            top_k=100 if options.top_k is None else options.top_k,
            precision=options.precision,
            check_with=options.check,
        )
    megabytes = report.path.stat().st_size / 1e6
    sizes = ", sizes [batch, 2] int64" if options.with_postprocess else ""
    values = "scores" if options.with_postprocess else "logits"
    for line in (
        f"inputs: images {report.input_shape} float32{sizes}; outputs: {', '.join(report.outputs)}",
        f"run by {' and '.join(report.runtimes)}: {values}, and boxes in fractions of the image, differ from the "
        f"model's by at most {report.difference:.1e}, on batches of shape {', '.join(map(str, report.checked))}",
        f"wrote {report.path} ({megabytes:.1f} MB)",
    ):
        say(line)
