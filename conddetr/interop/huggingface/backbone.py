"""timm's plain ResNets with frozen batch norm: the norm is folded into the convolution, also in training."""

from torch import Tensor, nn
from transformers.models.conditional_detr import modeling_conditional_detr as modeling

from conddetr.kernels import paths, registry
from conddetr.model import resnet
from conddetr.model.detr import resize_mask
from conddetr.model.fast.plan import can_run, folded_recipes, make_weights, step_dtype
from conddetr.model.plain import why_not_plain

Maps = list[tuple[Tensor, Tensor]]
"""For each stage, the feature map and its mask [B, h, w] bool."""


class ConvEncoder(modeling.ConditionalDetrConvEncoder):
    """In channels-last, with norms folded within the graph."""

    backend: str

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> Maps:
        """[B, 3, H, W] and its mask [B, H, W] -> the maps of all stages."""
        with registry.demanded(self.backend):
            maps = encode(self, pixel_values, pixel_mask)
        return super().forward(pixel_values, pixel_mask) if maps is None else maps


def encode(encoder: nn.Module, pixel_values: Tensor, pixel_mask: Tensor) -> Maps | None:
    """The maps that `ConvEncoder` returns; None if transformers' own code has to compute them."""
    if misfit(encoder) is not None or resnet.is_unproven(encoder.backend, pixel_values):
        paths.note("backbone", "transformers' own")
        return None
    body = timm_model(encoder)
    maps = resnet.stages(body, pixel_values, encoder.backend, _folded(encoder, body, pixel_values))
    return [(x, resize_mask(pixel_mask, tuple(x.shape[-2:]))) for x in maps]


def _folded(encoder: nn.Module, body: nn.Module, pixel_values: Tensor) -> resnet.Folded | None:
    """The folded weights of plain convolutions, prepared at once; None if they are folded one by one."""
    dtype = step_dtype(pixel_values.device, pixel_values.dtype)
    if not can_run(encoder.backend, pixel_values.device, dtype):
        return None
    [weights] = make_weights((folded_recipes(body),), dtype)
    return lambda conv, _: weights[id(conv)]


def timm_model(encoder: nn.Module) -> nn.Module:
    """timm's model, which some of transformers' encoders wrap."""
    return getattr(encoder.model, "_backbone", encoder.model)


def misfit(encoder: nn.Module) -> str | None:
    """The reason why `ConvEncoder` is not equivalent to this encoder; None if it is, part for part."""
    body = timm_model(encoder)
    names = [name for name, _ in body.named_children()]
    if names != ["conv1", "bn1", "act1", "maxpool", *resnet.STAGES]:
        return f"{type(body).__name__} is not a ResNet of timm"
    if tuple(body.feature_info.out_indices) != (1, 2, 3, 4):
        return f"out_indices: expected (1, 2, 3, 4), got {tuple(body.feature_info.out_indices)}"
    return why_not_plain(encoder.model) or why_not_plain(body)
