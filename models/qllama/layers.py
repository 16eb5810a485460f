"""Cross-attention of queries to vision tokens.

Letters: S sequence, Q queries, B rows, B' images, V vision tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlfoundry.models.layers.megatron import (
    TransformerConfig,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from vlfoundry.models.layers.parallel import Part, beside, head_size
from vlfoundry.models.layers.specs import Parts


class QueryCrossAttention(Part):
    """The first Q positions attend all vision tokens and add what they find; text passes by.

    Norms of its own on both sides, no rotary positions, no mask, no gate. Keys and values are
    computed once an image and shared by the rows that the objectives make of it. Under sequence
    parallelism the queries may lie on one rank alone, so the tokens are put together around it.
    """

    linear_q: Any
    linear_k: Any
    linear_v: Any

    def __init__(
        self,
        config: TransformerConfig,
        *,
        parts: Parts,
        num_queries: int,
        vision_width: int,
        pg_collection: Any,
        **_,
    ):
        self.sequence_parallel = config.sequence_parallel
        config = beside(config)
        super().__init__(config)
        self.num_queries = num_queries
        self.heads = config.num_attention_heads // pg_collection.tp.size()
        norm = parts.norms["rms"]
        self.query_norm = norm(config, config.hidden_size, config.layernorm_epsilon)
        self.vision_norm = norm(config, vision_width, config.layernorm_epsilon)
        shared = {
            "config": config,
            "init_method": config.init_method,
            "bias": False,
            "tp_group": pg_collection.tp,
        }
        inner = config.num_attention_heads * head_size(config)
        for name, width in (("q", config.hidden_size), ("k", vision_width), ("v", vision_width)):
            linear = parts.unbiased_column(width, inner, gather_output=False, **shared)
            setattr(self, f"linear_{name}", linear)
        self.linear_proj = parts.row(
            inner, config.hidden_size, input_is_parallel=True, skip_bias_add=False, **shared
        )
        # Keys and values have all heads here, whatever the groups of self-attention.
        ungrouped = dataclasses.replace(config, num_query_groups=config.num_attention_heads)
        self.attend = parts.attention(ungrouped, attention_type="cross")

    def forward(self, hidden: Tensor, key_value_states: Tensor | None = None, **_) -> Tensor:
        """hidden [S, B, D], key_value_states [V, B', D'] with B a multiple of B' -> [S, B, D].

        Without vision tokens, or with fewer positions than queries (cached decoding), nothing
        happens.
        """
        if key_value_states is None:
            return hidden
        if self.sequence_parallel:
            whole = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tp_group
            )
            return scatter_to_sequence_parallel_region(
                self._look(whole, key_value_states), group=self.tp_group
            )
        return self._look(hidden, key_value_states)

    def _look(self, hidden: Tensor, key_value_states: Tensor) -> Tensor:
        if hidden.shape[0] < self.num_queries:
            return hidden
        queries, text = hidden[: self.num_queries], hidden[self.num_queries :]
        rows = hidden.shape[1] // key_value_states.shape[1]
        vision = self.vision_norm(key_value_states)
        query, key, value = (
            self._split(linear(x)[0])
            for linear, x in (
                (self.linear_q, self.query_norm(queries)),
                (self.linear_k, vision),
                (self.linear_v, vision),
            )
        )
        found = self.attend(query, key.repeat(1, rows, 1, 1), value.repeat(1, rows, 1, 1))
        return torch.cat([queries + self.linear_proj(found)[0], text])

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1)


def already_added(_training: bool, _fused: bool) -> Callable:
    """The residual sum after cross-attention: it has added its result to the queries itself."""
    return _take


def _take(x: Tensor, _residual: Tensor, _dropout: float) -> Tensor:
    return x
