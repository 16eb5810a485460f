"""The attention pooling head of InternVL-C and -G (their `clip_projector`s).

Letters: B batch, T tokens, D width, E output width, N heads.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from models.common.canonical import set_init
from models.common.megatron import TransformerConfig
from models.common.norms import LayerNorm
from models.common.parallel import Part


class AttentionPool(Part):
    """One query, the mean of all tokens, attends all tokens; then a projection. No residual.

    Replicated over tensor ranks: it is small beside the towers. (InternVL, section 3.2 and the
    released checkpoints: three separate LayerNorms of eps 1e-5.)
    """

    def __init__(self, config: TransformerConfig, width: int, heads: int, out_width: int):
        super().__init__(config)
        self.heads = heads
        make = {"dtype": config.params_dtype}
        for name in ("q", "k", "v"):
            setattr(self, f"norm_{name}", LayerNorm(config, width, eps=1e-5))
            setattr(self, f"linear_{name}", nn.Linear(width, width, **make))
        self.linear_proj = nn.Linear(width, out_width, **make)

    def init_rules(self, std: float) -> None:
        set_init(self, std)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, D] -> [B, E], not normalised."""
        batch, _length, width = tokens.shape
        query = tokens.mean(1, keepdim=True)  # [B, 1, D]

        def split(x: Tensor) -> Tensor:  # [B, T, D] -> [B, N, T, D/N]
            return x.view(batch, -1, self.heads, width // self.heads).transpose(1, 2)

        out = scaled_dot_product_attention(
            split(self.linear_q(self.norm_q(query))),
            split(self.linear_k(self.norm_k(tokens))),
            split(self.linear_v(self.norm_v(tokens))),
        )
        return self.linear_proj(out.reshape(batch, width))
