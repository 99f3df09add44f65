"""Describes the machine for readers of the results, quickest part first; fails if PyTorch sees no GPU."""

import os
import platform
import subprocess
import sys
import time
from importlib import metadata


def main() -> None:
    """Print each part at once, because the next may never end."""
    print(f"Python {platform.python_version()} ({sys.executable}), {platform.platform()}, {os.cpu_count()} CPUs")
    show("nvidia-smi")
    show("nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE")
    show("nvcc", "--version")
    packages = {f"{package.metadata['Name']} {package.version}" for package in metadata.distributions()}
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
    """Print a program's output, or why it has none."""
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{command[0]}: {error}", flush=True)
    else:
        print(run.stdout, flush=True)


if __name__ == "__main__":
    main()
