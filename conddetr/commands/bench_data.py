"""`conddetr bench-data`."""

import argparse

from conddetr.config import PRESETS
from conddetr.config.checks import check_least
from conddetr.data.bench import bench_data
from conddetr.data.coco import coco_split
from conddetr.data.transforms import TrainTransform
from conddetr.devices import find_device
from conddetr.engine.progress import console, say


def run(options: argparse.Namespace) -> None:
    check_least("--count", options.count, 1)
    check_least("--rounds", options.rounds, 1)
    device = find_device(options.device) if options.device else None
    dataset = coco_split(options.coco_path, "train", TrainTransform(PRESETS[options.preset]))
    result = bench_data(dataset, options.count, options.rounds, device=device)
    console.print(result.table())
    say(result.agreement())
