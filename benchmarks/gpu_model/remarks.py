"""Remarks on a kernel's figures, and on their change since the last file."""

from collections.abc import Mapping

from gpu_model.figures import TIMED, Figures

TWICE = 1.15
"""Exponentials per score of the special-function unit above which some are recomputed. The online softmax has slightly
more than one, to rescale its sums."""
LITTLE = 0.25
"""Minimal share of a trip that copies should have."""
LONGER = 1.05


def of(figures: Figures) -> list[str]:
    """Remarks as text; empty if there are none."""
    remarks = []
    if figures.blocks == 0:
        remarks.append("not one block fits a multiprocessor")
    if figures.exponentials > TWICE:
        remarks.append(f"computes exponentials {figures.exponentials:.1f} times")
    warp_products, warpgroup_products = (figures.by_name.get(name, 0.0) for name in ("HMMA", "HGMMA"))
    if figures.architecture == TIMED and warp_products:
        remarks.append(
            "HMMA instead of HGMMA"
            + (f" ({warp_products:.0f} beside {warpgroup_products:.0f})" if warpgroup_products else "")
        )
    if figures.overlap is not None and figures.overlap < LITTLE:
        remarks.append(f"waits for all copies {figures.overlap:.0%} of a trip after the last")
    if figures.stack or figures.local:
        remarks.append(f"spills: {figures.stack} bytes of stack, {figures.local:.0f} instructions")
    return remarks


def cost(figures: Figures) -> float:
    """The number by which kernels are compared: clocks, or without timing instructions."""
    return figures.full or figures.instructions


def longer(current: Mapping[object, Figures], before: Mapping[object, Figures]) -> dict[object, float]:
    """Kernels that take at least 1.05 times as long as before, with the ratio; new kernels are left out."""
    ratios = {key: cost(figures) / cost(before[key]) for key, figures in current.items() if key in before}
    return {key: ratio for key, ratio in ratios.items() if ratio >= LONGER}
