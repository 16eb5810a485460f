"""The causal decoder that LLaMA and QLLaMA share.

Letters: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlfoundry.models.decoder.rope import rope_frequencies
from vlfoundry.models.layers.attention import additive
from vlfoundry.models.layers.canonical import set_init, set_rule, set_true_shape
from vlfoundry.models.layers.config import DecoderConfig, LayerSpecKind
from vlfoundry.models.layers.layer import PlainLayer, layer_submodules
from vlfoundry.models.layers.linear import ColumnLinear, VocabEmbedding
from vlfoundry.models.layers.lora import add_lora
from vlfoundry.models.layers.megatron import (
    ModuleSpec,
    TransformerConfig,
)
from vlfoundry.models.layers.packing import is_packed, packed_positions
from vlfoundry.models.layers.parallel import Part, beside, pad_to_multiple, stack_config
from vlfoundry.models.layers.specs import Parts, parts_of
from vlfoundry.models.layers.stack import Stack


class Decoder(Part):
    """Token embeddings, layers, a final norm and, if asked for, a head over the vocabulary.

    A pipeline stage may hold only some `layers`: the embeddings are where the first one is, norm
    and head where the last one is.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        head: bool = True,
        layer_specs: Sequence[ModuleSpec] | None = None,
        spec: LayerSpecKind = "local",
        layers: range | None = None,
    ):
        parts = parts_of(spec)
        stack = decoder_stack_config(config, spec)
        super().__init__(stack)
        self.decoder_config = config
        vocabulary = pad_to_multiple(config.vocab_size, self.tp_group.size())
        self.decoder = Stack(
            stack,
            list(layer_specs or [decoder_layer_spec(config, parts)] * config.depth),
            range(config.depth) if layers is None else layers,
            layer_norm=parts.norms["rms"],
        )
        plain = beside(stack)
        self.embedding: Any = None
        self.head: Any = None
        if self.starts:
            self.embedding = VocabEmbedding(
                vocabulary,
                config.width,
                init_method=_initially(stack),
                config=plain,
                tp_group=self.tp_group,
            )
        if head and self.ends:
            self.head = _head(plain, config, vocabulary, self.tp_group)
        self._set_init_rules(vocabulary)
        add_lora(self.decoder.layers, config.lora, separate=True)

    @property
    def starts(self) -> bool:
        """Whether the first layer is here, and with it the embeddings."""
        return self.decoder.starts

    @property
    def ends(self) -> bool:
        """Whether the last layer is here, and with it the final norm and the head."""
        return self.decoder.ends

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
        """Hidden states after the final norm; with all layers here.

        Args:
            tokens: embeddings [B, T, D].
            mask: None for causal; else boolean (True: blocked) or additive, [B, 1, T, T]; or
                cu_seqlens, int32 [P+1], of P samples that lie one behind another in one row.
            positions: rotary positions [B, T]; None: 0, 1, ... in each row or packed sample.
            context: what cross-attention layers look at [B', T', D'].

        Returns:
            [B, T, D].
        """
        hidden = self.through(
            tokens.transpose(0, 1).contiguous(),
            tokens.shape[1],
            mask,
            positions=positions,
            context=context,
        )
        return hidden.transpose(0, 1)

    def through(
        self,
        hidden: Tensor,
        length: int,
        mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Run the layers that are here; `mask`, `positions` and `context` as in `forward`.

        Args:
            hidden: embeddings [T, B, D] where the decoder starts, else what the stage before
                returned.
            length: T.

        Returns:
            [T, B, D], normed, where the decoder ends.
        """
        if mask is not None and mask.dtype == torch.bool:
            mask = additive(mask, hidden.dtype)
        if positions is None and mask is not None and is_packed(mask):
            positions = packed_positions(mask, hidden.shape[1], length)
        result, _ = self.decoder.through(
            hidden,
            length,
            mask=mask,
            rotary=self.angles(positions, length, hidden.device),
            context=None if context is None else context.transpose(0, 1),
        )
        return result

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Causal hidden states [B, T, D] of right-padded text; those at padding mean nothing.

        `mask` is [B, T], or cu_seqlens of texts that are packed in one row.
        """
        return self(self.embed(ids), mask_of_holes(mask))

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> [..., V]."""
        weight = self.embedding.weight if self.decoder_config.tied_head else None
        flat, _ = self.head(hidden.reshape(-1, 1, hidden.shape[-1]), weight)
        return flat[:, 0, : self.decoder_config.vocab_size].view(*hidden.shape[:-1], -1)

    def angles(self, positions: Tensor | None, length: int, device: torch.device) -> Tensor:
        """Rotary angles [T, B or 1, 1, head size], the two halves alike ("rotate half")."""
        if positions is None:
            positions = torch.arange(length, device=device)[None]
        angles = positions.T[..., None].float() * rope_frequencies(self.decoder_config, positions)
        return torch.cat([angles, angles], -1)[:, :, None]

    def _set_init_rules(self, vocabulary: int) -> None:
        config = self.decoder_config
        set_init(self, config.matrix_std)
        if self.embedding is not None:
            set_rule(self.embedding.weight, "token_embedding", config.embedding_init_std)
        own_head = None if config.tied_head else self.head
        for module in (self.embedding, own_head):
            if module is not None and vocabulary != config.vocab_size:
                set_true_shape(module.weight, config.vocab_size, config.width)


def decoder_stack_config(config: DecoderConfig, spec: LayerSpecKind = "local") -> TransformerConfig:
    """Megatron's config for a decoder in the current layout."""
    return stack_config(
        spec,
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


def decoder_layer_spec(config: DecoderConfig, parts: Parts, **cross_attention) -> ModuleSpec:
    """One decoder layer, with cross-attention submodules if given."""
    submodules = layer_submodules(
        parts,
        norm="rms",
        causal=True,
        qkv_bias=config.qkv_bias,
        lora=config.lora,
        head_norms=config.qk_norm,
        **cross_attention,
    )
    return ModuleSpec(module=PlainLayer, submodules=submodules)


def _initially(stack: TransformerConfig) -> Callable:
    assert stack.init_method is not None
    return stack.init_method


def _head(
    stack: TransformerConfig, config: DecoderConfig, vocabulary: int, group: Any
) -> ColumnLinear:
    return ColumnLinear(
        config.width,
        vocabulary,
        config=stack,
        init_method=_initially(stack),
        bias=False,
        gather_output=True,
        skip_weight_param_allocation=config.tied_head,
        tp_group=group,
    )


def at_end(hidden: Tensor, mask: Tensor) -> Tensor:
    """States [B, D] at the last real token of each row, or packed sample, of [B, T, D]."""
    if is_packed(mask):
        return hidden[0, mask[1:] - 1]
    last = mask.long().sum(1) - 1
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def mask_of_holes(mask: Tensor) -> Tensor | None:
    """None if each row's real tokens come first, else the causal mask with padding blocked.

    To a causal layer, padding on the right is invisible, so the common case needs no mask. Of
    packed texts `mask` is cu_seqlens, and stays it.
    """
    if is_packed(mask):
        return mask
    if bool((mask[:, 1:] <= mask[:, :-1]).all()):
        return None
    length = mask.shape[1]
    future = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
    return future | ~mask.bool()[:, None, None, :]
