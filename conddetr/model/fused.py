"""A frozen copy of a model for inference: values that depend on weights alone are computed once.

The copy has its own weights: later changes of the model do not affect it, and the model itself never runs on outdated
folded weights. Parts that are hooked, wrapped, parametrised or replaced are copied unchanged.
"""

import copy
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from conddetr.kernels import convolution, paths
from conddetr.model import resnet
from conddetr.model.backbone.resnet import ResNetBody
from conddetr.model.backbone.timm import TimmBackbone
from conddetr.model.layers import channels_last
from conddetr.model.plain import HOOKS, why_not_plain

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class FusionReport:
    """Report of the parts that `DETR.fused` fused or left unchanged."""

    fused: list[str] = field(default_factory=list)
    """Names of the modules that were replaced by fused ones."""
    left: dict[str, str] = field(default_factory=dict)
    """Names of parts that could not be fused, with the reason."""

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} parts fused, {len(self.left)} left unchanged"]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.left.items()])


class FusedConvolution(nn.Module):
    """A convolution fused with the frozen batch norm behind it, the residual add and the ReLU.

    With a `dtype`, its weights have that dtype and its input is cast to it, even without autocast.
    """

    is_fused = True

    def __init__(
        self, conv: nn.Conv2d, norm: nn.Module, relu: bool, backend: str, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        weight, bias = resnet.fold(conv, norm, dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.window = resnet.window(conv)
        self.relu, self.backend, self.casts = relu, backend, dtype is not None

    def forward(self, x: Tensor, residual: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """[B, Cin, H, W] -> [B, Cout, h, w], in channels-last; `overwrite`: the residual may be overwritten."""
        x = channels_last(x, self.weight.dtype if self.casts else None)
        if self.casts and residual is not None:
            residual = residual.to(self.weight.dtype)
        backend = resnet.convolution_backend(self.backend)
        end = {"residual": residual, "overwrite": overwrite, "relu": self.relu}
        return convolution(x, self.weight, self.bias, **self.window, **end, backend=backend)

    def extra_repr(self) -> str:
        """For `print`."""
        return f"{tuple(self.weight.shape)}, relu={self.relu}, backend={self.backend}"


class FusedBlock(nn.Module):
    """A residual block of fused convolutions.

    The bias of the shortcut's convolution is added to the last convolution's: on GPUs no kernel would add it otherwise.
    """

    is_fused = True

    def __init__(self, block: nn.Module, backend: str, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        pairs = resnet.conv_norm_pairs(block)
        self.convolutions = nn.ModuleList(FusedConvolution(*pair, True, backend, dtype) for pair in pairs)
        self.downsample = None
        if type(block.downsample) is nn.Sequential:
            self.downsample = FusedConvolution(*block.downsample, False, backend, dtype)
            self.convolutions[-1].bias.data += self.downsample.bias
            self.downsample.bias = None

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """Same as the original block; `overwrite`: nothing else needs x."""
        paths.note("backbone", "frozen copy")
        shortcut = x
        if self.downsample is not None:
            shortcut, overwrite = self.downsample(x), why_not_plain(self.downsample) is None
        *inner, last = self.convolutions
        for conv in inner:
            x = conv(x)
        return last(x, shortcut, overwrite)


class FusedStage(nn.Sequential):
    """Residual blocks; each may overwrite the previous block's output, unless a hook has seen that output."""

    is_fused = True

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks in order."""
        overwrite = False
        for block in self:
            if not isinstance(block, FusedBlock):
                x, overwrite = block(x), False
                continue
            x = block(x, overwrite)
            overwrite = all(why_not_plain(module) is None for module in block.modules())
        return x


@torch.no_grad()
def fused_copy(model: Model, dtype: torch.dtype | None = None) -> tuple[Model, FusionReport]:
    """Make a frozen copy in evaluation mode, fused where possible, and a report.

    Args:
        model: does not change.
        dtype: of the fused parts' weights; default: the model's dtype. Outputs of fused parts have this dtype, so other
            parts need autocast if their dtype differs.
    """
    # `copy.deepcopy` takes entries of the memo as copies, so weights of fused parts are not copied first.
    memo: dict[int, object] = {}
    report = FusionReport()
    for name, module in model.named_modules():
        if isinstance(module, ResNetBody):
            memo |= _fused_parts(module, f"{name}." if name else "", report, dtype)
        elif isinstance(module, TimmBackbone):
            report.left[name] = f"{module.name}: modules of timm are called"
        # A hook that is a method would be copied with its object, and the user's object would see no calls.
        memo |= {id(hooks): hooks for hooks in (getattr(module, name) for name in HOOKS)}
        # Tensors that a hook has left on the module, as old weight norm does, cannot be copied with their graph.
        tensors = [x for x in module.__dict__.values() if isinstance(x, Tensor) and not x.is_leaf]
        memo |= {id(x): x.detach().clone() for x in tensors}
    copied = copy.deepcopy(model, memo)
    for body in (module for module in copied.modules() if isinstance(module, ResNetBody)):
        for name, stage in ((name, getattr(body, name)) for name in resnet.STAGES):
            if type(stage) is nn.Sequential and why_not_plain(stage) is None:
                setattr(body, name, FusedStage(*stage))
    return copied.eval().requires_grad_(False), report


def _fused_parts(
    body: ResNetBody, prefix: str, report: FusionReport, dtype: torch.dtype | None
) -> dict[int, nn.Module]:
    """`id` of each module that can be fused → its replacement."""
    parts: dict[int, nn.Module] = {}
    for name, reason in resnet.survey(body).items():
        if reason is not None:
            report.left[prefix + name] = reason
            continue
        report.fused.append(prefix + name)
        module = body.get_submodule(name)
        if name != "conv1":
            parts[id(module)] = FusedBlock(module, body.backend, dtype)
            continue
        parts[id(module)] = FusedConvolution(module, body.bn1, True, body.backend, dtype)
        parts |= {id(body.bn1): nn.Identity(), id(body.relu): nn.Identity()}
    return parts
