"""torchvision's ResNets, with frozen or with trained batch norm."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import (
    ResNet,
    ResNet18_Weights,
    ResNet34_Weights,
    ResNet50_Weights,
    ResNet101_Weights,
    WeightsEnum,
)
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from conddetr.config import ModelConfig
from conddetr.kernels import registry
from conddetr.model import resnet
from conddetr.model.recompute import recomputed

TRAINED_STAGES = ("layer2", "layer3", "layer4")
"""The stem and the first stage never train, as in DETR."""


class _Depth(NamedTuple):
    """A ResNet of torchvision."""

    block: type[BasicBlock] | type[Bottleneck]
    blocks: list[int]
    """Residual blocks of each stage."""
    weights: WeightsEnum
    """Of ImageNet."""


_RESNETS = {
    "resnet18": _Depth(BasicBlock, [2, 2, 2, 2], ResNet18_Weights.IMAGENET1K_V1),
    "resnet34": _Depth(BasicBlock, [3, 4, 6, 3], ResNet34_Weights.IMAGENET1K_V1),
    "resnet50": _Depth(Bottleneck, [3, 4, 6, 3], ResNet50_Weights.IMAGENET1K_V1),
    "resnet101": _Depth(Bottleneck, [3, 4, 23, 3], ResNet101_Weights.IMAGENET1K_V1),
}


class ResNetBody(ResNet):
    """torchvision's ResNet up to its last stage.

    Backend `eager` calls every module, as the official code does. The other backends fold frozen batch norms into the
    convolutions within the graph, except in parts that are not plain modules (`conddetr.model.resnet`). The results
    are equal up to rounding.
    """

    def __init__(self, name: str, dilation: bool, backend: str, freezes_norms: bool = True) -> None:
        super().__init__(
            _RESNETS[name].block,
            _RESNETS[name].blocks,
            norm_layer=FrozenBatchNorm2d,
            replace_stride_with_dilation=[False, False, dilation],
        )
        del self.avgpool, self.fc
        self.backend = backend
        self.recomputes = False
        """Whether backward recomputes the activations of each stage; see `DETR.checkpoint_activations`."""
        for stage in () if freezes_norms else TRAINED_STAGES:
            for path, norm in list(self.get_submodule(stage).named_modules(prefix=stage)):
                if isinstance(norm, FrozenBatchNorm2d):
                    self.set_submodule(path, nn.BatchNorm2d(len(norm.weight), norm.eps))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] normalised images -> [B, C, ⌈H/32⌉, ⌈W/32⌉] (/16 with dilation).

        C is 2048, with ResNet-18 and ResNet-34 512.
        """
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

    The stem and the first stage never train, and their batch norms are always frozen.
    """

    def __init__(self, config: ModelConfig, pretrained: bool, backend: str) -> None:
        super().__init__()
        depth = _RESNETS[config.backbone]
        self.stride = 16 if config.dilation else 32
        self.num_channels = 512 * depth.block.expansion
        self.body = ResNetBody(config.backbone, config.dilation, backend, config.freezes_norms)
        if pretrained:
            _load_imagenet(self.body, depth.weights)
        for name, parameter in self.body.named_parameters():
            parameter.requires_grad_(config.train_backbone and name.startswith(TRAINED_STAGES))

    def forward(self, images: Tensor) -> Tensor:
        """Same as `ResNetBody.forward`."""
        return self.body(images)


def _load_imagenet(body: nn.Module, weights: WeightsEnum) -> None:
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
