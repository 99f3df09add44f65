"""transformers' DAB-DETR: its cross-attention is conditional attention, with anchors of four numbers.

Its sine embedding stays: it embeds boxes, is recomputed in every layer and scaled by their size.
"""

from torch import Tensor
from transformers.models.dab_detr import modeling_dab_detr as modeling

from conddetr.interop.huggingface.attention import as_under_autocast, cross_attention
from conddetr.interop.huggingface.backbone import Maps, encode
from conddetr.interop.huggingface.calls import runs_ours
from conddetr.interop.huggingface.masks import is_floating_mask, key_padding
from conddetr.kernels import paths, registry
from conddetr.model.attention import self_attention


class ConvEncoder(modeling.DabDetrConvEncoder):
    """In channels-last, with norms folded within the graph."""

    backend: str

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> Maps:
        """[B, 3, H, W] and its mask [B, H, W] -> the maps of all stages."""
        with registry.demanded(self.backend):
            maps = encode(self, pixel_values, pixel_mask)
        return super().forward(pixel_values, pixel_mask) if maps is None else maps


class EncoderSelfAttention(modeling.DetrAttention):
    """PyTorch's fused attention; ours on a CPU."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        object_queries: Tensor | None = None,
        key_value_states: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As the base class, which documents the arguments; no attention weights."""
        if output_attentions or key_value_states is not None or not is_floating_mask(attention_mask):
            paths.note("self-attention", "transformers' own")
            return super().forward(hidden_states, attention_mask, object_queries, key_value_states, output_attentions)
        positioned = hidden_states if object_queries is None else hidden_states + object_queries
        projected = as_under_autocast(self.q_proj(positioned), self.k_proj(positioned), self.v_proj(hidden_states))
        dropout_p = self.attention_dropout if self.training else 0.0
        attended = self_attention(*projected, self.num_heads, key_padding(attention_mask), dropout_p, self.backend)
        return self.out_proj(attended), None


class CrossAttention(modeling.DabDetrAttention):
    """Conditional cross-attention: queries and keys are twice as wide as values, and each head has its content half
    first, its spatial half after it.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_states: Tensor | None = None,
        value_states: Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As the base class, which documents the arguments; no attention weights."""
        is_plain = not output_attentions and is_floating_mask(attention_mask)
        if not (is_plain and runs_ours(self.backend, hidden_states)):
            paths.note("cross-attention", "transformers' own")
            return super().forward(hidden_states, attention_mask, key_states, value_states, output_attentions)
        heads = [x.unflatten(-1, (self.attention_heads, -1)) for x in (hidden_states, key_states, value_states)]
        attended = cross_attention(
            *heads[0].chunk(2, dim=-1),
            *heads[1].chunk(2, dim=-1),
            heads[2],
            padding=key_padding(attention_mask),
            dropout_p=self.attention_dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self.output_proj(attended), None


def is_cross_attention(module: modeling.DabDetrAttention) -> bool:
    """Whether this is the cross-attention to the image; the queries' self-attention has the same class."""
    return module.embed_dim == 2 * module.output_dim
