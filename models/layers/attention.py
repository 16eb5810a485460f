"""Core attention on PyTorch's scaled_dot_product_attention, with a cache for decoding.

Letters: S query tokens, T key tokens, B batch, N heads, G key/value heads, H head size, P packed
samples.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vlfoundry.models.layers.megatron import AttnMaskType, TransformerConfig
from vlfoundry.models.layers.packing import is_packed
from vlfoundry.models.layers.parallel import Part


class KeyValueCache:
    """Keys and values of one layer, in a buffer of fixed length."""

    def __init__(self, max_tokens: int):
        self.max_tokens = max_tokens
        self.length = 0
        self.buffer: Tensor | None = None

    def append(self, new: Tensor) -> Tensor:
        """Add tokens [S, B, G, 2, H], key and value; returns all so far as [T, B, G, 2, H]."""
        if self.buffer is None:
            self.buffer = new.new_empty(self.max_tokens, *new.shape[1:])
        end = self.length + new.shape[0]
        self.buffer[self.length : end] = new
        self.length = end
        return self.buffer[:end]

    def reorder(self, rows: Tensor) -> None:
        """Row b goes on from what row `rows[b]` has seen."""
        if self.buffer is not None:
            self.buffer[: self.length] = self.buffer[: self.length, rows]


class SDPAttention(Part):
    """Softmax attention over heads that are already projected (and rotated).

    `attention_mask` is None, boolean (True: blocked, as everywhere in Megatron) or an additive
    float mask, broadcastable to [B, N, S, T]. None means causal if the layer is causal, else full.
    So does `cu_seqlens` (models.layers.packing), within each sample.
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
            key, value = self.cache.append(torch.stack([key, value], 3)).unbind(3)
        tokens, batch, heads, _size = query.shape
        if key.shape[2] != heads:
            key = key.repeat_interleave(heads // key.shape[2], dim=2)
            value = value.repeat_interleave(heads // value.shape[2], dim=2)
        mask = attention_mask
        if mask is not None and is_packed(mask):
            return self._packed(query, key, value, mask)
        if mask is not None and mask.dim() == 0:
            key, value, mask = key[: int(mask)], value[: int(mask)], None
        if mask is not None and mask.dtype == torch.bool:
            mask = ~mask
        out = self._attend(query, key, value, mask)
        return out.reshape(tokens, batch, -1)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """[S, B, N, H] and twice [T, B, N, H] -> [S, B, N, H]."""
        out = scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=self.causal and mask is None and len(query) > 1,
            scale=self.scale,
        )
        return out.permute(2, 0, 1, 3)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[T, 1, N, H] each -> [T, 1, N*H]; samples of equal length are computed together."""
        tokens, _, heads, size = query.shape
        assert self.cache is None, "packed samples are not decoded"
        places: dict[int, list[int]] = {}
        for start, end in itertools.pairwise(cu_seqlens.tolist()):
            places.setdefault(end - start, []).append(start)
        if all(len(starts) == 1 for starts in places.values()):
            parts = [x.split(list(places)) for x in (query, key, value)]
            outs = [self._attend(*part) for part in zip(*parts, strict=True)]
            return torch.cat(outs).reshape(tokens, 1, -1)
        order = torch.cat(
            [
                (torch.tensor(starts) + torch.arange(length)[:, None]).flatten()
                for length, starts in places.items()
            ]
        ).to(query.device)
        sizes = [length * len(starts) for length, starts in places.items()]
        parts = [x[:, 0].index_select(0, order).split(sizes) for x in (query, key, value)]
        outs = [
            self._attend(*(x.view(length, -1, heads, size) for x in part)).flatten(0, 1)
            for length, part in zip(places, zip(*parts, strict=True), strict=True)
        ]
        back = order.argsort()
        return torch.cat(outs).index_select(0, back).reshape(tokens, 1, -1)


@contextlib.contextmanager
def key_value_cache(module: torch.nn.Module, max_tokens: int) -> Iterator[None]:
    """Within the context, the self-attention layers of `module` remember keys and values."""
    cores: list[Any] = [m.core_attention for m in module.modules() if hasattr(m, "core_attention")]
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
