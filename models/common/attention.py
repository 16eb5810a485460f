"""Core attention on PyTorch's scaled_dot_product_attention, with a cache for decoding.

Letters: S query tokens, T key tokens, B batch, N heads, G key/value heads, H head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from models.common.megatron import AttnMaskType, TransformerConfig
from models.common.parallel import Part


class KeyValueCache:
    """Keys and values of one layer, in a buffer of fixed length."""

    def __init__(self, max_tokens: int):
        self.max_tokens = max_tokens
        self.length = 0
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add [S, B, G, H] tokens; returns all so far as [T, B, G, H]."""
        if self.key is None:
            self.key = key.new_empty(self.max_tokens, *key.shape[1:])
            self.value = value.new_empty(self.max_tokens, *value.shape[1:])
        end = self.length + key.shape[0]
        self.key[self.length : end] = key
        self.value[self.length : end] = value
        self.length = end
        return self.key[:end], self.value[:end]


class SDPAttention(Part):
    """Softmax attention over heads that are already projected (and rotated).

    `attention_mask` is None, boolean (True: blocked, as everywhere in Megatron) or an additive
    float mask, broadcastable to [B, N, S, T]. None means causal if the layer is causal, else full.
    A scalar says how many keys are real: padding comes last. (That needs no mask, and without one
    attention is faster.)
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        attn_mask_type: AttnMaskType = AttnMaskType.no_mask,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        **_,
    ):
        super().__init__(config)
        self.causal = attn_mask_type == AttnMaskType.causal
        self.scale = softmax_scale
        self.cache: KeyValueCache | None = None

    def forward(
        self,
        query: Tensor,  # [S, B, N, H]
        key: Tensor,  # [T, B, G, H]
        value: Tensor,  # [T, B, G, H]
        attention_mask: Tensor | None = None,
        **_,
    ) -> Tensor:
        """Returns [S, B, N*H]."""
        if self.cache is not None:
            key, value = self.cache.append(key, value)
        tokens, batch, heads, _size = query.shape
        if key.shape[2] != heads:
            key = key.repeat_interleave(heads // key.shape[2], dim=2)
            value = value.repeat_interleave(heads // value.shape[2], dim=2)
        mask = attention_mask
        if mask is not None and mask.dim() == 0:
            key, value, mask = key[: int(mask)], value[: int(mask)], None
        if mask is not None and mask.dtype == torch.bool:
            mask = ~mask
        out = scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=self.causal and mask is None and tokens > 1,
            scale=self.scale,
        )
        return out.permute(2, 0, 1, 3).reshape(tokens, batch, -1)


@contextlib.contextmanager
def key_value_cache(module: torch.nn.Module, max_tokens: int) -> Iterator[None]:
    """Within the context, the self-attention layers of `module` remember keys and values."""
    cores = [m.core_attention for m in module.modules() if hasattr(m, "core_attention")]
    for core in cores:
        core.cache = KeyValueCache(max_tokens)
    try:
        yield
    finally:
        for core in cores:
            core.cache = None


def additive(blocked: Tensor, dtype: torch.dtype) -> Tensor:
    """Boolean mask (True: blocked) to an additive one, once for all layers."""
    mask = torch.zeros(blocked.shape, dtype=dtype, device=blocked.device)
    return mask.masked_fill_(blocked, torch.finfo(dtype).min)
