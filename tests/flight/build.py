"""Builds the native extension in this checkout, on all cores, for this machine's GPU only."""

import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent


def main() -> None:
    """Replace this process with the build."""
    major, minor = torch.cuda.get_device_capability()
    # The kernel for Hopper needs instructions that only 90a has.
    architecture = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
    # By default the build limits its processes by free memory, of which some machines report too little.
    jobs = len(os.sched_getaffinity(0))
    print(f"building for {torch.cuda.get_device_name()}, sm_{architecture}, {jobs} jobs", flush=True)
    flags = {"CONDDETR_NATIVE": "1", "CONDDETR_CUDA": "1", "CONDDETR_CUDA_ARCHS": architecture, "MAX_JOBS": str(jobs)}
    os.chdir(ROOT)
    os.execve(sys.executable, (sys.executable, "setup.py", "-q", "build_ext", "--inplace"), {**os.environ, **flags})


if __name__ == "__main__":
    main()
