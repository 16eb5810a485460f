"""QLLaMA (InternVL, section 3.2): queries in front of the text, cross-attention in some layers.

Letters: B batch, B' rows (a multiple of B), Q queries, T text tokens, V vision tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlfoundry.models.decoder.beam import beam_search
from vlfoundry.models.decoder.generate import causal_blocked, greedy
from vlfoundry.models.decoder.model import Decoder, decoder_layer_spec
from vlfoundry.models.layers.canonical import set_init, set_rule
from vlfoundry.models.layers.config import DecoderConfig, LayerSpecKind
from vlfoundry.models.layers.megatron import ModuleSpec
from vlfoundry.models.layers.specs import Parts, parts_of
from vlfoundry.models.qllama.config import QLlamaConfig
from vlfoundry.models.qllama.layers import QueryCrossAttention, already_added


class QLlama(Decoder):
    """LLaMA that also turns an image into Q language-like tokens."""

    def __init__(
        self,
        config: DecoderConfig,
        queries: QLlamaConfig,
        vision_width: int,
        *,
        head: bool = True,
        spec: LayerSpecKind = "local",
        layers: range | None = None,
    ):
        parts = parts_of(spec)
        specs = [
            _layer_spec(config, parts, index, queries, vision_width)
            for index in range(config.depth)
        ]
        super().__init__(config, head=head, layer_specs=specs, spec=spec, layers=layers)
        self.query_config = queries
        std = config.matrix_std if queries.init_std is None else queries.init_std
        if self.starts:
            self.query_tokens = nn.Parameter(
                torch.zeros(queries.num_queries, config.width, dtype=self.config.params_dtype)
            )
            set_rule(self.query_tokens, "trunc_normal", std)
        for module in self.modules():
            if isinstance(module, QueryCrossAttention):
                set_init(module, std)

    @property
    def num_queries(self) -> int:
        return self.query_config.num_queries

    def encode_image(self, vision: Tensor) -> Tensor:
        """Vision tokens [B, V, D'] -> query outputs [B, Q, D]; queries alone, all seeing all."""
        return self(self.before_image(len(vision)), self.open_mask(), context=vision)

    def encode_pairs(self, ids: Tensor, blocked: Tensor, vision: Tensor) -> tuple[Tensor, Tensor]:
        """[queries | text] under a mask of `models.qllama.masks`.

        Args:
            ids: text [B', T]; rows are whole copies of the batch of images, one after another.
            blocked: [B', 1, Q+T, Q+T].
            vision: tokens of the images [B, V, D'].

        Returns:
            Query outputs [B', Q, D] and text outputs [B', T, D].
        """
        hidden = self(self.before_pairs(ids), blocked, context=vision)
        return hidden[:, : self.num_queries], hidden[:, self.num_queries :]

    def before_image(self, images: int) -> Tensor:
        """What goes in for images alone: queries [B, Q, D]."""
        return self.query_tokens.expand(images, -1, -1)

    def open_mask(self) -> Tensor:
        """Nobody is blocked among the queries: [1, 1, Q, Q]."""
        shape = (1, 1, self.num_queries, self.num_queries)
        return torch.zeros(shape, dtype=torch.bool, device=next(self.parameters()).device)

    def before_pairs(self, ids: Tensor) -> Tensor:
        """What goes in for pairs, [B', Q+T, D]."""
        return torch.cat([self.query_tokens.expand(len(ids), -1, -1), self.embed(ids)], 1)

    def generate(
        self, vision: Tensor, ids: Tensor, mask: Tensor, *, max_new_tokens: int, eos_id: int
    ) -> Tensor:
        """Greedy continuation [B, N] of prompts ids [B, T], left-padded, about images."""
        embeddings, full_mask, blocked = self.prompt(ids, mask)
        return greedy(
            self,
            embeddings,
            full_mask,
            prefix_mask=blocked,
            context=vision,
            max_new_tokens=max_new_tokens,
            eos_id=eos_id,
        )

    def generate_by_beams(
        self,
        vision: Tensor,
        ids: Tensor,
        mask: Tensor,
        *,
        max_new_tokens: int,
        eos_id: int,
        beams: int,
    ) -> list[list[int]]:
        """Continuation of each prompt by beam search, as InternVL-G's captions are evaluated."""
        embeddings, full_mask, blocked = self.prompt(ids, mask)
        return beam_search(
            self,
            embeddings,
            full_mask,
            prefix_mask=blocked,
            context=vision,
            max_new_tokens=max_new_tokens,
            eos_id=eos_id,
            beams=beams,
        )

    def prompt(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[queries | text] for generating: queries see queries, text sees all before it.

        ids and mask are [B, T]. Returns embeddings [B, Q+T, D], the mask [B, Q+T] and who is
        blocked [B, 1, Q+T, Q+T].
        """
        queries = self.query_tokens.expand(len(ids), -1, -1)
        full_mask = torch.cat([mask.new_ones(len(ids), self.num_queries), mask], 1)
        blocked = causal_blocked(full_mask.shape[1], ids.device)
        blocked[: self.num_queries, : self.num_queries] = False
        blocked = blocked | ~full_mask.bool()[:, None, None, :]
        return torch.cat([queries, self.embed(ids)], 1), full_mask, blocked


def _layer_spec(
    config: DecoderConfig, parts: Parts, index: int, queries: QLlamaConfig, vision_width: int
) -> ModuleSpec:
    if index % queries.cross_attention_frequency:
        return decoder_layer_spec(config, parts)
    return decoder_layer_spec(
        config,
        parts,
        cross_attention=ModuleSpec(
            module=QueryCrossAttention,
            params={
                "parts": parts,
                "num_queries": queries.num_queries,
                "vision_width": vision_width,
            },
        ),
        cross_attn_bda=already_added,
    )
