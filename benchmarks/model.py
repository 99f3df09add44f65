"""Inference of conditional-detr-r50 against the HuggingFace implementation: same weights, same image, same run."""

import argparse
import copy
import re
from functools import partial

import torch
from harness import OURS, Result, arguments, console, measure, parse, run_all
from machine import DEVICE
from torch import Tensor

import conddetr
from conddetr.interop import convert_to_huggingface

TOLERANCE = {"pred_logits": 1e-4, "pred_boxes": 1e-5}


def main() -> None:
    """Time the one problem; write and print the result."""
    parser = arguments(__doc__, seconds=60)
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1066], metavar=("H", "W"))
    options = parse(parser)
    title = f"conditional-detr-r50, forward, 1×3×{options.size[0]}×{options.size[1]}, float32"
    run_all("model", {title: partial(run, title, options)}, options)


@torch.inference_mode()
def run(title: str, options: argparse.Namespace) -> Result:
    """Check that both give the same output, then time them."""
    model = conddetr.build("conditional-detr-r50").eval()
    spread_outputs(model)
    model = model.to(DEVICE)
    peer, _ = convert_to_huggingface(model)
    accelerated = copy.deepcopy(peer)
    conddetr.accelerate(accelerated)
    image = torch.randn(1, 3, *options.size, device=DEVICE)
    mask = torch.ones(1, *options.size, dtype=torch.int64, device=DEVICE)
    runs = {
        "HuggingFace as shipped": partial(huggingface_outputs, peer, image, mask),
        "HuggingFace, accelerated": partial(huggingface_outputs, accelerated, image, mask),
        f"{OURS}, eager": partial(model, image),
    }
    expected, *found = (function() for function in runs.values())
    console.print(f"largest differences: {[check(expected, outputs) for outputs in found]}", highlight=False)
    return measure(title, runs, options, None, {})


def spread_outputs(model: conddetr.DETR) -> None:
    """Sharper attention, weaker residual branches and random heads, in place.

    With fresh weights all queries collapse to one vector, and a wrong implementation would pass the check.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if re.search(r"\.[sc]a_[qk]\w*_proj\.weight$", name):
                value.mul_(4.0)
            elif re.search(r"\.(out_proj|linear2)\.weight$|bn3\.weight$", name):
                value.mul_(0.4)
            elif name in ("bbox_embed.layers.2.weight", "class_embed.weight"):
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))


def huggingface_outputs(peer: torch.nn.Module, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """One forward pass, under our names."""
    out = peer(pixel_values=image, pixel_mask=mask)
    return {"pred_logits": out.logits, "pred_boxes": out.pred_boxes}


def check(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each output; refuses to go on where it is too large."""
    differences = {name: (found[name] - expected[name]).abs().max().item() for name in TOLERANCE}
    for name, tolerance in TOLERANCE.items():
        spread = expected[name].std(dim=1).mean().item()
        if spread < 100 * tolerance:
            raise SystemExit(f"{name}: queries differ by {spread:.2e} only, so the check says nothing: not timing.")
        if not differences[name] <= tolerance:
            raise SystemExit(f"{name} differs by {differences[name]:.2e}, more than {tolerance:.0e}: not timing.")
    return differences


if __name__ == "__main__":
    main()
