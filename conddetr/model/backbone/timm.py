"""The last feature map of a model of timm; the package is imported where it is used."""

import difflib
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from conddetr.config import TIMM, ModelConfig, nearest
from conddetr.kernels import paths

_FREE_SIZES = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
"""Arguments with which models that were pretrained on images of one size take any size: ViTs, windowed models, and
models that need no argument. Models do not accept each other's arguments."""


class TimmBackbone(nn.Module):
    """The last feature map of a model of timm, called as modules.

    Images are padded with zeros, at the bottom and right, to a multiple of the stride. The model's own mean and
    standard deviation replace ImageNet's. Both are in the state dict, because another version of timm may have other
    weights, with other statistics, under the same name.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, config: ModelConfig, pretrained: bool) -> None:
        super().__init__()
        self.name = config.backbone
        self.trains = config.train_backbone
        features = _create(config.backbone.removeprefix(TIMM), pretrained)
        if config.freezes_norms:
            features = _with_frozen_norms(features, self.name)
        self.num_channels = features.feature_info.channels()[-1]
        self.stride = features.feature_info.reduction()[-1]
        self.is_channels_last = getattr(features, "output_fmt", None) == "NHWC"
        self.features = features
        scale, shift = _renormalisation(features.pretrained_cfg)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        used = self._parameters_of_the_map()
        for parameter in self.parameters():
            parameter.requires_grad_(self.trains and parameter in used)

    def train(self, mode: bool = True) -> Self:
        """Same as `nn.Module.train`, but a frozen backbone stays in evaluation mode: it drops nothing out."""
        return super().train(mode and self.trains)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] images normalised with ImageNet's statistics -> [B, C, ⌈H/stride⌉, ⌈W/stride⌉]."""
        paths.note("backbone", "modules")
        height, width = images.shape[-2:]
        # Padding is exactly 0 in all channels, and stays 0. No colour of 8 bits is: ImageNet's mean red is 123.675.
        is_image = (images != 0).any(1, keepdim=True)
        pixels = images * self.scale + self.shift * is_image
        rows, columns = self._cells(height), self._cells(width)
        [features] = self.features(F.pad(pixels, (0, columns * self.stride - width, 0, rows * self.stride - height)))
        return features.permute(0, 3, 1, 2) if self.is_channels_last else features

    def _cells(self, pixels: int) -> int:
        """⌈pixels/stride⌉, in the form that export traces for any size; ONNX rounds negative quotients towards zero."""
        return (pixels - 1) // self.stride + 1

    def _parameters_of_the_map(self) -> set[nn.Parameter]:
        """The parameters that the map depends on. Other ones, such as those of a classifier, must not train: several
        processes would wait for their gradients.

        Raises:
            ValueError: the model does not take images of any size, or its map has another size.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        pretraining = self.features.pretrained_cfg
        # Narrower than images of a fixed size, and wider.
        width = pretraining["input_size"][-1] if pretraining["fixed_input_size"] else self.stride
        size = 2 * self.stride - 1, width + self.stride + 1
        expected = (1, self.num_channels, *map(self._cells, size))
        self.eval()
        try:
            with torch.enable_grad():
                features = self(torch.zeros(1, 3, *size, device=parameters[0].device))
                gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
        except (RuntimeError, AssertionError, IndexError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(
                f"backbone {self.name} does not take images of every size; for {size[0]}×{size[1]} pixels: {reason}"
            ) from error
        self.train()
        if tuple(features.shape) != expected:
            raise ValueError(
                f"backbone {self.name}: expected a map of shape {expected} for {size[0]}×{size[1]} pixels and stride "
                f"{self.stride}, got {tuple(features.shape)}."
            )
        return {x for x, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def _create(name: str, pretrained: bool) -> nn.Module:
    """timm's extractor of the last feature map."""
    timm = _timm(name)
    config = _pretraining(timm, name)
    if pretrained and not config.has_weights:
        raise ValueError(
            f"pretrained_backbone: timm has no pretrained weights of {name}. Start without: pretrained_backbone=False, "
            "on the command line --no-pretrained-backbone."
        )
    for options in _FREE_SIZES if config.fixed_input_size else ({},):
        try:
            features = timm.create_model(name, pretrained, features_only=True, out_indices=(-1,), **options)
        except TypeError as error:
            # From the model's constructor, before any weight is loaded.
            if not options or next(iter(options)) not in str(error):
                raise
        except OSError as error:
            raise OSError(
                f"Pretrained weights of timm's {name} could not be downloaded ({str(error).partition('. ')[0]}): "
                "download them with a network (timm keeps them in the cache of HuggingFace's hub), or start without: "
                "pretrained_backbone=False, on the command line --no-pretrained-backbone."
            ) from error
        else:
            break
    if isinstance(features, timm.models.FeatureHookNet):
        raise ValueError(f"backbone {TIMM}{name}: its maps are taken by hooks, which frozen copies cannot have.")
    return features


def _timm(name: str) -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"backbone {TIMM}{name} needs timm: pip install 'conddetr[timm]'.") from error
    return timm


def _pretraining(timm: ModuleType, name: str) -> Any:
    """timm's configuration of a model's pretraining.

    Raises:
        ValueError: timm has no such model, or no such weights of it.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"backbone {TIMM}{name}: timm has no such model.{hint} timm.list_models() lists all.")
    architecture, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ValueError(f"backbone {TIMM}{name}: timm has no such weights.{nearest(tag, tags)}")
    config = timm.get_pretrained_cfg(name)
    if config is None:
        raise ValueError(
            f"backbone {TIMM}{name}: timm has this model under a newer name; timm.list_models() lists all."
        )
    return config


def _with_frozen_norms(features: nn.Module, name: str) -> nn.Module:
    from timm.layers import freeze_batch_norm_2d

    frozen = freeze_batch_norm_2d(features)
    left = next((type(module).__name__ for module in frozen.modules() if isinstance(module, _BatchNorm)), None)
    if left:
        raise ValueError(f"backbone_norm: timm cannot freeze {left}, which is in {name}: set backbone_norm to `train`.")
    return frozen


def _renormalisation(pretraining: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Scale and shift [3, 1, 1] from images normalised with ImageNet's statistics to the model's own."""
    from conddetr.data.images import MEAN, STD

    imagenet_mean, imagenet_std, mean, std = (
        torch.tensor(values, dtype=torch.float64)[:, None, None]
        for values in (MEAN, STD, pretraining["mean"], pretraining["std"])
    )
    return (imagenet_std / std).float(), ((imagenet_mean - mean) / std).float()
