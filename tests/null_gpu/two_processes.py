"""A program for torchrun: one training step in each process, which prints the devices that it launched on.

A second step would never end: before it, gradients are sorted by data from the other process, which are zeros on a null
GPU.
"""

import torch

from conddetr.engine.distributed import process_group, rank
from null_gpu.counts import counted
from null_gpu.test_training import make_batch, make_stepper


def main() -> None:
    """Train, and print `rank launches_by_device collectives` in one line."""
    # It compares shapes from another process, which are zeros on a null GPU.
    torch.nn.parallel.distributed._verify_param_shape_across_processes = lambda *_: None
    with process_group("cuda") as device, counted() as counts:
        stepper = make_stepper(device)
        stepper([make_batch()], 0)
        stepper.flush()
        number = rank()
    reductions = sum(launches for name, launches in counts.kernels.items() if name == "ncclAllReduce")
    print("counted", number, *counts.launches_by_device, reductions, flush=True)


if __name__ == "__main__":
    main()
