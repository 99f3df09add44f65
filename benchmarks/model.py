"""Inference of conditional-detr-r50 against the HuggingFace implementation: same weights, same image, same run."""

import argparse
import re

import torch
from harness import console, measure, print_table, write_result
from torch import Tensor

import conddetr
from conddetr.interop.huggingface import to_huggingface

BASELINE = "HuggingFace as shipped"
TOLERANCE = {"pred_logits": 1e-4, "pred_boxes": 1e-5}


def main() -> None:
    """Check that both give the same output, time them, write and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1066], metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = conddetr.build("conditional-detr-r50").eval()
    spread_outputs(model)
    peer = huggingface_model(model)
    model, peer = model.to(device), peer.to(device)
    image = torch.randn(1, 3, *options.size, device=device)
    mask = torch.ones(1, *options.size, dtype=torch.int64, device=device)

    runs = {
        BASELINE: lambda: huggingface_outputs(peer, image, mask),
        "conddetr eager": lambda: model(image),
    }
    with torch.inference_mode():
        differences = check(runs[BASELINE](), runs["conddetr eager"]())
        samples = measure(runs, options.rounds)
    settings = {"size": options.size, "batch": 1, "dtype": "float32", "differences": differences}
    path = write_result("model", settings, {"seconds": samples})
    title = f"conditional-detr-r50, forward, 1×3×{options.size[0]}×{options.size[1]}, float32"
    print_table(title, samples, BASELINE)
    console.print(f"largest differences: {differences}; wrote {path}", highlight=False, soft_wrap=True)


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


def huggingface_model(model: conddetr.DETR) -> torch.nn.Module:
    """The HuggingFace model with our weights, in eval mode."""
    from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection

    config = ConditionalDetrConfig(
        use_timm_backbone=True,
        backbone="resnet50",
        use_pretrained_backbone=False,
        num_labels=model.config.num_classes,
        auxiliary_loss=False,
    )
    peer = ConditionalDetrForObjectDetection(config)
    peer.load_state_dict(to_huggingface(model.state_dict()), strict=True)
    return peer.eval()


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
