"""Training images that one core prepares per second: the official chain against ours, on the same images.

On an NVIDIA GPU also the images per second that it decodes and augments itself, as with `--decode device`.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from PIL import Image, ImageOps
from rich.table import Table
from torch import Tensor
from torchvision.transforms import functional as official

from conddetr.config.augment import AugmentConfig
from conddetr.config.checks import check_least
from conddetr.data.augment.plans import Plan
from conddetr.data.coco import CocoDetection
from conddetr.data.device_decoder import DeviceDecoder
from conddetr.data.encoded import EncodedBatch
from conddetr.data.images import MEAN, STD, read_reduced, to_model_input
from conddetr.data.transforms import augmentation_generator

MAX_LEVELS = 2.0
"""Limit for the difference of any pixel from the official chain's, in grey levels (of 255), if a file is decoded whole.
Both resizes round to whole levels; PIL and torch round differently by at most one each."""
MEAN_LEVELS = 4.0
"""Limit for the mean difference over the pixels of an image, in grey levels, if a file is decoded at reduced size."""
DEVICE_BATCH = 16
"""Images that a device decodes together."""


@dataclass
class DataBenchmark:
    """Samples of both chains, one per round over all images, in images per second."""

    images: int
    reduced: int
    """Number of those images that our chain decodes at reduced size."""
    official: list[float]
    ours: list[float]
    max_levels: float
    """Largest difference between the chains' pixels in files decoded whole, in grey levels of 255."""
    mean_levels: float
    """Largest mean difference of an image decoded at reduced size, in grey levels of 255."""
    on_device: list[float] = field(default_factory=list)
    """Images per second of `device`, from files in memory, in batches of `DEVICE_BATCH`; empty: not measured."""
    device: str = ""
    """The device of `on_device`: a whole GPU, or `cpu`, of which one thread is used; empty: not measured."""

    @property
    def speedup(self) -> float:
        """Median of ours over median of the official chain."""
        return statistics.median(self.ours) / statistics.median(self.official)

    def agreement(self) -> str:
        """The difference between the chains' pixels, in one line."""
        whole = f"decoded whole: no pixel differs by more than {self.max_levels:.0f} of 255 grey levels"
        reduced = f"decoded at reduced size: no image differs by more than {self.mean_levels:.2f} levels in the mean"
        return f"{whole}; {reduced}" if self.reduced else whole

    def table(self) -> Table:
        """Images per second of the chains, for the terminal."""
        table = Table(title=f"training images/s on one core, {self.images} images, {self.reduced} at reduced size")
        for column in ("chain", "median", "slowest", "fastest", "speed-up"):
            table.add_column(column, justify="left" if column == "chain" else "right")
        rows = [("official (PIL, torchvision)", self.official), ("conddetr", self.ours)]
        rows += [(f"by {self.device}, files in memory", self.on_device)] if self.on_device else []
        for name, samples in rows:
            median = statistics.median(samples)
            row = (median, min(samples), max(samples), median / statistics.median(self.official))
            table.add_row(name, *(f"{value:.1f}" for value in row[:3]), f"{row[3]:.2f}×")
        return table


def official_chain(path: Path, plan: Plan) -> Tensor:
    """A training image from the official code's chain with the choices of `plan`: [3, plan.height, plan.width] float32.

    Source: `datasets/coco.py` and `datasets/transforms.py` of the official code; without boxes.
    """
    # The official code does not turn images upright. Without an EXIF tag, as in COCO, this does nothing.
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    if plan.flip:
        image = official.hflip(image)
    if plan.crop is not None:
        image = official.resize(image, [plan.crop.height, plan.crop.width])
        image = official.crop(image, plan.crop.top, plan.crop.left, plan.crop.rows, plan.crop.columns)
    image = official.resize(image, [plan.height, plan.width])
    return official.normalize(official.to_tensor(image), MEAN, STD)


def bench_data(
    dataset: CocoDetection, images: int = 100, rounds: int = 5, seed: int = 0, device: torch.device | None = None
) -> DataBenchmark:
    """Time both chains in turn, on one thread, after checking that they agree.

    Args:
        dataset: with a `TrainTransform` of the set `paper`.
        images: number of images to use at most, from the first on.
        rounds: passes over the images.
        seed: for the augmentation.
        device: a device to measure too, usually a GPU.

    Raises:
        ValueError: `images` or `rounds` below 1; an augmentation that the official chain does not have; an image is
            missing or damaged, or the chains disagree by more than `MAX_LEVELS` or `MEAN_LEVELS`; names the image. Or
            the device cannot decode.
    """
    check_least("images", images, 1)
    check_least("rounds", rounds, 1)
    if dataset.augment.switches() != AugmentConfig("paper").switches():
        raise ValueError(f"augment: the official chain has only 'paper', got {dataset.augment}.")
    count = min(images, len(dataset))
    # `paper` has no mosaics.
    plans = [cast(Plan, dataset.plan(index, augmentation_generator(seed, 0, index))) for index in range(count)]

    def ours(index: int) -> Tensor:
        return to_model_input(dataset.load(index, plans[index])[0])

    def reference(index: int) -> Tensor:
        return official_chain(dataset.path(index), plans[index])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = _compare(dataset, plans, ours, reference)
        for _ in range(rounds):
            result.official.append(_rate(reference, count))
            result.ours.append(_rate(ours, count))
        if device is not None:
            result.device, result.on_device = str(device), device_rates(dataset, plans, device, rounds)
    finally:
        torch.set_num_threads(threads)
    return result


def device_rates(dataset: CocoDetection, plans: Sequence[Plan], device: torch.device, rounds: int) -> list[float]:
    """Images per second that a device decodes and augments, one sample per round.

    Args:
        dataset: the images; plan i is for image i.
        plans: what to do.
        device: runs nothing else.
        rounds: passes over the images, after one that is not timed.

    Raises:
        ValueError: the device cannot decode, or a file is damaged.
    """
    decoder, batches = DeviceDecoder(device), []
    for start in range(0, len(plans), DEVICE_BATCH):
        part = plans[start : start + DEVICE_BATCH]
        images, targets = zip(*(dataset.load_encoded(start + i, plan) for i, plan in enumerate(part)), strict=True)
        batches.append(EncodedBatch(images, part, targets, (max(p.height for p in part), max(p.width for p in part))))
    rates = []
    for _ in range(rounds + 1):
        start_time = time.perf_counter()
        for batch in batches:
            decoder(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rates.append(len(plans) / (time.perf_counter() - start_time))
    return rates[1:]


def _rate(chain: Callable[[int], Tensor], count: int) -> float:
    start = time.perf_counter()
    for index in range(count):
        chain(index)
    return count / (time.perf_counter() - start)


def _compare(
    dataset: CocoDetection, plans: list[Plan], ours: Callable[[int], Tensor], reference: Callable[[int], Tensor]
) -> DataBenchmark:
    """The benchmark without timings: the differences between the chains' pixels."""
    result = DataBenchmark(len(plans), 0, [], [], 0.0, 0.0)
    to_levels = 255 * torch.tensor(STD)[:, None, None]
    for index, plan in enumerate(plans):
        # Both chains have whole grey levels before they normalise.
        difference = ((ours(index) - reference(index)).abs() * to_levels).round()
        decoded, size = read_reduced(dataset.path(index), *plan.first_size())
        reduced = tuple(decoded.shape[-2:]) != size
        result.reduced += reduced
        name = "mean_levels" if reduced else "max_levels"
        levels, limit = (difference.mean(), MEAN_LEVELS) if reduced else (difference.max(), MAX_LEVELS)
        if not levels <= limit:
            raise ValueError(
                f"Image file {dataset.path(index)}: {name} between the official chain and ours: expected at most "
                f"{limit}, got {levels:.2f}."
            )
        setattr(result, name, max(getattr(result, name), levels.item()))
    return result
