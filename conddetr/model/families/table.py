"""The parts of each family. All families share the backbone, the encoder, the matching and the box losses."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conddetr.config import ModelConfig
from conddetr.model.families.conditional_detr import heads as conditional_heads
from conddetr.model.families.conditional_detr import products as conditional_products
from conddetr.model.families.conditional_detr.decoder import ConditionalDecoder
from conddetr.model.families.detr import heads as detr_heads
from conddetr.model.families.detr import products as detr_products
from conddetr.model.families.detr.decoder import DETRDecoder
from conddetr.model.families.products import Products
from conddetr.model.layers import MLP


@dataclass(frozen=True)
class Parts:
    """The parts of one family."""

    decoder: Callable[[ModelConfig, str], nn.Module]
    """Builds the decoder from a configuration and a backend. It has the call of `ConditionalDecoder`; attention maps
    are read from its `layers`."""
    initialize_heads: Callable[[nn.Linear, MLP], None]
    """Initialises the class and box heads in place, after everything else is built."""
    class_loss: Callable[[Tensor, Tensor, Tensor, Tensor, ModelConfig, str], Tensor]
    """Logits [L, B, Q, K], assignment [L, B, Q] (-1 for none), labels [B, N], weights of the classes [K], the
    configuration and the backend of losses -> the sum over each layer, [L]."""
    divisor: Callable[[Tensor, torch.dtype], Tensor]
    """`Criterion.normalizer` and the dtype of the losses -> divisor of the class, L1 and GIoU losses [3, L], in a shape
    that broadcasts."""
    cross_attention: Callable[[nn.Module], nn.Module]
    """A decoder layer -> the module whose inputs `products` takes."""
    products: Callable[..., Products]
    """A decoder layer and those inputs -> the products of its attention."""
    attention_operation: str
    """The operation whose backend a run reports for its attention."""
    loss_operation: str
    """The operation whose backend a run reports for its losses."""


PARTS: dict[str, Parts] = {
    "conditional-detr": Parts(
        decoder=ConditionalDecoder,
        initialize_heads=conditional_heads.initialize_heads,
        class_loss=conditional_heads.class_loss,
        divisor=conditional_heads.divisor,
        cross_attention=conditional_products.cross_attention,
        products=conditional_products.products,
        attention_operation="conditional_attention",
        loss_operation="focal_loss",
    ),
    "detr": Parts(
        decoder=DETRDecoder,
        initialize_heads=detr_heads.initialize_heads,
        class_loss=detr_heads.class_loss,
        divisor=detr_heads.divisor,
        cross_attention=detr_products.cross_attention,
        products=detr_products.products,
        attention_operation="self_attention",
        loss_operation="matched_box_loss",
    ),
}
