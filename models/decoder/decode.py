"""Tokens after a prompt, one at a time: the weights of a Decoder's modules without the modules.

To run Megatron's modules for one token costs more than the token's arithmetic. Where they hold
plain matrices, these are used as they lie (the same storage, no copies); elsewhere, as with
matrices that are cut over tensor ranks or carry adapters, the modules themselves run.

Letters: B batch, T prompt tokens, N new tokens, D width, G key/value heads, R query heads of each,
H head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from vlfoundry.models.decoder.model import Decoder
from vlfoundry.models.layers.attention import KeyValueCache, SDPAttention, additive
from vlfoundry.models.layers.layer import HeadNormSelfAttention, PlainLayer
from vlfoundry.models.layers.linear import ColumnLinear, RowLinear, UnbiasedColumnLinear
from vlfoundry.models.layers.megatron import MLP, SelfAttention
from vlfoundry.models.layers.norms import HeadRMSNorm, RMSNorm, rms_norm

_PLAIN = {
    "input_layernorm": RMSNorm,
    "self_attention": SelfAttention,
    "self_attention.core_attention": SDPAttention,
    "self_attention.linear_qkv": ColumnLinear,
    "self_attention.linear_proj": RowLinear,
    "pre_mlp_layernorm": RMSNorm,
    "mlp": MLP,
    "mlp.linear_fc1": ColumnLinear,
    "mlp.linear_fc2": RowLinear,
}
"""the modules of a layer whose sum `PlainWeights` computes"""
_WEIGHTS = {f"{name}.weight" for name in _PLAIN if "norm" in name or "linear" in name}
_QKV_BIAS = "self_attention.linear_qkv.bias"
_HEAD_NORMS = {"self_attention.q_layernorm": HeadRMSNorm, "self_attention.k_layernorm": HeadRMSNorm}
"""modules that a layer may have as well"""


class Continuation:
    """Feeds a decoder one token a row, inside the `key_value_cache` that has seen the prompt."""

    def __init__(self, decoder: Decoder, mask: Tensor, max_new_tokens: int):
        """`mask` [B, T] is 1 where the prompt is real; at most `max_new_tokens` can be fed."""
        self.decoder: Any = decoder  # with embeddings and final norm: all of it
        self.layers = plain_layers(decoder)
        self.fed = 0
        new = torch.arange(max_new_tokens, device=mask.device)
        self.positions = mask.long().sum(1, keepdim=True) + new  # [B, N]
        self.prompt_tokens = mask.shape[1]
        self.seen = None  # [B, 1, 1, T + N], additive
        if self.layers is None or not bool(mask.all()):
            blocked = torch.nn.functional.pad(~mask.bool(), (0, max_new_tokens), value=False)
            self.seen = additive(blocked[:, None, None], decoder.embedding.weight.dtype)
        if self.layers is not None:
            self.cos, self.sin = self._rotations(decoder.embedding.weight.dtype)

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        """Token ids [B] -> hidden states [B, D] after the final norm."""
        step, self.fed = self.fed, self.fed + 1
        seen = None if self.seen is None else self.seen[..., : self.prompt_tokens + self.fed]
        token = self.decoder.embed(ids[:, None])
        if self.layers is None:
            place = self.positions[:, step : self.fed]
            return self.decoder(token, seen, positions=place)[:, 0]
        x = token[:, 0]
        cos, sin = self._but_values(self.cos[step], 1.0), self._but_values(self.sin[step], 0.0)
        for layer in self.layers:
            x = layer(x, cos, sin, seen)
        final = self.decoder.decoder.final_layernorm
        return rms_norm(x, final.weight, final.eps)

    def _but_values(self, factors: Tensor, neutral: float) -> Tensor:
        """[B, 1, 1, H] for each query and the key of a group, and `neutral` for its value:
        [B, 1, R + 2, H]."""
        config = self.decoder.decoder_config
        queries = config.heads // (config.key_value_heads or config.heads)
        turned = factors.expand(-1, -1, queries + 1, -1)
        return torch.cat([turned, torch.full_like(factors, neutral)], 2)

    def _rotations(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [N, B, 1, 1, H]; the first half of sin is negative: it meets the second
        half of a head."""
        scaling = self.decoder.decoder_config.rope_scaling
        # Dynamic scaling looks at the furthest position at hand: one token at a time.
        at_once = 1 if scaling and scaling.kind == "dynamic" else self.positions.shape[1]
        parts = self.positions.split(at_once, 1)
        angles = torch.cat([self.decoder.angles(p, p.shape[1], p.device) for p in parts])[
            :, :, None
        ]
        sin = angles.sin()
        sin[..., : sin.shape[-1] // 2].neg_()
        return angles.cos().to(dtype), sin.to(dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainWeights:
    """One layer's weights, and the keys and values that it has seen."""

    attention_norm: Tensor
    qkv: Tensor
    """[G * (R + 2) * H, D]: the queries of a group, its key, its value"""
    qkv_bias: Tensor | None
    head_norms: tuple[Tensor, Tensor] | None
    """[H] each: of queries and of keys"""
    projection: Tensor
    """[in, out], as is `down`"""
    mlp_norm: Tensor
    gate_up: Tensor
    """gate first"""
    down: Tensor
    groups: int
    """G"""
    head_size: int
    """H"""
    scale: float | None
    eps: float
    cache: KeyValueCache

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None) -> Tensor:
        """One token a row through the layer: [B, D] -> [B, D].

        cos and sin are [B, 1, R + 2, H], `seen` is None or additive [B, 1, 1, tokens so far].
        """
        rows = x.shape[0]
        mixed = linear(rms_norm(x, self.attention_norm, self.eps), self.qkv, self.qkv_bias)
        mixed = mixed.view(rows, self.groups, -1, self.head_size)  # [B, G, R + 2, H]
        if self.head_norms is not None:
            query, key = self.head_norms
            mixed = torch.cat(
                [
                    rms_norm(mixed[:, :, :-2], query, self.eps),
                    rms_norm(mixed[:, :, -2:-1], key, self.eps),
                    mixed[:, :, -1:],
                ],
                2,
            )
        mixed = torch.addcmul(mixed * cos, mixed.roll(self.head_size // 2, -1), sin)
        key, value = self.cache.append(mixed[None, :, :, -2:]).permute(3, 1, 2, 0, 4).unbind()
        # A group's queries take the place of tokens, so that no key is repeated for them.
        found = scaled_dot_product_attention(
            mixed[:, :, :-2],
            key,
            value,
            attn_mask=seen,
            scale=self.scale,
        )
        x = torch.addmm(x, found.reshape(rows, -1), self.projection)
        gate, up = linear(rms_norm(x, self.mlp_norm, self.eps), self.gate_up).chunk(2, -1)
        return torch.addmm(x, silu(gate).mul_(up), self.down)


def plain_layers(decoder: Decoder) -> list[PlainWeights] | None:
    """Each layer's weights inside `key_value_cache`; None if any layer is not known to be plain.

    Known are the types of its modules and the names of its parameters, but for cross-attention,
    which does nothing after the prompt.
    """
    layers: Any = decoder.decoder.layers
    if decoder.tp_group.size() > 1 or not all(_is_plain(layer) for layer in layers):
        return None
    return [_weights(layer) for layer in layers]


def _is_plain(layer: torch.nn.Module) -> bool:
    modules = dict(layer.named_modules())
    names = {n for n, _ in layer.named_parameters() if not n.startswith("cross_attention.")}
    kinds, weights = _PLAIN, _WEIGHTS
    if type(modules.get("self_attention")) is HeadNormSelfAttention:
        kinds = _PLAIN | _HEAD_NORMS | {"self_attention": HeadNormSelfAttention}
        weights = _WEIGHTS | {f"{name}.weight" for name in _HEAD_NORMS}
    return (
        type(layer) is PlainLayer
        and names - {_QKV_BIAS} == weights
        and all(_is_exactly(modules.get(name), kind) for name, kind in kinds.items())
        and not any(m._forward_hooks or m._forward_pre_hooks for m in modules.values())
    )


def _is_exactly(module: torch.nn.Module | None, kind: type) -> bool:
    return type(module) is kind or (kind is ColumnLinear and type(module) is UnbiasedColumnLinear)


def _weights(layer: Any) -> PlainWeights:
    attention, mlp = layer.self_attention, layer.mlp
    core, norms = attention.core_attention, None
    if type(attention) is HeadNormSelfAttention:
        query, key = cast(Any, (attention.q_layernorm, attention.k_layernorm))
        norms = query.weight, key.weight
    return PlainWeights(
        attention_norm=layer.input_layernorm.weight,
        qkv=attention.linear_qkv.weight,
        qkv_bias=attention.linear_qkv.bias,
        head_norms=norms,
        projection=attention.linear_proj.weight.T,
        mlp_norm=layer.pre_mlp_layernorm.weight,
        gate_up=mlp.linear_fc1.weight,
        down=mlp.linear_fc2.weight.T,
        groups=attention.num_query_groups_per_partition,
        head_size=attention.hidden_size_per_attention_head,
        scale=core.scale,
        eps=layer.input_layernorm.eps,
        cache=core.cache,
    )
