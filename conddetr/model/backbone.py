"""Feature extractors: torchvision's ResNets with frozen batch norm, and a small one for CPUs."""

import copy
import logging

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models import ResNet50_Weights, ResNet101_Weights, resnet50, resnet101
from torchvision.ops import FrozenBatchNorm2d

from conddetr.config import ModelConfig
from conddetr.kernels import registry
from conddetr.model import folding

log = logging.getLogger(__name__)

_RESNETS = {
    "resnet50": (resnet50, ResNet50_Weights.IMAGENET1K_V1),
    "resnet101": (resnet101, ResNet101_Weights.IMAGENET1K_V1),
}


class ResNetBackbone(nn.Module):
    """The last stage of a ResNet: stride 32, or 16 with dilation (DC5).

    Batch norm is frozen. The stem and the first stage never train, as in DETR. Without gradients (and in eval mode) the
    norms are folded into the convolutions; with a backend other than `eager` also with them. The plain form is the
    official one: the same but for rounding.
    """

    num_channels = 2048

    def __init__(self, name: str, dilation: bool, pretrained: bool, train: bool, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.stride = 16 if dilation else 32
        make, weights = _RESNETS[name]
        body = make(
            weights=None,
            norm_layer=FrozenBatchNorm2d,
            replace_stride_with_dilation=[False, False, dilation],
        )
        if pretrained:
            _load_imagenet(body, weights)
        del body.avgpool, body.fc
        for parameter_name, parameter in body.named_parameters():
            trainable = train and parameter_name.startswith(("layer2", "layer3", "layer4"))
            parameter.requires_grad_(trainable)
        self.body = body
        self._kept: folding.Kept | None = None

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] normalised images -> [B, 2048, ⌈H/32⌉, ⌈W/32⌉] (/16 with dilation)."""
        inference = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        if self.backend == "eager" and not inference:
            return plain_features(self.body, images)
        folded, self._kept = folding.fold(self.body, self._kept)
        *_, features = folding.stages(self.body, folded, images, self.backend)
        return features

    def train(self, mode: bool = True) -> "ResNetBackbone":
        """As `nn.Module.train`; forgets the folded weights."""
        self._kept = None
        return super().train(mode)


def plain_features(body: nn.Module, images: Tensor) -> Tensor:
    """The official form of a ResNet: [B, 3, H, W] -> its last stage, batch norms by themselves."""
    x = body.maxpool(body.relu(body.bn1(body.conv1(images))))
    return body.layer4(body.layer3(body.layer2(body.layer1(x))))


def _load_imagenet(body: nn.Module, weights: ResNet50_Weights | ResNet101_Weights) -> None:
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise OSError(
            f"ImageNet weights {weights.url} could not be downloaded ({error}): download the file elsewhere "
            f"into {torch.hub.get_dir()}/checkpoints/, or do without: pretrained_backbone=False, on the command line "
            f"--no-pretrained-backbone."
        ) from error
    body.load_state_dict({name: value for name, value in state.items() if "num_batches_tracked" not in name})


def fold_batch_norms(body: nn.Module) -> nn.Module:
    """A copy of a torchvision ResNet with every frozen batch norm folded into the convolution before it, for export."""
    with torch.no_grad():
        folded = copy.deepcopy(body)
        for module in folded.modules():
            pairs = [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")]
            for conv_name, norm_name in pairs:
                conv, norm = getattr(module, conv_name, None), getattr(module, norm_name, None)
                if isinstance(conv, nn.Conv2d) and isinstance(norm, FrozenBatchNorm2d):
                    conv.weight, conv.bias = fuse_conv_bn_weights(
                        conv.weight,
                        conv.bias,
                        norm.running_mean,
                        norm.running_var,
                        norm.eps,
                        norm.weight,
                        norm.bias,
                    )
                    setattr(module, norm_name, nn.Identity())
    return folded.eval().requires_grad_(False)


class TinyBackbone(nn.Module):
    """Five convolutions, four of them strided: stride 16, trained from scratch on a CPU.

    Batch norm, which trains: with group norm, or none, the same recipe learned several times slower.
    """

    num_channels = 128
    stride = 16

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            _conv_norm_relu(3, 16, stride=2),
            _conv_norm_relu(16, 32, stride=2),
            _conv_norm_relu(32, 64, stride=2),
            _conv_norm_relu(64, 128, stride=2),
            _conv_norm_relu(128, 128, stride=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] normalised images -> [B, 128, ⌈H/16⌉, ⌈W/16⌉]."""
        if images.device.type == "cpu" and not registry.transforms():
            # There convolutions of few channels are faster where the channels of a pixel lie side by side; vmap has no
            # such layout.
            images = images.contiguous(memory_format=torch.channels_last)
        return self.stages(images)


def _conv_norm_relu(channels_in: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


def build_backbone(config: ModelConfig) -> nn.Module:
    """The backbone that `config` names; `num_channels` is the width of its output, `stride` its cells' in pixels."""
    if config.backbone == "tiny":
        return TinyBackbone().requires_grad_(config.train_backbone)
    return ResNetBackbone(
        config.backbone, config.dilation, config.pretrained_backbone, config.train_backbone, config.backend
    )
