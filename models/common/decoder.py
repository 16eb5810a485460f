"""The causal decoder that LLaMA and QLLaMA share.

Letters: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.common.attention import additive
from models.common.canonical import set_init, set_rule, set_true_shape
from models.common.config import DecoderConfig
from models.common.layers import (
    LayerSpecKind,
    PlainLayer,
    layer_submodules,
    require_local,
    self_attention_spec,
)
from models.common.linear import ColumnLinear, VocabEmbedding
from models.common.megatron import (
    ModuleSpec,
    TransformerBlock,
    TransformerBlockSubmodules,
    TransformerConfig,
)
from models.common.norms import RMSNorm
from models.common.parallel import Part, pad_to_multiple, process_groups, stack_config


class Decoder(Part):
    """Token embeddings, layers, a final norm and, if asked for, a head over the vocabulary."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        head: bool = True,
        layer_specs: Sequence[ModuleSpec] | None = None,
        spec: LayerSpecKind = "local",
    ):
        require_local(spec)
        stack = decoder_stack_config(config)
        super().__init__(stack)
        self.decoder_config = config
        vocabulary = pad_to_multiple(config.vocab_size, self.tp_group.size())
        self.embedding = VocabEmbedding(
            vocabulary,
            config.width,
            init_method=stack.init_method,
            config=stack,
            tp_group=self.tp_group,
        )
        self.decoder = TransformerBlock(
            stack,
            TransformerBlockSubmodules(
                layer_specs=list(layer_specs or [decoder_layer_spec(config)] * config.depth),
                layer_norm=RMSNorm,
            ),
            pg_collection=process_groups(),
        )
        self.head = _head(stack, config.width, vocabulary, self.tp_group) if head else None
        self._set_init_rules(vocabulary)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] -> [B, T, D]."""
        return self.embedding(ids)

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens: embeddings [B, T, D].
            mask: None for causal; else boolean (True: blocked) or additive, [B, 1, T, T].
            positions: rotary positions [B, T]; None: 0, 1, ... T-1 in each row.
            context: what cross-attention layers look at [B', T', D'].

        Returns:
            [B, T, D].
        """
        if mask is not None and mask.dtype == torch.bool:
            mask = additive(mask, tokens.dtype)
        hidden = self.decoder(
            tokens.transpose(0, 1).contiguous(),
            attention_mask=mask,
            rotary_pos_emb=self.angles(positions, tokens.shape[1], tokens.device),
            context=None if context is None else context.transpose(0, 1),
        )
        return hidden.transpose(0, 1)

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Causal hidden states [B, T, D] of right-padded text; those at padding mean nothing."""
        return self(self.embed(ids), _mask_of_holes(mask))

    def last_hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden state [B, D] at the last real token of each row (the end of the text)."""
        hidden = self.encode(ids, mask)
        last = mask.long().sum(1) - 1
        return hidden[torch.arange(len(ids), device=ids.device), last]

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> [..., V]."""
        flat, _ = self.head(hidden.reshape(-1, 1, hidden.shape[-1]))
        return flat[:, 0, : self.decoder_config.vocab_size].view(*hidden.shape[:-1], -1)

    def angles(self, positions: Tensor | None, length: int, device: torch.device) -> Tensor:
        """Rotary angles [T, B or 1, 1, head size], the two halves alike ("rotate half")."""
        config = self.decoder_config
        if positions is None:
            positions = torch.arange(length, device=device)[None]
        steps = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=device)
        frequencies = 1.0 / config.rope_base ** (steps / config.head_size)
        angles = positions.T[..., None].float() * frequencies
        return torch.cat([angles, angles], -1)[:, :, None]

    def _set_init_rules(self, vocabulary: int) -> None:
        config = self.decoder_config
        set_init(self, config.matrix_std)
        set_rule(self.embedding.weight, "token_embedding", config.embedding_init_std)
        if vocabulary != config.vocab_size:
            set_true_shape(self.embedding.weight, config.vocab_size, config.width)
            if self.head is not None:
                set_true_shape(self.head.weight, config.vocab_size, config.width)


def decoder_stack_config(config: DecoderConfig) -> TransformerConfig:
    """Megatron's config for a decoder in the current layout."""
    return stack_config(
        num_layers=config.depth,
        hidden_size=config.width,
        num_attention_heads=config.heads,
        num_query_groups=config.key_value_heads or config.heads,
        kv_channels=config.head_size,
        ffn_hidden_size=config.mlp_hidden,
        add_bias_linear=False,
        add_qkv_bias=config.qkv_bias,
        normalization="RMSNorm",
        layernorm_epsilon=config.eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
    )


def decoder_layer_spec(config: DecoderConfig, **cross_attention) -> ModuleSpec:
    """One decoder layer, with cross-attention submodules if given."""
    attention = self_attention_spec(causal=True, qkv_bias=config.qkv_bias)
    return ModuleSpec(
        module=PlainLayer,
        submodules=layer_submodules(norm="rms", self_attention=attention, **cross_attention),
    )


def _head(stack: TransformerConfig, width: int, vocabulary: int, group) -> ColumnLinear:
    return ColumnLinear(
        width,
        vocabulary,
        config=stack,
        init_method=stack.init_method,
        bias=False,
        gather_output=True,
        tp_group=group,
    )


def _mask_of_holes(mask: Tensor) -> Tensor | None:
    """None if each row's real tokens come first, else the causal mask with padding blocked.

    To a causal layer, padding on the right is invisible, so the common case needs no mask.
    """
    if bool((mask[:, 1:] <= mask[:, :-1]).all()):
        return None
    length = mask.shape[1]
    future = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
    return future | ~mask.bool()[:, None, None, :]
