"""Backbones: torchvision's ResNets with frozen batch norm, and a small one for CPUs."""

import logging

import torch
from torch import Tensor, nn
from torchvision.models import ResNet, ResNet50_Weights, ResNet101_Weights
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from conddetr.config import ModelConfig
from conddetr.kernels import paths, registry
from conddetr.model import resnet
from conddetr.model.layers import channels_last
from conddetr.model.plain import why_not_plain
from conddetr.model.recompute import recomputed

log = logging.getLogger(__name__)

_RESNETS = {
    "resnet50": ([3, 4, 6, 3], ResNet50_Weights.IMAGENET1K_V1),
    "resnet101": ([3, 4, 23, 3], ResNet101_Weights.IMAGENET1K_V1),
}


class ResNetBody(ResNet):
    """torchvision's ResNet up to its last stage.

    Backend `eager` calls every module, as the official code does. The other backends fold frozen batch norms into the
    convolutions within the graph, except in parts that are not plain modules (`conddetr.model.resnet`). The results
    are equal up to rounding.
    """

    def __init__(self, blocks: list[int], dilation: bool, backend: str) -> None:
        super().__init__(
            Bottleneck,
            blocks,
            norm_layer=FrozenBatchNorm2d,
            replace_stride_with_dilation=[False, False, dilation],
        )
        del self.avgpool, self.fc
        self.backend = backend
        self.recomputes = False
        """Whether backward recomputes the activations of each stage; see `DETR.checkpoint_activations`."""

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] normalised images -> [B, 2048, ⌈H/32⌉, ⌈W/32⌉] (/16 with dilation)."""
        # The model sets this too, but the body may also run alone, or again under activation checkpointing.
        with registry.demanded(self.backend):
            if self.backend != "eager" and not resnet.is_unproven(self.backend, images):
                *_, features = resnet.stages(self, images, self.backend)
                return features
        resnet.note_modules(self.conv1)
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for name in resnet.STAGES:
            x = recomputed(self, "backbone stage", getattr(self, name), x)
        return x


class ResNetBackbone(nn.Module):
    """The last stage of a ResNet: stride 32, or 16 with dilation (DC5).

    Batch norm is frozen. The stem and the first stage never train, as in DETR.
    """

    num_channels = 2048

    def __init__(self, name: str, dilation: bool, pretrained: bool, train: bool, backend: str) -> None:
        super().__init__()
        self.stride = 16 if dilation else 32
        blocks, weights = _RESNETS[name]
        self.body = ResNetBody(blocks, dilation, backend)
        if pretrained:
            _load_imagenet(self.body, weights)
        for parameter_name, parameter in self.body.named_parameters():
            trainable = train and parameter_name.startswith(("layer2", "layer3", "layer4"))
            parameter.requires_grad_(trainable)

    def forward(self, images: Tensor) -> Tensor:
        """Same as `ResNetBody.forward`."""
        return self.body(images)


def _load_imagenet(body: nn.Module, weights: ResNet50_Weights | ResNet101_Weights) -> None:
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise OSError(
            f"ImageNet weights {weights.url} could not be downloaded ({error}): download the file on another machine "
            f"and put it into {torch.hub.get_dir()}/checkpoints/, or start without it: pretrained_backbone=False, on "
            f"the command line --no-pretrained-backbone."
        ) from error
    body_state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    body.load_state_dict({name: value for name, value in body_state.items() if "num_batches_tracked" not in name})


class TinyBackbone(nn.Module):
    """Five convolutions, four of them strided: total stride 16, trained from scratch on a CPU.

    Its batch norms are trained: with group norm or no norm, the same recipe learned several times slower.
    """

    num_channels = 128
    stride = 16

    def __init__(self) -> None:
        super().__init__()
        self.recomputes = False
        """Whether backward recomputes the activations of each stage; see `DETR.checkpoint_activations`."""
        self.stages = nn.Sequential(
            _conv_norm_relu(3, 16, stride=2),
            _conv_norm_relu(16, 32, stride=2),
            _conv_norm_relu(32, 64, stride=2),
            _conv_norm_relu(64, 128, stride=2),
            _conv_norm_relu(128, 128, stride=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] normalised images -> [B, 128, ⌈H/16⌉, ⌈W/16⌉]."""
        if images.device.type == "cpu":
            # On CPUs convolutions of few channels are faster in channels-last.
            images = channels_last(images)
        paths.note("backbone", "modules")
        is_plain = type(self.stages) is nn.Sequential and why_not_plain(self.stages) is None
        x = images
        for stage in self.stages if is_plain else [self.stages]:
            x = recomputed(self, "backbone stage", stage, x)
        return x


def _conv_norm_relu(channels_in: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


def build_backbone(config: ModelConfig, backend: str, pretrained: bool) -> nn.Module:
    """Build the backbone that `config` names.

    Its attribute `num_channels` is the width of its output, `stride` the size of a cell in pixels.

    Args:
        config: of the model.
        backend: used by ResNets alone.
        pretrained: start a ResNet from torchvision's ImageNet weights, downloaded on first use.
    """
    if config.backbone == "tiny":
        return TinyBackbone().requires_grad_(config.train_backbone)
    return ResNetBackbone(config.backbone, config.dilation, pretrained, config.train_backbone, backend)
