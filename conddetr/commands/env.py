"""`conddetr env`."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.table import Table

from conddetr.devices import find_device
from conddetr.engine.progress import say, show
from conddetr.kernels import native, registry


def run(options: argparse.Namespace) -> None:
    device = find_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
    say(f"Python {platform.python_version()}, device {device} ({name})")
    for package in ("torch", "torchvision", "triton", "pycocotools", "faster-coco-eval"):
        try:
            installed = version(package)
        except PackageNotFoundError:
            installed = "not installed"
        say(f"{package} {installed}")
    say(f"native kernels: {native.NOT_LOADED or native.describe(device)}")
    dtypes = (torch.float32, torch.bfloat16)
    table = Table()
    for column in ("operation", *(str(dtype).removeprefix("torch.") for dtype in dtypes)):
        table.add_column(column)
    reasons: dict[str, list[str]] = {}
    for name, operation in sorted(registry.OPERATIONS.items()):
        choices = [operation.choose("auto", device, dtype) for dtype in dtypes]
        table.add_row(name, *(choice.backend for choice in choices))
        for backend, reason in {item for choice in choices for item in choice.refused.items()}:
            reasons.setdefault(f"{backend} is refused: {reason}", []).append(name)
    show("backends that backend=auto selects", table)
    for line, names in sorted(reasons.items()):
        say(f"{line} ({', '.join(names) if len(names) < 4 else f'{len(names)} operations'})")
