"""Training images per second and core: the official transforms against ours, and a GPU that decodes them itself.

CONDDETR_COCO=dir python benchmarks/run.py data
python benchmarks/run.py data --shapes          # where there are no images: synthetic shapes, as JPEG files
"""

import json
import os
import tempfile
from pathlib import Path

import torch
from PIL import Image

from conddetr.config import PRESETS
from conddetr.data.bench import bench_data
from conddetr.data.coco import coco_split
from conddetr.data.synthetic import SyntheticShapes
from conddetr.data.transforms import TrainTransform
from harness.command import command
from harness.machine import is_null_gpu
from harness.show import console, show
from harness.store import say_written, write

SHAPES, SIDE = 64, 640
"""Number of files for `--shapes`, and their height and width in pixels, the longest side in COCO."""


def main(words: list[str]) -> None:
    """Measure, print, and write the raw samples."""
    parser = command("data", __doc__)
    parser.add_argument("--coco-path", default=os.environ.get("CONDDETR_COCO"), help="COCO's 2017 layout")
    parser.add_argument("--shapes", action="store_true", help="files of synthetic shapes instead")
    parser.add_argument("--preset", default="conditional-detr-r50", choices=list(PRESETS))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(words)
    if not (options.coco_path or options.shapes):
        parser.error("--coco-path or CONDDETR_COCO: name a folder in COCO's 2017 layout; or --shapes")
    # The file records the number of threads.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = shape_files(Path(folder)) if options.shapes else options.coco_path
        dataset = coco_split(root, "train", TrainTransform(PRESETS[options.preset]))
        # A null GPU decodes nothing.
        device = torch.device("cuda") if torch.cuda.is_available() and not is_null_gpu() else None
        result = bench_data(dataset, 100, options.rounds, device=device)
    show(result.table())
    console.print(result.agreement())
    images = f"{SHAPES} synthetic shapes of {SIDE}×{SIDE} as JPEG" if options.shapes else "COCO"
    settings = {"preset": options.preset, "rounds": options.rounds, "images": images}
    say_written(write("data", {"settings": settings, "results": vars(result)}))


def shape_files(root: Path) -> Path:
    """Write synthetic shapes as JPEG files in COCO's layout; their noise makes them about as large as photos."""
    shapes = SyntheticShapes(SHAPES, seed=3, image_size=SIDE)
    for folder in ("train2017", "annotations"):
        (root / folder).mkdir()
    content = shapes.ground_truth()
    for entry in content["images"]:
        entry["file_name"] = f"{entry['id']}.jpg"
        Image.fromarray(shapes.draw(entry["id"])[0]).save(root / "train2017" / entry["file_name"])
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    return root
