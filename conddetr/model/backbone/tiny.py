"""A small backbone for CPUs."""

from typing import Self

from torch import Tensor, nn

from conddetr.kernels import paths
from conddetr.model.layers import channels_last
from conddetr.model.plain import why_not_plain
from conddetr.model.recompute import recomputed


class TinyBackbone(nn.Module):
    """Five convolutions, four of them strided: total stride 16, trained from scratch on a CPU.

    Its batch norms are trained: with group norm or no norm, the same recipe learned several times slower.
    """

    num_channels = 128
    stride = 16

    def __init__(self, trains: bool = True) -> None:
        """`trains`: False freezes it, and it stays in evaluation mode."""
        super().__init__()
        self.trains = trains
        self.recomputes = False
        """Whether backward recomputes the activations of each stage; see `DETR.checkpoint_activations`."""
        self.stages = nn.Sequential(
            _conv_norm_relu(3, 16, stride=2),
            _conv_norm_relu(16, 32, stride=2),
            _conv_norm_relu(32, 64, stride=2),
            _conv_norm_relu(64, 128, stride=2),
            _conv_norm_relu(128, 128, stride=1),
        )
        self.requires_grad_(trains).train()

    def train(self, mode: bool = True) -> Self:
        """Same as `nn.Module.train`, but a frozen backbone stays in evaluation mode: its statistics do not change."""
        return super().train(mode and self.trains)

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
