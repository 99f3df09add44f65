"""transformers 4.5x (tested: 4.57) and 5.0: the decoder layers hold the projections; attention is matrix products."""

from torch import Tensor
from transformers.models.conditional_detr import modeling_conditional_detr as modeling

from conddetr.interop.huggingface.attention import as_under_autocast, cross_attention
from conddetr.interop.huggingface.calls import is_plain_call, runs_ours
from conddetr.interop.huggingface.decoder import decode
from conddetr.interop.huggingface.masks import is_floating_mask, key_padding, mask_of_keys
from conddetr.kernels import paths
from conddetr.model.attention import self_attention


class EncoderSelfAttention(modeling.DetrAttention):
    """PyTorch's fused attention; ours on a CPU."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        object_queries: Tensor | None = None,
        key_value_states: Tensor | None = None,
        spatial_position_embeddings: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As the base class; no attention weights."""
        needs_original = output_attentions or key_value_states is not None or spatial_position_embeddings is not None
        if needs_original or not is_floating_mask(attention_mask):
            paths.note("self-attention", "transformers' own")
            return super().forward(
                hidden_states,
                attention_mask,
                object_queries,
                key_value_states,
                spatial_position_embeddings,
                output_attentions,
            )
        positioned = hidden_states if object_queries is None else hidden_states + object_queries
        projected = as_under_autocast(self.q_proj(positioned), self.k_proj(positioned), self.v_proj(hidden_states))
        dropout_p = self.dropout if self.training else 0.0
        attended = self_attention(*projected, self.num_heads, key_padding(attention_mask), dropout_p, self.backend)
        return self.out_proj(attended), None


class DecoderAttention(modeling.ConditionalDetrAttention):
    """Self-attention of the queries, or conditional cross-attention: then queries and keys are twice as wide, and
    each head has its content half first, its spatial half after it.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_states: Tensor | None = None,
        value_states: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As the base class; no attention weights."""
        is_conditional = self.embed_dim == 2 * self.out_dim
        lacks_kernel = is_conditional and not runs_ours(self.backend, hidden_states)
        if output_attentions or lacks_kernel or not is_floating_mask(attention_mask):
            paths.note("cross-attention" if is_conditional else "self-attention", "transformers' own")
            return super().forward(hidden_states, attention_mask, key_states, value_states, output_attentions)
        padding = key_padding(attention_mask)
        dropout_p = self.dropout if self.training else 0.0
        if is_conditional:
            heads = [x.unflatten(-1, (self.num_heads, -1)) for x in (hidden_states, key_states, value_states)]
            attended = cross_attention(
                *heads[0].chunk(2, dim=-1), *heads[1].chunk(2, dim=-1), heads[2], padding, dropout_p, self.backend
            )
        else:
            projected = as_under_autocast(hidden_states, key_states, value_states)
            attended = self_attention(*projected, self.num_heads, padding, dropout_p, self.backend)
        return self.out_proj(attended), None


class Decoder(modeling.ConditionalDetrDecoder):
    """The sine embedding runs in one kernel; the mask of the keys is a view, made without waiting for the device."""

    def forward(
        self,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        object_queries: Tensor | None = None,
        query_position_embeddings: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> modeling.ConditionalDetrDecoderOutput | tuple:
        """As the base class, which documents the arguments."""
        options = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        options = {name: value for name, value in options.items() if value is not None}
        is_plain = is_plain_call(self, encoder_hidden_states, encoder_attention_mask, options)
        if not (is_plain and runs_ours(self.backend, encoder_hidden_states)):
            paths.note("decoder", "transformers' own")
            return super().forward(
                inputs_embeds,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                object_queries,
                query_position_embeddings,
                **options,
                **kwargs,
            )

        fields = decode(
            self,
            inputs_embeds,
            encoder_hidden_states,
            mask_of_keys(encoder_attention_mask, inputs_embeds.shape[1], inputs_embeds.dtype),
            object_queries,
            query_position_embeddings,
        )
        return modeling.ConditionalDetrDecoderOutput(**fields)
