"""Qwen3 (dense): no biases, a head size of its own, and norms of each head's queries and keys."""

from __future__ import annotations

import dataclasses

from vlfoundry.models.decoder.family import Family, is_llama_like
from vlfoundry.models.layers.config import DecoderConfig
from vlfoundry.models.official.configs import HEADS, decoder_table
from vlfoundry.models.official.fields import size

HEAD_DIM = 128
"""of all published sizes, and where a config does not say it"""
_8B = DecoderConfig(
    vocab_size=151936,
    width=4096,
    depth=36,
    heads=32,
    key_value_heads=8,
    mlp_hidden=12288,
    max_tokens=40960,
    rope_base=1e6,
    qk_norm=True,
    init_std=0.02,
    embedding_init_std=0.02,
)
_0_6B = dataclasses.replace(
    _8B, width=1024, depth=28, heads=16, mlp_hidden=3072, head_dim=HEAD_DIM, tied_head=True
)


FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    table=decoder_table(
        vocab=151936,
        hidden=22016,
        tokens=32768,
        groups=32,
        head_dim=size(HEAD_DIM, most=HEADS, null=True),
    ),
    fits=lambda config: is_llama_like(config) and config.qk_norm and not config.qkv_bias,
    options=lambda _: {"qk_norm": True},
    # Its class takes 128 where the config does not say it.
    official=lambda config: {"head_dim": config.head_size},
    flavours={
        "qwen3-0.6b": _0_6B,
        "qwen3-1.7b": dataclasses.replace(_0_6B, width=2048, mlp_hidden=6144, head_dim=None),
        "qwen3-4b": dataclasses.replace(
            _8B, width=2560, mlp_hidden=9728, head_dim=HEAD_DIM, tied_head=True
        ),
        "qwen3-8b": _8B,
        "qwen3-14b": dataclasses.replace(_8B, width=5120, depth=40, heads=40, mlp_hidden=17408),
        "qwen3-32b": dataclasses.replace(
            _8B, width=5120, depth=64, heads=64, mlp_hidden=25600, head_dim=HEAD_DIM
        ),
    },
)
