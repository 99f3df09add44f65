"""timm's plain ResNets with frozen batch norm: the norm is part of the convolution, in training as well."""

from torch import Tensor, nn
from transformers.models.conditional_detr import modeling_conditional_detr as theirs

from conddetr.model import folding
from conddetr.model.detr import resize_mask

_PLAIN = {"conv1", "conv2", "conv3", "bn1", "bn2", "bn3", "act1", "act2", "act3", "downsample", "drop_block", "aa"}


class ConvEncoder(theirs.ConditionalDetrConvEncoder):
    """In channels-last, its norms folded."""

    backend: str
    _kept: folding.Kept | None = None

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """[B, 3, H, W] and its mask [B, H, W] -> of each stage, the feature map and its mask [B, h, w] bool."""
        folded, self._kept = folding.fold(self.model, self._kept)
        maps = folding.stages(self.model, folded, pixel_values, self.backend)
        return [(x, resize_mask(pixel_mask, tuple(x.shape[-2:]))) for x in maps]


def misfit(encoder: theirs.ConditionalDetrConvEncoder) -> str | None:
    """The reason why `ConvEncoder` is not the same as this one; None where it is."""
    body = encoder.model
    names = [name for name, _ in body.named_children()]
    if names != ["conv1", "bn1", "act1", "maxpool", *folding.STAGES]:
        return f"{type(body).__name__} is no ResNet of timm"
    if tuple(body.feature_info.out_indices) != (1, 2, 3, 4):
        return f"out_indices {tuple(body.feature_info.out_indices)}, expected (1, 2, 3, 4)"
    if not (_is_foldable(body["conv1"], body["bn1"]) and type(body["act1"]) is nn.ReLU):
        return "its stem is more than convolution, frozen batch norm and ReLU"
    for stage in folding.STAGES:
        for block in body[stage]:
            reason = _block_misfit(block)
            if reason is not None:
                return f"{stage} of {type(body).__name__}: {reason}"
    return None


def _block_misfit(block: nn.Module) -> str | None:
    count = folding.CONVOLUTIONS.get(type(block).__name__)
    parts = dict(block.named_children())
    if count is None or not set(parts) <= _PLAIN:
        return f"{type(block).__name__} has parts that a plain ResNet has not"
    pairs = [(parts[f"conv{i}"], parts[f"bn{i}"]) for i in range(1, count + 1)]
    if block.downsample is not None:
        pairs.append(tuple(block.downsample))
    if not all(len(pair) == 2 and _is_foldable(*pair) for pair in pairs):
        return "expected pairs of convolution without bias and frozen batch norm"
    rest = [parts[name] for name in ("drop_block", "aa") if name in parts]
    activations = [parts[f"act{i}"] for i in range(1, count + 1)]
    if not all(type(part) is nn.Identity for part in rest) or not all(type(part) is nn.ReLU for part in activations):
        return "expected ReLU, no dropped blocks and no anti-aliasing"
    return None


def _is_foldable(conv: nn.Module, norm: nn.Module) -> bool:
    is_plain = type(conv) is nn.Conv2d and conv.bias is None and conv.padding_mode == "zeros"
    return is_plain and type(norm) is theirs.ConditionalDetrFrozenBatchNorm2d
