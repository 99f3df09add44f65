"""Backbones: torchvision's ResNets, a small one for CPUs, and models of timm by name."""

from torch import nn

from conddetr.config import TIMM, ModelConfig
from conddetr.model.backbone.resnet import ResNetBackbone
from conddetr.model.backbone.timm import TimmBackbone
from conddetr.model.backbone.tiny import TinyBackbone


def build_backbone(config: ModelConfig, backend: str, pretrained: bool) -> nn.Module:
    """Build the backbone that `config` names.

    It takes images [B, 3, H, W] and returns [B, `num_channels`, ⌈H/`stride`⌉, ⌈W/`stride`⌉].

    Args:
        config: of the model.
        backend: used by ResNets alone.
        pretrained: start from pretrained weights, downloaded on first use: torchvision's of ImageNet, or timm's own.

    Raises:
        ValueError: timm has no such model or no weights for it, or the model cannot be a backbone; says why.
        ImportError: timm is not installed.
        OSError: the weights cannot be downloaded.
    """
    if config.backbone == "tiny":
        return TinyBackbone(config.train_backbone)
    if config.backbone.startswith(TIMM):
        return TimmBackbone(config, pretrained)
    return ResNetBackbone(config, pretrained, backend)
