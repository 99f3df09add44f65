"""How many training images one core prepares per second: the official chain against ours, on the same images."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from rich.table import Table
from torch import Tensor
from torchvision.transforms import functional as official

from conddetr.config.checks import check_least
from conddetr.data.coco import CocoDetection
from conddetr.data.images import MEAN, STD, read_reduced, to_model_input
from conddetr.data.transforms import Plan, augmentation_generator

MAX_LEVELS = 2.0
"""Where a file is decoded whole, no pixel may differ from the official chain's by more grey levels (of 255). Both
resizes round to whole levels; PIL and torch round differently by at most one each."""
MEAN_LEVELS = 4.0
"""The same where a file is decoded at reduced size, as the mean over the pixels of an image."""


@dataclass
class DataBenchmark:
    """Samples of both chains, one per round over all images, in images per second."""

    images: int
    reduced: int
    """Of those images, how many ours decodes at reduced size."""
    official: list[float]
    ours: list[float]
    max_levels: float
    """Largest difference between the chains' pixels where files are decoded whole, in grey levels of 255."""
    mean_levels: float
    """Largest mean difference of an image that is decoded at reduced size, in grey levels."""

    @property
    def speedup(self) -> float:
        """Median of ours over median of the official chain."""
        return statistics.median(self.ours) / statistics.median(self.official)

    def agreement(self) -> str:
        """How far the chains' pixels differ, in one line."""
        whole = f"decoded whole: no pixel differs by more than {self.max_levels:.0f} of 255 grey levels"
        reduced = f"decoded reduced: no image differs by more than {self.mean_levels:.2f} levels in the mean"
        return f"{whole}; {reduced}" if self.reduced else whole

    def table(self) -> Table:
        """For the terminal."""
        table = Table(title=f"training images/s on one core, {self.images} images, {self.reduced} decoded reduced")
        for column in ("chain", "median", "slowest", "fastest", "speed-up"):
            table.add_column(column, justify="left" if column == "chain" else "right")
        for name, samples in (("official (PIL, torchvision)", self.official), ("conddetr", self.ours)):
            median = statistics.median(samples)
            row = (median, min(samples), max(samples), median / statistics.median(self.official))
            table.add_row(name, *(f"{value:.1f}" for value in row[:3]), f"{row[3]:.2f}×")
        return table


def official_chain(path: Path, plan: Plan) -> Tensor:
    """What the official code does to a training image for the draws in `plan`: [3, plan.height, plan.width] float32.

    Source: `datasets/coco.py` and `datasets/transforms.py` of the official code; boxes left out.
    """
    # Turned upright, which the official code leaves out: without the tag, as in COCO, this does nothing.
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    if plan.flip:
        image = official.hflip(image)
    if plan.crop is not None:
        image = official.resize(image, [plan.crop.height, plan.crop.width])
        image = official.crop(image, plan.crop.top, plan.crop.left, plan.crop.rows, plan.crop.columns)
    image = official.resize(image, [plan.height, plan.width])
    return official.normalize(official.to_tensor(image), MEAN, STD)


def bench_data(dataset: CocoDetection, images: int = 100, rounds: int = 5, seed: int = 0) -> DataBenchmark:
    """Time both chains in turn, on one thread, after checking that they agree.

    Args:
        dataset: with a `TrainTransform`.
        images: how many to use at most, from the first on.
        rounds: passes over the images.
        seed: of the augmentation.

    Raises:
        ValueError: `images` or `rounds` below 1; an image is missing or damaged, or the chains disagree by more than
            `MAX_LEVELS` or `MEAN_LEVELS`; names the image.
    """
    check_least("images", images, 1)
    check_least("rounds", rounds, 1)
    count = min(images, len(dataset))
    plans = [dataset.plan(index, augmentation_generator(seed, 0, index)) for index in range(count)]

    def ours(index: int) -> Tensor:
        return to_model_input(dataset.load(index, plans[index])[0])

    def theirs(index: int) -> Tensor:
        return official_chain(dataset.path(index), plans[index])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = _compare(dataset, plans, ours, theirs)
        for _ in range(rounds):
            result.official.append(_rate(theirs, count))
            result.ours.append(_rate(ours, count))
    finally:
        torch.set_num_threads(threads)
    return result


def _rate(chain: Callable[[int], Tensor], count: int) -> float:
    start = time.perf_counter()
    for index in range(count):
        chain(index)
    return count / (time.perf_counter() - start)


def _compare(
    dataset: CocoDetection, plans: list[Plan], ours: Callable[[int], Tensor], theirs: Callable[[int], Tensor]
) -> DataBenchmark:
    """The benchmark without its timings: how far the chains' pixels differ."""
    result = DataBenchmark(len(plans), 0, [], [], 0.0, 0.0)
    to_levels = 255 * torch.tensor(STD)[:, None, None]
    for index, plan in enumerate(plans):
        # Both chains hold whole grey levels before they normalise.
        difference = ((ours(index) - theirs(index)).abs() * to_levels).round()
        decoded, size = read_reduced(dataset.path(index), *plan.first_size())
        reduced = tuple(decoded.shape[-2:]) != size
        result.reduced += reduced
        name = "mean_levels" if reduced else "max_levels"
        found, limit = (difference.mean(), MEAN_LEVELS) if reduced else (difference.max(), MAX_LEVELS)
        if not found <= limit:
            raise ValueError(
                f"Image file {dataset.path(index)}: {name} between the official chain and ours is {found:.2f}, "
                f"expected at most {limit}."
            )
        setattr(result, name, max(getattr(result, name), found.item()))
    return result
