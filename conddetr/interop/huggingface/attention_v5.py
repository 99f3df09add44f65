"""Late transformers 5 (tested: 5.23): the attention modules hold the projections of queries, keys and values."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.conditional_detr import modeling_conditional_detr as modeling

from conddetr.interop.huggingface.attention import as_under_autocast, cross_attention
from conddetr.interop.huggingface.calls import as_shipped, asking_waits, is_plain_call, runs_ours, wants_more
from conddetr.interop.huggingface.decoder import decode
from conddetr.interop.huggingface.fast import decoder as fast_decoder
from conddetr.interop.huggingface.fast import encoder as fast_encoder
from conddetr.interop.huggingface.masks import key_padding, mask_of_keys
from conddetr.kernels import paths, registry
from conddetr.model.attention import attends_natively, self_attention

_KNOWN_MASKS = ("eager", "sdpa", "conddetr")
"""Attention implementations that take the masks of `mask_of_keys`."""


class EncoderSelfAttention(modeling.ConditionalDetrSelfAttention):
    """Native kernels on a CPU; elsewhere the model's `attn_implementation`."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """As the base class, which documents the arguments; no attention weights."""
        if not _is_native(self, hidden_states, attention_mask, kwargs):
            paths.note("self-attention", "transformers' own")
            return super().forward(hidden_states, attention_mask, position_embeddings, **kwargs)
        positioned = hidden_states if position_embeddings is None else hidden_states + position_embeddings
        return _attend(self, self.q_proj(positioned), self.k_proj(positioned), hidden_states, attention_mask), None


class DecoderSelfAttention(modeling.ConditionalDetrDecoderSelfAttention):
    """Like `EncoderSelfAttention`, for the queries."""

    def forward(
        self,
        hidden_states: Tensor,
        query_position_embeddings: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """As the base class, which documents the arguments; no attention weights."""
        if not _is_native(self, hidden_states, attention_mask, kwargs):
            paths.note("self-attention", "transformers' own")
            return super().forward(hidden_states, query_position_embeddings, attention_mask, **kwargs)
        query = self.q_content_proj(hidden_states) + self.q_pos_proj(query_position_embeddings)
        key = self.k_content_proj(hidden_states) + self.k_pos_proj(query_position_embeddings)
        return _attend(self, query, key, hidden_states, attention_mask), None


def _is_native(module: nn.Module, tokens: Tensor, mask: object, options: dict) -> bool:
    wants_weights = options.get("output_attentions", module.config.output_attentions)
    is_known_mask = mask is None or isinstance(mask, Tensor)
    return is_known_mask and not wants_weights and attends_natively(module.backend, tokens)


def _attend(module: nn.Module, query: Tensor, key: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
    dropout_p = module.attention_dropout if module.training else 0.0
    heads = query.shape[-1] // module.head_dim
    projected = as_under_autocast(query, key, module.v_proj(tokens))
    attended = self_attention(*projected, heads, key_padding(mask), dropout_p, module.backend)
    return module.o_proj(attended)


class EncoderLayer(modeling.ConditionalDetrEncoderLayer):
    """On a GPU it does not wait for the check that all values are finite."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        spatial_position_embeddings: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """As the base class, which documents the arguments."""
        if not (self.training and asking_waits(hidden_states)):
            return super().forward(hidden_states, attention_mask, spatial_position_embeddings, **kwargs)
        # The base class uses the same keywords.
        attended, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_embeddings=spatial_position_embeddings,
            **kwargs,
        )
        hidden_states = self.self_attn_layer_norm(hidden_states + F.dropout(attended, self.dropout, self.training))
        return _finite(self.final_layer_norm(hidden_states + self.mlp(hidden_states)))


def _finite(tokens: Tensor) -> Tensor:
    """Clamp a layer's output if a value is not finite, as transformers does, but without waiting for the device."""
    limit = torch.finfo(tokens.dtype).max - 1000
    limited = tokens.clamp(-limit, limit)
    if tokens.dtype != torch.float16:
        # The limit rounds to the dtype's largest number, so finite values stay in any case.
        return limited
    return torch.where(tokens.isfinite().all(), tokens, limited)


_ENCODER_KINDS = frozenset(
    (
        modeling.ConditionalDetrEncoderLayer,
        EncoderLayer,
        modeling.ConditionalDetrSelfAttention,
        EncoderSelfAttention,
        modeling.ConditionalDetrMLP,
        nn.ReLU,
    )
)
"""Classes of the parts of encoder layers that fused operations support."""


class Encoder(modeling.ConditionalDetrEncoder):
    """Fused operations on a GPU; else its layers, whose mask is a view, made without waiting for the device."""

    backend: str

    def forward(
        self,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        spatial_position_embeddings: Tensor | None = None,
        **kwargs: object,
    ) -> BaseModelOutput:
        """As the base class, which documents the arguments."""
        needs_original = self.config._attn_implementation not in _KNOWN_MASKS or wants_more(self.config, kwargs)
        needs_original = needs_original or attention_mask is None or attention_mask.dim() != 2
        if not needs_original:
            with registry.demanded(self.backend):
                memory = fast_encoder.encode(
                    self, inputs_embeds, attention_mask, spatial_position_embeddings, _ENCODER_KINDS
                )
            if memory is not None:
                return BaseModelOutput(last_hidden_state=memory)
        paths.note("encoder", "modules")
        if needs_original or not asking_waits(inputs_embeds):
            with as_shipped(self, modeling.ConditionalDetrEncoder):
                return modeling.ConditionalDetrEncoder.forward(
                    self, inputs_embeds, attention_mask, spatial_position_embeddings, **kwargs
                )

        dtype = inputs_embeds.dtype if self.config._attn_implementation == "eager" else None
        mask = mask_of_keys(attention_mask, inputs_embeds.shape[1], dtype)
        tokens = F.dropout(inputs_embeds, self.dropout, self.training)
        for layer in self.layers:
            tokens = layer(tokens, mask, spatial_position_embeddings=spatial_position_embeddings, **kwargs)
        return BaseModelOutput(last_hidden_state=tokens)


class CrossAttention(modeling.ConditionalDetrDecoderCrossAttention):
    """Concatenates nothing and writes no scores. Requested attention maps come from transformers."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        query_sine_embed: Tensor,
        encoder_position_embeddings: Tensor,
        query_position_embeddings: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """As the base class, which documents the arguments; no attention weights."""
        wants_weights = kwargs.get("output_attentions", self.config.output_attentions)
        is_known_mask = attention_mask is None or isinstance(attention_mask, Tensor)
        if wants_weights or not is_known_mask or not runs_ours(self.backend, hidden_states):
            paths.note("cross-attention", "transformers' own")
            return super().forward(
                hidden_states,
                encoder_hidden_states,
                query_sine_embed,
                encoder_position_embeddings,
                query_position_embeddings,
                attention_mask,
                **kwargs,
            )
        q_content = self.q_content_proj(hidden_states)
        q_spatial = self.q_pos_sine_proj(query_sine_embed)
        if query_position_embeddings is not None:
            # (q + q_p)·(k + k_p) + q_s·k_p = (q + q_p)·k + (q + q_p + q_s)·k_p leaves the keys unchanged.
            q_content = q_content + self.q_pos_proj(query_position_embeddings)
            q_spatial = q_content + q_spatial
        attended = cross_attention(
            *map(
                self._split,
                (
                    q_content,
                    q_spatial,
                    self.k_content_proj(encoder_hidden_states),
                    self.k_pos_proj(encoder_position_embeddings),
                    self.v_proj(encoder_hidden_states),
                ),
            ),
            padding=key_padding(attention_mask),
            dropout_p=self.attention_dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self.o_proj(attended), None

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.num_attention_heads, self.head_dim))


_DECODER_KINDS = frozenset(
    (
        modeling.ConditionalDetrDecoderLayer,
        modeling.ConditionalDetrDecoderSelfAttention,
        DecoderSelfAttention,
        CrossAttention,
        modeling.ConditionalDetrMLP,
        modeling.ConditionalDetrMLPPredictionHead,
        nn.ModuleList,
        nn.ReLU,
    )
)
"""Like `_ENCODER_KINDS`, for the decoder."""


class Decoder(modeling.ConditionalDetrDecoder):
    """The sine embedding runs in one kernel; the mask of the keys is a view, made without waiting for the device."""

    def forward(
        self,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        spatial_position_embeddings: Tensor | None = None,
        object_queries_position_embeddings: Tensor | None = None,
        **kwargs: object,
    ) -> modeling.ConditionalDetrDecoderOutput:
        """As the base class, which documents the arguments."""
        implementation = self.config._attn_implementation
        is_plain = is_plain_call(self, encoder_hidden_states, encoder_attention_mask, kwargs)
        has_known_mask = implementation in _KNOWN_MASKS
        if not (is_plain and has_known_mask and runs_ours(self.backend, encoder_hidden_states)):
            paths.note("decoder", "transformers' own")
            with as_shipped(self, modeling.ConditionalDetrDecoder):
                return modeling.ConditionalDetrDecoder.forward(
                    self,
                    inputs_embeds,
                    attention_mask,
                    encoder_hidden_states,
                    encoder_attention_mask,
                    spatial_position_embeddings,
                    object_queries_position_embeddings,
                    **kwargs,
                )

        inputs = (encoder_attention_mask, spatial_position_embeddings, object_queries_position_embeddings)
        with registry.demanded(self.backend):
            fields = fast_decoder.decode(self, inputs_embeds, encoder_hidden_states, *inputs, _DECODER_KINDS)
        if fields is not None:
            return modeling.ConditionalDetrDecoderOutput(**fields)
        dtype = inputs_embeds.dtype if implementation == "eager" else None
        fields = decode(
            self,
            inputs_embeds,
            encoder_hidden_states,
            mask_of_keys(encoder_attention_mask, inputs_embeds.shape[1], dtype),
            spatial_position_embeddings,
            object_queries_position_embeddings,
            **kwargs,
        )
        return modeling.ConditionalDetrDecoderOutput(**fields)
