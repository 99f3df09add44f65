"""The official Conditional DETR (Atten4Vis/ConditionalDETR): its model on our operations.

Parameter names are the same in both codes, so our transformer is kept beside the official one and shares its
parameters.
"""

from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conddetr import config as configs
from conddetr.interop.hooks import report_hooks
from conddetr.interop.official.mixing import Accelerated, arguments, mix_in
from conddetr.interop.official.weights import identify
from conddetr.interop.report import AccelerationReport, Part, describe, parameter_of, report_backbone
from conddetr.kernels import paths, registry
from conddetr.model import resnet
from conddetr.model.grid import FeatureGrid
from conddetr.model.transformer import Transformer as OurTransformer

_SETTINGS = ("p", "dropout", "eps", "activation", "normalize_before", "return_intermediate", "num_heads")
"""Attributes of the transformer's modules, besides parameters, that determine their outputs."""
_EPS = 1e-5
"""The eps of our layer norms."""


def is_model(model: nn.Module) -> bool:
    """Whether the model has the parts, names and internal interface of the official `ConditionalDETR`."""
    parts = ("backbone", "transformer", "input_proj", "query_embed", "class_embed", "bbox_embed")
    if not all(isinstance(getattr(model, name, None), nn.Module) for name in parts):
        return False
    is_conditional = identify(model.state_dict()).get("family") == "conditional-detr"
    return is_conditional and arguments(model.transformer) == ["src", "mask", "query_embed", "pos_embed"]


class Transformer(Accelerated):
    """Encoder and decoder by ours. The official code runs if a module or a setting was changed."""

    _twin: tuple[OurTransformer]
    """Our transformer, which shares the official parameters; in a tuple, so that it is not a submodule."""
    _settings: list[object]
    """The settings that ours was built with."""

    def forward(self, src: Tensor, mask: Tensor, query_embed: Tensor, pos_embed: Tensor) -> list[Tensor]:
        """src and pos_embed [B, C, h, w], mask [B, h, w] bool, True = padding, query_embed [Q, C]
        -> normalised outputs of all layers [L, B, Q, C], and sigmoid reference points [B, Q, 2].
        """
        # All parts of ours are in the same mode.
        is_one_mode = all(module.training == self.training for module in self.modules())
        if not (is_one_mode and self._is_unmodified() and _settings(self) == self._settings):
            paths.note("transformer", "the official code")
            return super().forward(src, mask, query_embed, pos_embed)
        paths.note("transformer", "ours")
        (twin,) = self._twin
        if twin.training != self.training:
            twin.train(self.training)
        tokens, position = (x.flatten(2).transpose(1, 2) for x in (src, pos_embed))
        grid = FeatureGrid(tuple(src.shape[-2:]), mask.flatten(1), None)
        hidden, reference = twin(tokens, grid, position, query_embed)
        return [hidden, reference.expand(len(src), -1, -1)]


class ResNetBody(Accelerated):
    """torchvision's `IntermediateLayerGetter` of a ResNet, in channels-last, with norms folded within the graph."""

    backend: str

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """[B, 3, H, W] -> the requested feature maps, by name."""
        with registry.demanded(self.backend):
            if _body_misfit(self) is not None or resnet.is_unproven(self.backend, x):
                paths.note("backbone", "the official code")
                return super().forward(x)
            maps = dict(zip(resnet.STAGES, resnet.stages(self, x, self.backend), strict=True))
        return OrderedDict((name, maps[stage]) for stage, name in self.return_layers.items())


def accelerate_model(model: nn.Module, backend: str, choice: registry.Choice, report: AccelerationReport) -> None:
    """Replace the supported parts, and list all parts in the report.

    Args:
        model: the official `ConditionalDETR`, changed in place.
        backend: as requested; `choice` is the backend that it selects on the model's current device.
    """
    reason = _transformer_misfit(model.transformer)
    if reason is None:
        twin, settings = _twin(model.transformer, backend), _settings(model.transformer)
        mix_in(model.transformer, Transformer, _twin=(twin,), _settings=settings)
        report.replaced.append(Part("transformer", 1, f"backend {describe(choice, parameter_of(model))}"))
    else:
        report.left.append(Part("transformer", 1, reason))
    body = getattr(model.backbone[0], "body", model.backbone[0])
    reason = _body_misfit(body)
    if reason is None:
        mix_in(body, ResNetBody, backend=backend)
        report_backbone(body, report)
    else:
        report.left.append(Part("backbone", 1, reason))
    report.left.append(Part("position encoding and heads", 1, "the model's own forward computes them"))
    report.left.append(Part("matcher and loss", 1, "not part of the model: conddetr.accelerate(criterion)"))
    report_hooks(model, report, partial(_fallback, model))


def _fallback(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """A note on the part that runs the official code because of hooks of this module; None if no part does."""
    body = getattr(model.backbone[0], "body", model.backbone[0])
    for accelerated, note in (
        (model.transformer, "the official code of the transformer runs while they are attached"),
        (body, "its part of the backbone runs as shipped"),
    ):
        is_inside = module is not accelerated and any(module is inner for inner in accelerated.modules())
        if isinstance(accelerated, Accelerated) and is_inside:
            return note
    return None


def _settings(transformer: nn.Module) -> list[object]:
    """The values of all `_SETTINGS`, in the order of the modules."""
    attributes = [vars(module) for module in transformer.modules()]
    return [values[name] for values in attributes for name in _SETTINGS if name in values]


def _twin(transformer: nn.Module, backend: str) -> OurTransformer:
    """Our transformer with the official one's parameter dictionaries, so that it sees every change to them."""
    twin, originals = _same_size(transformer, backend), dict(transformer.named_modules())
    for name, module in twin.named_modules():
        if module._parameters:
            module._parameters = originals[name]._parameters
    return twin


def _same_size(transformer: nn.Module, backend: str) -> OurTransformer:
    """Our transformer of the same size, on the meta device."""
    first = transformer.decoder.layers[0]
    config = configs.ModelConfig(
        hidden_dim=transformer.d_model,
        num_heads=transformer.nhead,
        encoder_layers=len(transformer.encoder.layers),
        decoder_layers=len(transformer.decoder.layers),
        ffn_dim=first.linear1.out_features,
        dropout=first.dropout.p,
    )
    with torch.device("meta"):
        return OurTransformer(config, backend)


def _transformer_misfit(transformer: nn.Module) -> str | None:
    """The reason why ours is not equivalent to this transformer; None if it is."""
    layers = [*transformer.encoder.layers, *transformer.decoder.layers]
    if any(layer.normalize_before or layer.activation is not F.relu for layer in layers):
        return "expected layers that normalise last, with ReLU"
    if not transformer.decoder.return_intermediate:
        return "its decoder returns the last layer only (return_intermediate)"
    rates = {module.p for module in transformer.modules() if isinstance(module, nn.Dropout)}
    attentions = [layer.self_attn for layer in layers] + [layer.cross_attn for layer in transformer.decoder.layers]
    rates |= {attention.dropout for attention in attentions}
    if len(rates) != 1:
        return f"expected one rate of dropout, got {sorted(rates)}"
    eps = {module.eps for module in transformer.modules() if isinstance(module, nn.LayerNorm)}
    if eps != {_EPS}:
        return f"expected layer norms with eps {_EPS}, got {sorted(eps)}"
    actual, expected = (
        {name: tuple(x.shape) for name, x in module.named_parameters()}
        for module in (transformer, _same_size(transformer, "eager"))
    )
    different = sorted(name for name in actual.keys() | expected.keys() if actual.get(name) != expected.get(name))
    return (
        f"{different[0]}: expected {expected.get(different[0])}, got {actual.get(different[0])}" if different else None
    )


def _body_misfit(body: nn.Module) -> str | None:
    """The reason why `ResNetBody` is not equivalent to this backbone; None if it is, part for part."""
    names = [name for name, _ in body.named_children()]
    if names != ["conv1", "bn1", "relu", "maxpool", *resnet.STAGES]:
        return f"{type(body).__name__} is not a ResNet of torchvision up to {resnet.STAGES[-1]}"
    if not set(getattr(body, "return_layers", [None])) <= set(resnet.STAGES):
        return "expected torchvision's IntermediateLayerGetter that returns whole stages"
    return None
