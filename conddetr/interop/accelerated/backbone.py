"""timm's plain ResNets with frozen batch norm: the norm is part of the convolution, in training as well."""

from torch import Tensor, nn
from transformers.models.conditional_detr import modeling_conditional_detr as theirs

from conddetr.interop.accelerated.common import SHIPPED
from conddetr.kernels import paths
from conddetr.model import resnet
from conddetr.model.detr import resize_mask
from conddetr.model.plain import why_not_plain


class ConvEncoder(theirs.ConditionalDetrConvEncoder):
    """In channels-last, its norms folded within the graph."""

    backend: str

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """[B, 3, H, W] and its mask [B, H, W] -> of each stage, the feature map and its mask [B, h, w] bool."""
        if misfit(self.model) is not None:
            paths.note("backbone", SHIPPED)
            return super().forward(pixel_values, pixel_mask)
        return feature_maps(self.model, pixel_values, pixel_mask, self.backend)


def feature_maps(body: nn.Module, images: Tensor, mask: Tensor, backend: str) -> list[tuple[Tensor, Tensor]]:
    """What a `ConvEncoder` gives, of a ResNet that has no misfit."""
    return [(x, resize_mask(mask, tuple(x.shape[-2:]))) for x in resnet.stages(body, images, backend)]


def misfit(body: nn.Module) -> str | None:
    """The reason why `feature_maps` gives something else than this module would; None where it is the same."""
    names = [name for name, _ in body.named_children()]
    if names != ["conv1", "bn1", "act1", "maxpool", *resnet.STAGES]:
        return f"{type(body).__name__} is no ResNet of timm"
    if tuple(body.feature_info.out_indices) != (1, 2, 3, 4):
        return f"out_indices {tuple(body.feature_info.out_indices)}, expected (1, 2, 3, 4)"
    return why_not_plain(body)
