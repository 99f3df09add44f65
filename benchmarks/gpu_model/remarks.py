"""What is worth a word about a kernel's figures, and about what they were before."""

from collections.abc import Mapping

from gpu_model.figures import TIMED, Figures

TWICE = 1.15
"""Exponentials of the special-function unit for a score, from which on some are computed again. The online softmax has
a few more than one, for what its sums shrink by."""
LITTLE = 0.25
"""Share of a trip that copies have at least."""
LONGER = 1.05


def of(found: Figures) -> list[str]:
    """In words; none if there is nothing to say."""
    said = []
    if found.blocks == 0:
        said.append("not one block fits a multiprocessor")
    if found.exponentials > TWICE:
        said.append(f"computes exponentials {found.exponentials:.1f} times")
    warp, group = (found.by_name.get(name, 0.0) for name in ("HMMA", "HGMMA"))
    if found.architecture == TIMED and warp:
        said.append("HMMA for HGMMA" + (f" ({warp:.0f} beside {group:.0f})" if group else ""))
    if found.overlap is not None and found.overlap < LITTLE:
        said.append(f"waits for all copies {found.overlap:.0%} of a trip after the last")
    if found.stack or found.local:
        said.append(f"spills: {found.stack} bytes of stack, {found.local:.0f} instructions")
    return said


def cost(found: Figures) -> float:
    """What a kernel is compared by: clocks, or where no timing is known instructions."""
    return found.full or found.instructions


def longer(found: Mapping[object, Figures], before: Mapping[object, Figures]) -> dict[object, float]:
    """Kernels that take 1.05 times as long as before, or longer, with the ratio; those that were not there are none."""
    ratios = {key: cost(one) / cost(before[key]) for key, one in found.items() if key in before}
    return {key: ratio for key, ratio in ratios.items() if ratio >= LONGER}
