"""Small detectors from transformers with random weights, and a batch for them."""

import re

import torch
from torch import nn
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DabDetrConfig,
    DabDetrForObjectDetection,
    ResNetConfig,
)


def _options():
    """Configuration options that both models share."""
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    sizes = {"encoder_layers": 1, "decoder_layers": 3, "num_queries": 12, "num_labels": 5, "dropout": 0.0}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_attention_heads": 4, f"{side}_ffn_dim": 64}
    source = {"use_timm_backbone": False, "backbone": None, "backbone_config": backbone}
    return {"use_pretrained_backbone": False, **source, **sizes}


def small_config(**options):
    return ConditionalDetrConfig(**{**_options(), "d_model": 64, **options})


def _with_sharp_attention(model):
    """Set random weights under which queries differ and attention is sharp: initial weights would hide errors."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            gain = 3.0 if re.search(r"(content|pos|sine)_proj", name) else 1.0
            nn.init.normal_(parameter, std=gain * parameter[0].numel() ** -0.5)
        elif "proj" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def small_model(**options):
    model = _with_sharp_attention(ConditionalDetrForObjectDetection(small_config(**options)))
    nn.init.normal_(model.model.query_position_embeddings.weight)
    return model


def small_dab(**options):
    """DAB-DETR."""
    config = DabDetrConfig(**{**_options(), "hidden_size": 64, **options})
    model = _with_sharp_attention(DabDetrForObjectDetection(config))
    nn.init.normal_(model.model.query_refpoint_embeddings.weight, std=2.0)
    return model


def batch(is_padded, dtype=torch.float32, size=(160, 224), valid=(100, 130)):
    """Two images, the second of which may be padded, with labels."""
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = torch.ones(2, *size, dtype=torch.int64)
    if is_padded:
        mask[1, valid[0] :] = 0
        mask[1, :, valid[1] :] = 0
        pixels = pixels * mask[:, None]
    boxes = torch.tensor([[0.4, 0.5, 0.3, 0.2], [0.6, 0.3, 0.2, 0.4], [0.5, 0.5, 0.9, 0.8]], dtype=dtype)
    labels = [
        {"class_labels": torch.tensor([1, 4, 1]), "boxes": boxes},
        {"class_labels": torch.tensor([2]), "boxes": boxes[:1]},
    ]
    return {"pixel_values": pixels, "pixel_mask": mask, "labels": labels}


def small_batch(dtype=torch.float32):
    """A padded batch, about as small as a backbone of stride 32 allows."""
    return batch(True, dtype, size=(96, 128), valid=(64, 96))


def run(model, inputs):
    """Outputs, losses and gradients, by name, on the CPU."""
    device = next(model.parameters()).device
    labels = [{name: value.to(device) for name, value in label.items()} for label in inputs["labels"]]
    out = model(inputs["pixel_values"].to(device), inputs["pixel_mask"].to(device), labels=labels)
    model.zero_grad()
    out.loss.backward()
    results = {"logits": out.logits, "boxes": out.pred_boxes, "loss": out.loss, "state": out.last_hidden_state}
    results |= {f"loss {name}": value for name, value in out.loss_dict.items()}
    results |= {f"gradient {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().double().cpu() for name, value in results.items()}
