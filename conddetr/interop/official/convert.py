"""Conversion of whole models from the official code to ours and back, with the parity of the two."""

from torch import nn

from conddetr.interop.compare import ParityReport, parity
from conddetr.interop.official.weights import identify
from conddetr.model.detr import DETR
from conddetr.weights.load import load_weights
from conddetr.zoo import build


def convert_from_official(model: nn.Module) -> tuple[DETR, ParityReport]:
    """Our model with the weights of the official repository's `ConditionalDETR`; names and shapes are the same.

    Args:
        model: with a ResNet of torchvision of 18, 34, 50 or 101 layers, dilated or not; not changed.

    Returns:
        Ours, on the same device, in evaluation mode; and the parity of the two.

    Raises:
        ValueError: the weights do not belong to such a model; says what does not fit.
    """
    state, transformer = model.state_dict(), model.transformer
    converted = build(
        "conditional-detr-r50",
        **identify(state),
        dilation=model.backbone[0].body["layer4"][1].conv2.dilation != (1, 1),
        num_heads=transformer.nhead,
        dropout=float(transformer.decoder.layers[0].dropout.p),
    )
    load_weights(converted, state)
    converted.to(next(model.parameters())).eval()
    return converted, parity(model, converted)


def convert_to_official(model: DETR, official: nn.Module) -> ParityReport:
    """Load our weights into a model from the official repository's `build_model`, in place.

    Returns:
        The parity of the two.

    Raises:
        ValueError: its names or shapes differ (it is unchanged); says which.
    """
    load_weights(official, model.state_dict())
    return parity(model, official)
