"""Output that several commands share."""

import torch

from conddetr.detector import Detector
from conddetr.engine import distributed
from conddetr.engine.chosen import chosen, prove
from conddetr.engine.progress import say


def print_chosen(detector: Detector, device: torch.device) -> None:
    """Print the implementations that a detector uses on a device. Kernels without a record are checked before."""
    config, backend = detector.model.config, detector.model.backend
    prove(device, backend)
    if distributed.is_main():
        say(chosen(config, backend, device, detector.precision, trains=False).line())
