"""`conddetr export`."""

import argparse

from conddetr.detector import Detector
from conddetr.engine.progress import console, say
from conddetr.export import SUFFIXES
from conddetr.files import refuse_overwriting


def run(options: argparse.Namespace) -> None:
    refuse_overwriting("--out", options.out, [options.checkpoint])
    detector = Detector.from_checkpoint(options.checkpoint, options.preset, "cpu")
    path = options.out or f"runs/export/model{SUFFIXES[options.format]}"
    with console.status("exporting and comparing the file with the model"):
        report = detector.export(path, options.format, options.size and tuple(options.size))
    megabytes = report.path.stat().st_size / 1e6
    for line in (
        f"input images {report.input_shape} float32; outputs logits and boxes",
        f"differs from the model by at most {report.difference:.1e}, on batches of shape "
        f"{', '.join(map(str, report.checked))}",
        f"wrote {report.path} ({megabytes:.1f} MB)",
    ):
        say(line)
