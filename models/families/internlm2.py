"""InternLM2: what LLaMA computes, under other names and with q, k and v in one matrix."""

from __future__ import annotations

import dataclasses

from vlfoundry.models.decoder.family import Family
from vlfoundry.models.decoder.hf_keys import internlm2_keys
from vlfoundry.models.layers.config import DecoderConfig, RopeScaling
from vlfoundry.models.official.configs import decoder_table
from vlfoundry.models.official.fields import only

_7B = DecoderConfig(
    vocab_size=92544,
    width=4096,
    depth=32,
    heads=32,
    key_value_heads=8,
    mlp_hidden=14336,
    max_tokens=32768,
    eps=1e-5,
    rope_base=1e6,
    rope_scaling=RopeScaling(kind="dynamic", factor=2.0),
    names="internlm2",
    init_std=0.02,
    embedding_init_std=0.02,
)


def _fits(config: DecoderConfig) -> bool:
    return (
        config.names == "internlm2"
        and not config.qkv_bias
        and not config.qk_norm
        and config.head_dim is None
    )


FAMILY = Family(
    name="internlm2",
    architecture="InternLM2ForCausalLM",
    # Its class also has biases by default; a file of such a model has them as tensors, which are
    # named as surplus.
    table=decoder_table(
        vocab=103168,
        hidden=11008,
        tokens=2048,
        groups=None,
        head_dim=only(None, why="its class derives it from hidden_size and num_attention_heads"),
    ),
    fits=_fits,
    options=lambda _: {"names": "internlm2"},
    official=lambda _: {"bias": False},
    keys=internlm2_keys,
    in_transformers=False,
    flavours={
        "internlm2-1.8b": dataclasses.replace(_7B, width=2048, depth=24, heads=16, mlp_hidden=8192),
        "internlm2-7b": _7B,
        "internlm2-20b": dataclasses.replace(_7B, width=6144, depth=48, heads=48, mlp_hidden=16384),
    },
)
