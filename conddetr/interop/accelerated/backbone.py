"""timm's plain ResNets with frozen batch norm: the norm is part of the convolution, in training as well."""

from torch import Tensor, nn
from transformers.models.conditional_detr import modeling_conditional_detr as theirs

from conddetr.model import resnet
from conddetr.model.detr import resize_mask
from conddetr.model.plain import why_not_plain


class ConvEncoder(theirs.ConditionalDetrConvEncoder):
    """In channels-last, its norms folded within the graph."""

    backend: str

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """[B, 3, H, W] and its mask [B, H, W] -> of each stage, the feature map and its mask [B, h, w] bool."""
        if misfit(self) is not None:
            return super().forward(pixel_values, pixel_mask)
        maps = resnet.stages(self.model, pixel_values, self.backend)
        return [(x, resize_mask(pixel_mask, tuple(x.shape[-2:]))) for x in maps]


def misfit(encoder: nn.Module) -> str | None:
    """The reason why `ConvEncoder` is not the same as this one; None where it is, part for part."""
    body = encoder.model
    names = [name for name, _ in body.named_children()]
    if names != ["conv1", "bn1", "act1", "maxpool", *resnet.STAGES]:
        return f"{type(body).__name__} is no ResNet of timm"
    if tuple(body.feature_info.out_indices) != (1, 2, 3, 4):
        return f"out_indices {tuple(body.feature_info.out_indices)}, expected (1, 2, 3, 4)"
    return why_not_plain(body)
