"""Inference of whole models: official-style, HuggingFace's and ours, with the same weights on the same images.

    python benchmarks/model.py
    python benchmarks/model.py --compiled               # torch.compile too: minutes more
    python benchmarks/model.py --presets conditional-detr-dc5-r50 detr-r50
    python benchmarks/model.py --images 1 16            # latency and throughput; on two CPU cores half an hour

One image gives the latency, a batch the throughput: its images/s are the number of images over the time. Reading and
resizing are not included.

Everything is float32, on a GPU without TF32, because outputs must agree with the first one's within 1e-4.
"""

import argparse
import copy
import re
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Self

import torch
from torch import Tensor, nn

import conddetr
from conddetr.interop import convert_to_huggingface
from conddetr.kernels import registry
from harness.machine import DEVICE, dtype_name, is_null_gpu
from harness.memory import with_host_memory
from harness.problem import Timed
from harness.refusals import OURS, WRONG, RefusedError, refusing
from harness.result import Result
from harness.show import NOT_COMPARED, console
from harness.timing import measure

TOLERANCE = {"pred_logits": 1e-4, "pred_boxes": 1e-5}
Runs = dict[str, partial]


@dataclass(frozen=True)
class Problem(Timed):
    """One model, the size of the images, and their number."""

    preset: str
    size: tuple[int, int]
    compiled: bool
    """torch.compile too."""
    images: int = 1

    @property
    def title(self) -> str:
        shape = f"{self.images}×3×{self.size[0]}×{self.size[1]}"
        return f"{self.preset}, forward, {shape}, {dtype_name(torch.float32)}"

    @torch.inference_mode()
    def measured(self, options: argparse.Namespace) -> Result:
        """Check that all implementations give the same output, then time them."""
        torch.compiler.reset()
        model = conddetr.build(self.preset, backend="eager").eval()
        spread_outputs(model)
        model = model.to(DEVICE)
        images = torch.randn(self.images, 3, *self.size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        runs, refused = our_runs(model, images, self.compiled)
        with refusing("HuggingFace", refused):
            peer, _ = convert_to_huggingface(model)
            runs |= huggingface_runs(peer, images, self.compiled)
            with refusing(f"{OURS}, HuggingFace accelerated", refused):
                runs |= accelerated_run(peer, images)
        good = alike(runs, refused)
        return with_host_memory(replace(measure(self.title, good, options, None, refused), images=self.images), good)

    @classmethod
    def arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--presets", nargs="+", choices=list(conddetr.presets()), default=["conditional-detr-r50"])
        parser.add_argument("--size", type=int, nargs=2, default=[800, 1066], metavar=("H", "W"))
        default = [1, 16] if DEVICE.type == "cuda" else [1]
        parser.add_argument(
            "--images", nargs="+", type=int, default=default, help="images per call; default: %(default)s"
        )
        parser.add_argument("--compiled", action="store_true", help="torch.compile of HuggingFace's and of ours too")

    @classmethod
    def asked_for(cls, options: argparse.Namespace) -> list[Self]:
        """Every preset with every number of images."""
        if min(options.images) < 1:
            raise RefusedError(f"--images: expected at least 1, got {min(options.images)}")
        pairs = product(options.presets, options.images)
        return [cls(preset, tuple(options.size), options.compiled, images) for preset, images in pairs]


def alike(runs: Runs, refused: dict[str, str]) -> Runs:
    """Implementations with the same output as the first; the others go to `refused`."""
    expected, good = next(iter(runs.values()))(), {}
    check_spread(expected)
    for name, function in runs.items():
        with refusing(name, refused):
            differences = check(expected, function())
            console.print(f"  {name}: largest differences {differences}", highlight=False)
            good[name] = function
    return good


def our_runs(model: conddetr.DETR, images: Tensor, compiled: bool) -> tuple[Runs, dict[str, str]]:
    """The official style, with separate batch norms; our default, as in `Detector.predict` of one image; our frozen
    copy, as in `evaluate` and for several images; then copies on backends that `auto` does not pick.
    """
    default = copy.deepcopy(model)
    default.set_backend("auto")
    runs: Runs = {"official-style eager": partial(model, images), OURS: partial(default, images)}
    refused, by_default = {}, registry.OPERATIONS["conditional_attention"].choose("auto", DEVICE, model.dtype).backend
    for backend in ("auto", *(name for name in registry.BACKENDS if name != by_default)):
        title = f"{OURS}, frozen copy" if backend == "auto" else f"{OURS}, {backend}"
        with refusing(title, refused):
            registry.OPERATIONS["conditional_attention"].choose(backend, DEVICE, model.dtype)
            fused = model.fused(backend)
            runs[title] = partial(fused, images)
            if compiled and backend != "eager":
                runs[f"{title}, compiled"] = partial(torch.compile(fused, dynamic=False), images)
    return runs, refused


def huggingface_runs(peer: nn.Module, images: Tensor, compiled: bool) -> Runs:
    """transformers' model as shipped, and in channels-last."""
    channels_last = copy.deepcopy(peer).to(memory_format=torch.channels_last)
    channels_last_images = images.contiguous(memory_format=torch.channels_last)
    runs = {
        "HuggingFace as shipped": partial(huggingface_outputs, peer, images),
        "HuggingFace, channels-last": partial(huggingface_outputs, channels_last, channels_last_images),
    }
    if compiled:
        compiled_peer = torch.compile(channels_last, dynamic=False)
        runs["HuggingFace, channels-last, compiled"] = partial(huggingface_outputs, compiled_peer, channels_last_images)
    return runs


def accelerated_run(peer: nn.Module, images: Tensor) -> Runs:
    """transformers' model with our kernels."""
    accelerated = copy.deepcopy(peer)
    conddetr.accelerate(accelerated)
    return {f"{OURS}, HuggingFace accelerated": partial(huggingface_outputs, accelerated, images)}


def spread_outputs(model: conddetr.DETR) -> None:
    """Sharpen attention, weaken residual branches and randomize heads, in place.

    With initial weights all queries collapse to one vector, and a wrong implementation would pass the check.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if re.search(r"\.[sc]a_[qk]\w*_proj\.weight$", name):
                value.mul_(4.0)
            elif re.search(r"\.decoder\..*in_proj_weight$", name):
                value.mul_(6.0)
            elif re.search(r"\.(out_proj|linear2)\.weight$|bn3\.weight$", name):
                value.mul_(0.4)
            elif name in ("bbox_embed.layers.2.weight", "class_embed.weight"):
                value.copy_(1.6 / value.shape[1] ** 0.5 * torch.randn(value.shape, generator=generator))


def huggingface_outputs(peer: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """One forward pass, with our names of outputs."""
    mask = torch.ones(len(images), *images.shape[-2:], dtype=torch.int64, device=DEVICE)
    out = peer(pixel_values=images, pixel_mask=mask)
    return {"pred_logits": out.logits, "pred_boxes": out.pred_boxes}


def check_spread(expected: dict[str, Tensor]) -> None:
    """
    Raises:
        RefusedError: queries are so similar that a wrong answer would pass `check`.
    """
    for name, tolerance in TOLERANCE.items():
        spread = expected[name].std(dim=1).mean().item()
        if spread < 100 * tolerance and not is_null_gpu():
            raise RefusedError(f"{name}: queries differ by only {spread:.2e}, so the check would prove nothing")


def check(expected: dict[str, Tensor], outputs: dict[str, Tensor]) -> str:
    """Largest difference of each output, as text.

    Raises:
        RefusedError: a difference is too large.
    """
    differences = {name: (outputs[name] - expected[name]).abs().max().item() for name in TOLERANCE}
    if is_null_gpu():
        return NOT_COMPARED
    for name, tolerance in TOLERANCE.items():
        if not differences[name] <= tolerance:
            raise RefusedError(f"{WRONG}{name} differs by {differences[name]:.2e}, more than {tolerance:.0e}")
    return ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
