"""Prints what a reader of results asks of the machine, the quickest first; fails where PyTorch sees no GPU."""

import os
import platform
import subprocess
import sys
import time
from importlib import metadata


def main() -> None:
    """Each part by itself: the next may never end."""
    print(f"Python {platform.python_version()} ({sys.executable}), {platform.platform()}, {os.cpu_count()} CPUs")
    show("nvidia-smi")
    show("nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE")
    show("nvcc", "--version")
    packages = {f"{found.metadata['Name']} {found.version}" for found in metadata.distributions()}
    print("packages:", ", ".join(sorted(packages, key=str.lower)), flush=True)

    start = time.perf_counter()
    import torch

    print(f"import torch: {time.perf_counter() - start:.1f} s", flush=True)
    start = time.perf_counter()
    from conddetr.cli import main as conddetr

    print(f"import conddetr: {time.perf_counter() - start:.1f} s", flush=True)
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU (torch.cuda.is_available() is False).")
    print(torch.cuda.get_device_properties(0))
    raise SystemExit(conddetr(["env"]))


def show(*command: str) -> None:
    """What a program says, or why it says nothing."""
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{command[0]}: {error}", flush=True)
    else:
        print(run.stdout, flush=True)


if __name__ == "__main__":
    main()
