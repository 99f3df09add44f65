"""Shared fixtures."""

import json
import os
import signal
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: threads of two workers on the same cores would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Before any kernel is imported: Triton reads it when a kernel is defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import null_gpu
import proven
from PIL import Image

import conddetr
from conddetr.kernels import records, registry

if os.environ.get("TRITON_INTERPRET") == "1" and registry.HAS_TRITON:
    import quick_interpreter

    quick_interpreter.install()

pytest.register_assert_rewrite("small_runs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slowest files first, so that parallel workers finish at about the same time."""
    longest = ("test_null_gpu.py", "test_flight.py", "test_aot.py", "test_compile.py", "test_golden.py", "test_attn.py")
    items.sort(key=lambda item: [*longest, item.path.name].index(item.path.name))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """On a null GPU, skip a test that compares numbers at its first failed comparison; other errors still fail it."""
    marker = pyfuncitem.get_closest_marker("compares_numbers")
    if not null_gpu.IS_RUNNING or marker is None:
        return (yield)
    from torch.testing._internal.optests.generate_tests import OpCheckError

    try:
        return (yield)
    except (AssertionError, OpCheckError, *marker.args) as error:
        pytest.skip(f"a null GPU computes nothing to compare ({type(error).__name__})")


# Without these settings cuDNN would round the inputs of float32 convolutions to TF32's ten bits, and choose algorithms
# that differ from run to run.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cudnn.deterministic = True


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _separate_records(tmp_path_factory):
    """Tests neither read nor change the user's records of checked kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONDDETR_CACHE", str(tmp_path_factory.mktemp("cache")))
        if torch.cuda.is_available():
            # All kernels count as proven, so that tests of `auto` run them.
            device = torch.device("cuda")
            records.save(device, proven.everything(device))
        yield


@pytest.fixture
def coco_path() -> Path:
    """Real COCO images in the official layout."""
    path = os.environ.get("CONDDETR_COCO")
    if not path:
        pytest.skip("CONDDETR_COCO is not set: it names a folder with COCO's 2017 layout")
    return Path(path)


@pytest.fixture
def tiny_model() -> conddetr.DETR:
    """A three-class tiny model with random weights, in eval mode."""
    return conddetr.build("conditional-detr-tiny", num_classes=3).eval()


class SmallCoco:
    """A folder in COCO's layout with a few noise images, and an annotation file that a test can damage."""

    categories = ({"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 90, "name": "toothbrush"})

    def __init__(self, root: Path, split: str = "train", count: int = 4) -> None:
        self.root, self.split = root, split
        self.images = root / f"{split}2017"
        self.file = root / "annotations" / f"instances_{split}2017.json"
        self.images.mkdir(parents=True)
        self.file.parent.mkdir(exist_ok=True)
        self.content = {"images": [], "annotations": [], "categories": [dict(entry) for entry in self.categories]}
        rng = np.random.default_rng(0)
        for index in range(count):
            height, width = 60 + 10 * index, 90
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.images / f"{index}.jpg")
            self.content["images"].append(
                {"id": 100 + index, "file_name": f"{index}.jpg", "height": height, "width": width}
            )
            self.annotate(100 + index, [10.0, 5.0, 30.0, 40.0], 3)
        self.write()

    def annotate(self, image_id: int, bbox: list, category_id: int, **extra: object) -> None:
        """Add an annotation."""
        self.content["annotations"].append(
            {
                "id": len(self.content["annotations"]) + 1,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": bbox,
                "area": 1.0,
                "iscrowd": 0,
                **extra,
            }
        )

    def write(self) -> None:
        """Write the annotation file."""
        self.file.write_text(json.dumps(self.content))


@pytest.fixture
def small_coco(tmp_path) -> SmallCoco:
    """Four training images and two validation images, with one dog each."""
    SmallCoco(tmp_path / "coco", "val", count=2)
    return SmallCoco(tmp_path / "coco")


@pytest.fixture
def default_interrupt_handler():
    """Python's handler of Ctrl-C: a shell that starts the tests in the background makes them, and their children,
    ignore SIGINT.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
