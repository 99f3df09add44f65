"""Training images per second and core: the official transforms against ours, on real images.

CONDDETR_COCO=dir python benchmarks/run.py data
"""

import os

import torch

from conddetr.config import PRESETS
from conddetr.data.bench import bench_data
from conddetr.data.coco import coco_split
from conddetr.data.transforms import TrainTransform
from harness.command import command
from harness.show import console, show
from harness.store import say_written, write


def main(words: list[str]) -> None:
    """Measure, print, and write the raw samples."""
    parser = command("data", __doc__)
    parser.add_argument("--coco-path", default=os.environ.get("CONDDETR_COCO"), help="COCO's 2017 layout")
    parser.add_argument("--preset", default="conditional-detr-r50", choices=list(PRESETS))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(words)
    if not options.coco_path:
        parser.error("--coco-path or CONDDETR_COCO: name a folder in COCO's 2017 layout")
    # The file records the number of threads.
    torch.set_num_threads(1)
    result = bench_data(
        coco_split(options.coco_path, "train", TrainTransform(PRESETS[options.preset])), 100, options.rounds
    )
    show(result.table())
    console.print(result.agreement())
    settings = {"preset": options.preset, "rounds": options.rounds}
    say_written(write("data", {"settings": settings, "results": vars(result)}))
