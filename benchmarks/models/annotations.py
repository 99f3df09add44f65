"""Time and memory of reading an annotation file, by its number of boxes.

    python benchmarks/run.py annotations --boxes 826000

The files are synthetic but similar to COCO's, with polygons and seven boxes per image; COCO's training set has 826,000
boxes. Each reader runs in a separate process, so that peak memory is its own; imports are not counted. The peer is
pycocotools' `COCO(file)`; the plain reader is Python's `json` with a check of every entry. `scaling.py` plots curves.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from harness.command import command
from harness.result import Result
from harness.show import print_table
from harness.store import say_written, write

RUN = Path(__file__).parents[1] / "run.py"
CLASSES, PER_IMAGE = 80, 7
SIZES = (1_000, 10_000, 100_000, 826_000)


def make(path: Path, boxes: int) -> None:
    """Write a file with that many boxes."""
    rng, images = random.Random(0), -(-boxes // PER_IMAGE)
    polygons = [[round(rng.uniform(0, 640), 2) for _ in range(2 * rng.randint(8, 26))] for _ in range(1000)]
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"info": {"year": 2017}, "licenses": [], "images": [')
        for key in range(images):
            name, address = f"{key:012}.jpg", f"http://images.cocodataset.org/train2017/{key:012}.jpg"
            entry = {"license": 3, "file_name": name, "coco_url": address, "height": 480, "width": 640, "id": key}
            file.write(", " * bool(key) + json.dumps(entry))
        file.write('], "annotations": [')
        for key in range(boxes):
            box = [round(rng.uniform(0, 300), 2) for _ in range(4)]
            entry = {"segmentation": [polygons[key % 1000]], "area": round(box[2] * box[3] / 2, 4), "iscrowd": 0}
            entry |= {"image_id": key // PER_IMAGE, "bbox": box, "category_id": key % CLASSES + 1, "id": key + 1}
            file.write(", " * bool(key) + json.dumps(entry))
        categories = [{"supercategory": "thing", "id": n + 1, "name": f"class {n + 1}"} for n in range(CLASSES)]
        file.write(f'], "categories": {json.dumps(categories)}}}')


def plain() -> Callable[[Path], list[float]]:
    """Python's `json`, with a check of every entry."""
    from conddetr.data.annotations import SECTIONS, entry_fault

    def read(path: Path) -> list[float]:
        content = json.loads(path.read_text(encoding="utf-8"))
        assert not any(entry_fault(section, entry) for section in SECTIONS for entry in content[section])
        return [entry["bbox"][0] for entry in content["annotations"]]

    return read


def peer() -> Callable[[Path], list[float]]:
    """pycocotools."""
    from pycocotools.coco import COCO

    return lambda path: [entry["bbox"][0] for entry in COCO(str(path)).dataset["annotations"]]


def ours() -> Callable[[Path], list[float]]:
    """`read_annotations`."""
    from conddetr.data.annotations import read_annotations

    return lambda path: read_annotations(path).boxes[:, 0]


READERS = {"json, entry by entry": plain, "pycocotools": peer, "ours": ours}


def read_once(reader: str, path: Path) -> None:
    """Print time and memory of one reader as JSON; a separate process runs this alone."""
    read = READERS[reader]()
    before, start = _peak(), time.perf_counter()
    values = read(path)
    seconds = time.perf_counter() - start
    # After the clock: numbers that must agree between readers.
    print(json.dumps({"seconds": seconds, "bytes": _peak() - before, "boxes": len(values), "sum": float(sum(values))}))


def _peak() -> int:
    """Peak bytes of this process. `getrusage` is no alternative: its figure starts with that of the parent process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def measured(boxes: int, rounds: int) -> Result:
    """Every reader on one file; the plain reader is the reference."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "annotations.json"
        make(path, boxes)
        seconds: dict[str, list[float]] = {}
        peaks: dict[str, int] = {}
        refused: dict[str, str] = {}
        expected = None
        for name in READERS:
            for _ in range(rounds):
                command = [sys.executable, str(RUN), "annotations", "--read", name, str(path)]
                output = json.loads(subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1])
                expected = expected or output
                if (output["boxes"], round(output["sum"], 3)) != (expected["boxes"], round(expected["sum"], 3)):
                    refused[name] = "wrong answer: the boxes differ from those of Python's reader"
                    break
                seconds.setdefault(name, []).append(output["seconds"])
                peaks[name] = max(peaks.get(name, 0), output["bytes"])
        title = f"annotation file of {boxes:,} boxes, {path.stat().st_size / 2**20:.0f} MiB"
        return Result(title, {name: s for name, s in seconds.items() if name not in refused}, None, peaks, refused)


def main(words: list[str]) -> None:
    """Measure files of all requested sizes."""
    parser = command("annotations", __doc__)
    parser.add_argument("--boxes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--read", nargs=2, metavar=("READER", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.read:
        read_once(options.read[0], Path(options.read[1]))
        return
    results = [measured(boxes, options.rounds) for boxes in options.boxes]
    for result in results:
        print_table(result)
    say_written(write("annotations", {"settings": vars(options), "results": [vars(result) for result in results]}))
