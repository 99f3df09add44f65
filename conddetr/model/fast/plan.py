"""The plan of a step: which parts of a model run from fused operations, and their weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conddetr.kernels import paths, registry
from conddetr.kernels.common.launch import cdiv
from conddetr.kernels.weights import FrozenNorm, Recipe, Shift, Weight, prepare_weights
from conddetr.model import resnet
from conddetr.model.backbone.resnet import ResNetBackbone, ResNetBody
from conddetr.model.encoder import Encoder
from conddetr.model.families.conditional_detr.decoder import ConditionalDecoder
from conddetr.model.fast import decoder as fast_decoder
from conddetr.model.fast import encoder as fast_encoder
from conddetr.model.fast import parts
from conddetr.model.fast.layers import linear, seeds
from conddetr.model.grid import FeatureGrid
from conddetr.model.plain import why_not_plain
from conddetr.model.transformer import Transformer

SEEDS_PER_LAYER = 5
"""Largest number of operations with random bits in a layer."""

_RECIPES = frozenset(get_args(Recipe))

Tree = TypeVar("Tree")


@dataclass
class Plan:
    """The parts of one forward pass; parts that are None are called as modules."""

    model: nn.Module
    dtype: torch.dtype
    folded: dict[int, tuple[Tensor, Tensor]] | None
    """`id` of a convolution → weight and bias, its frozen norm folded in."""
    input_proj: tuple[Tensor, Tensor] | None
    encoder: list[fast_encoder.LayerWeights | None] | None
    decoder: fast_decoder.DecoderWeights | None
    seeds: Iterator[Tensor]

    def backbone(self, images: Tensor) -> Tensor:
        """Same as the model's backbone."""
        if self.folded is None:
            return self.model.backbone(images)
        [backbone] = self.model.backbone
        *_, features = resnet.stages(backbone.body, images, backbone.body.backend, self._folded)
        return features

    def _folded(self, conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
        return self.folded[id(conv)]

    def tokens(self, features: Tensor) -> Tensor:
        """[B, C, h, w] features -> [B, h·w, dim], same as the model's input projection."""
        if self.input_proj is None:
            return self.model.input_proj(features).flatten(2).transpose(1, 2)
        weight, bias = self.input_proj
        # In channels-last a 1×1 convolution is a matrix product.
        return linear(features.to(self.dtype).permute(0, 2, 3, 1).flatten(1, 2), weight.flatten(1), bias)

    def transformer(
        self, tokens: Tensor, grid: FeatureGrid, position: Tensor, object_query: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Same as the model's transformer."""
        transformer = self.model.transformer
        if self.encoder is None and self.decoder is None:
            return transformer(tokens, grid, position, object_query)
        tokens, position = tokens.to(self.dtype), position.to(self.dtype)
        if self.encoder is None:
            memory = transformer.encoder(tokens, grid.padding, position)
        else:
            memory = fast_encoder.encode(transformer.encoder, self.encoder, tokens, grid.padding, position, self.seeds)
        is_rectangle = grid.padding is None or grid.valid_cells is not None
        if self.decoder is None or not is_rectangle:
            return transformer.decoder(memory, grid, position, object_query)
        memory = memory.to(self.dtype)
        return fast_decoder.decode(transformer.decoder, self.decoder, memory, grid, position, object_query, self.seeds)


def make_plan(model: nn.Module, images: Tensor, object_query: Tensor) -> Plan | None:
    """Check the model's current state and make the weights of the step.

    Args:
        model: a `DETR`.
        images: [B, 3, H, W].
        object_query: [Q, C], the parameter or a module's output.

    Returns:
        None if fused operations cannot run: another device, backend eager, torch.compile, a function transform.
    """
    device = images.device
    dtype = step_dtype(device, model.dtype)
    if not can_run(model.backend, device, dtype):
        return None
    tokens = _number_of_tokens(model.backbone, images)
    backbone = _backbone_recipes(model.backbone)
    input_proj = _input_recipes(model.input_proj, tokens)
    encoder = decoder = None
    if _is_plain(model.transformer, Transformer):
        inner = model.transformer
        encoder = fast_encoder.recipes(inner.encoder, tokens) if _is_plain(inner.encoder, Encoder) else None
        if _is_plain(inner.decoder, ConditionalDecoder) and type(object_query) is nn.Parameter:
            decoder = fast_decoder.recipes(inner.decoder, object_query, len(images), tokens)
    paths.note("decoder", "modules" if decoder is None else "fused operations")
    trees = (backbone, input_proj, encoder, decoder)
    layers = len(encoder or ()) + len(decoder.layers if decoder else ())
    step_seeds = seeds(device, SEEDS_PER_LAYER * layers)
    if model.training and layers and (model.recomputes or model.config.dropout):
        # Sampled before any unit runs: a unit that is recomputed repeats the random numbers that it sampled itself.
        # Without recomputation too, so that both have the same random numbers.
        step_seeds = chain([next(step_seeds)], step_seeds)
    return Plan(model, dtype, *make_weights(trees, dtype), step_seeds)


def step_dtype(device: torch.device, otherwise: torch.dtype) -> torch.dtype:
    """Autocast's dtype if it is on, else `otherwise`."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else otherwise


def can_run(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model with this backend runs from fused operations on this device."""
    if backend == "eager" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    # `auto` never chooses Triton's interpreter, so a model with backend `triton` requests it by name.
    wanted = "triton" if backend == "triton" else "auto"
    return registry.OPERATIONS["prepare_weights"].prefer(wanted, device, dtype).backend == "triton"


def _is_plain(part: nn.Module, expected: type) -> bool:
    return type(part) is expected and why_not_plain(part) is None


def _backbone_recipes(backbone: nn.Module) -> dict[int, tuple[Recipe, Recipe]] | None:
    """Recipes of the convolutions in a ResNet's plain parts."""
    if not _is_plain(backbone, nn.Sequential) or [type(part) for part in backbone] != [ResNetBackbone]:
        return None
    body = backbone[0].body
    if why_not_plain(backbone[0]) is not None or not _is_plain(body, ResNetBody):
        return None
    return folded_recipes(body)


def folded_recipes(body: nn.Module) -> dict[int, tuple[Recipe, Recipe]]:
    """`id` of a convolution of a ResNet's plain parts → recipes of weight and bias with its frozen norm folded in."""
    return {id(conv): _folded_recipes(conv, norm) for conv, norm in resnet.plain_pairs(body)}


def _folded_recipes(conv: nn.Conv2d, norm: nn.Module) -> tuple[Recipe, Recipe]:
    # Read from the dictionary of buffers: attribute access of `nn.Module` is slower.
    vectors = (norm._buffers[name] for name in ("weight", "bias", "running_mean", "running_var"))
    frozen = FrozenNorm(*vectors, getattr(norm, "eps", resnet.EPS))
    return Weight((conv.weight,), frozen), Shift(frozen)


def _number_of_tokens(backbone: nn.Module, images: Tensor) -> int | None:
    """Number of tokens of all images [B, 3, H, W], as our backbones return them; None: not known."""
    stride = getattr(next(backbone.children(), None), "stride", None)
    if not isinstance(stride, int):
        return None
    return len(images) * cdiv(images.shape[-2], stride) * cdiv(images.shape[-1], stride)


def _input_recipes(conv: nn.Module, tokens: int | None) -> tuple[Recipe, Recipe] | None:
    is_product = _is_plain(conv, nn.Conv2d) and resnet.window(conv) == resnet.POINTWISE and conv.kernel_size == (1, 1)
    if not is_product or any(type(x) is not nn.Parameter for x in (conv.weight, conv.bias)):
        return None
    return Weight((conv.weight,)), Weight((conv.bias,), copies=parts.copies(tokens))


def make_weights(trees: tuple, dtype: torch.dtype) -> tuple | list:
    """Replace the recipes in trees by weights.

    One process makes all weights at once. Several processes make them tree by tree, so that the gradients of one tree
    can be exchanged while the next are computed.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return _made_at_once(trees, dtype)
    return [_made_at_once(tree, dtype) for tree in trees]


def _made_at_once(tree: Tree, dtype: torch.dtype) -> Tree:
    recipes: list[Recipe] = []
    _flatten(tree, recipes)
    return _rebuild(tree, iter(prepare_weights(recipes, dtype)))


def _flatten(tree: object, recipes: list[Recipe]) -> None:
    """Append all recipes of a tree."""
    if type(tree) in _RECIPES:
        recipes.append(tree)
    elif isinstance(tree, (tuple, list, dict)):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            _flatten(branch, recipes)


def _rebuild(tree: Tree, made: Iterator[Tensor]) -> Tree:
    if type(tree) in _RECIPES:
        return next(made)
    if isinstance(tree, dict):
        return {key: _rebuild(branch, made) for key, branch in tree.items()}
    if isinstance(tree, (tuple, list)):
        branches = [_rebuild(branch, made) for branch in tree]
        return type(tree)(*branches) if hasattr(tree, "_fields") else type(tree)(branches)
    return tree
