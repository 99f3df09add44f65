"""What several commands say."""

import torch

from conddetr.detector import Detector
from conddetr.engine import distributed
from conddetr.engine.chosen import chosen, prove
from conddetr.engine.progress import say


def print_chosen(detector: Detector, device: torch.device) -> None:
    """One line: what a detector runs on a device, whose kernels are checked before if nothing is known of them."""
    config, backend = detector.model.config, detector.model.backend
    prove(device, backend)
    if distributed.is_main():
        say(chosen(config, backend, device, detector.precision, trains=False).line())
