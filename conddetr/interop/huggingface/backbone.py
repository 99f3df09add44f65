"""timm's plain ResNets with frozen batch norm: the norm is part of the convolution, in training as well."""

from torch import Tensor, nn
from transformers.models.conditional_detr import modeling_conditional_detr as theirs

from conddetr.kernels import paths, registry
from conddetr.model import resnet
from conddetr.model.detr import resize_mask
from conddetr.model.fast.plan import can_run, folded_recipes, make_weights, step_dtype
from conddetr.model.plain import why_not_plain

Maps = list[tuple[Tensor, Tensor]]
"""Of each stage, the feature map and its mask [B, h, w] bool."""


class ConvEncoder(theirs.ConditionalDetrConvEncoder):
    """In channels-last, its norms folded within the graph."""

    backend: str

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> Maps:
        """[B, 3, H, W] and its mask [B, H, W] -> the maps of all stages."""
        with registry.demanded(self.backend):
            maps = encode(self, pixel_values, pixel_mask)
        return super().forward(pixel_values, pixel_mask) if maps is None else maps


def encode(encoder: nn.Module, pixel_values: Tensor, pixel_mask: Tensor) -> Maps | None:
    """What `ConvEncoder` computes; None where the original has to."""
    if misfit(encoder) is not None or resnet.is_unproven(encoder.backend, pixel_values):
        paths.note("backbone", "transformers' own")
        return None
    body = timm_model(encoder)
    maps = resnet.stages(body, pixel_values, encoder.backend, _folded(encoder, body, pixel_values))
    return [(x, resize_mask(pixel_mask, tuple(x.shape[-2:]))) for x in maps]


def _folded(encoder: nn.Module, body: nn.Module, pixel_values: Tensor) -> resnet.Folded | None:
    """The weights of plain convolutions, all of them made at once; None where they are folded one by one."""
    dtype = step_dtype(pixel_values.device, pixel_values.dtype)
    if not can_run(encoder.backend, pixel_values.device, dtype):
        return None
    [made] = make_weights((folded_recipes(body),), dtype)
    return lambda conv, _: made[id(conv)]


def timm_model(encoder: nn.Module) -> nn.Module:
    """timm's model, which some of transformers' encoders have in a wrapper."""
    return getattr(encoder.model, "_backbone", encoder.model)


def misfit(encoder: nn.Module) -> str | None:
    """The reason why `ConvEncoder` is not the same as this one; None where it is, part for part."""
    body = timm_model(encoder)
    names = [name for name, _ in body.named_children()]
    if names != ["conv1", "bn1", "act1", "maxpool", *resnet.STAGES]:
        return f"{type(body).__name__} is no ResNet of timm"
    if tuple(body.feature_info.out_indices) != (1, 2, 3, 4):
        return f"out_indices {tuple(body.feature_info.out_indices)}, expected (1, 2, 3, 4)"
    return why_not_plain(encoder.model) or why_not_plain(body)
