"""Weights of a LLaMA in the Hugging Face layout to ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.common.config import DecoderConfig

_LAYER = {
    "self_attn.o_proj": "self_attention.linear_proj",
    "mlp.down_proj": "mlp.linear_fc2",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "cross_attn.q_proj": "cross_attention.linear_q",
    "cross_attn.k_proj": "cross_attention.linear_k",
    "cross_attn.v_proj": "cross_attention.linear_v",
    "cross_attn.o_proj": "cross_attention.linear_proj",
    "cross_attn.norm1": "cross_attention.query_norm",
    "cross_attn.norm2": "cross_attention.vision_norm",
}
_TOP = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "head.weight",
}


def decoder_from_official(
    weights: Mapping[str, Tensor], config: DecoderConfig
) -> dict[str, Tensor]:
    """Names like `model.layers.0.self_attn.q_proj.weight` to canonical ones.

    q, k and v become one matrix, by groups: the queries of a group, its key, its value. Gate and
    up become one matrix, gate first.
    """
    result = {}
    for name, tensor in weights.items():
        if name in _TOP:
            result[_TOP[name]] = tensor
            continue
        index, rest = name.removeprefix("model.layers.").split(".", 1)
        prefix = f"decoder.layers.{index}."
        stem, _, leaf = rest.rpartition(".")
        if stem == "self_attn.q_proj":
            key, value = (weights[name.replace("q_proj", part)] for part in ("k_proj", "v_proj"))
            fused = _fuse_qkv(tensor, key, value, config)
            result[f"{prefix}self_attention.linear_qkv.{leaf}"] = fused
        elif stem == "mlp.gate_proj":
            up = weights[name.replace("gate_proj", "up_proj")]
            result[prefix + "mlp.linear_fc1.weight"] = torch.cat([tensor, up])
        elif stem in _LAYER:
            result[f"{prefix}{_LAYER[stem]}.{leaf}"] = tensor
    return result


def _fuse_qkv(query: Tensor, key: Tensor, value: Tensor, config: DecoderConfig) -> Tensor:
    groups = config.key_value_heads or config.heads
    rest = query.shape[1:]  # (width,) of a matrix, () of a bias
    parts = [x.view(groups, -1, config.head_size, *rest) for x in (query, key, value)]
    return torch.cat(parts, 1).reshape(-1, *rest)
