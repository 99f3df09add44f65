"""The official Conditional DETR (Atten4Vis/ConditionalDETR): its model and its criterion, on our operations.

A module gets a subclass of its own class, mixed with ours: parameters, hooks, copies and pickles go on as they were.
Parameter names are the same in both codes, so a transformer of ours stands beside theirs and has the very same
parameters.
"""

import inspect
from collections import OrderedDict
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conddetr import config as configs
from conddetr.interop.accelerate import AccelerationReport, Part, describe, parameter_of, report_backbone
from conddetr.interop.accelerated.changes import change
from conddetr.interop.accelerated.hooks import report_hooks
from conddetr.interop.checkpoints import identify
from conddetr.kernels import paths, registry
from conddetr.loss.criterion import loss_backend
from conddetr.model import resnet
from conddetr.model.grid import FeatureGrid
from conddetr.model.plain import why_not_plain
from conddetr.model.transformer import Transformer as OurTransformer
from conddetr.zoo import build_criterion

MATCHING_ALPHA = 0.25
"""The official matcher's α, whatever the criterion's is; ours has one for both."""
_SETTINGS = ("p", "dropout", "eps", "activation", "normalize_before", "return_intermediate", "num_heads")
"""Attributes of the transformer's modules, beside parameters, that decide what they compute."""
_EPS = 1e-5
"""Of our layer norms."""


def is_model(model: nn.Module) -> bool:
    """Whether this has the parts, the names and the inner interface of the official `ConditionalDETR`."""
    parts = ("backbone", "transformer", "input_proj", "query_embed", "class_embed", "bbox_embed")
    if not all(isinstance(getattr(model, name, None), nn.Module) for name in parts):
        return False
    is_conditional = identify(model.state_dict()).get("family") == "conditional-detr"
    return is_conditional and _arguments(model.transformer) == ["src", "mask", "query_embed", "pos_embed"]


def is_criterion(module: nn.Module) -> bool:
    """Whether this is the official `SetCriterion`: with focal loss, so not that of the original DETR."""
    names = ("num_classes", "matcher", "weight_dict", "losses", "focal_alpha")
    is_named = any(base.__name__ == "SetCriterion" for base in type(module).__mro__)
    return is_named and all(hasattr(module, name) for name in names) and _arguments(module) == ["outputs", "targets"]


def _arguments(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


class _Accelerated:
    """Mixed into their class. What is pickled or copied names their class, and gets ours again."""

    _known: tuple[nn.Module, ...] = ()
    """Our code reads these modules' parameters; it was written for no others."""

    def __reduce_ex__(self, protocol: int) -> tuple:
        ours, original = type(self).__bases__
        return _blank, (ours, original), self.__dict__

    def _is_as_known(self) -> bool:
        """No module was exchanged, none has what ours would not call, and this is no copy of `DataParallel`."""
        found = tuple(self.modules())[1:]
        if len(found) != len(self._known) or getattr(self, "_is_replica", False):
            return False
        pairs = zip(found, self._known, strict=True)
        return all(a is b and why_not_plain(a) is None for a, b in pairs)


@lru_cache
def _subclass(ours: type, original: type) -> type:
    return type(f"Accelerated{original.__name__}", (ours, original), {"__module__": __name__})


def _blank(ours: type, original: type) -> nn.Module:
    kind = _subclass(ours, original)
    return kind.__new__(kind)


def _mix_in(module: nn.Module, ours: type, **attributes: object) -> None:
    kind = type(module) if isinstance(module, ours) else _subclass(ours, type(module))
    change(module, kind, _known=tuple(module.modules())[1:], **attributes)


class Transformer(_Accelerated):
    """Encoder and decoder by ours. Where `_is_as_known` says no, theirs runs, and where settings were changed."""

    _twin: tuple[OurTransformer]
    """In a tuple, so that it is no part of the module: it holds theirs' parameters."""
    _settings: list[object]
    """Those that ours was made with."""

    def forward(self, src: Tensor, mask: Tensor, query_embed: Tensor, pos_embed: Tensor) -> list[Tensor]:
        """src and pos_embed [B, C, h, w], mask [B, h, w] bool, True = padding, query_embed [Q, C]
        -> normalised outputs of all layers [L, B, Q, C], and sigmoid reference points [B, Q, 2].
        """
        # Of ours all parts are in one mode.
        is_one_mode = all(module.training == self.training for module in self.modules())
        if not (is_one_mode and self._is_as_known() and _settings(self) == self._settings):
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


class ResNetBody(_Accelerated):
    """torchvision's `IntermediateLayerGetter` of a ResNet, in channels-last, its norms folded within the graph."""

    backend: str

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """[B, 3, H, W] -> the feature maps that are asked for, by name."""
        with registry.demanded(self.backend):
            if _body_misfit(self) is not None or resnet.is_unproven(self.backend, x):
                paths.note("backbone", "the official code")
                return super().forward(x)
            maps = dict(zip(resnet.STAGES, resnet.stages(self, x, self.backend), strict=True))
        return OrderedDict((name, maps[stage]) for stage, name in self.return_layers.items())


class SetCriterion(_Accelerated):
    """Matching and losses of all layers at once; the losses are named and scaled as theirs."""

    backend: str

    def forward(self, outputs: dict, targets: list[dict]) -> dict[str, Tensor]:
        """Unweighted losses and errors by name. Outputs that ours does not know (masks, of an encoder) are for theirs,
        and so are a matcher that was exchanged or has hooks, and settings that ours does not have.

        Raises:
            ValueError: targets do not fit, or matching is on the host and predictions are not finite; names the image.
        """
        is_known = set(outputs) <= {"pred_logits", "pred_boxes", "aux_outputs"} and self._is_as_known()
        if not is_known or _criterion_misfit(self) is not None:
            paths.note("loss", "the official code")
            return super().forward(outputs, targets)
        targets = [{name: target[name] for name in ("labels", "boxes")} for target in targets]
        losses = _build_criterion(_loss_config(self), loss_backend(self.backend))(outputs, targets)
        del losses["loss"]
        return losses


_build_criterion = lru_cache(maxsize=8)(build_criterion)


def _loss_config(criterion: nn.Module) -> configs.ModelConfig:
    matcher = criterion.matcher
    return configs.resolve(
        "conditional-detr-r50",
        num_classes=criterion.num_classes,
        class_cost=matcher.cost_class,
        bbox_cost=matcher.cost_bbox,
        giou_cost=matcher.cost_giou,
        focal_alpha=criterion.focal_alpha,
    )


def accelerate_model(model: nn.Module, backend: str, choice: registry.Choice, report: AccelerationReport) -> None:
    """Replace what can be replaced, and say so in the report.

    Args:
        model: for which `is_model` holds, changed in place.
        backend: as asked for; `choice` is what it means where the model is now.
    """
    reason = _transformer_misfit(model.transformer)
    if reason is None:
        twin, settings = _twin(model.transformer, backend), _settings(model.transformer)
        _mix_in(model.transformer, Transformer, _twin=(twin,), _settings=settings)
        report.replaced.append(Part("transformer", 1, f"backend {describe(choice, parameter_of(model))}"))
    else:
        report.left.append(Part("transformer", 1, reason))
    body = getattr(model.backbone[0], "body", model.backbone[0])
    reason = _body_misfit(body)
    if reason is None:
        _mix_in(body, ResNetBody, backend=backend)
        report_backbone(body, report)
    else:
        report.left.append(Part("backbone", 1, reason))
    report.left.append(Part("position encoding and heads", 1, "the model's own forward computes them"))
    report.left.append(Part("matcher and loss", 1, "not part of the model: conddetr.accelerate(criterion)"))
    report_hooks(model, report, partial(_gives_way, model))


def _gives_way(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """What runs as the official code because of hooks of a module of this name."""
    body = getattr(model.backbone[0], "body", model.backbone[0])
    for accelerated, what in (
        (model.transformer, "the official code of the transformer runs as long as they are there"),
        (body, "its part of the backbone runs as shipped"),
    ):
        is_inside = module is not accelerated and any(module is found for found in accelerated.modules())
        if isinstance(accelerated, _Accelerated) and is_inside:
            return what
    return None


def accelerate_criterion(criterion: nn.Module, backend: str, report: AccelerationReport) -> None:
    """As `accelerate_model`, for what `is_criterion` holds."""
    reason = _criterion_misfit(criterion)
    if reason is not None:
        report.left.append(Part("matcher and loss", 1, reason))
        return
    configs.check_backend(backend)
    _loss_config(criterion)  # Refuses values that ours does not take.
    _mix_in(criterion, SetCriterion, backend=backend)
    report.replaced.append(Part("matcher and loss", 1, "all layers at once"))


def _criterion_misfit(criterion: nn.Module) -> str | None:
    """The reason why ours is not the same as this one; None where it is."""
    if {"labels", "boxes", "cardinality"} != set(criterion.losses):
        return f"its losses are {', '.join(criterion.losses)}; expected labels, boxes, cardinality"
    if not all(hasattr(criterion.matcher, f"cost_{name}") for name in ("class", "bbox", "giou")):
        return f"{type(criterion.matcher).__name__} is no matcher by class, L1 and GIoU"
    if criterion.focal_alpha != MATCHING_ALPHA:
        return f"focal_alpha {criterion.focal_alpha}: its matcher uses {MATCHING_ALPHA} all the same"
    return None


def _settings(transformer: nn.Module) -> list[object]:
    """The values of all `_SETTINGS`, in the order of the modules."""
    attributes = [vars(module) for module in transformer.modules()]
    return [found[name] for found in attributes for name in _SETTINGS if name in found]


def _twin(transformer: nn.Module, backend: str) -> OurTransformer:
    """Ours, with the parameters of theirs: with their very dictionaries, so that it sees whatever happens to them."""
    twin, theirs = _same_size(transformer, backend), dict(transformer.named_modules())
    for name, module in twin.named_modules():
        if module._parameters:
            module._parameters = theirs[name]._parameters
    return twin


def _same_size(transformer: nn.Module, backend: str) -> OurTransformer:
    """Ours, without memory."""
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
    """The reason why ours is not the same as this one; None where it is."""
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
    found, ours = (
        {name: tuple(x.shape) for name, x in module.named_parameters()}
        for module in (transformer, _same_size(transformer, "eager"))
    )
    different = sorted(name for name in found.keys() | ours.keys() if found.get(name) != ours.get(name))
    return f"{different[0]}: expected {ours.get(different[0])}, got {found.get(different[0])}" if different else None


def _body_misfit(body: nn.Module) -> str | None:
    """The reason why `ResNetBody` is not the same as this one; None where it is, part for part."""
    names = [name for name, _ in body.named_children()]
    if names != ["conv1", "bn1", "relu", "maxpool", *resnet.STAGES]:
        return f"{type(body).__name__} is no ResNet of torchvision up to {resnet.STAGES[-1]}"
    if not set(getattr(body, "return_layers", [None])) <= set(resnet.STAGES):
        return "expected torchvision's IntermediateLayerGetter that returns whole stages"
    return None
