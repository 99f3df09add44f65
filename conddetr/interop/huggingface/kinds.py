"""The supported detectors of transformers, recognised by name, so that only users of transformers import it."""

from torch import nn

CONDITIONAL_DETR = "ConditionalDetrForObjectDetection"
DAB_DETR = "DabDetrForObjectDetection"


def is_model(model: nn.Module, *kinds: str) -> bool:
    """Whether it is one of these models of transformers; without kinds: either of the two above."""
    names = kinds or (CONDITIONAL_DETR, DAB_DETR)
    return any(base.__name__ in names and base.__module__.startswith("transformers.") for base in type(model).__mro__)
