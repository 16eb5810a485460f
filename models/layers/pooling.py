"""The attention pooling head of InternVL-C and -G (their `clip_projector`s).

Letters: B batch, T tokens, D width, E output width, N heads (of D/N channels).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from vlfoundry.models.layers.megatron import TransformerConfig
from vlfoundry.models.layers.norms import LayerNorm
from vlfoundry.models.layers.parallel import Part


class AttentionPool(Part):
    """One query, the mean of all tokens, attends all tokens; then a projection. No residual.

    Replicated over tensor ranks: it is small beside the towers. (InternVL, section 3.2 and the
    released checkpoints: three separate LayerNorms of eps 1e-5.)
    """

    norm_q: LayerNorm
    norm_k: LayerNorm
    norm_v: LayerNorm
    linear_q: nn.Linear
    linear_k: nn.Linear
    linear_v: nn.Linear

    def __init__(self, config: TransformerConfig, width: int, heads: int, out_width: int):
        super().__init__(config)
        self.heads = heads
        make = {"dtype": config.params_dtype}
        for name in ("q", "k", "v"):
            setattr(self, f"norm_{name}", LayerNorm(config, width, eps=1e-5))
            setattr(self, f"linear_{name}", nn.Linear(width, width, **make))
        self.linear_proj = nn.Linear(width, out_width, **make)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, D] -> [B, E], not normalised.

        There is one query, so keys and values of the tokens need not be made: the query goes
        through the key matrix backwards, and the value matrix is applied to the weighted mean.
        The same numbers for a fraction of the work (N*D instead of D*D a token, twice).
        """
        size = tokens.shape[-1] // self.heads
        unit = layer_norm(tokens, tokens.shape[-1:], eps=self.norm_k.eps)  # keys' and values'
        query = self.linear_q(self.norm_q(tokens.mean(1))).unflatten(-1, (self.heads, size))
        query = query * size**-0.5  # [B, N, D/N]
        key_matrix = self.linear_k.weight.view(self.heads, size, -1)
        asked = torch.einsum("bnh,nhd->bnd", query, key_matrix)
        shift = asked @ self.norm_k.bias + (query * self._by_head(self.linear_k.bias)).sum(-1)
        scores = (asked * self.norm_k.weight) @ unit.transpose(1, 2) + shift[..., None]
        mean = scores.softmax(-1) @ unit  # [B, N, D]
        value = mean * self.norm_v.weight + self.norm_v.bias
        value_matrix = self.linear_v.weight.view(self.heads, size, -1)
        found = torch.einsum("bnd,nhd->bnh", value, value_matrix)
        return self.linear_proj((found + self._by_head(self.linear_v.bias)).flatten(1))

    def _by_head(self, bias: Tensor) -> Tensor:
        return bias.view(self.heads, -1)
