"""Conversion of whole models from transformers to ours and back, with the parity of the two."""

from torch import nn

from conddetr.interop.compare import ParityReport, parity
from conddetr.interop.huggingface.config import RESNETS, model_options
from conddetr.interop.huggingface.weights import from_huggingface, to_huggingface
from conddetr.model.detr import DETR
from conddetr.weights.load import load_weights
from conddetr.zoo import build


def convert_from_huggingface(model: nn.Module) -> tuple[DETR, ParityReport]:
    """Our model with the weights of transformers' `ConditionalDetrForObjectDetection`.

    The settings of its loss are not taken over: ours has the paper's. In training, `dropout` also applies to attention
    and inside the feed-forward network, as in the official code; transformers has separate rates there.

    Args:
        model: with a ResNet of timm of 18, 34, 50 or 101 layers; not changed.

    Returns:
        Ours, on the same device, in evaluation mode; and the parity of the two. With `auxiliary_loss` in its
        configuration transformers' forward pass differs (normalised tokens go to the next layer): the report then
        shows a difference, and our outputs are the official code's.

    Raises:
        ValueError: it has another backbone, activation or position encoding, or encoder and decoder differ in heads
            or width; says which.
    """
    options = model_options(model.config.to_dict())
    converted = build("conditional-detr-r50", num_classes=model.config.num_labels, **options)
    load_weights(converted, from_huggingface(model.state_dict()))
    converted.to(next(model.parameters())).eval()
    return converted, parity(model, converted)


def convert_to_huggingface(model: DETR) -> tuple[nn.Module, ParityReport]:
    """transformers' `ConditionalDetrForObjectDetection` with the weights of ours; needs transformers and timm.

    Args:
        model: of a `conditional-detr` preset with a ResNet and frozen norms, without the paper's ablations; it is not
            changed.

    Returns:
        transformers' model, on the same device, in evaluation mode; and the parity of the two. In training it differs:
        dropout is applied elsewhere, the whole backbone may train, the classification loss has weight 1.

    Raises:
        ValueError: transformers does not have such a model; says why.
    """
    from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection

    config = model.config
    required = {"family": "conditional-detr", "csq": "full", "reference_points": "generated"}
    for name, expected in required.items():
        if getattr(config, name) != expected:
            raise ValueError(f"{name}: expected {expected}, as in transformers, got {getattr(config, name)}.")
    if config.backbone not in RESNETS:
        raise ValueError(f"backbone: expected {', '.join(RESNETS)}, which timm has, got {config.backbone}.")
    if not config.freezes_norms:
        raise ValueError("backbone_norm: expected frozen, as in transformers, got train.")
    peer = ConditionalDetrForObjectDetection(
        ConditionalDetrConfig(
            use_timm_backbone=True,
            backbone=config.backbone,
            use_pretrained_backbone=False,
            dilation=config.dilation,
            num_labels=config.num_classes,
            d_model=config.hidden_dim,
            encoder_layers=config.encoder_layers,
            decoder_layers=config.decoder_layers,
            encoder_attention_heads=config.num_heads,
            decoder_attention_heads=config.num_heads,
            encoder_ffn_dim=config.ffn_dim,
            decoder_ffn_dim=config.ffn_dim,
            dropout=config.dropout,
            attention_dropout=config.dropout,
            num_queries=config.num_queries,
            auxiliary_loss=False,
        )
    )
    is_old = any(name.startswith("model.backbone.conv_encoder.") for name in peer.state_dict())
    peer.load_state_dict(to_huggingface(model.state_dict(), "4" if is_old else "5"), strict=True)
    peer.to(next(model.parameters())).eval()
    return peer, parity(model, peer)
