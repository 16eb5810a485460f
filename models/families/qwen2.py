"""Qwen2 and Qwen2.5: LLaMA with a bias on q, k and v."""

from __future__ import annotations

import dataclasses

from vlfoundry.models.decoder.family import Family, is_llama_like
from vlfoundry.models.layers.config import DecoderConfig
from vlfoundry.models.official.configs import decoder_table

_7B = DecoderConfig(
    vocab_size=152064,
    width=3584,
    depth=28,
    heads=28,
    key_value_heads=4,
    mlp_hidden=18944,
    max_tokens=32768,
    rope_base=1e6,
    qkv_bias=True,
    init_std=0.02,
    embedding_init_std=0.02,
)
_HALF_B = dataclasses.replace(
    _7B,
    vocab_size=151936,
    width=896,
    depth=24,
    heads=14,
    key_value_heads=2,
    mlp_hidden=4864,
    tied_head=True,
)

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    table=decoder_table(vocab=151936, hidden=22016, tokens=32768, groups=32),
    fits=lambda config: is_llama_like(config) and config.qkv_bias and not config.qk_norm,
    options=lambda _: {"qkv_bias": True},
    flavours={
        "qwen2-0.5b": _HALF_B,
        # InternVL's chat models have two matrices for embedding and head.
        "qwen2-0.5b-untied": dataclasses.replace(_HALF_B, tied_head=False),
        "qwen2.5-7b": _7B,
    },
)
